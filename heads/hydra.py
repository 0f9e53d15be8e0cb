"""Hydra and Hydra++: one MLP for each depth over the target's state and the embeddings of all drafted tokens.

Ankner et al., Hydra (arXiv 2402.05109). The state is the growing concatenation [h_t ; e(x_{t+1}) ; ... ; e(x_{t+1+k})],
with the target's own embeddings. Hydra++ ("prefix-mlp") first sends the target's states through a decoder layer with
attention over the text, and a norm.

Dimensions: D hidden size, V vocabulary, K heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.heads.layer import LayerConfig
from specdec.heads.sequential import TargetEnds, TextLayers


@dataclass(frozen=True)
class HydraConfig:
    """Sizes and options.

    Attributes:
        num_heads: K.
        num_layers: blocks of each head, the one that reads the concatenation included.
        grounded: heads see the drafted tokens; False makes them independent of each other, as Medusa's are.
        shared_blocks: the blocks of a head after its first are one and the same, as in all published files.
        prefix: the decoder layer of Hydra++; None for Hydra.
        prefix_from_target: the files did not describe that layer: of `prefix`, the shapes of tensors are true, the
            rest waits for `fitted_to`.
    """

    hidden_size: int
    vocab_size: int
    num_heads: int = 4
    num_layers: int = 1
    grounded: bool = True
    shared_blocks: bool = True
    prefix: LayerConfig | None = None
    prefix_from_target: bool = False

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.num_layers < 1:
            raise ValueError(f"hydra needs at least one head of one layer, got {self.num_heads} of {self.num_layers}")
        if self.prefix is not None and self.prefix.hidden_size != self.hidden_size:
            raise ValueError(f"prefix has hidden size {self.prefix.hidden_size}, the heads {self.hidden_size}")

    def fitted_to(self, text_config: Any) -> HydraConfig:
        """With heads, rotary positions and norms of the prefix layer as in the target of this config, if they are open.

        Raises:
            ValueError: the target's layers have other shapes.
        """
        if self.prefix is None or not self.prefix_from_target:
            return self
        layer = LayerConfig.of(text_config)
        if _shapes(layer) != _shapes(self.prefix):
            raise ValueError(f"the prefix layer has sizes {_shapes(self.prefix)}, the target's layers {_shapes(layer)}")
        return replace(self, prefix=layer, prefix_from_target=False)

    @property
    def own_blocks(self) -> int:
        """Blocks of weights behind the first one of each head."""
        return min(self.num_layers - 1, 1) if self.shared_blocks else self.num_layers - 1


def _shapes(layer: LayerConfig) -> dict[str, int | bool]:
    """What the shapes of a layer's tensors show."""
    return {
        "hidden": layer.hidden_size,
        "inner": layer.intermediate_size,
        "queries": layer.num_attention_heads * layer.head_dim,
        "keys": layer.num_key_value_heads * layer.head_dim,
        "biases": layer.attention_bias,
        "head norms": layer.qk_norm,
    }


class Block(nn.Module):
    """residual(z) + silu(linear(z)); the residual is a projection where widths differ. Weights begin at zero."""

    def __init__(self, hidden_size: int, inputs: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs * hidden_size, hidden_size)
        self.res_connection = nn.Linear(inputs * hidden_size, hidden_size) if inputs > 1 else nn.Identity()
        nn.init.zeros_(self.linear.weight)

    def forward(self, states: Tensor) -> Tensor:
        """[..., inputs D] -> [..., D]."""
        return self.res_connection(states) + F.silu(self.linear(states))


class HydraDepth(nn.Module):
    """The head of one depth: its blocks and its own LM head, which has a bias."""

    def __init__(self, config: HydraConfig, depth: int) -> None:
        super().__init__()
        self.first = Block(config.hidden_size, depth + 2 if config.grounded else 1)
        self.rest = nn.ModuleList(Block(config.hidden_size) for _ in range(config.own_blocks))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self._passes = config.num_layers - 1

    def forward(self, states: Tensor) -> Tensor:
        """The concatenation -> [..., D]."""
        states = self.first(states)
        for index in range(self._passes):
            states = self.rest[index % len(self.rest)](states)
        return states


class HydraHead(nn.Module):
    """K heads, and for Hydra++ the prefix layer. A SequentialHead over the target's state after its final norm."""

    before_norm = False

    def __init__(self, config: HydraConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleList(HydraDepth(config, depth) for depth in range(config.num_heads))
        self.prefix = None if config.prefix is None else TextLayers(config.prefix, 1)

    @property
    def depth(self) -> int:
        """K."""
        return self.config.num_heads

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    @property
    def text(self) -> TextLayers | None:
        """The prefix layer; it reads states alone, tokens come in at each depth."""
        return self.prefix

    def pair(self, hidden: Tensor, tokens: Tensor, ends: TargetEnds) -> Tensor:
        """The state as it is."""
        return hidden

    def step(self, depth: int, state: Tensor, tokens: Tensor, ends: TargetEnds) -> tuple[Tensor, Tensor]:
        """Append the token's embedding to the concatenation, and read all of it."""
        if not self.config.grounded:
            return state, self.heads[depth](state)
        state = torch.cat([state, ends.embedding(tokens).to(state.dtype)], -1)
        return state, self.heads[depth](state)

    def logits(self, depth: int, hidden: Tensor, ends: TargetEnds) -> Tensor:
        """By the LM head of this depth."""
        return cast(Callable[[Tensor], Tensor], self.heads[depth].lm_head)(hidden)

    @torch.no_grad()
    def begin_as(self, lm_head_weight: Tensor) -> None:
        """For training from scratch: every head's LM head begins as a copy of the target's, [V, D], without a bias."""
        for head in self.heads:
            lm_head = cast(nn.Linear, head.lm_head)
            lm_head.weight.copy_(lm_head_weight)
            lm_head.bias.zero_()
