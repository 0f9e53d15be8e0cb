"""Clover's sampler: few nodes, spent from the top down, for batches in which every drafted token is paid for.

Xiao et al. (arXiv 2405.00263). At each node, children beyond the `nucleus` of the draft law or below a share of the
likeliest child are dropped; of what is left on a level, over all its nodes, the paths of largest probability are taken
while the row's budget lasts. What one level takes is not there for the next.

Children are chosen, so the walk makes it lossless.

Dimensions: B rows, F nodes of a frontier, K children looked at for each, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.grow.policy import Expand, Frontier, Grown, assembled
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE, TokenTree

BUDGET = 4
"""Nodes for each row when nothing is said: what the sampler was made for."""

NUCLEUS = 0.8
LEAST_SHARE = 0.25


class CloverGrowth:
    """Rows get trees of their own.

    Args:
        budget: nodes for each row.
        depth: most levels.
        width: most children of a node; None for no limit but the budget.
        nucleus: children are looked at until they hold this draft probability together.
        least_share: of the likeliest child's probability, which its siblings must have.
    """

    def __init__(
        self,
        budget: int,
        depth: int,
        width: int | None = None,
        *,
        nucleus: float = NUCLEUS,
        least_share: float = LEAST_SHARE,
    ) -> None:
        self.budget, self.depth, self.width = budget, depth, budget if width is None else min(width, budget)
        self.nucleus, self.least_share = nucleus, least_share

    @property
    def is_chain(self) -> bool:
        """Only when nodes may have one child."""
        return self.width == 1

    def grow(
        self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int, expand: Expand, most_children: int
    ) -> Grown:
        """Level by level; the law is that of the draft at temperature 1, nothing is drawn."""
        rows = [_Row(self.budget) for _ in root]
        frontier = Frontier.of_roots(root)
        first_column = 0
        for depth in range(1, min(self.depth, room) + 1):
            logits = expand(frontier)
            if logits is None:
                for row in rows:
                    row.columns = [NO_NODE if column >= first_column else column for column in row.columns]
                break
            law = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
            best = law.topk(min(self.width, most_children), dim=-1)
            self._take(rows, best.indices.tolist(), self._worth_a_look(best.values.cpu()).tolist())
            first_column += frontier.tokens.shape[1]
            if not any(row.level and row.left for row in rows):
                break
            if depth < min(self.depth, room):
                frontier = _frontier(rows, depth, first_column, root)
        tokens, parents = [row.tokens for row in rows], [row.parents for row in rows]
        return assembled(root, tokens, parents, None, [row.columns for row in rows])

    def _worth_a_look(self, shares: Tensor) -> Tensor:
        """Draft probabilities [B, F, K] in falling order, with 0 for children that are dropped."""
        in_nucleus = shares.cumsum(-1) - shares < self.nucleus
        return shares * (in_nucleus & (shares >= self.least_share * shares[..., :1]))

    def _take(self, rows: list[_Row], tokens: list[list[list[int]]], shares: list[list[list[float]]]) -> None:
        for row, row_tokens, row_shares in zip(rows, tokens, shares, strict=True):
            row.take([*zip(row_tokens, row_shares, strict=True)])

    def observe(self, tree: TokenTree, nodes: list[list[int]]) -> None:
        """Learns nothing."""


class _Row:
    """The nodes of one row so far, and those of the last level, which may go on."""

    def __init__(self, budget: int) -> None:
        self.left = budget
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.columns: list[int] = []
        self.level = [(0, 1.0)]
        """Node and probability of its path."""

    def take(self, children: list[tuple[list[int], list[float]]]) -> None:
        """Of the children of each node of the last level (padding behind them), the best the budget allows."""
        found = [
            (value * share, node, token)
            for (node, value), (tokens, shares) in zip(self.level, children, strict=False)
            for token, share in zip(tokens, shares, strict=True)
            if share > 0
        ]
        taken = sorted(found, key=lambda child: -child[0])[: self.left] if self.left else []
        self.level = [(len(self.tokens) + 1 + index, value) for index, (value, _, _) in enumerate(taken)]
        self.tokens += [token for _, _, token in taken]
        self.parents += [node for _, node, _ in taken]
        self.columns += [NO_NODE] * len(taken)
        self.left -= len(taken)


def _frontier(rows: list[_Row], depth: int, first_column: int, root: Tensor) -> Frontier:
    """The last level of every row that has budget left, padded; its nodes get their columns."""
    going_on = [row.level if row.left else [] for row in rows]
    width = max(map(len, going_on))
    tokens, parents, depths = [], [], []
    for row, level in zip(rows, going_on, strict=True):
        padding = width - len(level)
        nodes = [node for node, _ in level]
        tokens.append([*(row.tokens[node - 1] for node in nodes), *[0] * padding])
        above = (row.parents[node - 1] for node in nodes)
        parents.append([*(row.columns[node - 1] if node else 0 for node in above), *[NO_NODE] * padding])
        depths.append([*[depth] * len(level), *[0] * padding])
        for index, node in enumerate(nodes):
            row.columns[node - 1] = first_column + index
        row.level = level
    return Frontier(
        torch.tensor(tokens, dtype=root.dtype, device=root.device), torch.tensor(parents), torch.tensor(depths)
    )
