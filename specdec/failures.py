"""Acceptance weights and residual laws at every node of drawn trees, should all below it fail; without a host sync.

Dimensions: B rows of the tree, N nodes, M nodes with children, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.law import Law, Place
from specdec.tree import NO_NODE, TokenTree

NO_MASS = 1e-12
"""A residual with less mass than this is rounding: fall back to p, never to NaN or noise."""


@dataclass(frozen=True)
class Failures:
    """What remains at each node once all below it has failed.

    Attributes:
        entry: [B, N], the weight with which a node's turn begins: min(1, w p(x)/q(x)) of its parent's w, p and q.
        after: [B, N], the weight that is left to it when all its children have failed; 0 for padding.
        p: [M, V], the law of the next token there, at nodes with children.
        places: the index into p of each of those.
    """

    entry: Tensor
    after: Tensor
    p: Tensor
    places: dict[Place, int]

    def laws(self, nodes: list[int], law: Law) -> Tensor:
        """What is left of the law at these nodes, one of each row; [B, V]."""
        return torch.stack(
            [
                self.p[self.places[row, node]] if (row, node) in self.places else law.p(row, node)
                for row, node in enumerate(nodes)
            ]
        )


def all_failing(tree: TokenTree, law: Law, *, inherits: bool) -> Failures:
    """Weights and residual laws of all nodes, for all rows and one level after the other, without a host sync.

    Args:
        tree: of drawn children.
        law: the target's.
        inherits: a node begins with the weight that its token was tried with (traversal), or anew with 1.
    """
    assert tree.log_q is not None
    levels = _inner_by_level(tree)
    places = [place for level in levels for place in level]
    p = law.p_at(places)
    number = torch.tensor([row * tree.num_nodes + node for row, node in places], device=p.device)
    log_q = tree.log_q.flatten(0, 1).index_select(0, number.to(tree.log_q.device)).to(p.device, p.dtype)
    rounds = [tried for level in levels for tried in _rounds(tree, level)]
    children = torch.tensor([child for tried in rounds for child in tried], device=p.device)
    tokens = tree.tokens.to(p.device).flatten()[children]
    live = [n == 0 or parent != NO_NODE for shape in tree.shapes for n, parent in enumerate(shape.parents)]
    entry = torch.tensor(live, device=p.device).to(p.dtype)
    after = entry.clone()
    first = start = 0  # of the level's places, of the round's children
    for depth, level in enumerate(levels):
        nodes = number[first : first + len(level)]
        w = entry[nodes] if inherits and depth else p.new_ones(len(level))
        for tried in _rounds(tree, level):
            active, these = slice(first, first + len(tried)), slice(start, start + len(tried))
            start += len(tried)
            q = log_q[active].softmax(-1)
            weight = w[: len(tried)]
            entry[children[these]] = (weight * ratio(p[active], q, tokens[these])).clamp(max=1.0)
            residual = torch.mul(p[active], weight[:, None]).sub_(q).clamp_(min=0.0)
            mass = residual.sum(-1)
            has_mass = mass > NO_MASS
            residual.div_(mass.clamp(min=NO_MASS)[:, None])
            if inherits and depth:  # the root's weight, and that of all that begin anew, is and stays 1
                p[active] = residual  # without mass the weight is 0, and nobody asks for p
                weight.copy_((mass / (mass + (1 - weight))).masked_fill_(~has_mass, 0.0))
            else:
                p[active] = torch.where(has_mass[:, None], residual, p[active])
            log_q[active] = without(log_q[active], tokens[these])
        after[nodes] = w
        first += len(level)
    leaves = torch.ones_like(after, dtype=torch.bool).index_fill_(0, number, False)
    after = torch.where(leaves, entry, after).view_as(tree.tokens)
    return Failures(entry.view_as(tree.tokens), after, p, {place: i for i, place in enumerate(places)})


def _rounds(tree: TokenTree, level: list[Place]) -> list[list[int]]:
    """Children (as row * N + node) of a level's nodes, one list for each rank; the nodes with most children first."""
    children = [(row * tree.num_nodes, tree.shapes[row].children[node]) for row, node in level]
    most = len(children[0][1]) if children else 0
    return [[start + nodes[rank] for start, nodes in children if len(nodes) > rank] for rank in range(most)]


def _inner_by_level(tree: TokenTree) -> list[list[Place]]:
    """Nodes with children, of all rows, by depth; on each level those with most children first."""
    levels: list[list[Place]] = [[] for _ in range(tree.depth)]
    for row, shape in enumerate(tree.shapes):
        for node, children in enumerate(shape.children):
            if children:
                levels[shape.depths[node]].append((row, node))
    for level in levels:
        level.sort(key=lambda place: -len(tree.shapes[place[0]].children[place[1]]))
    return levels


def ratio(p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
    """p(x)/q(x) of one token per row from [B, V] laws."""
    at = tokens[:, None]
    return (p.gather(1, at) / q.gather(1, at).clamp(min=torch.finfo(q.dtype).tiny))[:, 0]


def without(log_q: Tensor, tokens: Tensor) -> Tensor:
    """The draft laws [M, V] after one draw of each. The logit is masked and softmax taken anew: dividing probabilities
    by the remaining mass underflows at low temperature.
    """
    return log_q.scatter(1, tokens[:, None], -torch.inf)
