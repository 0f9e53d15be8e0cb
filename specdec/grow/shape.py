"""Fixed tree shapes: which child ranks are tried at which depth, the same in every step.

A node's value is the product of acceptance rates along its path, where the j-th child of any node is the
accepted one with probability `acceptance[j]`. For a non-increasing vector, taking the open slot of largest
value until the budget is spent is optimal: it equals Sequoia's dynamic programme (arXiv 2402.12374).
"""

from __future__ import annotations

import heapq
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
    """The `budget` proposed nodes of largest value, at most `depth` levels deep.

    Raises:
        UnknownDrafter: budget or depth out of range.
    """
    if budget < 1 or depth < 1:
        raise UnknownDrafter(f"a tree needs budget >= 1 and depth >= 1, got budget={budget}, depth={depth}")
    if budget > MAX_BUDGET:
        raise UnknownDrafter(f"a tree takes a budget of at most {MAX_BUDGET} nodes, got budget={budget}")
    if budget <= depth:
        return chain(budget)
    ranks = [max(acceptance[j:]) for j in range(len(acceptance))]  # a histogram's tail may wiggle
    open_slots: list[tuple[float, tuple[int, ...]]] = [(-ranks[0], (0,))]
    taken: list[tuple[int, ...]] = []
    while open_slots and len(taken) < budget:
        value, path = heapq.heappop(open_slots)
        taken.append(path)
        if path[-1] + 1 < len(ranks):
            sibling = value / ranks[path[-1]] * ranks[path[-1] + 1]
            heapq.heappush(open_slots, (sibling, (*path[:-1], path[-1] + 1)))
        if len(path) < depth:
            heapq.heappush(open_slots, (value * ranks[0], (*path, 0)))
    return shape_of(taken)


def shape_of(paths: list[tuple[int, ...]]) -> Shape:
    """The shape with these nodes, each given by the ranks from the root down, as in Medusa's tables.

    Raises:
        ValueError: a node without its parent, or a rank without the ranks before it.
    """
    ordered = sorted(set(paths), key=lambda path: (len(path), path))
    index: dict[tuple[int, ...], int] = {(): 0}
    children = []
    for path in ordered:
        if path[:-1] not in index or (path[-1] > 0 and (*path[:-1], path[-1] - 1) not in index):
            raise ValueError(f"node {path} needs its parent and its lower-ranked siblings in the list")
        children.append(Child(index[path[:-1]], path[-1]))
        index[path] = len(children)
    return Shape(tuple(children))
