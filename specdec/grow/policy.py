"""The seam between a growth policy and a drafter that runs a model: frontiers go down, logits come back.

A policy decides which nodes a tree has; it never runs a model itself. It hands a `Frontier` of nodes to the drafter's
`expand`, one draft forward for all rows of the batch, and gets the draft logits at those nodes. Rows may have
different nodes: frontiers are padded. The drafter numbers nodes by *column*, the order in which they were expanded,
and the policy says at the end which node of the tree is which column.

Dimensions: B rows, F nodes of a frontier, C columns, N nodes of the tree, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE, TokenTree, topology


@dataclass(frozen=True)
class Frontier:
    """Nodes to run through a draft model at once.

    Attributes:
        tokens: [B, F] ids; those of padding are arbitrary but valid.
        parents: [B, F] on the host: the column of each node's parent, NO_NODE for the root and for padding.
        depths: [B, F] on the host: distance from the root, 0 for padding.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor

    @staticmethod
    def of_roots(root: Tensor) -> Frontier:
        """The first frontier of every growth: column 0."""
        alone = torch.full((root.shape[0], 1), NO_NODE)
        return Frontier(root[:, None], alone, torch.zeros_like(alone))


Expand = Callable[[Frontier], Tensor | None]
"""Runs a frontier; returns draft logits [B, F, V]. Its nodes become the next F columns.

None ends growth: no node of this frontier gets children. The first frontier is never refused.
"""


@dataclass(frozen=True)
class Grown:
    """What a policy made.

    Attributes:
        tree: the proposal.
        columns: per row and node, the column as which the node was expanded; NO_NODE where it never was.
    """

    tree: TokenTree
    columns: list[list[int]]

    def up_to_depths(self, depths: list[int]) -> Grown:
        """Without the nodes below each row's depth. The others move to the front of their row, in order."""
        tree = self.tree.up_to_depths(depths)
        if tree is self.tree:
            return self
        columns = []
        for shape, row, depth in zip(self.tree.shapes, self.columns, depths, strict=True):
            live = [n for n, parent in enumerate(shape.parents) if n == 0 or parent != NO_NODE]
            kept = [row[n] for n in live if shape.depths[n] <= depth]
            columns.append([*kept, *[NO_NODE] * (tree.num_nodes - len(kept))])
        return Grown(tree, columns)


class GrowthPolicy(Protocol):
    """How a tree takes its shape."""

    @property
    def depth(self) -> int:
        """Most levels, and most calls of `expand`."""
        ...

    @property
    def is_chain(self) -> bool:
        """True when no node can get two children."""
        ...

    def grow(
        self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int, expand: Expand, most_children: int
    ) -> Grown:
        """Trees below the roots [B], at most `room` (>= 1) deep; the first frontier is that of the roots.

        Args:
            root: [B].
            params: the draft law of drawn children is warped with the same values as the target's.
            chooser: source of the draws.
            room: most levels.
            expand: runs the draft model.
            most_children: tokens that the draft model knows; no node can have more children.
        """
        ...

    def observe(self, tree: TokenTree, nodes: list[list[int]]) -> None:
        """See what verification kept of a scored tree: per row the accepted nodes, root first."""
        ...


class Columns:
    """What each column sees, kept by a drafter beside its cache while a tree grows."""

    def __init__(self, batch_size: int) -> None:
        self.sees = torch.zeros(batch_size, 0, 0, dtype=torch.bool)

    @property
    def count(self) -> int:
        """C."""
        return self.sees.shape[1]

    def append(self, frontier: Frontier) -> Tensor:
        """Bool [B, F, C + F]: which columns each node of the frontier sees, itself and its ancestors."""
        rows, added = frontier.parents.shape
        old = self.count
        sees = torch.zeros(rows, added, old + added, dtype=torch.bool)
        if old:
            above = self.sees.gather(1, frontier.parents.clamp(min=0)[:, :, None].expand(-1, -1, old))
            sees[:, :, :old] = above & (frontier.parents != NO_NODE)[:, :, None]
        sees[:, :, old:] = torch.eye(added, dtype=torch.bool)
        self.sees = torch.cat([torch.nn.functional.pad(self.sees, (0, added)), sees], 1)
        return sees


def assembled(
    root: Tensor, tokens: list[list[int]], parents: list[list[int]], laws: list[Tensor] | None, columns: list[list[int]]
) -> Grown:
    """A tree and its columns from each row's nodes below the root, rows padded to the longest.

    Args:
        root: [B].
        tokens: per row, the nodes' tokens.
        parents: per row, the nodes' parents as node numbers; the first entry is of node 1.
        laws: for drawn children, the log-laws [B, F, V] of each frontier.
        columns: per row, the nodes' columns, NO_NODE for those never expanded.
    """
    width = max(map(len, tokens))
    padded = [[*row, *[0] * (width - len(row))] for row in tokens]
    drafted = torch.tensor(padded, dtype=root.dtype, device=root.device).reshape(len(tokens), width)
    shapes = tuple(topology((NO_NODE, *row, *[NO_NODE] * (width - len(row)))) for row in parents)
    whole = [[0, *row, *[NO_NODE] * (width - len(row))] for row in columns]
    log_q = None if laws is None else _laws_of_nodes(laws, whole, parents)
    return Grown(TokenTree(torch.cat([root[:, None], drafted], 1), shapes, log_q), whole)


def _laws_of_nodes(laws: list[Tensor], columns: list[list[int]], parents: list[list[int]]) -> Tensor:
    """Log-laws [B, N, V] of the nodes that have children, from those of the frontiers; 0 elsewhere."""
    rows, nodes, size = len(columns), len(columns[0]), laws[0].shape[2]
    log_q = laws[0].new_zeros(rows * nodes, size)
    inner = [(b * nodes + n, b, columns[b][n]) for b in range(rows) for n in sorted({0, *parents[b]})]
    first = 0
    for law in laws:
        width = law.shape[1]
        here = [(to, b * width + column - first) for to, b, column in inner if first <= column < first + width]
        first += width
        if here:
            to, source = torch.tensor(here, device=law.device).unbind(1)
            log_q.index_copy_(0, to, law.reshape(-1, size).index_select(0, source))
    return log_q.view(rows, nodes, size)
