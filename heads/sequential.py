"""What Hydra, Clover and the MLP speculator share: state and token just drafted give the next state and logits.

Which state goes with which token is decided here and nowhere else. Example: the target has run x0 ... x3, and x4, the
root, was drawn from what it said after x3:

    text      x0      x1      x2      x3      x4
    states    h0      h1      h2      h3                h_t has read x0 ... x_t
    pairs     h0,x1   h1,x2   h2,x3   h3,x4             state t goes with token t + 1
    depth 0   x2      x3      x4      x5                pair t guesses x_{t+2}: the target itself knew x_{t+1}
    depth 1   x3      x4      x5                        ... and after x_{t+2} was fed too, x_{t+3}

So depth k of pair t has been fed x_{t+1} ... x_{t+1+k} and guesses x_{t+2+k}. Drafting starts at the last pair, h3,x4.

Dimensions: B rows, S text length, P pairs, Q positions, D hidden size of the target, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from specdec.heads.layer import DecoderLayer, LayerCache, LayerConfig, RMSNorm, Rotary, causal_mask


class TargetEnds(NamedTuple):
    """The two modules of the target that heads may share; beside the head, never inside it."""

    embedding: Callable[[Tensor], Tensor]
    lm_head: Callable[[Tensor], Tensor]


class SequentialHead(Protocol):
    """One step for each depth. Leading dimensions are free: positions of a text or nodes of a tree."""

    before_norm: bool
    """Reads the target's last hidden state before the final norm; else after it."""

    @property
    def depth(self) -> int:
        """Deepest level that the head was made for."""
        ...

    @property
    def hidden_size(self) -> int:
        """D."""
        ...

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def text(self) -> TextLayers | None:
        """Layers with attention over the accepted text; None when the head looks at one pair alone."""
        ...

    def pair(self, hidden: Tensor, tokens: Tensor, ends: TargetEnds) -> Tensor:
        """States [..., D] and tokens [...] of pairs -> what the text layers, or else depth 0, read: [..., D]."""
        ...

    def step(self, depth: int, state: Tensor, tokens: Tensor, ends: TargetEnds) -> tuple[Tensor, Tensor]:
        """Feed one token of each place.

        Args:
            depth: 0 for the root.
            state: [..., W] of the token before; at depth 0 of the pair.
            tokens: [...].
            ends: of the target.

        Returns:
            the new state [..., W'] and `hidden` [..., D'], which `logits` reads.
        """
        ...

    def logits(self, depth: int, hidden: Tensor, ends: TargetEnds) -> Tensor:
        """[..., D'] of this depth -> [..., V]."""
        ...


class TextLayers(nn.Module):
    """Decoder layers with causal attention over pairs, and a norm."""

    def __init__(self, config: LayerConfig, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._rotary = Rotary(config)

    def forward(
        self, states: Tensor, positions: Tensor, mask: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        """States [B, Q, D] at positions [B, Q] -> [B, Q, D]; mask and cache as in DecoderLayer."""
        cos_sin = self._rotary(positions)
        for layer in self.layers:
            states = layer(states, cos_sin, mask, cache)
        return self.norm(states)


def pair_tokens(tokens: list[int], root: int) -> list[int]:
    """The tokens of the pairs of a row's committed tokens: each one's successor, the root being the last one's."""
    return [*tokens[1:], root]


def fed_tokens(tokens: Tensor, depth: int) -> Tensor:
    """Of a text [B, S]: the token that each pair is fed at this depth, for the first S - 1 - depth pairs."""
    return tokens[:, depth + 1 :]


def guessed_tokens(tokens: Tensor, depth: int) -> Tensor:
    """Of a text [B, S]: what each pair should guess at this depth, for the first S - 2 - depth pairs."""
    return tokens[:, depth + 2 :]


def teacher_forced(
    head: SequentialHead,
    hidden: Tensor,
    tokens: Tensor,
    ends: TargetEnds,
    *,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> Iterator[Tensor]:
    """For training: every depth of every pair of a text, fed with the text's own tokens.

    Args:
        head: any sequential head.
        hidden: states of the target [B, S, D].
        tokens: the text [B, S].
        ends: of the target.
        positions: of the pairs [B, S - 1]; 0, 1, ... when None.
        mask: additive [B or 1, 1, S - 1, S - 1] for the text layers; causal when None.

    Yields:
        for each depth k, `hidden` of the first S - 1 - k pairs, [B, S - 1 - k, D']: `head.logits` makes logits of it
        where they are wanted, `guessed_tokens` are the labels of all pairs but the last.
    """
    state = head.pair(hidden[:, :-1], fed_tokens(tokens, 0), ends)
    if head.text is not None:
        pairs = state.shape[1]
        if positions is None:
            positions = torch.arange(pairs, device=state.device)[None]
        state = head.text(state, positions, causal_mask(pairs, state) if mask is None else mask)
    for depth in range(head.depth):
        fed = fed_tokens(tokens, depth)
        if not fed.shape[1]:
            return
        state, guess = head.step(depth, state[:, : fed.shape[1]], fed, ends)
        yield guess
