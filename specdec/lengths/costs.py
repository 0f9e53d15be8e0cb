"""What steps cost, learned while decoding: medians of the latest, with the calls of `specdec.costs.table.Costs`."""

from __future__ import annotations

import statistics
from collections import deque

from specdec.costs.interpolation import interpolated

LATEST = 15
"""Measurements kept for each width and number of levels; their median counts, so one slow step does not."""


class MeasuredCosts:
    """Verification by tokens of the forward, rows times nodes, and drafting by levels; growth and context play no part.

    Medians never fall with more work, as noise would have it.
    """

    def __init__(self) -> None:
        self._verify: dict[int, deque[float]] = {}
        self._draft: dict[int, deque[float]] = {}

    def learn(self, tokens: int, levels: int, verify_seconds: float, draft_seconds: float | None) -> None:
        """What one step took; None where the proposal took longer for another reason than its levels."""
        self._verify.setdefault(tokens, deque(maxlen=LATEST)).append(verify_seconds)
        if levels and draft_seconds is not None:
            self._draft.setdefault(levels, deque(maxlen=LATEST)).append(draft_seconds)

    def knows(self) -> bool:
        """Whether two widths and a proposal were seen; a line needs two points."""
        return len(self._verify) >= 2 and bool(self._draft)

    def verify(self, nodes: float, batch: int = 1, context: float | None = None) -> float:
        """Seconds of acceptance and commit included."""
        return interpolated(_rising(self._verify), nodes * batch)

    def draft(self, levels: float, nodes: float, batch: int = 1, growth: str = "fixed") -> float:
        """Seconds of a proposal of so many levels; nothing for nothing."""
        return interpolated([(0.0, 0.0), *_rising(self._draft)], levels)

    def overhead(self, tokens: float = 1.0) -> float:
        """Is in the verification's seconds."""
        return 0.0


def _rising(measured: dict[int, deque[float]]) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    for size, seconds in sorted(measured.items()):
        points.append((float(size), max(statistics.median(seconds), points[-1][1] if points else 0.0)))
    return points
