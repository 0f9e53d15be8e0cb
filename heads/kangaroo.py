"""Kangaroo's adapter: one attention sublayer turns the target's shallow states into draft states (arXiv 2404.18911).

    y = norm(x + attention(input_layernorm(x)))

with x the output of the target's layer E - 1, before any norm, and the target's own output matrix on y. No MLP, no
embedding, no second norm, no biases: 4 D^2 + 2 D numbers where a head of the target has D dimensions per query head.

Dimensions: B sequences, Q tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from specdec.heads.layer import Attention, CosSin, LayerCache, LayerConfig, RMSNorm, Rotary


@dataclass(frozen=True)
class KangarooConfig:
    """Sizes of an adapter.

    Attributes:
        layer: sizes of the attention; its MLP's are not used. Published adapters rotate with base 10000.
        exit_layer: E, target layers below the adapter; `hidden_states[E]` is what it reads.

    Raises:
        ValueError: an exit layer below 1.
    """

    layer: LayerConfig
    exit_layer: int = 2

    def __post_init__(self) -> None:
        if self.exit_layer < 1:
            raise ValueError(f"exit_layer is at least 1, got {self.exit_layer}")

    @staticmethod
    def of(text_config: Any, exit_layer: int = 2) -> KangarooConfig:
        """An adapter for a target with this config: its heads and positions, without biases and per-head norms."""
        layer = replace(LayerConfig.of(text_config), qk_norm=False, attention_bias=False, output_bias=False)
        return KangarooConfig(layer, exit_layer)

    @property
    def hidden_size(self) -> int:
        """D of the target."""
        return self.layer.hidden_size


class AdapterLayer(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, 0)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, states: Tensor, cos_sin: CosSin, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """[B, Q, D] -> [B, Q, D]."""
        return states + self.self_attn(self.input_layernorm(states), cos_sin, mask, cache)


class KangarooHead(nn.Module):
    """The adapter: one layer and the norm in front of the target's output matrix."""

    def __init__(self, config: KangarooConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([AdapterLayer(config.layer)])
        self.norm = RMSNorm(config.hidden_size, config.layer.rms_norm_eps)
        self.rotary = Rotary(config.layer)

    def forward(
        self, states: Tensor, positions: Tensor, mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        """Shallow states [B, Q, D] -> normed draft states [B, Q, D].

        Args:
            states: `hidden_states[E]` of the target.
            positions: [B, Q].
            mask: additive [B or 1, 1, Q, C]; None lets every query see every column.
            cache: earlier keys and values; None for whole sequences, as in training.
        """
        return self.norm(self.layers[0](states, self.rotary(positions), mask, cache))

    def inject(self, states: Tensor, positions: Tensor, cache: LayerCache) -> None:
        """Append keys and values of states [B, Q, D] that need no draft of their own: no query, no attention."""
        layer = cast(AdapterLayer, self.layers[0])
        keys, values = layer.self_attn.keys_and_values(layer.input_layernorm(states), self.rotary(positions))
        cache.update(keys, values, 0)
