"""Clover-2: a recurrence by one-key attention over drafted tokens, begun by an augmenting block over the text.

Xiao et al., Clover (arXiv 2405.00263) and Clover-2 (2408.00264). With h the target's state *before* its final norm and
e(x) a table of the head's own (at first a copy of the LM head's rows):

    s_0 = norm(layers(attend_1(h_t, e(x_{t+1}))))          z_0 = head_norm(FC_1(s_0))
    s_k = attend_2(s_{k-1}, e(x_{t+1+k}))                  z_k = head_norm(FC_2([s_k ; e(x_{t+1+k})]))

and logits = LM head(z). All depths after the first share their weights.

Dimensions: D hidden size, V vocabulary, H attention heads, E size of one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.heads.layer import LayerConfig, RMSNorm
from specdec.heads.sequential import TargetEnds, TextLayers


@dataclass(frozen=True)
class CloverConfig:
    """Sizes and options.

    Attributes:
        layer: of the augmenting block; its number of attention heads also divides the regressive attention.
        num_heads: depths it was trained for.
        num_layers: of the augmenting block.
        own_lm_head: the head carries a copy of the target's LM head; False uses the target's.
    """

    layer: LayerConfig
    vocab_size: int
    num_heads: int = 5
    num_layers: int = 2
    own_lm_head: bool = True

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.num_layers < 1:
            raise ValueError(f"clover needs at least one head and one layer, got {self.num_heads}, {self.num_layers}")
        if self.layer.hidden_size % self.layer.num_attention_heads:
            raise ValueError(
                f"hidden size {self.layer.hidden_size} is no multiple of {self.layer.num_attention_heads} heads"
            )


class RegressiveAttention(nn.Module):
    """Attention of a state to the one token that follows it: weights are cosines, for one key has no softmax."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps)
        self.q, self.k, self.v = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)
        self._by_head, self._eps = (config.num_attention_heads, size // config.num_attention_heads), config.rms_norm_eps
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for linear in (self.q, self.k, self.v):
            nn.init.uniform_(linear.weight, 0.0, 0.01)
            nn.init.zeros_(linear.bias)
        for linear in (self.q, self.k):
            linear.weight += torch.eye(linear.weight.shape[0], device=linear.weight.device)

    def forward(self, states: Tensor, embedded: Tensor) -> Tensor:
        """States and embeddings [..., D] -> [..., D]."""
        queries = self.q(self.input_layernorm(states)).unflatten(-1, self._by_head)
        keys, values = (part(embedded).unflatten(-1, self._by_head) for part in (self.k, self.v))
        scores = F.cosine_similarity(queries, keys, dim=-1, eps=self._eps)
        return states + (values * scores[..., None]).flatten(-2)


class CloverHead(nn.Module):
    """A SequentialHead over the target's state before its final norm."""

    before_norm = True

    def __init__(self, config: CloverConfig) -> None:
        super().__init__()
        self.config = config
        size, eps = config.layer.hidden_size, config.layer.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.first_attention = RegressiveAttention(config.layer)
        self.text = TextLayers(config.layer, config.num_layers)
        self.later_attention = RegressiveAttention(config.layer)
        self.first_projection = nn.Linear(size, size)
        self.later_projection = nn.Linear(2 * size, size)
        self.head_norm = RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False) if config.own_lm_head else None
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        for linear in (self.first_projection, self.later_projection):
            nn.init.uniform_(linear.weight, 0.0, 0.01)
            nn.init.zeros_(linear.bias)
            linear.weight[:, : self.hidden_size] += torch.eye(self.hidden_size, device=linear.weight.device)

    @property
    def depth(self) -> int:
        """Depths it was trained for."""
        return self.config.num_heads

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.config.layer.hidden_size

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    def pair(self, hidden: Tensor, tokens: Tensor, ends: TargetEnds) -> Tensor:
        """The first regressive attention."""
        return self.first_attention(hidden, self.embed_tokens(tokens))

    def step(self, depth: int, state: Tensor, tokens: Tensor, ends: TargetEnds) -> tuple[Tensor, Tensor]:
        """Depth 0 has its token from the pair; later ones attend to theirs."""
        if depth == 0:
            return state, self.head_norm(self.first_projection(state))
        embedded = self.embed_tokens(tokens)
        state = self.later_attention(state, embedded)
        return state, self.head_norm(self.later_projection(torch.cat([state, embedded], -1)))

    def logits(self, depth: int, hidden: Tensor, ends: TargetEnds) -> Tensor:
        """By the LM head, the same for all depths."""
        return (ends.lm_head if self.lm_head is None else self.lm_head)(hidden)

    @torch.no_grad()
    def begin_as(self, table: Tensor, lm_head_weight: Tensor) -> None:
        """For training from scratch: the table of tokens and the LM head begin as copies of these, [V, D].

        Both are the target's LM head; the second holds the factor that some families multiply their logits with.
        """
        self.embed_tokens.weight.copy_(table)
        if self.lm_head is not None:
            self.lm_head.weight.copy_(lm_head_weight)
