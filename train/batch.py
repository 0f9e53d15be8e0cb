"""A batch of training rows: tokens, where documents begin, what is supervised, and what the target computed.

Dimensions: R rows, S row length, D the target's hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from specdec.train.logits import Logits
from specdec.train.order import Order, Piece, Row, derived_seed, pieces_of

PADDING = -1
"""`documents` of columns that hold no token."""

Places = Tensor | tuple[Tensor, Tensor]
"""Of a [R, S] tensor."""


@dataclass(frozen=True)
class Document:
    """One text as ids; `supervised[t]` says that token t is one the drafter shall learn to predict."""

    ids: Tensor
    supervised: Tensor
    taps: dict[int, Tensor] = field(default_factory=dict)


class Documents(Protocol):
    """Prepared texts, in memory or on disk."""

    lengths: tuple[int, ...]

    def piece(self, piece: Piece) -> Document:
        """Tokens [start, stop) of one document."""
        ...

    def supervised(self, piece: Piece) -> Tensor:
        """Bool [stop - start]: which of them are supervised. Reads nothing else."""
        ...


def order_of(documents: Documents, row_length: int, seed: int, *, packed: bool = True) -> Order:
    """The order in which documents are learned from, without pieces of long ones that hold a prompt alone.

    Such a piece would cost a forward, and a step of nothing else has no loss.

    Raises:
        BadData: nothing is left.
    """
    silent = [
        piece
        for document, length in enumerate(documents.lengths)
        if length > row_length
        for piece in pieces_of(document, length, row_length)
        if not documents.supervised(piece)[1:].any()
    ]
    return Order(documents.lengths, row_length, seed, packed=packed, silent=frozenset(silent))


@dataclass(frozen=True)
class TrainBatch:
    """R rows of S tokens.

    Attributes:
        ids: [R, S].
        positions: [R, S], starting at 0 in every document.
        documents: [R, S] number of the piece within its row, PADDING where there is no token.
        supervised: bool [R, S], token t is to be predicted.
        row_numbers: R numbers of the rows over the whole run; noise is derived from them, so that it does not depend
            on how rows are spread over processes.
        seed: of the run.
        taps: the target's hidden states by `hidden_states` index, [R, S, D] each.
        logits: the target's, [R, S, V]; at t they are the law of token t + 1.
    """

    ids: Tensor
    positions: Tensor
    documents: Tensor
    supervised: Tensor
    row_numbers: tuple[int, ...]
    seed: int = 0
    taps: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None

    @property
    def num_supervised(self) -> int:
        """Supervised tokens that have a predecessor in their document: the denominator of a loss."""
        return int(self.drafts(1).sum())

    def drafts(self, ahead: int) -> Tensor:
        """Bool [R, S]: from position t, token t + ahead is supervised and belongs to the same document.

        The one place that says which token a position predicts. Example: ids a b c d, one document, c and d
        supervised. ahead=1: positions 1, 2 (b predicts c, c predicts d). ahead=2: positions 0, 1. The target's own
        law of token t + ahead stands at logits[t + ahead - 1].
        """
        result = torch.zeros_like(self.supervised)
        if ahead < self.ids.shape[1]:
            same = (self.documents[:, ahead:] == self.documents[:, :-ahead]) & (self.documents[:, ahead:] != PADDING)
            result[:, :-ahead] = self.supervised[:, ahead:] & same
        return result

    def laws(self, ahead: int) -> Tensor:
        """The target's logits [M, V] of token t + ahead at the M positions t of `drafts(ahead)`."""
        return self.laws_at(self.stands(ahead))

    def laws_at(self, places: Places) -> Tensor:
        """The target's logits [M, V] that stand at these places: bool [R, S], or M rows and M columns."""
        assert self.logits is not None, "features with logits come first"
        return self.logits[places]

    def laws_to_make(self, places: Places) -> Logits:
        """The same without a copy of them all: whoever reads them takes some at a time."""
        logits = self.logits
        assert logits is not None, "features with logits come first"
        listed = places.nonzero() if isinstance(places, Tensor) else torch.stack(places, 1)
        return Logits(listed, lambda some: logits[some[:, 0], some[:, 1]], logits.shape[-1])

    def stands(self, ahead: int) -> Tensor:
        """Bool [R, S]: where the target's own laws of the tokens of `drafts(ahead)` stand, in the same order."""
        stands = torch.zeros_like(self.supervised)
        stands[:, ahead - 1 :] = self.drafts(ahead)[:, : max(self.ids.shape[1] - ahead + 1, 0)]
        return stands

    def tokens(self, ahead: int) -> Tensor:
        """Token t + ahead [M] at the M positions t of `drafts(ahead)`."""
        stands = torch.zeros_like(self.supervised)
        stands[:, ahead:] = self.drafts(ahead)[:, : max(self.ids.shape[1] - ahead, 0)]
        return self.ids[stands]

    def generator(self, row: int, purpose: str) -> torch.Generator:
        """Random numbers of one row for one purpose, the same whoever computes it."""
        return torch.Generator().manual_seed(derived_seed(self.seed, purpose, self.row_numbers[row]))

    def to(self, device: torch.device) -> TrainBatch:
        """The same batch on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("ids", "positions", "documents", "supervised")}
        taps = {tap: value.to(device) for tap, value in self.taps.items()}
        return replace(self, **moved, taps=taps, logits=None if self.logits is None else self.logits.to(device))

    @staticmethod
    def of_rows(
        documents: Documents, rows: list[Row], row_numbers: list[int], row_length: int, seed: int = 0
    ) -> TrainBatch:
        """Read the pieces of these rows and lay them out, padded on the right."""
        shape = (len(rows), row_length)
        ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        owner, supervised = torch.full(shape, PADDING), torch.zeros(shape, dtype=torch.bool)
        taps: dict[int, Tensor] = {}
        for index, row in enumerate(rows):
            column = 0
            for number, piece in enumerate(row):
                document = documents.piece(piece)
                end = column + len(document.ids)
                ids[index, column:end] = document.ids
                positions[index, column:end] = torch.arange(end - column)
                owner[index, column:end] = number
                supervised[index, column:end] = document.supervised
                for tap, states in document.taps.items():
                    taps.setdefault(tap, states.new_zeros(*shape, states.shape[-1]))[index, column:end] = states
                column = end
            positions[index, column:] = torch.arange(row_length - column)
        return TrainBatch(ids, positions, owner, supervised, tuple(row_numbers), seed, taps)
