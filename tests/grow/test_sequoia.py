"""Sequoia's programme finds the best of all shapes, and the greedy construction agrees where it may be used."""

from __future__ import annotations

import random

import pytest

from specdec.errors import UnknownDrafter
from specdec.grow.sequoia import _backtracked, expected_tokens, sequoia_shape
from specdec.grow.shape import best_shape, greedy_shape
from tests.grow.reference import every_shape, shape_value
from tests.grow.test_shape import best_value


def vectors(count: int, width: int, *, sorted_: bool) -> list[tuple[float, ...]]:
    rng = random.Random(width)
    found = []
    for _ in range(count):
        raw = [rng.random() for _ in range(width + 1)]
        rates = [value / sum(raw) for value in raw[:width]]
        found.append(tuple(sorted(rates, reverse=True) if sorted_ else rates))
    return found


@pytest.mark.parametrize(("budget", "depth", "width"), [(1, 1, 1), (4, 2, 3), (6, 3, 2), (6, 6, 3), (7, 2, 4)])
@pytest.mark.parametrize("sorted_", [True, False], ids=["non-increasing", "any"])
def test_it_is_the_best_of_all_shapes(budget: int, depth: int, width: int, sorted_: bool) -> None:
    shapes = every_shape(budget, depth, width)
    assert len(shapes) == len(set(shapes))
    for acceptance in vectors(25, width, sorted_=sorted_):
        best = max(shape_value(paths, acceptance) for paths in shapes)
        shape = sequoia_shape(budget, depth, acceptance)
        assert expected_tokens(shape, acceptance) - 1 == pytest.approx(best, abs=1e-12)
        assert shape.num_nodes <= budget + 1
        assert (shape.depth <= depth, shape.width <= width, shape.has_gaps) == (True, True, False)


@pytest.mark.parametrize(("budget", "depth", "width"), [(24, 6, 5), (40, 4, 8), (64, 10, 6), (30, 30, 3)])
def test_programme_greedy_construction_and_another_recursion_have_one_value(
    budget: int, depth: int, width: int
) -> None:
    for acceptance in vectors(6, width, sorted_=True):
        programme = expected_tokens(_backtracked(budget, depth, acceptance), acceptance)
        greedy = expected_tokens(greedy_shape(budget, (acceptance,) * depth), acceptance)
        assert programme == pytest.approx(greedy, abs=1e-12)
        if budget <= 40:
            assert programme - 1 == pytest.approx(best_value(budget, depth, acceptance), abs=1e-12)


def test_the_greedy_construction_is_not_enough_for_a_vector_that_wiggles() -> None:
    """Which is why there is a programme: the greedy value is smaller for some vectors, never larger."""
    worse = 0
    for acceptance in vectors(40, 4, sorted_=False):
        programme = expected_tokens(sequoia_shape(9, 3, acceptance), acceptance)
        greedy = expected_tokens(best_shape(9, 3, acceptance), acceptance)
        assert greedy <= programme + 1e-12
        worse += greedy < programme - 1e-6
    assert worse > 0


def test_rates_of_zero_and_limits_on_the_width_are_kept() -> None:
    assert sequoia_shape(10, 4, (0.5, 0.0, 0.3), 1).topology.is_chain
    wiggling = sequoia_shape(10, 4, (0.3, 0.0, 0.6), 2)
    assert wiggling.width <= 2
    assert sequoia_shape(5, 2, (0.0, 0.4)).num_nodes <= 6


def test_the_largest_budget_takes_seconds_at_most() -> None:
    rates = tuple(vectors(1, 16, sorted_=False)[0])
    assert sequoia_shape(256, 8, rates).num_nodes == 257


@pytest.mark.parametrize("acceptance", [(1.2, 0.1), (), (-0.1,)])
def test_what_is_no_acceptance_vector_is_refused(acceptance: tuple[float, ...]) -> None:
    with pytest.raises(UnknownDrafter, match="from 0 to 1"):
        sequoia_shape(8, 3, acceptance)
