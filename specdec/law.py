"""The target's distribution at the nodes of one step's trees, as it is used for drawing.

Dimensions: B rows of the tree, N nodes, M places, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from specdec.emitter import Emitter, apply
from specdec.tree import TokenTree

Place = tuple[int, int]
"""A row and a node of it."""

TOGETHER = 16
"""Nodes whose laws are made in one call: a call costs as much as several laws, and a whole tree is seldom asked for."""


class Law(Protocol):
    """The target's distribution at the nodes of one step's trees."""

    def p(self, row: int, node: int) -> Tensor:
        """Probabilities [V] at a node, after all processing, in float32 or float64."""
        ...

    def p_at(self, places: list[Place]) -> Tensor:
        """The same at several nodes, [M, V]; a tensor of its own."""
        ...


class TreeLaw:
    """p at tree nodes, processed with each node's own history; at once where history does not matter."""

    def __init__(self, tree: TokenTree, logits: Tensor, emitter: Emitter, rows: list[int]) -> None:
        self.tree, self.logits, self.emitter, self.rows = tree, logits, emitter, rows
        self._tokens = tree.ids
        self._scores: dict[Place, Tensor] = {}
        self._pieces: dict[Place, Tensor] = {}

    def scores(self, row: int, node: int) -> Tensor:
        """Processed log-scores [V] at a node."""
        if (row, node) not in self._scores:
            path_tokens = [self._tokens[row][n] for n in self.tree.shapes[row].path(node)]
            self._scores[row, node] = self.emitter.process_node(self.rows[row], path_tokens, self.logits[row, node])
        return self._scores[row, node]

    def p(self, row: int, node: int) -> Tensor:
        """Probabilities [V] at a node; where history does not matter, those of its neighbours are made with it."""
        if not self.emitter.processes_nodes_at_once:
            return self.scores(row, node).softmax(-1)
        piece, place = divmod(node, TOGETHER)
        if (row, piece) not in self._pieces:
            nodes = range(piece * TOGETHER, min((piece + 1) * TOGETHER, self.tree.num_nodes))
            self._pieces[row, piece] = self.p_at([(row, n) for n in nodes])
        return self._pieces[row, piece][place]

    def p_at(self, places: list[Place]) -> Tensor:
        """Probabilities [M, V] at several nodes."""
        if not self.emitter.processes_nodes_at_once:
            return torch.stack([self.p(row, node) for row, node in places])
        width = self.logits.shape[1]  # at least N
        at = torch.tensor([row * width + node for row, node in places], device=self.logits.device)
        logits = self.logits.flatten(0, 1).index_select(0, at)
        ids = torch.tensor([[self._tokens[row][node]] for row, node in places], device=self.logits.device)
        scores = apply(self.emitter.processors, ids, logits.to(self.emitter.scores_dtype(logits.dtype)))
        self._scores.update(zip(places, scores, strict=True))
        return scores.softmax(-1)
