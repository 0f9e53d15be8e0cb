"""The baseline against itself: how often an interval wrongly sees a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from specdec.bench.statistics.bootstrap import CONFIDENCE, FEWEST
from specdec.bench.statistics.sample import Sample, units_of
from specdec.bench.statistics.speedup import geometric_mean, pair_up


def against_itself(samples: Sequence[Sample], again: Sequence[Sample]) -> dict[str, Any]:
    """Speed-ups of the baseline over itself, measured as those of any method: in turns on each prompt.

    Two repeats would not do: they lie minutes apart, and a machine that has become busier in between slows every prompt
    alike, which no interval over prompts can know of. Turns are what keeps that out of a comparison.

    Args:
        samples: the baseline's.
        again: those of the same generation under a second name in the same run.

    Returns:
        estimates: one geometric mean with its interval for each repeat.
        containing_one: how many of these intervals contain 1.
        odds: probability that so few or fewer do, when nothing differs and an interval keeps its promise; a small
            number says that the intervals are too narrow.
    """
    units = units_of(samples)
    estimates = []
    for repeat in sorted({sample.record["repeat"] for sample in samples}):
        halves = ([s for s in half if s.record["repeat"] == repeat] for half in (samples, again))
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
