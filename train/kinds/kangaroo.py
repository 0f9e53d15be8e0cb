"""Kangaroo's adapter learns to turn the target's shallow states into its final ones (arXiv 2404.18911, section 3.1).

The adapter reads the state of token t after E layers, which is exact when drafting too, so one teacher-forced pass
covers every depth: at t it guesses token t + 1, as the target does there.
"""

from __future__ import annotations

from typing import Any, cast

from specdec.heads.kangaroo import KangarooConfig, KangarooHead
from specdec.target import Target
from specdec.train.batch import TrainBatch
from specdec.train.kinds.head import HeadTraining
from specdec.train.mask import document_mask
from specdec.train.objective import Objective, Term


class KangarooTraining(HeadTraining):
    """Trains the adapter on a frozen target.

    Args:
        target: probed.
        exit_layer: E, layers below the adapter.
        head: continue from this one instead of a fresh one.
        options: of the drafter that validation decodes with.
    """

    kind = "kangaroo"

    def __init__(
        self,
        target: Target,
        *,
        exit_layer: int = 2,
        head: KangarooHead | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if head is None:
            head = KangarooHead(KangarooConfig.of(target.config, exit_layer))
        super().__init__(target, head, (head.config.exit_layer,), options)

    def terms(self, batch: TrainBatch, objective: Objective) -> list[Term]:
        """One term: all supervised tokens."""
        states = batch.taps[self.taps[0]].float()
        drafted = cast(KangarooHead, self.module)(states, batch.positions, document_mask(batch, states))
        here = batch.drafts(1)
        return [objective.term(1, self.logits(drafted[here], self.target_logits), self.laws(batch, 1))]
