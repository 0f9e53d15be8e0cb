"""The drawn rules as their papers write them, one decision after the other: slow, and obvious beside `drawn_rules`."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.drawn_rules import Decided
from specdec.failures import NO_MASS
from specdec.law import Law
from specdec.sampling import Chooser
from specdec.tree import TokenTree


def traversal(tree: TokenTree, law: Law, chooser: Chooser) -> Decided:
    """Weng et al., arXiv 2505.12398: leaves are tried from the first drawn on."""
    paths, next_tokens = [], []
    for row, shape in enumerate(tree.shapes):
        node, p = _first_passing(row, 0, None, tree, law, chooser)
        assert p is not None, "the root's weight is 1"
        paths.append(shape.path(node))
        next_tokens.append(int(chooser.draw(p[None])))
    return Decided(paths, next_tokens)


def _first_passing(
    row: int, node: int, weight: Tensor | None, tree: TokenTree, law: Law, chooser: Chooser
) -> tuple[int, Tensor | None]:
    """The first node of this subtree that passes, with the law of its next token; None when all failed."""
    assert tree.log_q is not None
    p = law.p(row, node)
    w = p.new_ones(()) if weight is None else weight
    log_q = tree.log_q[row, node]
    for child in tree.shapes[row].children[node]:
        token = int(tree.tokens[row, child])
        q = log_q.softmax(-1)
        passed, final = _first_passing(row, child, (w * p[token] / q[token]).clamp(max=1.0), tree, law, chooser)
        if final is not None:
            return passed, final
        residual = (w * p - q).clamp(min=0.0)
        mass = residual.sum()
        if mass > NO_MASS:
            p, w = residual / mass, (mass / (mass + (1 - w)) if weight is not None else w)
        elif weight is not None:
            w = torch.zeros_like(w)
        log_q = log_q.index_fill(0, torch.tensor([token]), -torch.inf)
    if weight is None or bool(chooser.accept(w)):
        return node, p
    return node, None


def recursive_rejection(tree: TokenTree, law: Law, chooser: Chooser) -> Decided:
    """Sequoia, arXiv 2402.12374: children of the node reached are tested in draw order."""
    assert tree.log_q is not None
    paths, next_tokens = [], []
    for row, shape in enumerate(tree.shapes):
        node, p = 0, law.p(row, 0)
        children, log_q = list(shape.children[0]), tree.log_q[row, 0]
        while children:
            child = children.pop(0)
            token = int(tree.tokens[row, child])
            q = log_q.softmax(-1)
            if bool(chooser.accept((p[token] / q[token]).clamp(max=1.0))):
                node, p = child, law.p(row, child)
                children, log_q = list(shape.children[child]), tree.log_q[row, child]
                continue
            residual = (p - q).clamp(min=0.0)
            p = residual / residual.sum() if residual.sum() > NO_MASS else p
            log_q = log_q.index_fill(0, torch.tensor([token]), -torch.inf)
        paths.append(shape.path(node))
        next_tokens.append(int(chooser.draw(p[None])))
    return Decided(paths, next_tokens)
