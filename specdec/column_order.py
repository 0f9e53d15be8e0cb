"""The order in which a tree's nodes lie in the cache, where that is not their own.

A block-sparse kernel skips blocks of the mask in which no query sees any column. Depth first with the largest subtree
first leaves the fewest (DySpec, arXiv 2410.11744, appendix C). Only the verifier knows of it: drafters and acceptance
rules go by nodes, whose order is that of the draws.

Dimensions: B sequences, N nodes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from specdec.target import TargetOutput
from specdec.tree import TokenTree


class ColumnOrder:
    """A tree laid out depth first, and the way back.

    Args:
        tree: the tree by nodes; its layers have not run anywhere.

    Attributes:
        tree: the tree by columns: tokens and shapes, no draft laws.
    """

    def __init__(self, tree: TokenTree) -> None:
        assert tree.resume is None, "a resumed tree's nodes already lie in the cache"
        orders = [shape.heavy_first for shape in tree.shapes]
        self._column_of = [dict(zip(order, range(len(order)), strict=True)) for order in orders]
        shapes = tuple(shape.in_order(order) for shape, order in zip(tree.shapes, orders, strict=True))
        node_of = torch.tensor(orders, device=tree.tokens.device)
        self._columns = node_of.argsort(1)
        self.tree = replace(tree, tokens=tree.tokens.gather(1, node_of), shapes=shapes, log_q=None)

    def columns(self, nodes: list[list[int]]) -> list[list[int]]:
        """Each row's nodes as columns."""
        return [[column_of[node] for node in row] for column_of, row in zip(self._column_of, nodes, strict=True)]

    def by_node(self, output: TargetOutput) -> TargetOutput:
        """What was computed by column, by node."""
        taps = {tap: self._by_node(states) for tap, states in output.taps.items()}
        return replace(output, logits=self._by_node(output.logits), taps=taps)

    def _by_node(self, states: Tensor) -> Tensor:
        """[B, N, ...] by column -> by node."""
        at = self._columns.to(states.device)
        return states.gather(1, at[:, :, None].expand(-1, -1, states.shape[2]))
