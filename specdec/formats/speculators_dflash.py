"""DFlash drafters in the format of the speculators library, which vLLM serves.

Layers as a Qwen3 config under `transformer_layer_config`. `aux_hidden_state_layer_ids` are indices into
`hidden_states`, as taps are here; z-lab's ids are one less. The library names its flags only where they differ from
its defaults and other readers have others, so all are written.

What belongs to the target (embedding, norm, output matrix of the whole vocabulary) is not part of the head; older
files hold copies, which are left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.dflash import count_layers, sliding_layers, transformer_json
from specdec.formats.draft_vocabulary import take_vocabulary
from specdec.formats.folder import Folder, write_json, write_tensors
from specdec.formats.layer_json import checked_config, read_layer
from specdec.formats.speculators_eagle3 import VERSION, speculators_config, verifier_of
from specdec.heads.dflash import FULL, DFlashConfig

NAME = "speculators_dflash"
KINDS = ("dflash",)

OF_THE_TARGET = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight")
MADE_ANEW = (
    "speculators_model_type", "draft_vocab_size", "block_size", "aux_hidden_state_layer_ids", "mask_token_id",
    "sliding_window_non_causal", "sample_from_anchor", "transformer_layer_config", "tie_word_embeddings",
)  # fmt: skip


def matches(folder: Folder) -> bool:
    """By the type in config.json."""
    return folder.config.get("speculators_model_type") == "dflash"


def read(folder: Folder) -> HeadCheckpoint:
    """Layers are counted from the names of tensors; a vocabulary of the target's size is the target's."""
    said = folder.require_config("transformer_layer_config", "aux_hidden_state_layer_ids", "mask_token_id")
    where = str(folder.path / "config.json")
    layer = said["transformer_layer_config"]
    if not isinstance(layer, dict) or "vocab_size" not in layer:
        raise BadCheckpoint(f"{where}: transformer_layer_config is no config of a layer with a vocab_size")
    num_layers = count_layers(folder)
    sliding, window = sliding_layers({"model_type": "qwen3", **layer}, num_layers, where)
    guesses = said.get("draft_vocab_size")
    config = checked_config(
        DFlashConfig, where,
        layer=replace(read_layer({"model_type": "qwen3", **layer}, where), qk_norm=True),
        num_layers=num_layers,
        taps=said["aux_hidden_state_layer_ids"],
        block_size=said.get("block_size", 8),
        mask_token_id=said["mask_token_id"],
        vocab_size=layer["vocab_size"],
        draft_vocab_size=None if guesses == layer["vocab_size"] else guesses,
        sliding_layers=list(sliding),
        sliding_window=window,
        causal=False if said.get("sliding_window_non_causal") else None,
        sample_from_anchor=said.get("sample_from_anchor", False),
    )  # fmt: skip
    target: dict[str, Any] = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size}
    if name := verifier_of(said, where).get("name_or_path"):
        target["name"] = name
    extra = {key: value for key, value in said.items() if key not in MADE_ANEW}
    return HeadCheckpoint("dflash", config, _take_tensors(folder, config), target, NAME, {NAME: extra})


def _take_tensors(folder: Folder, config: DFlashConfig) -> dict[str, Tensor]:
    folder.ignore(*OF_THE_TARGET)
    left_out = {*OF_THE_TARGET, "d2t", "t2d"}
    if config.draft_vocab_size is None:
        folder.ignore("lm_head.weight", "d2t", "t2d")
        left_out.add("lm_head.weight")
    tensors = {name: folder.take(name) for name in folder.names if name not in left_out}
    if config.draft_vocab_size is not None:
        tensors |= take_vocabulary(folder, config.vocab_size, config.draft_vocab_size)
    return tensors


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """What the library's own DFlash model computes."""
    config: DFlashConfig = checkpoint.config
    if loss := _loss(config, checkpoint.target.get("num_layers")):
        raise BadCheckpoint(f"{NAME} cannot hold {loss}: its readers would compute something else; write native")
    layer = transformer_json(config, NAME)
    del layer["rope_theta"], layer["rope_scaling"]  # transformers 5 keeps positions in rope_parameters alone
    about = speculators_config("dflash", checkpoint.target.get("name"))
    about["proposal_methods"][0]["speculative_tokens"] = config.max_depth
    written = {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": VERSION,
        "speculators_config": about,
        **checkpoint.extra.get(NAME, {}),
        "tie_word_embeddings": False,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": list(config.taps),
        "mask_token_id": config.mask_token_id,
        "sliding_window_non_causal": bool(config.sliding_layers) and config.causal is False,
        "sample_from_anchor": config.sample_from_anchor,
        "transformer_layer_config": {**layer, "tie_word_embeddings": False},
    }
    write_json(path / "config.json", written)
    write_tensors(path / "model.safetensors", checkpoint.tensors)


def _loss(config: DFlashConfig, num_target_layers: int | None) -> str | None:
    """What the format has no field for."""
    if config.embedding_scale != 1.0 or config.logit_scale != 1.0 or config.logit_softcap is not None:
        return "scaled embeddings or logits"
    if config.causal and FULL in config.layer_kinds:
        return "causal blocks in layers without a window"
    if num_target_layers is not None and num_target_layers in config.taps:
        return f"the tap after the target's final norm, {num_target_layers}, which stands for the state before it there"
    return None
