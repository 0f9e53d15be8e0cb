"""EAGLE-3 heads in the format of the speculators library, which vLLM serves.

config.json holds the layer as a full Llama or Qwen3 config under `transformer_layer_config`, and the target under
`speculators_config`; tensors are named as in vLLM's layout. The library and vLLM disagree about an absent
`norm_before_residual` (false and true), so every flag is written; where a file lacks it, the library's value counts.

The library loads files with missing or wrongly named tensors without an error and makes up their values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.eagle3_json import FLAGS, IDS, flags_json, head_config, refuse, taps_to_write, window_json
from specdec.formats.eagle_tensors import take_eagle3_tensors
from specdec.formats.folder import Folder, write_json, write_tensors
from specdec.formats.layer_json import layer_json
from specdec.heads.eagle3 import Eagle3Config

NAME = "speculators_eagle3"
KINDS = ("eagle3",)

MADE_ANEW = (
    "speculators_model_type", "draft_vocab_size", "target_hidden_size", "transformer_layer_config",
    "tie_word_embeddings", IDS, *FLAGS,
)  # fmt: skip
VERSION = "0.9.0"
"""The version of the library whose files these are."""
PROPOSAL = {"proposal_type": "greedy", "speculative_tokens": 5, "verifier_accept_k": 1, "accept_tolerance": 0.0}
"""Servers need one, and take the number of tokens from it unless they are told another."""


def matches(folder: Folder) -> bool:
    """By the type in config.json."""
    return folder.config.get("speculators_model_type") == "eagle3"


def read(folder: Folder) -> HeadCheckpoint:
    """Sizes from the layer's config, variants from config.json and from the names of tensors."""
    said = folder.require_config("transformer_layer_config")
    where = str(folder.path / "config.json")
    layer = said["transformer_layer_config"]
    if not isinstance(layer, dict) or "vocab_size" not in layer:
        raise BadCheckpoint(f"{where}: transformer_layer_config is no config of a layer with a vocab_size")
    own = {name: said[name] for name in ("draft_vocab_size", "target_hidden_size", *FLAGS) if name in said}
    config = head_config(folder, "layers.0", {**layer, **own}, said.get(IDS), where)
    tensors = take_eagle3_tensors(folder, config, "layers.0")
    extra = {key: value for key, value in said.items() if key not in MADE_ANEW}
    target: dict[str, Any] = {"vocab_size": config.vocab_size, "hidden_size": config.feature_size}
    name = verifier_of(said, where).get("name_or_path")
    if name:
        target["name"] = name
    return HeadCheckpoint("eagle3", config, tensors, target, NAME, {NAME: extra} if extra else {})


def verifier_of(said: dict[str, Any], where: str) -> dict[str, Any]:
    """What a file says of its target."""
    outer = said.get("speculators_config")
    verifier = outer.get("verifier") if isinstance(outer, dict) else None
    if not isinstance(verifier, dict):
        raise BadCheckpoint(f"{where}: speculators_config does not name a verifier")
    return verifier


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """What the library's own EAGLE-3 model computes."""
    config: Eagle3Config = checkpoint.config
    losses = {
        "a bias of fc": config.fc_bias,
        "the target's output matrix": not config.own_lm_head,
        "a target of another hidden size": config.feature_size != config.layer.hidden_size,
    }
    refuse(NAME, losses, "write eagle3 or native")
    extra = checkpoint.extra.get(NAME, {})
    written = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": VERSION,
        "speculators_config": speculators_config("eagle3", checkpoint.target.get("name")),
        **extra,
        "tie_word_embeddings": False,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        **flags_json(config),
        IDS: taps_to_write(checkpoint),
        "transformer_layer_config": layer_config(config),
    }
    write_json(path / "config.json", written)
    write_tensors(path / "model.safetensors", checkpoint.tensors)


def speculators_config(algorithm: str, target: str | None) -> dict[str, Any]:
    """The target and how to propose; without a name the target is given at serving time."""
    return {
        "algorithm": algorithm,
        "default_proposal_method": "greedy",
        "proposal_methods": [dict(PROPOSAL)],
        "verifier": {"name_or_path": target, "architectures": []},
    }


def layer_config(config: Eagle3Config) -> dict[str, Any]:
    """The layer as transformers 5 writes it: positions under `rope_parameters` alone."""
    fields = layer_json(config.layer, NAME)
    del fields["rope_theta"], fields["rope_scaling"]
    return {
        "model_type": "qwen3" if config.layer.qk_norm else "llama",
        **fields,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
        **window_json(config),
    }
