"""Medusa heads as vLLM reads them: config.json of model type medusa, `blocks.{head}.layers.{block}.weight`.

vLLM drops names that it does not know without a word: biases are lost unless `medusa_fc_bias` says that there are any.
So that flag, and every other whose absence means something there, is always written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.folder import Folder, write_json, write_tensors
from specdec.heads.medusa import MedusaConfig

NAME = "vllm_medusa"
KINDS = ("medusa",)

_PREFIX = "medusa_heads."
_BLOCK = re.compile(r"(?:medusa_heads\.)?blocks\.(\d+)\.layers\.(\d+)\.weight")
_OUTPUT = re.compile(r"(?:medusa_heads\.)?lm_heads\.(\d+)\.weight")
FIELDS = ("model_type", "architectures", "hidden_size", "vocab_size", "truncated_vocab_size", "medusa_fc_bias",
          "original_lm_head", "logit_scale")  # fmt: skip


def matches(folder: Folder) -> bool:
    """By the names of its blocks."""
    return any(_BLOCK.fullmatch(name) for name in folder.names)


def read(folder: Folder) -> HeadCheckpoint:
    """Heads, blocks, biases and output matrices are counted from the names; a prefix is stripped."""
    said = folder.require_config("vocab_size")
    places = [(int(found[1]), int(found[2])) for name in folder.names if (found := _BLOCK.fullmatch(name))]
    heads, layers = max(i for i, _ in places) + 1, max(j for _, j in places) + 1
    config = _config(folder, said, heads, layers)
    tensors = _tensors(folder, config)
    target = {"hidden_size": config.hidden_size, "vocab_size": int(said["vocab_size"])}
    extra = {key: value for key, value in said.items() if key not in FIELDS and not _is_count(key)}
    return HeadCheckpoint("medusa", config, tensors, target, NAME, {NAME: extra} if extra else {})


def _config(folder: Folder, said: dict[str, Any], heads: int, layers: int) -> MedusaConfig:
    prefix = _prefix(folder)
    size = folder.shape(f"{prefix}blocks.0.layers.0.weight")[0]
    has_map = folder.has(f"{prefix}token_map")
    rows = folder.shape(f"{prefix}token_map")[0] if has_map else folder.shape(f"{prefix}lm_heads.0.weight")[0]
    if not has_map and rows != said["vocab_size"]:
        folder.problem(f"lm_heads.0.weight has {rows} rows for a vocabulary of {said['vocab_size']}, and no token_map")
    outputs = {int(found[1]) for name in folder.names if (found := _OUTPUT.fullmatch(name))}
    bias = bool(said.get("medusa_fc_bias", False)) or any(name.endswith(".bias") for name in folder.names)
    return MedusaConfig(
        size, rows, heads, layers, bias=bias, output="one" if outputs == {0} and heads > 1 else "own",
        token_map=has_map, logit_scale=float(said.get("logit_scale", 1.0)),
    )  # fmt: skip


def _tensors(folder: Folder, config: MedusaConfig) -> dict[str, Tensor]:
    prefix, size, rows = _prefix(folder), config.hidden_size, config.vocab_size or 0
    tensors: dict[str, Tensor] = {}
    for i in range(config.num_heads):
        for j in range(config.num_layers):
            name, place = f"{prefix}blocks.{i}.layers.{j}", f"blocks.{i}.{j}.linear"
            tensors[f"{place}.weight"] = folder.take(f"{name}.weight", (size, size))
            if config.bias:
                tensors[f"{place}.bias"] = folder.take(f"{name}.bias", (size,))
    if config.token_map:
        tensors["token_map"] = folder.take(f"{prefix}token_map", (rows,), "int")
    for i in range(config.num_heads if config.output == "own" else 1):
        name = f"{prefix}lm_heads.{i}.weight"
        whole = folder.take(name, (None if config.token_map else rows, size))
        has_all_rows = config.token_map and whole.shape[0] > rows
        tensors[f"lm_heads.{i}.weight"] = whole[tensors["token_map"]] if has_all_rows else whole
    return tensors


def _prefix(folder: Folder) -> str:
    return _PREFIX if any(name.startswith(_PREFIX) for name in folder.names) else ""


def _is_count(key: str) -> bool:
    """vLLM takes any such key for the number of heads or of blocks."""
    return "num" in key and ("heads" in key or "layers" in key)


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """Everything but heads that use the target's output matrix, which vLLM wants in the file."""
    config = checkpoint.config
    if config.output == "target":
        raise BadCheckpoint(
            f"{NAME} has output matrices in the file, and these heads use the target's; write medusa_v2 or native"
        )
    vocabulary = checkpoint.target.get("vocab_size") if config.token_map else config.vocab_size
    if vocabulary is None:
        raise BadCheckpoint(f"{NAME} states the target's vocabulary, which is not known here; name the target")
    said = {
        "max_paths": 64,
        "topk": 10,
        **checkpoint.extra.get(NAME, {}),
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": config.hidden_size,
        "vocab_size": vocabulary,
        "truncated_vocab_size": config.vocab_size,
        "num_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "medusa_fc_bias": config.bias,
        "original_lm_head": config.output == "one",
        "logit_scale": config.logit_scale,
    }
    write_json(path / "config.json", said)
    write_tensors(path / "model.safetensors", {_vllm_name(name): t for name, t in checkpoint.tensors.items()})


def _vllm_name(name: str) -> str:
    return re.sub(r"blocks\.(\d+)\.(\d+)\.linear\.", r"blocks.\1.layers.\2.", name)
