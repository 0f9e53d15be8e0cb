"""What the Medusa formats share: names of blocks and output matrices under numbers, and how they are counted."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.folder import Folder
from specdec.heads.medusa import MedusaConfig

_BLOCK = re.compile(r"(\d+)\.(\d+)\.linear\.(?:weight|bias)")
_OUTPUT = re.compile(r"(\d+)\.(\d+)\.weight")
CONFIG_FIELDS = ("medusa_num_heads", "medusa_num_layers", "base_model_name_or_path")
"""Fields of config.json that are made anew on writing."""


def head_count(folder: Folder, prefix: str) -> tuple[int, int, bool]:
    """Heads and blocks of each, counted from the names; and whether there are output matrices.

    Published configs say something else now and then.
    """
    names = [name.removeprefix(prefix) for name in folder.names if name.startswith(prefix)]
    places = [(int(found[1]), int(found[2])) for name in names if (found := _BLOCK.fullmatch(name))]
    has_output = any(_OUTPUT.fullmatch(name) for name in names)
    return max((i for i, _ in places), default=-1) + 1, max((j for _, j in places), default=-1) + 1, has_output


def read_plain(folder: Folder, prefix: str, *, own_output: bool) -> tuple[MedusaConfig, dict[str, Tensor]]:
    """Heads under numbers: configuration and state dict. Repeated blocks of one head are read as they stand."""
    heads, layers, _ = head_count(folder, prefix)
    size = folder.shape(f"{prefix}0.0.linear.weight")[0]
    vocabulary = folder.shape(f"{prefix}0.{layers}.weight")[0] if own_output else None
    tensors = {}
    for i in range(heads):
        for j in range(layers):
            place = f"blocks.{i}.{j}.linear"
            tensors[f"{place}.weight"] = folder.take(f"{prefix}{i}.{j}.linear.weight", (size, size))
            tensors[f"{place}.bias"] = folder.take(f"{prefix}{i}.{j}.linear.bias", (size,))
        if own_output:
            tensors[f"lm_heads.{i}.weight"] = folder.take(f"{prefix}{i}.{layers}.weight", (vocabulary, size))
    output = "own" if own_output else "target"
    return MedusaConfig(size, vocabulary, heads, layers, bias=True, output=output), tensors


def plain_tensors(checkpoint: HeadCheckpoint, prefix: str, *, own_output: bool) -> dict[str, Tensor]:
    """The state dict under numbers. Blocks without biases get zeros, one output matrix is repeated for each head."""
    config, tensors = checkpoint.config, checkpoint.tensors
    written = {}
    for i in range(config.num_heads):
        for j in range(config.num_layers):
            weight = tensors[f"blocks.{i}.{j}.linear.weight"]
            bias = tensors.get(f"blocks.{i}.{j}.linear.bias")
            written[f"{prefix}{i}.{j}.linear.weight"] = weight
            written[f"{prefix}{i}.{j}.linear.bias"] = torch.zeros_like(weight[0]) if bias is None else bias
        if own_output:
            output = i if config.output == "own" else 0
            written[f"{prefix}{i}.{config.num_layers}.weight"] = tensors[f"lm_heads.{output}.weight"]
    return written


def plain_config(checkpoint: HeadCheckpoint) -> dict[str, Any]:
    """The fields that every plain format has, with the true number of heads."""
    config = checkpoint.config
    counts = {"medusa_num_heads": config.num_heads, "medusa_num_layers": config.num_layers}
    name = checkpoint.target.get("name")
    return counts | ({"base_model_name_or_path": name} if name else {})


def rest_of_config(folder: Folder) -> dict[str, Any]:
    """Fields of config.json that mean nothing to the heads."""
    return {key: value for key, value in folder.config.items() if key not in CONFIG_FIELDS}


def loss_in_plain_medusa(config: MedusaConfig) -> str | None:
    """What the plain formats have no place for."""
    if config.token_map:
        return "the choice of tokens that the heads guess"
    if config.logit_scale != 1.0:
        return f"the logit scale {config.logit_scale}"
    return None
