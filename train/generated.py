"""A second stage on the target's own words: from some step on it continues the beginnings of the data's documents.

The MLP speculator's recipe (arXiv 2404.19124) as a source of rows for every kind of head. Which stage a row belongs to
follows from its number alone, and what is written from row numbers, seed and present weights; so a resumed run reads
what the unbroken one read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel

from specdec.drafter import Drafter
from specdec.train.batch import Documents, TrainBatch
from specdec.train.kinds.head import HeadTraining
from specdec.train.on_policy import MixedSource, TextShares, Writing
from specdec.train.order import Order


class TargetsOwnText:
    """The only pen is the target's; the head in training may draft for it, which does not change its law."""

    def __init__(self, training: HeadTraining) -> None:
        self.training = training
        self.target = training.target

    def served(self) -> PreTrainedModel:
        """A head is no model that could write alone."""
        raise TypeError("a draft head cannot write alone; the target does, with the head as its drafter")

    def drafter(self) -> Drafter:
        """With the head's present weights."""
        return self.training.drafter()


class TwoStages:
    """Rows of the data first, rows that the target writes afterwards.

    Args:
        fixed: the first stage.
        written: the second.
        first_written: number of the first row of the second stage.
    """

    def __init__(
        self,
        fixed: Callable[[list[int]], TrainBatch],
        written: MixedSource,
        first_written: int,
    ) -> None:
        self.fixed, self.written, self.first_written = fixed, written, first_written

    def __call__(self, numbers: list[int]) -> TrainBatch:
        """The rows of these numbers, all of one step."""
        return (self.written if numbers[0] >= self.first_written else self.fixed)(numbers)

    def reads_weights(self, numbers: Sequence[int]) -> bool:
        """Whether these rows are written with the head's present weights."""
        return numbers[0] >= self.first_written and self.written.reads_weights(numbers)


def written_source(training: HeadTraining, documents: Documents, order: Order, writing: Writing) -> MixedSource:
    """Rows whose documents the target continues behind their beginnings, up to their old length."""
    return MixedSource(documents, order, TextShares(fixed=0.0, target=1.0), TargetsOwnText(training), writing)
