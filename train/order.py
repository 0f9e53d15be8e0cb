"""Which documents a step trains on: a pure function of lengths, seed and step.

No sampler state exists, so nothing about data has to be saved, and a run that was killed continues with exactly the
rows it would have seen. Rows are numbered from 0 over all epochs; step s trains on rows s*G to (s+1)*G - 1, whoever
computes them, so one process and several see the same data.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

from specdec.errors import BadData

OPEN_ROWS = 64
"""Rows that are filled at the same time: a document goes into the fullest one that has room for it."""


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of one document."""

    document: int
    start: int
    stop: int


Row = tuple[Piece, ...]


@dataclass(frozen=True)
class Order:
    """Packs documents into rows of at most `row_length` tokens, anew in every epoch.

    Args:
        lengths: tokens of each document; one that is longer than a row is cut into pieces of row length.
        row_length: S.
        seed: of the shuffles.
        packed: several documents share a row; False gives every piece a row of its own.
        silent: pieces of documents longer than a row in which nothing can be learned; they are left out.
    """

    lengths: tuple[int, ...]
    row_length: int
    seed: int = 0
    packed: bool = True
    shuffled: bool = True
    silent: frozenset[Piece] = frozenset()
    _epochs: dict[int, list[Row]] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not any(length > 1 for length in self.lengths):
            raise BadData("there is no document of two tokens or more to train on")
        if not self.rows_of(0):
            raise BadData(
                f"in rows of {self.row_length} tokens nothing can be learned: no supervised token has one before it"
            )

    def row(self, number: int) -> Row:
        """Row `number`, counted over all epochs."""
        epoch, first = 0, 0
        while number >= first + len(self.rows_of(epoch)):
            first += len(self.rows_of(epoch))
            epoch += 1
        return self.rows_of(epoch)[number - first]

    def rows_of(self, epoch: int) -> list[Row]:
        """All rows of one epoch, in order."""
        if epoch not in self._epochs:
            self._epochs[epoch] = self._pack(epoch)
            self._forget_before(epoch)
        return self._epochs[epoch]

    def _forget_before(self, epoch: int) -> None:
        """Old epochs keep their number of rows only through their list; two neighbours are enough to step on."""
        for old in [e for e in self._epochs if e < epoch - 1]:
            self._epochs[old] = [()] * len(self._epochs[old])

    def _pack(self, epoch: int) -> list[Row]:
        pieces = [piece for document in self._shuffled(len(self.lengths), epoch, "documents")
                  for piece in pieces_of(document, self.lengths[document], self.row_length)
                  if piece not in self.silent]  # fmt: skip
        rows = fill(pieces, self.row_length) if self.packed else [(piece,) for piece in pieces]
        return [rows[index] for index in self._shuffled(len(rows), epoch, "rows")]

    def _shuffled(self, count: int, epoch: int, what: str) -> list[int]:
        if not self.shuffled:
            return list(range(count))
        generator = torch.Generator().manual_seed(derived_seed(self.seed, what, epoch))
        return torch.randperm(count, generator=generator).tolist()


def pieces_of(document: int, length: int, row_length: int) -> list[Piece]:
    """A document of `length` tokens cut into pieces that rows can hold."""
    cuts = [Piece(document, start, min(start + row_length, length)) for start in range(0, length, row_length)]
    return [piece for piece in cuts if piece.stop - piece.start > 1]  # a lone token predicts nothing


def fill(pieces: list[Piece], row_length: int) -> list[Row]:
    """Pieces into rows: each into the fullest open row with room, the fullest row closing when too many are open."""
    done: list[list[Piece]] = []
    open_rows: list[tuple[int, list[Piece]]] = []
    for piece in pieces:
        length = piece.stop - piece.start
        fitting = [index for index, (used, _) in enumerate(open_rows) if used + length <= row_length]
        if fitting:
            best = max(fitting, key=lambda index: open_rows[index][0])
            used, row = open_rows.pop(best)
            row.append(piece)
            used += length
        else:
            used, row = length, [piece]
        if used == row_length:
            done.append(row)
        else:
            open_rows.append((used, row))
        if len(open_rows) > OPEN_ROWS:
            fullest = max(range(len(open_rows)), key=lambda index: open_rows[index][0])
            done.append(open_rows.pop(fullest)[1])
    return [tuple(row) for row in [*done, *(row for _, row in open_rows)]]


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path of names and numbers, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
