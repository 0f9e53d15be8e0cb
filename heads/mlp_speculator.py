"""The MLP speculator: a small recurrence over tables of its own, started by the target's last state.

Wertheimer et al., Accelerating Production LLMs with Combined Token/Embedding Speculators (arXiv 2404.19124):

    s_i = GELU(norm_i(proj_i(s_{i-1}) + (e / w) * emb_i(token)))        logits_i = head_i(s_i)

with w = 0.5 ** (0.5 / n) and e = sqrt((1 - w^2) * inner / 2), n being the depths it was *trained* for: the weights do
not change when fewer tokens are drafted.

Dimensions: D hidden size of the target, I inner size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.heads.sequential import TargetEnds

EPS = 1e-6


@dataclass(frozen=True)
class MLPSpeculatorConfig:
    """Sizes and options.

    Attributes:
        hidden_size: D.
        inner_size: I.
        n_predict: depths it was trained for.
        tie_weights: one embedding, head and norm for all depths, and one projection for all after the first.
        scale_input: the target's state is normed and divided by sqrt(2) first.
    """

    hidden_size: int
    vocab_size: int
    inner_size: int
    n_predict: int = 3
    tie_weights: bool = False
    scale_input: bool = False

    def __post_init__(self) -> None:
        if self.n_predict < 1 or self.inner_size < 1:
            raise ValueError(f"n_predict and inner_size are positive, got {self.n_predict} and {self.inner_size}")

    @property
    def num_tables(self) -> int:
        """Embeddings, heads and norms."""
        return 1 if self.tie_weights else self.n_predict

    @property
    def num_projections(self) -> int:
        """The first, from D, and those from I."""
        return min(self.n_predict, 2) if self.tie_weights else self.n_predict


class ShiftedRMSNorm(nn.Module):
    """Root-mean-square norm with a weight and a bias, in the dtype of its input as in the published code."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, states: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return normed(states) * self.weight + self.bias


def normed(states: Tensor) -> Tensor:
    """States [..., size] divided by their root mean square."""
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + EPS)


class MLPSpeculatorHead(nn.Module):
    """Embeddings, projections, norms and heads. A SequentialHead over the target's state after its final norm."""

    before_norm = False
    text = None

    def __init__(self, config: MLPSpeculatorConfig) -> None:
        super().__init__()
        self.config = config
        inner, tables = config.inner_size, range(config.num_tables)
        self.emb = nn.ModuleList(nn.Embedding(config.vocab_size, inner) for _ in tables)
        self.proj = nn.ModuleList(
            nn.Linear(inner if index else config.hidden_size, inner, bias=False)
            for index in range(config.num_projections)
        )
        self.ln = nn.ModuleList(ShiftedRMSNorm(inner) for _ in tables)
        self.head = nn.ModuleList(nn.Linear(inner, config.vocab_size, bias=False) for _ in tables)
        for module in (*self.emb, *self.proj, *self.head):
            nn.init.normal_(cast(Tensor, module.weight), 0.0, inner**-0.5)
        state_weight = 0.5 ** (0.5 / config.n_predict)
        self._token_weight = math.sqrt((1 - state_weight**2) * inner / 2) / state_weight

    @property
    def depth(self) -> int:
        """n."""
        return self.config.n_predict

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    def pair(self, hidden: Tensor, tokens: Tensor, ends: TargetEnds) -> Tensor:
        """The state, scaled where the head was trained so."""
        return normed(hidden) / math.sqrt(2) if self.config.scale_input else hidden

    def step(self, depth: int, state: Tensor, tokens: Tensor, ends: TargetEnds) -> tuple[Tensor, Tensor]:
        """One step of the recurrence; state and hidden are the same."""
        table, projection = min(depth, len(self.emb) - 1), min(depth, len(self.proj) - 1)
        moved = self.proj[projection](state) + self._token_weight * self.emb[table](tokens)
        state = F.gelu(self.ln[table](moved))
        return state, state

    def logits(self, depth: int, hidden: Tensor, ends: TargetEnds) -> Tensor:
        """By the head of this depth."""
        return self.head[min(depth, len(self.head) - 1)](hidden)
