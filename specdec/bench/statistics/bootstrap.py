"""Intervals by resampling prompts: a cluster bootstrap whose every statistic is a function of sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.bench.statistics.student import t_quantile

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0
FEWEST = 4
"""Units below which there is no interval: Student's t of one or two degrees of freedom says nothing of use."""
METHOD = (
    f"95 % by bootstrap over prompts, {RESAMPLES:,} resamples, seed {SEED}: prompts are drawn with replacement within "
    "each column, their repeats and turns with them, and prompts that were timed in one batch together; the interval "
    "is Student's t times the standard deviation of the resampled logarithm, corrected for the number of prompts. "
    f"Fewer than {FEWEST} prompts or batches have no interval."
)

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""From sums [..., k] to values [...]."""


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `low` and `high` are None with fewer units than FEWEST."""

    value: float
    low: float | None
    high: float | None
    units: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def estimate(
    columns: Floats,
    statistic: Statistic,
    units: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """A statistic of column sums, with its interval over resampled units.

    Args:
        columns: [n, k], one row a prompt.
        statistic: positive function of the sums of the columns, vectorised over leading dimensions.
        units: [n] what each row is resampled with.
        strata: [n] rows of different strata are resampled apart; None for one stratum. Used only where every
            stratum has two units or more, since a stratum of one would count as known exactly.
        resamples: number of resamples.
        seed: of the generator; the same units give the same draws, so methods are compared on the same resamples.
    """
    sums, sizes = unit_sums(columns, units, strata)
    value = float(statistic(sums.sum(axis=0)))
    if len(sums) < FEWEST or not 0 < value < math.inf:
        return Estimate(value, None, None, len(sums))
    logs = np.log(statistic(draws(tuple(sizes), resamples, seed) @ sums))
    reach = math.exp(widening(len(sums), len(sizes)) * float(logs[np.isfinite(logs)].std()))
    return Estimate(value, value / reach, value * reach, len(sums))


def unit_sums(
    columns: Floats, units: Sequence[Hashable], strata: Sequence[Hashable] | None = None
) -> tuple[Floats, list[int]]:
    """Column sums of each unit [u, k], ordered by stratum, and the number of units of each stratum."""
    of_unit: dict[Hashable, Floats] = {}
    stratum_of: dict[Hashable, Hashable] = {}
    for index, unit in enumerate(units):
        of_unit[unit] = of_unit[unit] + columns[index] if unit in of_unit else columns[index]
        stratum_of.setdefault(unit, None if strata is None else strata[index])
    by_stratum: dict[Hashable, list[Hashable]] = {}
    for unit, stratum in stratum_of.items():
        by_stratum.setdefault(stratum, []).append(unit)
    if any(len(members) < 2 for members in by_stratum.values()):
        by_stratum = {None: list(of_unit)}
    ordered = [unit for members in by_stratum.values() for unit in members]
    return np.stack([of_unit[unit] for unit in ordered]), [len(members) for members in by_stratum.values()]


@lru_cache(maxsize=8)
def draws(sizes: tuple[int, ...], resamples: int, seed: int) -> Floats:
    """How often each unit is drawn [resamples, sum(sizes)]: as many draws from each stratum as it has units."""
    generator = np.random.default_rng(seed)
    parts = [generator.multinomial(size, np.full(size, 1 / size), size=resamples) for size in sizes]
    return np.concatenate(parts, axis=1).astype(np.float64)


@lru_cache
def widening(units: int, strata: int) -> float:
    """Half of an interval's width in standard deviations of the resampled values.

    A resample varies less than the sample by (units - strata) / units, and few units need Student's t (Hesterberg,
    What Teachers Should Know About the Bootstrap, The American Statistician 69, 2015: t with bootstrap standard error).
    Quantiles of the resamples instead cover too little with few prompts: 93 % of the time at 6.
    """
    freedom = units - strata
    return math.sqrt(units / freedom) * t_quantile(0.5 + CONFIDENCE / 2, freedom)


def quotient(sums: Floats) -> Floats:
    """First sum over second: the statistic of every ratio."""
    return sums[..., 0] / sums[..., 1]
