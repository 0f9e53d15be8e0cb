"""The MLP speculators of IBM: config.json of model type mlp_speculator, tensors `speculator.emb.0.weight` and so on.

Tied heads need only the first of each tensor; files that repeat them are read where the copies are equal.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.folder import Folder, same_values, write_json, write_tensors
from specdec.formats.layer_json import checked_config
from specdec.heads.mlp_speculator import MLPSpeculatorConfig, MLPSpeculatorHead

NAME = "mlp_speculator"
KINDS = ("mlp-speculator",)
PREFIX = "speculator."
FIELDS = (
    "model_type",
    "architectures",
    "vocab_size",
    "emb_dim",
    "inner_dim",
    "n_predict",
    "tie_weights",
    "scale_input",
)
"""Fields of config.json that are made anew on writing."""

_TENSOR = re.compile(r"(emb|proj|head|ln)\.(\d+)\.(weight|bias)")


def matches(folder: Folder) -> bool:
    """The first embedding and projection, with the published prefix or without."""
    return any(all(folder.has(f"{prefix}{part}.0.weight") for part in ("emb", "proj")) for prefix in (PREFIX, ""))


def read(folder: Folder) -> HeadCheckpoint:
    """Sizes from the config, tensors strictly; the config alone says how many depths the head was trained for."""
    raw = folder.require_config("n_predict")
    prefix = PREFIX if folder.has(f"{PREFIX}emb.0.weight") else ""
    vocab_size, inner = (*folder.shape(f"{prefix}emb.0.weight"), 0)[:2]
    hidden = (*folder.shape(f"{prefix}proj.0.weight"), 0)[1]
    config = checked_config(
        MLPSpeculatorConfig,
        str(folder.path / "config.json"),
        hidden_size=hidden,
        vocab_size=vocab_size,
        inner_size=inner,
        n_predict=raw["n_predict"],
        tie_weights=raw.get("tie_weights", False),
        scale_input=raw.get("scale_input", False),
    )
    depths = sum(folder.has(f"{prefix}emb.{index}.weight") for index in range(len(list(folder.names))))
    if not config.tie_weights and depths != config.n_predict:
        raise BadCheckpoint(
            f"{folder.path}: config.json says n_predict {config.n_predict}, {depths} embeddings are there"
        )
    _compare(folder, raw, config)
    with torch.device("meta"):
        expected = MLPSpeculatorHead(config).state_dict()
    tensors = {name: folder.take(prefix + name, tuple(tensor.shape)) for name, tensor in expected.items()}
    if config.tie_weights:
        _take_copies(folder, prefix, tensors)
    target = {"hidden_size": hidden, "vocab_size": vocab_size}
    extra = {key: value for key, value in raw.items() if key not in FIELDS}
    return HeadCheckpoint("mlp-speculator", config, tensors, target, NAME, {NAME: extra} if extra else {})


def _compare(folder: Folder, raw: dict[str, Any], config: MLPSpeculatorConfig) -> None:
    """Note where config.json contradicts the tensors; an inner size of 0 stands for the hidden size."""
    says = {
        "vocab_size": (raw.get("vocab_size"), config.vocab_size),
        "emb_dim": (raw.get("emb_dim", raw.get("hidden_size")), config.hidden_size),
        "inner_dim": (raw.get("inner_dim") or raw.get("emb_dim"), config.inner_size),
    }
    for name, (said, actual) in says.items():
        if said not in (None, actual):
            folder.problem(f"config.json says {name} {said}, the tensors {actual}")


def _take_copies(folder: Folder, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Take the repeated tensors of a tied head, and note those that differ from the one they repeat."""
    for name in list(folder.names):
        found = _TENSOR.fullmatch(name.removeprefix(prefix))
        if found is None or found[0] in tensors:
            continue
        part, _, kind = found.groups()
        original = tensors.get(f"{part}.{1 if part == 'proj' else 0}.{kind}")
        if original is not None and not original.is_meta:
            copy = folder.take(name, tuple(original.shape))
            if not copy.is_meta and not same_values(copy, original):
                folder.problem(f"{name} differs from the first of its kind, and config.json says tie_weights")


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """With every flag that servers default differently; tied tensors once."""
    config: MLPSpeculatorConfig = checkpoint.config
    described = {
        "model_type": "mlp_speculator",
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "vocab_size": config.vocab_size,
        "emb_dim": config.hidden_size,
        "inner_dim": config.inner_size,
        "n_predict": config.n_predict,
        "top_k_tokens_per_head": [5, 4, *[3] * config.n_predict][: config.n_predict],
        "n_candidates": 5,
        "tie_weights": config.tie_weights,
        "scale_input": config.scale_input,
    }
    write_json(path / "config.json", described | checkpoint.extra.get(NAME, {}))
    tensors = {PREFIX + name: tensor for name, tensor in checkpoint.tensors.items()}
    write_tensors(path / "model.safetensors", tensors)
