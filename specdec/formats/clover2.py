"""Clover-2: a Llama-like config.json with a `clover` object, and model.safetensors.

The published code rotates positions with a base of 10000 whatever the config's `rope_theta` says, so that is how its
files are read. `clover.rope_theta`, which we write, says otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.folder import Folder, write_json, write_tensors
from specdec.formats.layer_json import checked_config, layer_json, read_layer, rest_of_config
from specdec.heads.clover import CloverConfig, CloverHead
from specdec.heads.layer import LayerConfig

NAME = "clover2"
KINDS = ("clover",)
PUBLISHED_THETA = 10_000.0
DEFAULTS = {"heads_coefficient": 1.0, "decay_coefficient": 0.7}
"""Of training; the published reader wants them."""

NAMES = {
    "embed_tokens": "clover_embed_tokens",
    "first_attention": "clover_head_mlp_rnn",
    "text.layers": "layers",
    "text.norm": "clover_norm",
    "later_attention": "clover_head_mlp_rnn2",
    "first_projection": "clover_head_mlp",
    "later_projection": "clover_head_mlp2",
    "head_norm": "clover_head_norm",
    "lm_head": "lm_head",
}
"""Beginnings of our names and of theirs."""


def matches(folder: Folder) -> bool:
    """The projections of both depths."""
    return folder.has("clover_head_mlp.weight") and folder.has("clover_head_mlp2.weight")


def read(folder: Folder) -> HeadCheckpoint:
    """Sizes from the config, layers counted from the names."""
    raw, where = folder.require_config("clover"), str(folder.path / "config.json")
    clover = raw["clover"]
    if not isinstance(clover, dict) or "num_heads" not in clover:
        raise BadCheckpoint(f"{where}: clover must be an object with num_heads")
    config = checked_config(
        CloverConfig,
        where,
        layer=replace(read_layer(raw, where), rope_theta=clover.get("rope_theta", PUBLISHED_THETA)),
        vocab_size=folder.shape("clover_embed_tokens.weight")[0],
        num_heads=clover["num_heads"],
        num_layers=_count_layers(folder),
        own_lm_head=folder.has("lm_head.weight"),
    )
    with torch.device("meta"):
        expected = CloverHead(config).state_dict()
    tensors = {name: folder.take(_their_name(name), tuple(tensor.shape)) for name, tensor in expected.items()}
    folder.ignore(*(name for name in folder.names if name.endswith("rotary_emb.inv_freq")))
    target = {"hidden_size": config.layer.hidden_size, "vocab_size": config.vocab_size}
    extra = rest_of_config(folder, ("clover", "vocab_size"))
    kept = {key: value for key, value in clover.items() if key not in ("num_heads", "num_layers", "rope_theta")}
    return HeadCheckpoint("clover", config, tensors, target, NAME, {NAME: {**extra, "clover": kept}})


def _count_layers(folder: Folder) -> int:
    indices = {name.split(".")[1] for name in folder.names if name.startswith("layers.") and name.count(".") > 1}
    return len(indices)


def _their_name(name: str) -> str:
    """A name of our state dict in the published file."""
    ours = max((part for part in NAMES if name.startswith(f"{part}.")), key=len)
    return NAMES[ours] + name.removeprefix(ours)


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """As the published code reads it, which knows plain Llama layers alone."""
    config: CloverConfig = checkpoint.config
    if loss := _loss(config.layer):
        raise BadCheckpoint(f"{NAME} has layers of Llama's plain form, and this head's have {loss}; write native")
    extra = dict(checkpoint.extra.get(NAME, {}))
    counts = {"num_heads": config.num_heads, "num_layers": config.num_layers, "rope_theta": config.layer.rope_theta}
    described = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "pad_token_id": 0,
        **layer_json(config.layer, NAME),
        "vocab_size": config.vocab_size,
        **extra,
        "clover": {**DEFAULTS, **extra.get("clover", {}), **counts},
    }
    write_json(path / "config.json", described)
    tensors = {_their_name(name): tensor for name, tensor in checkpoint.tensors.items()}
    write_tensors(path / "model.safetensors", tensors)


def _loss(layer: LayerConfig) -> str | None:
    """What the published layers have no place for."""
    if layer.head_dim * layer.num_attention_heads != layer.hidden_size:
        return f"heads of size {layer.head_dim}"
    if layer.attention_bias or layer.output_bias or layer.mlp_bias:
        return "biases"
    return "norms of queries and keys" if layer.qk_norm else None
