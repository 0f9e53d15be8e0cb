"""Kangaroo's adapter as published: a Llama config of one layer, and pytorch_model.bin.

The published loader takes any tensors it finds and leaves the rest random; here every name counts. It rotates with
base 10000 whatever the config says, and is told the exit layer on the command line (2 for Vicuna-7B, 3 for Vicuna-13B).
Files written here say both under `kangaroo_config`; where that is absent, the published values hold.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.folder import Folder, write_json, write_tensors
from specdec.formats.layer_json import checked_config, layer_json, read_layer, rest_of_config
from specdec.heads.kangaroo import KangarooConfig

NAME = "kangaroo"
KINDS = ("kangaroo",)

PUBLISHED_EXIT_LAYERS = {5120: 3}
"""By the target's hidden size; 2 for all others."""
ROTARY = "layers.0.self_attn.rotary_emb.inv_freq"
"""Old versions of torch wrote this buffer, which says nothing that the code does not."""


def matches(folder: Folder) -> bool:
    """One layer that is attention alone: its projections and norm are there, and no MLP."""
    names = set(folder.names)
    has_more = any(name.startswith(("layers.0.mlp.", "layers.0.post_attention", "fc.")) for name in names)
    return "layers.0.self_attn.q_proj.weight" in names and "norm.weight" in names and not has_more


def read(folder: Folder) -> HeadCheckpoint:
    """The six tensors and nothing else."""
    where = str(folder.path / "config.json")
    config = folder.require_config("hidden_size", "num_attention_heads")
    settings = config.get("kangaroo_config", {})
    if not isinstance(settings, dict):
        raise BadCheckpoint(f"{where}: kangaroo_config is {settings!r}, expected an object")
    layer = read_layer(config, where)
    layer = replace(layer, qk_norm=False, attention_bias=False, output_bias=False)
    if not settings.get("rope_from_config", False):
        layer = replace(layer, rope_theta=10_000.0, rope_scaling=None, partial_rotary_factor=1.0)
    exit_layer = settings.get("exit_layer", PUBLISHED_EXIT_LAYERS.get(layer.hidden_size, 2))
    head = checked_config(KangarooConfig, where, layer=layer, exit_layer=exit_layer)
    folder.ignore(ROTARY)
    tensors = {name: folder.take(name) for name in folder.names if name != ROTARY}
    target: dict[str, Any] = {"hidden_size": layer.hidden_size}
    if isinstance(config.get("vocab_size"), int):
        target["vocab_size"] = config["vocab_size"]
    extra = rest_of_config(folder, ("architectures", "model_type", "num_hidden_layers", "vocab_size",
                                    "kangaroo_config"))  # fmt: skip
    if folder.files[0].suffix == ".safetensors":
        extra["weights"] = "safetensors"
    return HeadCheckpoint("kangaroo", head, tensors, target, NAME, {NAME: extra} if extra else {})


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """As a pickle, which is what the published loader opens; as safetensors when it was read from one."""
    config: KangarooConfig = checkpoint.config
    extra = dict(checkpoint.extra.get(NAME, {}))
    suffix = extra.pop("weights", "bin")
    written = {
        **extra,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **layer_json(config.layer, NAME),
        "num_hidden_layers": 1,
        "kangaroo_config": {"exit_layer": config.exit_layer, "rope_from_config": True},
    }
    if "vocab_size" in checkpoint.target:
        written["vocab_size"] = checkpoint.target["vocab_size"]
    write_json(path / "config.json", written)
    write_tensors(path / ("pytorch_model.bin" if suffix == "bin" else "model.safetensors"), checkpoint.tensors)
