"""How much is accepted on which topic, when it was first met and now."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from specdec.drafter import Committed


@dataclass(frozen=True)
class Step:
    """One verification of one row, as `stats.StepRecord` counts; see there."""

    emitted: int
    accepted: int
    tried: int


@dataclass(frozen=True)
class Accepted:
    """Sums over steps.

    Attributes:
        steps: verifications.
        emitted: tokens, next_token included.
        accepted: drafted tokens.
        tried: levels at which a drafted token could have been accepted.
    """

    steps: int = 0
    emitted: int = 0
    accepted: int = 0
    tried: int = 0

    @property
    def tau(self) -> float:
        """Tokens per verification; 0 before the first."""
        return self.emitted / self.steps if self.steps else 0.0

    @property
    def alpha(self) -> float:
        """Probability that a drafted token is accepted given that its parent was, over all depths."""
        return self.accepted / self.tried if self.tried else 0.0

    def plus(self, step: Step, sign: int = 1) -> Accepted:
        """With one step more, or less."""
        return Accepted(
            self.steps + sign,
            self.emitted + sign * step.emitted,
            self.accepted + sign * step.accepted,
            self.tried + sign * step.tried,
        )

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {"steps": self.steps, "tau": round(self.tau, 4), "alpha": round(self.alpha, 4)}


class Rolling:
    """Sums over the last steps.

    Args:
        window: so many.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._steps: deque[Step] = deque()
        self.accepted = Accepted()

    def add(self, step: Step) -> None:
        """The oldest step leaves when the window is full."""
        self._steps.append(step)
        self.accepted = self.accepted.plus(step)
        if len(self._steps) > self._window:
            self.accepted = self.accepted.plus(self._steps.popleft(), -1)


class Topic:
    """One topic.

    Attributes:
        requests: generations.
        before: steps with the weights with which the topic was first met.
        after: the last steps.
    """

    def __init__(self, window: int, updates: int) -> None:
        self.requests = 0
        self.before = Accepted()
        self._met_at = updates
        self._last = Rolling(window)

    @property
    def after(self) -> Accepted:
        """The last steps."""
        return self._last.accepted

    def add(self, step: Step, updates: int) -> None:
        """Count a step that was drafted with the weights of so many updates."""
        self._last.add(step)
        if updates == self._met_at:
            self.before = self.before.plus(step)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {"requests": self.requests, "before": self.before.summary(), "after": self.after.summary()}


def steps_of(committed: Committed) -> list[Step]:
    """What a verification emitted, row by row.

    Where a stopping criterion ended a row on a drafted token, that token counts as rejected: it never came back.
    """
    assert committed.nodes is not None
    assert committed.tree is not None
    steps = []
    for nodes, shape in zip(committed.nodes, committed.tree.shapes, strict=True):
        accepted = len(nodes) - 1
        steps.append(Step(accepted + 1, accepted, accepted + bool(shape.children[nodes[-1]])))
    return steps
