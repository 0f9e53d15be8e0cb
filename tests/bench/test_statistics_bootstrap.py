"""Intervals: the vectorised bootstrap against the slow obvious one, and their promise on data whose answer is known."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from specdec.bench.statistics.bootstrap import Estimate, draws, estimate, quotient, unit_sums, widening
from specdec.bench.statistics.null import against_itself, at_most
from specdec.bench.statistics.sample import samples_of, units_of
from specdec.bench.statistics.speedup import geometric_mean, pair_up
from specdec.bench.statistics.student import t_cdf, t_quantile
from tests.bench.synthetic import random_run


def slow_interval(ratios: list[list[float]], resamples: int, seed: int) -> tuple[float, float]:
    """The obvious bootstrap of a geometric mean: draw prompts with replacement in each stratum, one by one."""
    chance, values = random.Random(seed), []
    for _ in range(resamples):
        drawn = [chance.choice(stratum) for stratum in ratios for _ in stratum]
        values.append(math.exp(sum(map(math.log, drawn)) / len(drawn)))
    units = sum(map(len, ratios))
    reach = math.exp(statistics.pstdev(map(math.log, values)) * widening(units, len(ratios)))
    value = math.exp(statistics.mean(math.log(ratio) for stratum in ratios for ratio in stratum))
    return value / reach, value * reach


def test_the_vectorised_bootstrap_agrees_with_the_obvious_one():
    # 4000 resamples know a standard deviation to 1.1 %, here 0.002 of each end; ten such errors are allowed.
    ratios = [[1.2, 1.5, 0.9, 1.1, 1.4], [2.0, 2.2, 1.9, 2.4]]
    columns = np.array([[1.0, math.log(ratio)] for stratum in ratios for ratio in stratum])
    strata = [index for index, stratum in enumerate(ratios) for _ in stratum]
    fast = estimate(columns, lambda sums: np.exp(sums[..., 1] / sums[..., 0]), range(9), strata, resamples=20_000)
    low, high = slow_interval(ratios, 4000, 1)
    assert fast.low == pytest.approx(low, abs=0.02)
    assert fast.high == pytest.approx(high, abs=0.02)
    assert fast.value == pytest.approx(math.prod([*ratios[0], *ratios[1]]) ** (1 / 9))


def test_every_resample_draws_as_many_units_of_a_stratum_as_there_are():
    counts = draws((3, 5), 200, 4)
    assert counts.shape == (200, 8)
    assert (counts[:, :3].sum(1) == 3).all()
    assert (counts[:, 3:].sum(1) == 5).all()
    assert counts.std() > 0.5


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    columns = np.random.default_rng(0).normal(2, 0.3, (12, 1)).repeat(2, axis=1) * [1, 0] + [0, 1]
    first, again, other = (estimate(columns, quotient, range(12), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_rows_of_a_unit_are_resampled_together():
    rows = np.array([[1.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    sums, sizes = unit_sums(rows, ["a", "b", "a"])
    assert sums.tolist() == [[5.0, 2.0], [2.0, 1.0]]
    assert sizes == [2]


def test_a_stratum_of_one_unit_would_count_as_known_so_strata_are_given_up():
    assert unit_sums(np.ones((3, 1)), [1, 2, 3], ["x", "x", "y"])[1] == [3]
    assert unit_sums(np.ones((4, 1)), [1, 2, 3, 4], ["x", "x", "y", "y"])[1] == [2, 2]


def test_fewer_than_four_units_have_a_value_and_no_interval():
    rows = np.array([[3.0, 2.0], [3.0, 2.0], [3.0, 2.5], [3.0, 1.5]])
    assert estimate(rows[:1], quotient, [1]) == Estimate(1.5, None, None, 1)
    assert estimate(rows[:3], quotient, [1, 2, 3]).low is None
    assert estimate(rows, quotient, [1, 2, 3, 4]).low is not None
    assert estimate(rows, quotient, [1, 2, 3, 3]).low is None


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (9, 2.262), (29, 2.045), (474, 1.965)])
def test_students_quantiles_are_those_of_the_tables(freedom: int, quantile: float):
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=6e-4)
    assert t_cdf(-quantile, freedom) == pytest.approx(0.025, abs=2e-5)


def test_few_prompts_widen_the_interval_and_many_come_to_the_normal_law():
    assert widening(2, 1) == pytest.approx(math.sqrt(2) * 12.706, abs=1e-3)
    assert widening(10, 1) > widening(40, 1) > widening(10_000, 1) == pytest.approx(1.96, abs=1e-3)
    assert widening(40, 6) > widening(40, 1)


def contains_one(seed: int, prompts: int) -> bool:
    """Whether the interval of plain against a second measurement of plain contains 1."""
    samples = samples_of(random_run(seed, {"plain": (0, 0)}, questions=prompts, repeats=2))
    halves = [[sample for sample in samples if sample.record["repeat"] == repeat] for repeat in (0, 1)]
    found = geometric_mean(pair_up(*halves), units_of(samples))
    return (found.low or 0) <= 1 <= (found.high or 0)


@pytest.mark.parametrize("prompts", [10, 30])
def test_the_baseline_against_itself_contains_one_in_eighteen_of_twenty_runs(prompts: int):
    # Twenty times twenty runs. Intervals that cover 95 % of the time contain 1 in 18 or more of 20 runs with
    # probability 0.925, so fewer than 15 such twenties of 20 have probability 0.003, and fewer than 368 of all 400 runs
    # 0.004. The seeds are fixed: the outcome does not vary.
    batches = [sum(contains_one(20 * batch + run, prompts) for run in range(20)) for batch in range(20)]
    assert sum(contained >= 18 for contained in batches) >= 15
    assert sum(batches) >= 368


def test_intervals_that_are_too_narrow_fail_that_test():
    # At a coverage of 85 %, 15 twenties of 20 with 18 or more have probability 0.002.
    twenty = 1 - at_most(17, 20, 0.95)
    assert twenty == pytest.approx(0.9245, abs=1e-4)
    assert at_most(14, 20, twenty) == pytest.approx(0.0028, abs=1e-4)
    assert 1 - at_most(14, 20, 1 - at_most(17, 20, 0.85)) < 2e-3


def test_an_interval_around_a_true_difference_leaves_one_out():
    samples = samples_of(random_run(3, {"plain": (0, 0), "draft": (0.9, 4)}, questions=20))
    halves = [[sample for sample in samples if sample.record["method"] == name] for name in ("plain", "draft")]
    found = geometric_mean(pair_up(*halves), units_of(samples))
    assert found.low is not None
    assert found.low > 1.1


TWICE = {"plain": (0.0, 0), "plain-again": (0.0, 0)}


def halves_of(records):
    samples = samples_of(records)
    return ([s for s in samples if s.record["method"] == name] for name in TWICE)


def test_the_baseline_measured_twice_in_turns_shows_the_same_on_a_real_run():
    found = against_itself(*halves_of(random_run(11, TWICE, questions=8, repeats=7)))
    assert len(found["estimates"]) == 7
    assert found["containing_one"] == sum(e["low"] <= 1 <= e["high"] for e in found["estimates"])
    assert found["odds"] == pytest.approx(at_most(found["containing_one"], 7, 0.95))


def test_a_machine_that_becomes_slower_between_repeats_does_not_matter():
    records = random_run(12, TWICE, questions=8, repeats=4, noise=0.01)
    before = against_itself(*halves_of(records))["containing_one"]
    for record in records:
        record["seconds"]["total"] *= 1.5 ** record["repeat"]
    assert against_itself(*halves_of(records))["containing_one"] == before >= 3


def test_a_second_baseline_that_is_slower_is_found_out():
    records = random_run(12, TWICE, questions=8, repeats=4, noise=0.01)
    for record in records:
        record["seconds"]["total"] *= 1.1 if record["method"] == "plain-again" else 1.0
    found = against_itself(*halves_of(records))
    assert found["containing_one"] == 0
    assert found["odds"] == pytest.approx(0.05**4)
