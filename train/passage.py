"""What verification leaves behind to be learned from: a piece of text and the target's laws along it.

Dimensions: R rows, S row length, n tokens of a passage, M laws, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from specdec.train.batch import PADDING, Places, TrainBatch
from specdec.train.order import derived_seed
from specdec.train.stored_laws import StoredLaws


@dataclass(frozen=True)
class Passage:
    """Tokens of one row of a generation, with the laws that the target had there.

    Attributes:
        ids: int32 [n]. The last one is only predicted: no law and no tap stands at it.
        first_position: position in the whole text of ids[0].
        start: where the first law stands; law j stands at start + j and is that of ids[start + j + 1], so that
            n = start + M + 1.
        laws: M of them.
        rejected: bool [M]: there the draft had proposed children and none of them was accepted.
        taps: the target's hidden states by index, [n - 1, D] each, in the target's dtype.
        topic: of the request, for reports.
    """

    ids: Tensor
    first_position: int
    start: int
    laws: StoredLaws
    rejected: Tensor
    taps: dict[int, Tensor] = field(default_factory=dict)
    topic: str | None = None

    def __len__(self) -> int:
        return self.ids.numel()

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return self.ids.nbytes + self.laws.nbytes + self.rejected.nbytes + sum(tap.nbytes for tap in self.taps.values())


@dataclass(frozen=True)
class ReplayBatch(TrainBatch):
    """A TrainBatch whose laws were kept, in place of logits that a target computes.

    Attributes:
        stored: all laws of the batch.
        places: [R, S], which of them stands there; PADDING where none does.
    """

    stored: StoredLaws | None = None
    places: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))

    def laws_at(self, places: Places) -> Tensor:
        """As in TrainBatch; only laws that are asked for take the room of a whole vocabulary."""
        assert self.stored is not None, "made by `lay_out`"
        return self.stored.select(self.places[places]).dense()

    def to(self, device: torch.device) -> ReplayBatch:
        """The same batch on a device."""
        assert self.stored is not None, "made by `lay_out`"
        moved: Any = super().to(device)
        return replace(moved, stored=self.stored.to(device), places=self.places.to(device))


def lay_out(passages: list[Passage], *, only_rejected: bool = False, seed: int = 0, first_row: int = 0) -> ReplayBatch:
    """Passages as rows of a batch, padded on the right: the one place that says which law is of which token.

    Example: the prompt is 5 6 7 and the target has chosen 8, the first root. The draft proposes 9 4; the target accepts
    9 and says 2 in place of 4. Verification ran the root and both nodes; the law at 8 is that of the token after 8,
    which became 9, and the law at 9 is that of the token after 9, which became 2. The law at 4 belongs to a text that
    was never written.

        column       0  1  2  3  4  5
        ids          5  6  7  8  9  2
        law                   0  1          start = 3, M = 2, n = 6
        supervised               x  x       tokens with a law, one column later
        rejected              .  x          the law at 9 is where the draft was wrong

    A position t that looks `ahead` tokens on is compared with the law at t + ahead - 1: TrainBatch.stands.

    Args:
        passages: not empty.
        only_rejected: supervise only tokens in whose place the draft had proposed something else.
        seed, first_row: of the noise that some kinds of heads add.
    """
    width = max(map(len, passages))
    shape = (len(passages), width)
    ids, documents = torch.zeros(shape, dtype=torch.long), torch.full(shape, PADDING)
    supervised, places = torch.zeros(shape, dtype=torch.bool), torch.full(shape, PADDING)
    positions = torch.arange(width) + torch.tensor([passage.first_position for passage in passages])[:, None]
    taps = {tap: states.new_zeros(*shape, states.shape[-1]) for tap, states in passages[0].taps.items()}
    before = 0
    for row, passage in enumerate(passages):
        size, start, count = len(passage), passage.start, len(passage.laws)
        ids[row, :size], documents[row, :size] = passage.ids.long(), 0
        places[row, start : start + count] = torch.arange(before, before + count)
        supervised[row, start + 1 : start + count + 1] = passage.rejected if only_rejected else True
        for tap, states in passage.taps.items():
            taps[tap][row, : size - 1] = states
        before += count
    numbers = tuple(range(first_row, first_row + len(passages)))
    stored = StoredLaws.joined([passage.laws for passage in passages])
    return ReplayBatch(
        ids, positions, documents, supervised, numbers, derived_seed(seed, "replay"), taps, None, stored, places
    )
