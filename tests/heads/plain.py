"""The arithmetic of a draft head's layer on raw tensors, one sequence, slowly: what modules are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from specdec.heads.layer import LayerConfig

Module = TypeVar("Module", bound=nn.Module)
Turn = Callable[[Tensor], Tensor]


class Weights(dict[str, Tensor]):
    """Tensors by name."""

    def __init__(self, source: nn.Module | dict[str, Tensor]) -> None:
        super().__init__(source.state_dict() if isinstance(source, nn.Module) else source)

    def under(self, prefix: str) -> Weights:
        return Weights({name.removeprefix(prefix): t for name, t in self.items() if name.startswith(prefix)})


@torch.no_grad()
def with_random_weights(module: Module, seed: int) -> Module:
    """Matrices of deviation 0.2, norms around 1, biases around 0: nothing that a forgotten tensor would leave equal."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        around = 1.0 if "norm" in name and parameter.ndim == 1 else 0.0
        parameter.normal_(around, 0.2, generator=generator)
    return module.eval()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(config: LayerConfig, start: int = 0) -> Turn:
    """Turns [S, E], the token of row s at position start + s; pairs are (i, i + E / 2)."""

    def turn(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        out = x.clone()
        for s in range(x.shape[0]):
            for i in range(half):
                angle = (start + s) * config.rope_theta ** (-2 * i / x.shape[-1])
                out[s, i] = x[s, i] * math.cos(angle) - x[s, i + half] * math.sin(angle)
                out[s, i + half] = x[s, i + half] * math.cos(angle) + x[s, i] * math.sin(angle)
        return out

    return turn


def attention(w: Weights, config: LayerConfig, x: Tensor, turn: Turn, window: int | None = None) -> Tensor:
    """Causal grouped-query attention of [S, width] over itself -> [S, D]; head by head, token by token."""
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    projected = {}
    for name in ("q", "k", "v"):
        projected[name] = x @ w[f"self_attn.{name}_proj.weight"].T
        if f"self_attn.{name}_proj.bias" in w:
            projected[name] = projected[name] + w[f"self_attn.{name}_proj.bias"]
    heads = []
    for head in range(config.num_attention_heads):
        cut, kv = slice(head * size, (head + 1) * size), slice(head // group * size, (head // group + 1) * size)
        q, k, v = projected["q"][:, cut], projected["k"][:, kv], projected["v"][:, kv]
        if config.qk_norm:
            q = rms_norm(q, w["self_attn.q_norm.weight"], config.rms_norm_eps)
            k = rms_norm(k, w["self_attn.k_norm.weight"], config.rms_norm_eps)
        q, k = turn(q), turn(k)
        rows = []
        for s in range(x.shape[0]):
            first = 0 if window is None else max(s - window + 1, 0)
            scores = k[first : s + 1] @ q[s] / math.sqrt(size)
            rows.append((scores - scores.max()).exp() / (scores - scores.max()).exp().sum() @ v[first : s + 1])
        heads.append(torch.stack(rows))
    out = torch.cat(heads, -1) @ w["self_attn.o_proj.weight"].T
    return out + w["self_attn.o_proj.bias"] if "self_attn.o_proj.bias" in w else out


def mlp(w: Weights, x: Tensor) -> Tensor:
    gate = x @ w["mlp.gate_proj.weight"].T
    return (gate / (1 + (-gate).exp()) * (x @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
