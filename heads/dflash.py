"""DFlash: a block of mask tokens becomes a block of drafted tokens in one pass (arXiv 2602.06036).

The target's hidden states of the text, its taps, are joined into one *feature* per token. A feature enters every layer
as a key and a value beside those of the block and is never a query, so it costs one projection per layer and stays
in a cache; rejected text was never in it. The block is the text's last token, the anchor, and mask tokens behind it.
Embedding and output matrix are the target's, raw: without the scaling that some families build around them.

Dimensions: B sequences, S tokens of text, A anchors, Q block tokens, T taps, D hidden size, V vocabulary, V' draft
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.heads.layer import DecoderLayer, LayerCache, LayerConfig, RMSNorm, Rotary

Masks = dict[str, Tensor]
"""Additive masks [B or 1, 1, Q, C] by layer kind."""

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class DFlashConfig:
    """Sizes of a DFlash drafter, and how it reads its target.

    Attributes:
        layer: a layer's sizes; Qwen3's layers have `qk_norm`.
        num_layers: draft layers.
        taps: the target's hidden states that make a feature, by `hidden_states` index (0 is the embedding).
        block_size: tokens of a block, the anchor included.
        mask_token_id: what stands for a token that is to be drafted.
        vocab_size: V of the target.
        draft_vocab_size: V' when the head has an output matrix of its own over fewer tokens; None for the target's.
        sliding_layers: layers that see a window of the text.
        sliding_window: its length in tokens, a query's own included; None without sliding layers.
        causal: whether a block token sees the later ones of its block (False) or not (True). None: sliding layers
            are causal and the others are not.
        sample_from_anchor: the anchor's slot drafts as well, so that a block of Q drafts Q tokens and not Q - 1.
        embedding_scale: multiplies the target's raw embeddings.
        logit_scale: multiplies logits.
        logit_softcap: logits become cap * tanh(logits / cap); None for none.

    Raises:
        ValueError: fields that contradict each other.
    """

    layer: LayerConfig
    num_layers: int
    taps: tuple[int, ...]
    block_size: int
    mask_token_id: int
    vocab_size: int
    draft_vocab_size: int | None = None
    sliding_layers: tuple[int, ...] = ()
    sliding_window: int | None = None
    causal: bool | None = None
    sample_from_anchor: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        if self.num_layers < 1 or not self.taps or min(self.taps) < 0:
            raise ValueError(f"num_layers is at least 1 and taps are indices, got {self.num_layers} and {self.taps}")
        if self.max_depth < 1:
            raise ValueError(f"a block of {self.block_size} drafts nothing; block_size counts the anchor too")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id {self.mask_token_id} lies outside a vocabulary of {self.vocab_size}")
        if self.sliding_layers and not self.sliding_window:
            raise ValueError(f"layers {self.sliding_layers} slide, but sliding_window is {self.sliding_window}")
        if any(not 0 <= layer < self.num_layers for layer in self.sliding_layers):
            raise ValueError(f"sliding_layers {self.sliding_layers} name more than the {self.num_layers} layers")
        if self.draft_vocab_size is not None and not 0 < self.draft_vocab_size <= self.vocab_size:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size} exceeds vocab_size {self.vocab_size}")

    @staticmethod
    def of(
        text_config: Any, *, mask_token_id: int, num_layers: int = 5, block_size: int = 16, **fields: Any
    ) -> DFlashConfig:
        """A new drafter for a target with this config: Qwen3's layers in the target's sizes, taps as published."""
        layer = replace(LayerConfig.of(text_config), qk_norm=True, attention_bias=False, output_bias=False,
                        mlp_bias=False)  # fmt: skip
        taps = default_taps(int(text_config.num_hidden_layers), num_layers)
        config = DFlashConfig(layer, num_layers, taps, block_size, mask_token_id, int(text_config.vocab_size))
        return replace(config, **fields)

    @property
    def hidden_size(self) -> int:
        """D, of head and target alike."""
        return self.layer.hidden_size

    @property
    def first_slot(self) -> int:
        """The slot of the block that drafts the first token."""
        return 0 if self.sample_from_anchor else 1

    @property
    def max_depth(self) -> int:
        """Tokens that one block drafts."""
        return self.block_size - self.first_slot

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of every layer."""
        return tuple(SLIDING if index in self.sliding_layers else FULL for index in range(self.num_layers))

    def is_causal(self, kind: str) -> bool:
        """Whether block tokens see only earlier ones of their block in layers of this kind."""
        return kind == SLIDING if self.causal is None else self.causal


def default_taps(num_target_layers: int, num_layers: int) -> tuple[int, ...]:
    """Outputs of as many target layers as there are draft layers, evenly spread between the 2nd and the 3rd last.

    By `hidden_states` index: the output of layer i, counted from 0, has index i + 1. Targets of few layers give fewer.

        >>> default_taps(36, 5)
        (2, 10, 18, 26, 34)
    """
    if num_layers == 1:
        return (num_target_layers // 2 + 1,)
    first, last = min(1, num_target_layers - 1), max(num_target_layers - 3, min(1, num_target_layers - 1))
    spread = [first + index * (last - first) / (num_layers - 1) for index in range(num_layers)]
    return tuple(sorted({round(layer) + 1 for layer in spread}))


class DFlashHead(nn.Module):
    """The draft layers, the projection that makes features, and their norms."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.config = config
        size, eps = config.hidden_size, config.layer.rms_norm_eps
        self.layers = nn.ModuleList(DecoderLayer(config.layer, index) for index in range(config.num_layers))
        self.norm = RMSNorm(size, eps)
        self.fc = nn.Linear(len(config.taps) * size, size, bias=False)
        self.hidden_norm = RMSNorm(size, eps)
        self.rotary = Rotary(config.layer)
        self.lm_head: nn.Linear | None = None
        self.d2t: Tensor | None
        self.t2d: Tensor | None
        chosen = config.draft_vocab_size
        if chosen is not None:
            self.lm_head = nn.Linear(size, chosen, bias=False)
        self.register_buffer("d2t", None if chosen is None else torch.zeros(chosen, dtype=torch.long))
        self.register_buffer("t2d", None if chosen is None else _first_tokens(config.vocab_size, chosen))

    def features(self, taps: Tensor) -> Tensor:
        """The target's taps side by side [B, S, T * D] -> features [B, S, D]."""
        return self.hidden_norm(self.fc(taps))

    def inject(self, features: Tensor, positions: Tensor, cache: LayerCache) -> None:
        """Append keys and values of features [B, S, D] at positions [B, S] to every layer of the cache."""
        cos_sin = self.rotary(positions)
        for index, layer in enumerate(self.layers):
            keys, values = cast(DecoderLayer, layer).self_attn.keys_and_values(features, cos_sin)
            cache.update(keys, values, index)

    def forward(self, block: Tensor, positions: Tensor, masks: Masks, cache: LayerCache) -> Tensor:
        """Normed states [B, Q, D] of blocks.

        Args:
            block: embeddings [B, Q, D].
            positions: [B, Q].
            masks: by layer kind, over injected features and block; a kind that is missing sees everything.
            cache: where features were injected; the block's keys and values are appended. Without a cache of
                one's own, as in training, an `InjectedFeatures`.
        """
        cos_sin, states = self.rotary(positions), block
        for layer, kind in zip(self.layers, self.config.layer_kinds, strict=True):
            states = layer(states, cos_sin, masks.get(kind), cache)
        return self.norm(states)

    def embed(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Ids [B, Q] -> [B, Q, D] by the target's embedding matrix [V, D]."""
        embedded = F.embedding(ids, weight)
        return embedded if self.config.embedding_scale == 1.0 else embedded * self.config.embedding_scale

    def logits(self, states: Tensor, lm_head: Callable[[Tensor], Tensor]) -> Tensor:
        """Normed states [..., D] -> logits [..., V] of the target's vocabulary.

        `lm_head` is the target's output matrix; a head over fewer tokens uses its own, and other tokens get -inf.
        """
        logits = lm_head(states) if self.lm_head is None else self.lm_head(states)
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        return logits if self.lm_head is None else self._spread(logits)

    def _spread(self, logits: Tensor) -> Tensor:
        whole = logits.new_full((*logits.shape[:-1], self.config.vocab_size), -torch.inf)
        whole[..., self.token_ids] = logits
        return whole

    @property
    def token_ids(self) -> Tensor:
        """The target's id of every draft token [V']; the file holds the differences, `d2t`."""
        assert self.d2t is not None, "only a head with a vocabulary of its own"
        return self.d2t + torch.arange(self.d2t.shape[0], device=self.d2t.device)


def _first_tokens(vocab_size: int, count: int) -> Tensor:
    """Bool [V] that is True for the tokens which a zero `d2t` names."""
    return torch.arange(vocab_size) < count


class InjectedFeatures:
    """Stands in for a cache in one forward: what is injected stays, what a block appends is forgotten.

    So gradients flow, and the same features serve one forward after the other.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, layer_index: int, /) -> tuple[Tensor, Tensor]:
        """Keep the first keys and values of a layer; return those and the new ones from then on."""
        if layer_index == len(self._layers):
            self._layers.append((keys, values))
            return keys, values
        old_keys, old_values = self._layers[layer_index]
        return torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)


def block_ids(anchors: Tensor, config: DFlashConfig, length: int | None = None) -> Tensor:
    """Blocks [..., Q] of anchor and masks below anchor tokens [...]; of the block size unless a length is given."""
    blocks = anchors[..., None].expand(*anchors.shape, config.block_size if length is None else length).clone()
    blocks[..., 1:] = config.mask_token_id
    return blocks


def causal_in_block(mask: Tensor, length: int) -> Tensor:
    """The additive mask [B, 1, Q, C] with the last `length` columns, the queries' own, hidden from earlier queries."""
    later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    later = F.pad(later, (mask.shape[-1] - length, 0))
    return mask.masked_fill(later, torch.finfo(mask.dtype).min)


def anchored_masks(
    config: DFlashConfig, anchors: Tensor, length: int, dtype: torch.dtype, *, documents: Tensor | None = None
) -> Masks:
    """Masks for many blocks in one training forward: each sees the text before its anchor, and itself.

    A window is counted from each query, as when drafting.

    Args:
        config: kinds of the layers.
        anchors: columns [A] or [B, A] in texts of `length` tokens, whose features are the first columns.
        length: S.
        dtype: of the mask.
        documents: [B, S], which document of a packed row a token belongs to; a block sees its anchor's alone. None
            for one document.

    Returns:
        [B or 1, 1, A * Q, S + A * Q] for each kind of layer.
    """
    anchors = torch.atleast_2d(anchors)
    rows, count = anchors.shape
    slot = torch.arange(config.block_size, device=anchors.device)
    columns = (anchors[..., None] + slot).flatten(1)
    block = torch.arange(count, device=anchors.device).repeat_interleave(config.block_size)
    text = torch.arange(length, device=anchors.device)
    before = text < anchors[:, block, None]
    if documents is not None:
        before = before & (documents[:, None] == documents.gather(1, anchors)[:, block, None])
    same = block[:, None] == block
    slots = slot.repeat(count)
    masks = {}
    for kind in dict.fromkeys(config.layer_kinds):
        seen = before if kind == FULL else before & (columns[..., None] - text < cast(int, config.sliding_window))
        within = same & (slots[:, None] >= slots) if config.is_causal(kind) else same
        hidden = ~torch.cat([seen, within.expand(rows, -1, -1)], -1)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=anchors.device)
        masks[kind] = mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
    return masks
