"""The baseline against itself: how often an interval wrongly sees a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from specdec.bench.statistics.bootstrap import CONFIDENCE, FEWEST
from specdec.bench.statistics.sample import Sample, units_of
from specdec.bench.statistics.speedup import geometric_mean, pair_up


def against_itself(samples: Sequence[Sample]) -> dict[str, Any]:
    """Speed-ups of the baseline over itself: repeats 0 and 1, 2 and 3, ... as if each were a method of its own.

    Args:
        samples: the baseline's, from a run with an even number of repeats; an odd last one is left out.

    Returns:
        estimates: one geometric mean with its interval for each pair of repeats.
        containing_one: how many of these intervals contain 1.
        odds: probability that so few or fewer do, when nothing differs and an interval keeps its promise; a small
            number says that the intervals are too narrow.
    """
    repeats = sorted({sample.record["repeat"] for sample in samples})
    units = units_of(samples)
    estimates = []
    for first, second in zip(repeats[::2], repeats[1::2], strict=False):
        halves = ([s for s in samples if s.record["repeat"] == repeat] for repeat in (first, second))
        pairs = pair_up(*halves)
        if len({units[pair.question] for pair in pairs}) >= FEWEST:
            estimates.append(geometric_mean(pairs, units))
    containing = sum((e.low or 0.0) <= 1 <= (e.high or 0.0) for e in estimates)
    return {
        "estimates": [estimate.as_dict() for estimate in estimates],
        "containing_one": containing,
        "odds": at_most(containing, len(estimates), CONFIDENCE),
    }


def at_most(successes: int, tries: int, probability: float) -> float:
    """P(X <= successes) of a binomial law: small where so few successes would be an accident."""
    return sum(
        math.comb(tries, k) * probability**k * (1 - probability) ** (tries - k)
        for k in range(min(successes, tries) + 1)
    )
