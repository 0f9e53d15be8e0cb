"""Who sees what in one forward of a context: row ends, depths and ancestors, from which every kind of mask is made.

A query sees a committed column of its row unless that lies beyond its layer's reach, and a tree column where `sees`
says so and within that reach. Positions are logical: left padding and dead columns do not count.

Dimensions: B sequences, Q query nodes, W tree columns, C columns, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specdec.tree import Topology, stacked

Sees = Tensor | tuple[Topology, ...]
"""Which tree columns each query sees: bool [B, Q, W] on the host, or each row's topology where all its nodes run."""


@dataclass(frozen=True)
class Reach:
    """How far back a layer attends: everywhere, within a sliding window, or within its own chunk."""

    window: int | None = None
    chunk: int | None = None

    @property
    def is_limited(self) -> bool:
        """False for full attention."""
        return self.window is not None or self.chunk is not None

    def first_seen(self, positions: Tensor) -> Tensor:
        """The earliest position that queries at these positions see; never later for an earlier query."""
        if self.window is not None:
            return positions - self.window + 1
        assert self.chunk is not None
        return positions // self.chunk * self.chunk


@dataclass(frozen=True)
class Visibility:
    """One forward.

    Attributes:
        starts, lengths: row b's committed columns are [starts[b], lengths[b]).
        column_depths: [B, W] on the host: depths of the tree's columns.
        depths: [B, Q] on the host: depths of the queries.
        sees: which tree columns each query sees.
        handed_out: columns that attention is given, at least C.
    """

    starts: list[int]
    lengths: list[int]
    column_depths: Tensor
    depths: Tensor
    sees: Sees
    handed_out: int

    @property
    def base(self) -> int:
        """The first tree column."""
        return max(self.lengths, default=0)

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.depths.shape[1]

    @property
    def tree_width(self) -> int:
        """W."""
        return self.column_depths.shape[1]

    @property
    def width(self) -> int:
        """C = base + W."""
        return self.base + self.tree_width

    @cached_property
    def ends(self) -> Tensor:
        """[B]: how many positions are committed, which is the position of depth 0."""
        return torch.tensor([length - start for length, start in zip(self.lengths, self.starts, strict=True)])

    def ancestors(self) -> Tensor:
        """`sees` as bool [B, Q, W] on the host."""
        return self.sees if isinstance(self.sees, Tensor) else stacked([shape.ancestors for shape in self.sees])

    def first_columns(self, reach: Reach, depths: Tensor) -> Tensor:
        """[B, Q]: the first committed column that queries of these depths [B, Q] see."""
        starts = torch.tensor(self.starts)[:, None]
        if not reach.is_limited:
            return starts.expand_as(depths)
        return torch.maximum(starts, starts + reach.first_seen(self.ends[:, None] + depths))

    def tree_beyond(self, reach: Reach) -> Tensor | None:
        """Bool [B, Q, W]: tree columns beyond the reach; None when the whole tree lies within, as nearly always."""
        if not reach.is_limited:
            return None
        last = self.ends + int(self.depths.max())
        if bool((reach.first_seen(last) <= self.ends).all()):
            return None
        first = reach.first_seen(self.ends[:, None] + self.depths)
        return (self.ends[:, None] + self.column_depths)[:, None, :] < first[:, :, None]

    def dense(self, reach: Reach) -> Tensor:
        """Bool [B, Q, C] on the host: the plain definition, at the cost of the whole past."""
        column = torch.arange(self.base)
        live = column < torch.tensor(self.lengths)[:, None, None]
        committed = live & (column >= self.first_columns(reach, self.depths)[:, :, None])
        tree, beyond = self.ancestors(), self.tree_beyond(reach)
        return torch.cat([committed, tree if beyond is None else tree & ~beyond], 2)
