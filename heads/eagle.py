"""EAGLE (arXiv 2401.15077): a small decoder that continues the target's last hidden states.

At position t the head reads the feature f_t, the target's state after its final norm, together with the embedding of
the *next* token x_{t+1}, and predicts f_{t+1}; the target's own output matrix makes logits of it, for x_{t+2}. Below
the last known feature its own predictions take the place of features.

Feature and embedding become one state by a linear layer over [embedding, feature] (section 3), or by a gate as in
Dovetail (arXiv 2412.18934): z * h1 + (1 - z) * h2 with h1 = W1 feature, h2 = SiLU(W2 norm(embedding)) and
z = sigmoid(Wz [h1, h2]). The first layer has no norm before attention, and there is no norm at the end.

Dimensions: B sequences, Q tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.heads.layer import DecoderLayer, LayerCache, LayerConfig, RMSNorm, Rotary

Fusion = Literal["linear", "gate"]
Project = Callable[[Tensor], Tensor]
"""The target's states after its final norm [..., D] -> logits [..., V]."""


@dataclass(frozen=True)
class EagleConfig:
    """Sizes of an EAGLE head.

    Attributes:
        layer: sizes of each decoder layer; D is the target's.
        vocab_size: V of the target.
        num_layers: decoder layers.
        fusion: how feature and embedding become one state.
        fc_bias: whether the linear fusion has a bias.
        own_embedding: the head has an embedding matrix of its own; else it uses the target's.

    Raises:
        ValueError: no layers, no vocabulary, or a bias for the gate.
    """

    layer: LayerConfig
    vocab_size: int
    num_layers: int = 1
    fusion: Fusion = "linear"
    fc_bias: bool = True
    own_embedding: bool = False

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.vocab_size < 1:
            raise ValueError("num_layers and vocab_size are at least 1")
        if self.fusion == "gate" and self.fc_bias:
            raise ValueError("the gate has no bias: set fc_bias=False")


class Gate(nn.Module):
    """Dovetail's dynamic gating fusion (section 3.2)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(size, eps)
        self.feature = nn.Linear(size, size, bias=False)
        self.embedding = nn.Linear(size, size, bias=False)
        self.gate = nn.Linear(2 * size, size, bias=False)

    def forward(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """[..., D] each -> [..., D]."""
        one, two = self.feature(features), F.silu(self.embedding(self.norm(embeddings)))
        share = torch.sigmoid(self.gate(torch.cat([one, two], -1)))
        return share * one + (1 - share) * two


class EagleHead(nn.Module):
    """The module; one for training on whole sequences and for drafting with a cache."""

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config = config
        size = config.layer.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size) if config.own_embedding else None
        if config.fusion == "gate":
            self.fuse = Gate(size, config.layer.rms_norm_eps)
        else:
            self.fc = nn.Linear(2 * size, size, bias=config.fc_bias)
        self.layers = nn.ModuleList(
            DecoderLayer(config.layer, index, input_norm=index > 0) for index in range(config.num_layers)
        )
        self.rotary = Rotary(config.layer)

    @property
    def guessed(self) -> int:
        """Tokens that the head can guess: V."""
        return self.config.vocab_size

    def encode(self, features: Tensor) -> Tensor:
        """The target's features [..., D] as the head's states: they are that already."""
        return features

    def forward(
        self,
        embeddings: Tensor,
        states: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Predict the next features.

        Args:
            embeddings: of tokens x_{t+1}, [B, Q, D].
            states: features f_t, or the head's own predictions of them, [B, Q, D].
            positions: t, [B, Q].
            mask: additive, [B or 1, 1, Q, C]; None lets every query see every column.
            cache: of this head's layers; appended to.

        Returns:
            predictions of f_{t+1}, [B, Q, D].
        """
        embeddings = embeddings.to(states.dtype)
        if self.config.fusion == "gate":
            hidden = self.fuse(embeddings, states)
        else:
            hidden = self.fc(torch.cat([embeddings, states], -1))
        cos_sin = self.rotary(positions)
        for layer in self.layers:
            hidden = cast(DecoderLayer, layer)(hidden, cos_sin, mask, cache)
        return hidden

    def logits(self, states: Tensor, project: Project) -> Tensor:
        """Logits [..., V] for x_{t+2} from predictions of f_{t+1} [..., D], through the target's output matrix."""
        return project(states)

    def to_token_ids(self, guesses: Tensor) -> Tensor:
        """The target's ids of guessed tokens: the same."""
        return guesses
