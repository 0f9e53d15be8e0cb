"""EAGLE-3 (arXiv 2503.01840): a small decoder on a mix of the target's low, middle and high hidden states.

The hidden states after l1, l2 and l3 layers at position t are concatenated and brought to D by `fc`: the head's state
g_t. Its first layer attends over [norm(embedding of x_{t+1}), norm(g_t)], so that q, k and v read 2 D, beside the
residual g_t. Its output is the next state, fed back as it is below the last token that the target has seen. Logits for
x_{t+2} come from the head's own norm and output matrix, which may know only the most frequent N tokens.

Variants that served checkpoints use: the residual may be the normed g_t (norm_before_residual); the target's states may
be normed one by one (fc_norm) or together (norm_before_fc) before `fc`; what is fed back may be the normed output
(norm_output, EAGLE-3.1); further layers are ordinary ones.

Dimensions: B sequences, Q tokens, D hidden size, T hidden size of the target, K taps, V vocabulary, N guessed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from specdec.heads.eagle import Project
from specdec.heads.layer import MLP, Attention, CosSin, DecoderLayer, LayerCache, LayerConfig, RMSNorm, Rotary


@dataclass(frozen=True)
class Eagle3Config:
    """Sizes and variants of an EAGLE-3 head.

    Attributes:
        layer: sizes of each decoder layer.
        vocab_size: V of the target.
        draft_vocab_size: N; V when every token can be guessed.
        num_layers: decoder layers.
        taps: numbers of target layers after which a state is read, low to high; None for the `standard_taps` of
            whatever target it is used with. The number of all layers means the state *before* the final norm.
        num_taps: K.
        target_hidden_size: T; None for D.
        norm_before_residual, norm_before_fc, fc_norm, norm_output: see above.
        fc_bias: whether `fc` has a bias.
        own_embedding: the head has an embedding matrix of its own; else it uses the target's.
        own_lm_head: likewise the output matrix.
        sliding_window: tokens that attention looks back, itself included; None for all.

    Raises:
        ValueError: sizes or variants that contradict each other.
    """

    layer: LayerConfig
    vocab_size: int
    draft_vocab_size: int
    num_layers: int = 1
    taps: tuple[int, ...] | None = None
    num_taps: int = 3
    target_hidden_size: int | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    fc_bias: bool = False
    own_embedding: bool = False
    own_lm_head: bool = True
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_taps < 1:
            raise ValueError("num_layers and num_taps are at least 1")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size} is not within 1 and {self.vocab_size}")
        if (3 if self.taps is None else len(self.taps)) != self.num_taps:
            raise ValueError(f"{self.num_taps} taps need their numbers of layers, got {self.taps}")
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm exclude each other")
        if self.draft_vocab_size < self.vocab_size and not self.own_lm_head:
            raise ValueError("a reduced vocabulary needs an output matrix of its own")
        if self.feature_size != self.layer.hidden_size and not (self.own_embedding and self.own_lm_head):
            raise ValueError(
                "a head of another size than its target needs an embedding and an output matrix of its own"
            )

    @property
    def feature_size(self) -> int:
        """T."""
        return self.target_hidden_size or self.layer.hidden_size


def standard_taps(num_layers: int) -> tuple[int, int, int]:
    """The taps of all published heads, (2, L // 2, L - 3); for targets of fewer than 7 layers low, middle and high."""
    if num_layers >= 7:
        return 2, num_layers // 2, num_layers - 3
    return 1, max(num_layers // 2, 1), max(num_layers - 1, 1)


class Eagle3Layer(nn.Module):
    """The first layer, whose attention reads embedding and state side by side."""

    def __init__(self, config: LayerConfig, *, norm_before_residual: bool) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, 0, 2 * config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, embeddings: Tensor, hidden: Tensor, cos_sin: CosSin, mask: Tensor | None, cache: LayerCache | None
    ) -> Tensor:
        """[B, Q, D] each -> [B, Q, D]."""
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        both = torch.cat([self.input_layernorm(embeddings), normed], -1)
        hidden = residual + self.self_attn(both, cos_sin, mask, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Head(nn.Module):
    """The module; one for training on whole sequences and for drafting with a cache.

    `d2t` [N] holds offsets: guess i is the target's token i + d2t[i]; `t2d` [V] says which tokens can be guessed.
    """

    d2t: Tensor | None
    t2d: Tensor | None

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        layer, size, eps = config.layer, config.layer.hidden_size, config.layer.rms_norm_eps
        features, guesses = config.num_taps * config.feature_size, config.draft_vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size) if config.own_embedding else None
        self.input_norm = RMSNorm(features, eps) if config.norm_before_fc else nn.Identity()
        norms = [RMSNorm(config.feature_size, eps) for _ in range(config.num_taps)] if config.fc_norm else []
        self.fc_norm = nn.ModuleList(norms)
        self.fc = nn.Linear(features, size, bias=config.fc_bias)
        first = Eagle3Layer(layer, norm_before_residual=config.norm_before_residual)
        self.layers = nn.ModuleList([first, *(DecoderLayer(layer, index) for index in range(1, config.num_layers))])
        self.norm = RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, guesses, bias=False) if config.own_lm_head else None
        self.rotary = Rotary(layer)
        reduced = guesses < config.vocab_size
        self.register_buffer("d2t", torch.zeros(guesses, dtype=torch.long) if reduced else None)
        self.register_buffer("t2d", torch.arange(config.vocab_size) < guesses if reduced else None)

    @property
    def guessed(self) -> int:
        """N."""
        return self.config.draft_vocab_size

    def encode(self, features: Tensor) -> Tensor:
        """The target's states, concatenated low to high [..., K T], as the head's states [..., D]."""
        features = self.input_norm(features)
        if len(self.fc_norm):
            parts = features.split(self.config.feature_size, -1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        return self.fc(features)

    def forward(
        self,
        embeddings: Tensor,
        states: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """The next states.

        Args:
            embeddings: of tokens x_{t+1}, [B, Q, D].
            states: g_t, encoded or from this function, [B, Q, D].
            positions: t, [B, Q].
            mask: additive, [B or 1, 1, Q, C]; None lets every query see every column.
            cache: of this head's layers; appended to.

        Returns:
            what stands for g_{t+1}, [B, Q, D].
        """
        cos_sin = self.rotary(positions)
        hidden = cast(Eagle3Layer, self.layers[0])(embeddings.to(states.dtype), states, cos_sin, mask, cache)
        for layer in list(self.layers)[1:]:
            hidden = cast(DecoderLayer, layer)(hidden, cos_sin, mask, cache)
        return self.norm(hidden) if self.config.norm_output else hidden

    def logits(self, states: Tensor, project: Project) -> Tensor:
        """Logits [..., N] for x_{t+2} from states that `forward` returned [..., D]."""
        normed = states if self.config.norm_output else self.norm(states)
        return project(normed) if self.lm_head is None else self.lm_head(normed)

    def to_token_ids(self, guesses: Tensor) -> Tensor:
        """The target's token ids of guesses among the N."""
        return guesses if self.d2t is None else guesses + self.d2t[guesses]

    def choose_vocabulary(self, tokens: Sequence[int]) -> None:
        """Let the N guesses be these token ids of the target.

        Raises:
            ValueError: not N different ids below V, or a head that guesses every token.
        """
        ids = torch.tensor(sorted(set(tokens)))
        if self.d2t is None or self.t2d is None:
            raise ValueError("this head guesses every token of its target")
        if len(ids) != self.guessed or not 0 <= int(ids[0]) <= int(ids[-1]) < self.config.vocab_size:
            raise ValueError(f"need {self.guessed} different token ids below {self.config.vocab_size}, got {len(ids)}")
        self.d2t.copy_(ids - torch.arange(len(ids)))
        self.t2d.zero_()
        self.t2d[ids.to(self.t2d.device)] = True
