"""Norm, rotation and attention straight from the equations, one head and one query at a time, from raw tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Sees = Callable[[int, int], bool]
"""(query, key) -> whether the query sees the key, both by their place among the keys."""


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """One head [E]: the pair (i, i + E/2) turns by position * theta^(-2i/E)."""
    half = x.shape[0] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / x.shape[0])
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def attention(
    tensors: Mapping[str, Tensor],
    name: str,
    queries: Tensor,
    keys: Tensor,
    positions: list[int],
    sees: Sees,
    *,
    head_dim: int,
    theta: float,
) -> Tensor:
    """Output [Q, D] of attention `name` for states [Q, D] that are the last of the states [C, D] behind the keys.

    Args:
        tensors: a state dict.
        name: prefix of q_proj and the like; with q_norm and k_norm where those are there.
        queries: inputs of the query projection.
        keys: inputs of the key and value projections.
        positions: of all C keys.
        sees: by place among the C keys.
        head_dim: E.
        theta: rotary base.
    """

    def heads(x: Tensor, projection: str, norm: str | None) -> Tensor:
        y = (x @ tensors[f"{name}.{projection}.weight"].T).reshape(x.shape[0], -1, head_dim)
        return rms_norm(y, tensors[f"{name}.{norm}.weight"]) if f"{name}.{norm}.weight" in tensors else y

    q, k, v = heads(queries, "q_proj", "q_norm"), heads(keys, "k_proj", "k_norm"), heads(keys, "v_proj", None)
    first, group = len(keys) - len(queries), q.shape[1] // k.shape[1]
    rows = []
    for i in range(len(queries)):
        mixed = []
        for head in range(q.shape[1]):
            query = rotated(q[i, head], positions[first + i], theta)
            seen = [c for c in range(len(keys)) if sees(first + i, c)]
            scores = torch.stack([query @ rotated(k[c, head // group], positions[c], theta) for c in seen])
            weights = (scores / math.sqrt(head_dim)).softmax(0)
            mixed.append(sum(w * v[c, head // group] for w, c in zip(weights, seen, strict=True)))
        rows.append(torch.cat(mixed))
    return torch.stack(rows) @ tensors[f"{name}.o_proj.weight"].T


def gated_mlp(tensors: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    gate, up = x @ tensors[f"{name}.gate_proj.weight"].T, x @ tensors[f"{name}.up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ tensors[f"{name}.down_proj.weight"].T
