"""What the loop trains: a module that learns, the terms of its loss, and the drafter that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import nn

from specdec.drafter import Drafter
from specdec.train.batch import TrainBatch
from specdec.train.objective import Objective, Term


class Trainable(Protocol):
    """One kind of drafter in training. The frozen target is held beside the module, never inside it."""

    kind: str
    """As on the command line: "medusa", "eagle3", ..."""

    module: nn.Module
    """All that is saved; what learns in it has `requires_grad`."""

    taps: tuple[int, ...]
    """Hidden states of the target that `terms` reads, by `hidden_states` index or BEFORE_NORM."""

    needs_logits: bool
    """Whether `terms` reads the target's logits."""

    def terms(self, batch: TrainBatch, objective: Objective) -> list[Term]:
        """The loss of a batch that carries taps and logits, as addends."""
        ...

    def drafter(self) -> Drafter:
        """A drafter with the module's present weights, for decoding held-out prompts."""
        ...

    def save(self, path: Path) -> None:
        """Write a drafter directory that `load_drafter` takes."""
        ...
