"""What a run tells of itself: each step, and each validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.train.objective import Term


@dataclass
class StepReport:
    """What one optimizer step did, over all processes.

    Attributes:
        step: finished steps, this one included.
        loss: weighted sum of all terms over supervised tokens.
        supervised: tokens that the loss was divided by.
        tokens: all tokens of the step's rows, without padding.
        terms: mean loss of each term by name.
        alpha: mean acceptance sum min(p, q) by depth, on the data's own prefixes.
        agreement: share of positions where the most probable tokens agree, by depth.
        gradient_norm: before clipping.
        seconds: wall-clock time.
    """

    step: int
    loss: float
    supervised: int
    terms: dict[str, float] = field(default_factory=dict)
    alpha: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    gradient_norm: float = 0.0
    learning_rate: float = 0.0
    seconds: float = 0.0
    tokens: int = 0


@dataclass
class Score:
    """A validation: `value` decides which checkpoint is the best (tau), `details` are logged."""

    value: float
    details: dict[str, Any] = field(default_factory=dict)


class Totals:
    """Sums over micro-batches by term: weighted, losses, positions, alpha, hits, positions with a law."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], Tensor] = {}

    def add(self, terms: list[Term]) -> None:
        """Add the terms of a micro-batch."""
        for term in terms:
            laws = 0 if term.alpha is None else term.alpha.numel()
            alpha = 0.0 if term.alpha is None else term.alpha.sum().item()
            hits = 0.0 if term.hits is None else term.hits.sum().item()
            losses = term.losses.detach()
            values = [term.total.item(), losses.sum().item(), losses.numel(), alpha, hits, laws]
            key = (term.name, term.depth)
            self._sums[key] = self._sums.get(key, torch.zeros(6, dtype=torch.float64)) + torch.tensor(values).double()

    def report(self, step: int, supervised: int, total: Callable[[Tensor], Tensor]) -> StepReport:
        """What the step was.

        Args:
            step: finished steps, this one included.
            supervised: tokens in all processes.
            total: adds up values over the processes.
        """
        names, values = list(self._sums), torch.cat(list(self._sums.values()))
        summed = total(values).tolist()
        report = StepReport(step, 0.0, supervised)
        for index, (name, depth) in enumerate(names):
            weighted, losses, count, alpha, hits, laws = summed[6 * index : 6 * index + 6]
            report.loss += weighted / supervised
            report.terms[name] = losses / max(count, 1)
            if depth:
                report.alpha.append(alpha / max(laws, 1))
                report.agreement.append(hits / max(laws, 1))
        return report
