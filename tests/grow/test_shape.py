"""Tree shapes: the best one is the best, cuts keep what they should, and malformed tables are refused."""

from __future__ import annotations

from functools import cache

import pytest

from specdec.errors import UnknownDrafter
from specdec.grow.shape import DEFAULT_ACCEPTANCE, Child, Shape, best_shape, chain, shape_of


def value(shape: Shape, acceptance: tuple[float, ...]) -> float:
    """Expected accepted tokens: the sum over nodes of the product of rates along the path."""
    values = [1.0]
    for child in shape.children:
        values.append(values[child.parent] * acceptance[child.rank])
    return sum(values[1:])


def best_value(budget: int, depth: int, acceptance: tuple[float, ...]) -> float:
    """The same optimum by a dynamic programme over all trees: split the budget between a node's first child with its
    subtree, and the children of higher ranks."""

    @cache
    def below(nodes: int, levels: int, rank: int) -> float:
        if nodes == 0 or levels == 0 or rank == len(acceptance):
            return 0.0
        options = [0.0]
        for inside in range(nodes):
            child = acceptance[rank] * (1.0 + below(inside, levels - 1, 0))
            options.append(child + below(nodes - 1 - inside, levels, rank + 1))
        return max(options)

    return below(budget, depth, 0)


@pytest.mark.parametrize(
    "acceptance", [(0.6, 0.2, 0.1), (0.9, 0.05), (0.3, 0.3, 0.3), (0.5, 0.25, 0.12, 0.06), DEFAULT_ACCEPTANCE]
)
def test_no_tree_of_the_budget_is_worth_more(acceptance: tuple[float, ...]) -> None:
    for depth in (1, 2, 3, 5):
        for budget in range(depth + 1, 13):
            shape = best_shape(budget, depth, acceptance)
            assert shape.depth <= depth
            assert shape.num_nodes <= budget + 1
            assert value(shape, acceptance) == pytest.approx(best_value(budget, depth, acceptance), abs=1e-12)


def test_a_budget_within_the_depth_is_a_chain() -> None:
    for budget in range(1, 5):
        assert best_shape(budget, 4) == chain(budget)
        assert best_shape(budget, 4).topology.is_chain


def test_a_shape_is_in_level_order_with_lower_ranks_first() -> None:
    shape = best_shape(20, 5)
    depths = shape.topology.depths
    assert list(depths) == sorted(depths)
    assert [node for level in shape.levels for node in level] == list(range(21))
    for node, children in enumerate(shape.topology.children):
        assert [shape.children[child - 1].rank for child in children] == list(range(len(children)))
        assert all(child > node for child in children)


@pytest.mark.parametrize(("budget", "depth"), [(0, 3), (3, 0), (-1, 3), (3, -1)])
def test_a_tree_without_nodes_is_refused(budget: int, depth: int) -> None:
    with pytest.raises(UnknownDrafter, match="budget >= 1 and depth >= 1"):
        best_shape(budget, depth)


def test_a_cut_drops_what_is_too_deep_or_too_wide_and_nothing_else() -> None:
    shape = best_shape(24, 5)
    paths = _paths(shape)
    for depth in range(1, 7):
        for width in range(1, 9):
            kept = {path for path in paths if len(path) <= depth and max(path) < width}
            assert _paths(shape.up_to(depth, width)) == kept
    assert shape.up_to(5, 8) is shape


def _paths(shape: Shape) -> set[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for child in shape.children:
        paths.append((*paths[child.parent], child.rank))
    return set(paths[1:])


def test_a_table_of_paths_in_any_order_gives_one_shape() -> None:
    table: list[tuple[int, ...]] = [(0, 1), (1,), (0,), (0, 0), (0, 0, 0), (1,)]
    shape = shape_of(table)
    assert shape == shape_of(sorted(table))
    assert _paths(shape) == set(table)
    assert shape.children == (Child(0, 0), Child(0, 1), Child(1, 0), Child(1, 1), Child(3, 0))
    assert (shape.num_nodes, shape.depth, shape.width) == (6, 3, 2)
    assert shape.levels == ((0,), (1, 2), (3, 4), (5,))


def test_a_list_of_leaves_gets_its_prefixes() -> None:
    leaves = [[0, 0, 0], [0, 1], [1, 0], [2]]
    assert shape_of(leaves) == shape_of([(0,), (0, 0), (0, 0, 0), (0, 1), (1,), (1, 0), (2,)])


def test_a_rank_may_be_left_out_and_the_shape_says_so() -> None:
    assert shape_of([(0,), (2,), (2, 1)]).has_gaps
    assert shape_of([(1,)]).has_gaps
    assert not shape_of([(0,), (1,), (1, 0), (1, 1)]).has_gaps
    assert not best_shape(20, 4).has_gaps


@pytest.mark.parametrize("table", [[()], [(0,), ()], [(-1,)], [(0, 1.0)], [("0",)], [(True,)]])
def test_a_table_of_something_else_than_paths_is_refused(table: list) -> None:
    with pytest.raises(UnknownDrafter, match="non-empty lists of ranks"):
        shape_of(table)


def test_an_empty_shape_has_only_a_root() -> None:
    assert (Shape(()).num_nodes, Shape(()).depth, Shape(()).width) == (1, 0, 0)
