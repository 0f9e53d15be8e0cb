"""Fixed tree shapes: which child ranks are tried at which depth, the same in every step.

A node's value is the product of acceptance rates along its path. With one rate for each rank, taking the open slot
of largest value until the budget is spent is optimal for a non-increasing vector: it equals Sequoia's dynamic
programme (arXiv 2402.12374; `sequoia` has that one, for any vector). With a rate for each depth and rank, the same
greedy construction is that of Medusa's tables (arXiv 2401.10774).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from specdec.errors import UnknownDrafter
from specdec.tree import NO_NODE, Topology, topology

DEFAULT_ACCEPTANCE = (0.6, 0.15, 0.07, 0.04, 0.03, 0.02, 0.015, 0.01)
"""Measured order of magnitude for small draft models; the tail is a guess that only ranks slots."""

MAX_BUDGET = 1024
"""More nodes than this cost more than they bring on any machine; a typing error more likely."""


class Child(NamedTuple):
    """A node other than the root: its parent and its rank among the parent's children, 0 for the best."""

    parent: int
    rank: int


@dataclass(frozen=True)
class Shape:
    """A tree in level order: `children[n - 1]` describes node n; parents and lower ranks come first."""

    children: tuple[Child, ...]

    @cached_property
    def topology(self) -> Topology:
        """The same as a Topology."""
        return topology((NO_NODE, *(child.parent for child in self.children)))

    @property
    def num_nodes(self) -> int:
        """Nodes with the root."""
        return len(self.children) + 1

    @cached_property
    def depth(self) -> int:
        """Levels below the root."""
        return max(self.topology.depths)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Nodes by depth, from the root's own level on."""
        levels: list[list[int]] = [[] for _ in range(self.depth + 1)]
        for node, depth in enumerate(self.topology.depths):
            levels[depth].append(node)
        return tuple(map(tuple, levels))

    @cached_property
    def width(self) -> int:
        """Most children of any node."""
        return max((child.rank + 1 for child in self.children), default=0)

    @cached_property
    def has_gaps(self) -> bool:
        """Whether some node has a child of some rank without those of all lower ranks."""
        seen = {(child.parent, child.rank) for child in self.children}
        return any(child.rank and (child.parent, child.rank - 1) not in seen for child in self.children)

    def up_to(self, depth: int, width: int) -> Shape:
        """Without nodes below `depth` and without ranks of `width` or more."""
        return _cut(self, depth, width)


@lru_cache(maxsize=512)
def _cut(shape: Shape, depth: int, width: int) -> Shape:
    if shape.depth <= depth and shape.width <= width:
        return shape
    index, children = {0: 0}, []
    for node, child in enumerate(shape.children, 1):
        if child.parent in index and child.rank < width and shape.topology.depths[node] <= depth:
            index[node] = len(children) + 1
            children.append(Child(index[child.parent], child.rank))
    return Shape(tuple(children))


def chain(depth: int) -> Shape:
    """A tree of width 1."""
    return Shape(tuple(Child(node, 0) for node in range(depth)))


@lru_cache(maxsize=256)
def best_shape(budget: int, depth: int, acceptance: tuple[float, ...] = DEFAULT_ACCEPTANCE) -> Shape:
    """The `budget` proposed nodes of largest value, at most `depth` levels deep; `acceptance` is by rank.

    A budget within the depth asks for a chain, and gets one.

    Raises:
        UnknownDrafter: budget or depth out of range, or rates that are no probabilities.
    """
    check_limits(budget, depth)
    if budget <= depth:
        return chain(budget)
    ranks = tuple(max(acceptance[j:]) for j in range(len(acceptance)))  # a histogram's tail may wiggle
    return greedy_shape(budget, (ranks,) * depth)


@lru_cache(maxsize=64)
def greedy_shape(budget: int, accuracy: tuple[tuple[float, ...], ...]) -> Shape:
    """Medusa's construction: of all next siblings and first children of the nodes so far, take the most valuable.

    Args:
        budget: most proposed nodes; fewer where the table has fewer.
        accuracy: by depth, then by rank: how often that guess is right. As many levels as there are rows.

    Raises:
        UnknownDrafter: a budget out of range, or rates that are no probabilities.
    """
    check_limits(budget, len(accuracy))
    if not all(row and all(0 <= rate <= 1 for rate in row) for row in accuracy):
        raise UnknownDrafter("acceptance rates are numbers from 0 to 1, at least one for each depth")
    open_slots: list[tuple[float, tuple[int, ...], float]] = [(-accuracy[0][0], (0,), 1.0)]
    taken: list[tuple[int, ...]] = []
    while open_slots and len(taken) < budget:
        negative, path, parent_value = heapq.heappop(open_slots)
        taken.append(path)
        level, rank = len(path), path[-1] + 1
        if rank < len(accuracy[level - 1]):
            sibling = parent_value * accuracy[level - 1][rank]
            heapq.heappush(open_slots, (-sibling, (*path[:-1], rank), parent_value))
        if level < len(accuracy):
            heapq.heappush(open_slots, (negative * accuracy[level][0], (*path, 0), -negative))
    return shape_of(taken)


def check_limits(budget: int, depth: int) -> None:
    """Refuse trees without nodes or levels, and budgets that can only be a mistake.

    Raises:
        UnknownDrafter: budget or depth out of range.
    """
    if budget < 1 or depth < 1:
        raise UnknownDrafter(f"a tree needs budget >= 1 and depth >= 1, got budget={budget}, depth={depth}")
    if budget > MAX_BUDGET:
        raise UnknownDrafter(f"a tree takes a budget of at most {MAX_BUDGET} nodes, got budget={budget}")


def shape_of(paths: Sequence[Sequence[int]]) -> Shape:
    """The shape with these nodes, each given by the ranks from the root down, as in Medusa's tables.

    Prefixes are added, so a list of leaves is enough. A rank may be left out; such a shape takes chosen children only.

    Raises:
        UnknownDrafter: a path that is empty or holds something else than ranks.
    """
    if not all(path and all(type(rank) is int and rank >= 0 for rank in path) for path in paths):
        raise UnknownDrafter("a tree's paths are non-empty lists of ranks, 0 for the best guess, such as [[0], [0, 1]]")
    closed = {tuple(path[:depth]) for path in paths for depth in range(1, len(path) + 1)}
    index: dict[tuple[int, ...], int] = {(): 0}
    children = []
    for path in sorted(closed, key=lambda path: (len(path), path)):
        children.append(Child(index[path[:-1]], path[-1]))
        index[path] = len(children)
    return Shape(tuple(children))
