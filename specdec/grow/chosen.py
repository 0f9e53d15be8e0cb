"""Trees of chosen children that follow the draft law: the nodes of largest value, found level by level.

A node's value is the product along its path of what each child is worth: its draft probability (EAGLE-2, OPT-Tree,
best-first), or a measured acceptance (see calibration). Values never grow downwards, so the nodes of largest value
hang together. A node outside the best `budget` so far cannot have a descendant inside, and is not expanded.

Chosen children are lossless with the walk whatever the rule that chose them.

Dimensions: B rows, F nodes of a frontier, K children looked at for each, P nodes of the pool, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from specdec.grow.policy import Expand, Frontier, Grown, assembled
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE, TokenTree

Worth = Callable[[Tensor], Tensor]
"""Draft probabilities [B, F, K] of children in rank order -> what each multiplies its parent's value with, 0 to 1."""


class ChosenGrowth:
    """Expand level by level, then keep the `budget` nodes of largest value.

    Args:
        budget: most proposed nodes.
        depth: most levels.
        width: most children of a node.
        beam: most nodes to expand on one level; None for all that may still matter, which makes the tree the best
            one of its budget.
        least_gain: stop below a level that raised the value of the best `budget` nodes by less than this.
        least_value: nodes of smaller value are left out, even where the budget has room.
        worth: the value of a child beside its parent's; by default its draft probability.
    """

    def __init__(
        self,
        budget: int,
        depth: int,
        width: int,
        *,
        beam: int | None = None,
        least_gain: float = 0.0,
        least_value: float = 0.0,
        worth: Worth | None = None,
    ) -> None:
        self.budget, self.depth, self.width = budget, depth, width
        self.beam, self.least_gain, self.least_value, self.worth = beam, least_gain, least_value, worth

    @property
    def is_best_first(self) -> bool:
        """Whether the tree is the best one of its budget by draft probability alone."""
        return self.beam is None and self.least_gain == 0 and self.least_value == 0 and self.worth is None

    @property
    def is_chain(self) -> bool:
        """Only when nodes may have one child."""
        return self.width == 1

    def grow(
        self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int, expand: Expand, most_children: int
    ) -> Grown:
        """Draws nothing: temperature plays no part."""
        return self.grow_pool(root, room, expand, most_children).tree(root)

    def observe(self, tree: TokenTree, nodes: list[list[int]]) -> None:
        """Learns nothing."""

    def grow_pool(self, root: Tensor, room: int, expand: Expand, most_children: int) -> Pool:
        """Every candidate that was looked at, with its value."""
        pool = Pool(root, self.budget, self.least_value)
        frontier: Frontier | None = Frontier.of_roots(root)
        value = torch.zeros(root.shape[0])
        levels = min(self.depth, room)
        for level in range(1, levels + 1):
            assert frontier is not None
            logits = expand(frontier)
            if logits is None:
                pool.take_back()
                break
            pool.add(*self._children(logits, min(self.width, most_children)))
            gain, value = pool.value() - value, pool.value()
            goes_on = gain >= self.least_gain if self.least_gain > 0 else torch.ones_like(gain, dtype=torch.bool)
            if level < levels:
                frontier = pool.next_frontier(self.beam, goes_on, level)
            if frontier is None:
                break
        return pool

    def _children(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, draft probabilities and log-worths [B, F, K] of the likeliest children, on the host."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        best = wide.topk(min(count, wide.shape[-1]), dim=-1)
        shares = (best.values - wide.logsumexp(-1, keepdim=True)).exp().clamp(max=1.0).cpu()
        return best.indices.cpu(), shares, (shares if self.worth is None else self.worth(shares)).log()


class Pool:
    """All candidates of all rows, on the host; entry 0 of each row is the root.

    Attributes:
        tokens, parents, ranks, shares, log_values, columns: [B, P]; parents are entries, columns are NO_NODE until
            an entry is expanded. Entries without value (padding, tokens without mass, values below the least) have
            log-value minus infinity.
    """

    def __init__(self, root: Tensor, budget: int, least_value: float = 0.0) -> None:
        rows = root.shape[0]
        self.budget = budget
        self._least = math.log(least_value) if least_value > 0 else -math.inf
        self.tokens = root.cpu()[:, None]
        self.parents = torch.full((rows, 1), NO_NODE)
        self.ranks = torch.zeros(rows, 1, dtype=torch.long)
        self.shares = torch.ones(rows, 1)
        self.log_values = torch.zeros(rows, 1)
        self.columns = torch.zeros(rows, 1, dtype=torch.long)
        self._num_columns = 1
        self._expanded = torch.zeros(rows, 1, dtype=torch.long)  # entries of the last frontier, NO_NODE for padding
        self._device = root.device
        self._kept: list[list[int]] | None = None  # once growth has ended

    def add(self, tokens: Tensor, shares: Tensor, log_worths: Tensor) -> None:
        """The children [B, F, K] of the last frontier."""
        rows, _, count = tokens.shape
        self._kept = None
        parents = self._expanded
        log_values = self.log_values.gather(1, parents.clamp(min=0))[:, :, None] + log_worths
        left_out = (parents == NO_NODE)[:, :, None] | (log_values < self._least)
        log_values = log_values.masked_fill(left_out, -torch.inf)
        ranks = torch.arange(count).expand_as(tokens)
        self._added = slice(self.tokens.shape[1], self.tokens.shape[1] + tokens[0].numel())
        self.tokens = torch.cat([self.tokens, tokens.reshape(rows, -1)], 1)
        self.parents = torch.cat([self.parents, parents[:, :, None].expand_as(tokens).reshape(rows, -1)], 1)
        self.ranks = torch.cat([self.ranks, ranks.reshape(rows, -1)], 1)
        self.shares = torch.cat([self.shares.to(shares.dtype), shares.reshape(rows, -1)], 1)
        self.log_values = torch.cat([self.log_values.to(log_values.dtype), log_values.reshape(rows, -1)], 1)
        self.columns = torch.cat([self.columns, torch.full_like(tokens.reshape(rows, -1), NO_NODE)], 1)
        below_root = self.log_values[:, 1:]
        self._best = below_root.topk(min(self.budget, below_root.shape[1]), dim=1).values

    def value(self) -> Tensor:
        """[B]: summed value of the best `budget` entries, the expected number of accepted tokens if values are true."""
        return self._best.exp().sum(1)

    def next_frontier(self, beam: int | None, goes_on: Tensor, depth: int) -> Frontier | None:
        """The entries added last that are worth expanding, best first; None when no row has any."""
        added = self.log_values[:, self._added]
        count = added.shape[1] if beam is None else min(beam, added.shape[1])
        values, at = added.topk(min(count, self.budget), dim=1)
        worthy = (values >= self._best[:, -1:]) & (values > -torch.inf) & goes_on[:, None]
        num_nodes = int(worthy.sum(1).max())  # sorted, so that the worthy ones come first
        if num_nodes == 0:
            return None
        worthy, entries = worthy[:, :num_nodes], at[:, :num_nodes] + self._added.start
        parents = self.columns.gather(1, self.parents.gather(1, entries).clamp(min=0)).masked_fill(~worthy, NO_NODE)
        new = torch.arange(self._num_columns, self._num_columns + num_nodes).expand_as(entries)
        self.columns.scatter_(1, entries, new.masked_fill(~worthy, NO_NODE))
        self._num_columns += num_nodes
        self._expanded = entries.masked_fill(~worthy, NO_NODE)
        tokens = self.tokens.gather(1, entries).to(self._device)
        return Frontier(tokens, parents, torch.full_like(parents, depth).masked_fill(~worthy, 0))

    def take_back(self) -> None:
        """The last frontier was not run after all."""
        first = self._num_columns - self._expanded.shape[1]
        self.columns.masked_fill_(self.columns >= first, NO_NODE)
        self._num_columns = first

    def kept(self) -> list[list[int]]:
        """Per row the entries of largest value in order of their making: parents first, siblings by rank."""
        if self._kept is None:
            order = self.log_values[:, 1:].sort(dim=1, descending=True, stable=True)
            entries = order.indices[:, : self.budget] + 1
            alive = (order.values[:, : self.budget] > -math.inf).sum(1).tolist()
            self._kept = [sorted(row[:n]) for row, n in zip(entries.tolist(), alive, strict=True)]
        return self._kept

    def tree(self, root: Tensor) -> Grown:
        """The kept entries as a tree."""
        tokens, parents, columns = [], [], []
        for row, entries in enumerate(self.kept()):
            at = torch.tensor(entries, dtype=torch.long)
            index = {entry: node for node, entry in enumerate(entries, 1)} | {0: 0}
            tokens.append(self.tokens[row, at].tolist())
            parents.append([index[entry] for entry in self.parents[row, at].tolist()])
            columns.append(self.columns[row, at].tolist())
        return assembled(root, tokens, parents, None, columns)
