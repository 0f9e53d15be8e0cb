"""Medusa heads (arXiv 2401.10774): each guesses one later token from the target's last hidden state alone.

Head k sees h_t, the state after the target's final norm, and guesses token t + 2 + k; the target's own head gives
token t + 1. A head is a few residual blocks, x + SiLU(Wx + b), and an output matrix: its own, one for all heads, or
the target's.

Dimensions: K heads, D hidden size, V' tokens that the heads can guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

Output = Literal["own", "one", "target"]
Project = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MedusaConfig:
    """Sizes of a set of Medusa heads.

    Attributes:
        hidden_size: D of the target.
        vocab_size: V'; the target's, or fewer with a `token_map`. None: as many as the target's output matrix has.
        num_heads: K.
        num_layers: residual blocks of each head.
        bias: whether the blocks have biases.
        output: "own" output matrix for each head, "one" for all of them, or the "target"'s, which is in no file.
        token_map: the heads guess V' chosen tokens; a tensor says which ids those are.
        logit_scale: multiplies logits.

    Raises:
        ValueError: sizes below 1, or chosen tokens with the target's own output matrix.
    """

    hidden_size: int
    vocab_size: int | None
    num_heads: int
    num_layers: int = 1
    bias: bool = True
    output: Output = "own"
    token_map: bool = False
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "num_heads", "num_layers"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} is at least 1, got {size}")
        if self.vocab_size is None and self.output != "target":
            raise ValueError("vocab_size is needed for output matrices of their own")
        if self.token_map and self.output == "target":
            raise ValueError("a token map needs an output matrix of its own")


class ResidualBlock(nn.Module):
    """x + SiLU(Wx + b), D to D, without any norm."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return hidden + functional.silu(self.linear(hidden))


class MedusaHead(nn.Module):
    """K heads that read the same state.

    Blocks of one head are distinct modules. Trainers that repeat one module write it once for each place, with equal
    values, which load into distinct modules as the same function.
    """

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.config = config
        size, outputs = config.hidden_size, {"own": config.num_heads, "one": 1, "target": 0}[config.output]
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResidualBlock(size, config.bias) for _ in range(config.num_layers))
            for _ in range(config.num_heads)
        )
        self.lm_heads = nn.ModuleList(nn.Linear(size, config.vocab_size or 0, bias=False) for _ in range(outputs))
        self.token_map: Tensor | None
        self.register_buffer("token_map", torch.arange(config.vocab_size or 0) if config.token_map else None)

    def states(self, hidden: Tensor, num_heads: int | None = None) -> Tensor:
        """What the first `num_heads` heads make of states [..., D]: [..., K, D]."""
        made = []
        for blocks in list(self.blocks)[:num_heads]:
            state = hidden
            for block in cast(nn.ModuleList, blocks):
                state = block(state)
            made.append(state)
        return torch.stack(made, -2)

    def forward(self, hidden: Tensor, lm_head: Project | None = None, num_heads: int | None = None) -> Tensor:
        """Logits [..., K, V'] of the first `num_heads` heads.

        Args:
            hidden: the target's states after its final norm, [..., D].
            lm_head: the target's output matrix, which heads without one of their own use.
            num_heads: how many heads are read; None for all.
        """
        states = self.states(hidden, num_heads)
        if self.config.output == "own":
            logits = torch.stack([self.lm_heads[k](states[..., k, :]) for k in range(states.shape[-2])], -2)
        elif self.config.output == "one":
            logits = self.lm_heads[0](states)
        else:
            assert lm_head is not None, "these heads use the target's output matrix"
            logits = lm_head(states)
        return logits if self.config.logit_scale == 1.0 else logits * self.config.logit_scale

    def to_token_ids(self, guesses: Tensor) -> Tensor:
        """The target's token ids of places among the V' guessed ones."""
        return guesses if self.token_map is None else self.token_map[guesses]

    @torch.no_grad()
    def begin_as_target(self, lm_head: Tensor) -> None:
        """Values to train from: every head guesses as the target's own output matrix [V, D] does."""
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        rows = lm_head if self.token_map is None else lm_head[self.token_map]
        for output in self.lm_heads:
            cast(nn.Linear, output).weight.copy_(rows)
