"""Checkpoints as others publish them, made from raw tensors without any of our own writers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

D, V, K = 16, 40, 3


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Normal tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.3).to(dtype) for name, shape in shapes.items()}


def medusa_shapes(
    prefix: str = "", *, heads: int = K, layers: int = 1, output: bool = True, bias: bool = True
) -> dict[str, tuple[int, ...]]:
    """Names of the original trainers: blocks and output matrix of a head under one number."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(heads):
        for j in range(layers):
            shapes[f"{prefix}{i}.{j}.linear.weight"] = (D, D)
            if bias:
                shapes[f"{prefix}{i}.{j}.linear.bias"] = (D,)
        if output:
            shapes[f"{prefix}{i}.{layers}.weight"] = (V, D)
    return shapes


def vllm_shapes(
    prefix: str = "", *, heads: int = K, layers: int = 1, bias: bool = True, outputs: int = K, rows: int = V
) -> dict[str, tuple[int, ...]]:
    """Names of vLLM."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(heads):
        for j in range(layers):
            shapes[f"{prefix}blocks.{i}.layers.{j}.weight"] = (D, D)
            if bias:
                shapes[f"{prefix}blocks.{i}.layers.{j}.bias"] = (D,)
    return shapes | {f"{prefix}lm_heads.{i}.weight": (rows, D) for i in range(outputs)}


V1_CONFIG = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
             "transformers_version": "4.31.0"}  # fmt: skip
"""As published: the number of heads is not true."""

VLLM_CONFIG = {"model_type": "medusa", "architectures": ["MedusaModel"], "hidden_size": D, "vocab_size": V,
               "num_heads": K, "num_hidden_layers": 1, "max_paths": 64, "topk": 10, "truncated_vocab_size": V,
               "medusa_fc_bias": True}  # fmt: skip


def save(folder: Path, config: Mapping[str, Any] | None, file: str, tensors: Mapping[str, Tensor]) -> Path:
    """config.json and one weight file."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file(dict(tensors), folder / file)
    else:
        torch.save(dict(tensors), folder / file)
    return folder


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every weight file of a directory."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        elif file.suffix in (".pt", ".bin"):
            found |= torch.load(file, weights_only=True)
    return found


def configs_in(folder: Path) -> dict[str, Any]:
    """Every JSON file of a directory."""
    return {file.name: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def same_bytes(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Same names, dtypes, shapes and bytes."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and torch.equal(one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name in one
    )


def block(tensors: Mapping[str, Tensor], name: str, hidden: Tensor) -> Tensor:
    """x + SiLU(Wx + b), from raw tensors; without bias where there is none."""
    pre = hidden @ tensors[f"{name}.weight"].T
    if f"{name}.bias" in tensors:
        pre = pre + tensors[f"{name}.bias"]
    return hidden + pre * functional.sigmoid(pre)
