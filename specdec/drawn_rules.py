"""The acceptance rules for children drawn without replacement from a known law.

Dimensions: B rows of the tree, N nodes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.failures import NO_MASS, all_failing, ratio, without
from specdec.law import Law
from specdec.sampling import Chooser
from specdec.tree import NO_NODE, TokenTree, Topology

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Decided:
    """Accepted path and next token of each row, before stopping criteria."""

    paths: list[list[int]]
    next_tokens: list[int]


def block(tree: TokenTree, law: Law, chooser: Chooser) -> Decided:
    """Block verification of chains (Sun et al., arXiv 2403.10444, Algorithm 2), all rows at once.

    Weights w_i = min(1, w_{i-1} p(x_i)/q(x_i)) run down the chain. Every prefix is tried with probability
    h_i = S_i / (S_i + 1 - w_i), S_i = sum (w_i p - q)+ at the next position, and w_n for the whole chain; the
    longest one that passes is kept. No early exit: a later prefix may pass where an earlier one failed.
    """
    assert tree.log_q is not None
    chains = [_chain_nodes(tree, i) for i in range(len(tree.shapes))]
    drafted = [len(chain) - 1 for chain in chains]
    width = max(drafted)
    padded = [[*chain, *[chain[-1]] * (width - n)] for chain, n in zip(chains, drafted, strict=True)]
    p = law.p_at([(i, node) for i, chain in enumerate(padded) for node in chain]).view(len(chains), width + 1, -1)
    order = torch.tensor(padded, device=p.device)
    log_q = tree.log_q.to(p.device, p.dtype)
    q = log_q.gather(1, order[:, :, None].expand(-1, -1, log_q.shape[2])).softmax(-1)
    tokens = tree.tokens.to(p.device).gather(1, order)
    num_drafted = torch.tensor(drafted, device=p.device)

    weights = [p.new_ones(p.shape[0])]
    for i in range(width):
        weights.append((weights[-1] * ratio(p[:, i], q[:, i], tokens[:, i + 1])).clamp(max=1.0))
    w = torch.stack(weights, 1)  # [B, width + 1]
    residual = (w[:, :, None] * p - q).clamp(min=0.0)
    mass = residual.sum(-1)
    passes = torch.where(mass > NO_MASS, mass / (mass + (1 - w)), torch.zeros_like(mass))
    position = torch.arange(width + 1, device=p.device)
    at_end = position == num_drafted[:, None]
    passes = torch.where(at_end, w, passes).masked_fill(position > num_drafted[:, None], 0.0)
    passed = chooser.accept(passes[:, 1:])
    kept = (passed * position[1:]).amax(1) if width else num_drafted * 0

    at = kept[:, None]
    use_p = (kept == num_drafted) | (mass.gather(1, at)[:, 0] <= NO_MASS)
    gathered = at[:, :, None].expand(-1, -1, p.shape[2])
    final = torch.where(use_p[:, None], p.gather(1, gathered)[:, 0], residual.gather(1, gathered)[:, 0])
    next_tokens = chooser.draw(final / final.sum(-1, keepdim=True)).tolist()
    paths = [chain[1 : 1 + n] for chain, n in zip(chains, kept.tolist(), strict=True)]
    return Decided(paths, next_tokens)


def traversal(tree: TokenTree, law: Law, chooser: Chooser) -> Decided:
    """Traversal verification of trees (Weng et al., arXiv 2505.12398); on a chain it has block's law.

    Leaves are tried from the first drawn downwards-up: a leaf passes with its weight and brings its whole path.
    A node whose subtree failed is removed from its parent: p becomes norm((w p - q)+), the parent's weight
    S / (S + 1 - w), and q loses the token. The root always passes once it stands alone.

    Where looking at a result costs nothing, nodes are tried in turn; elsewhere all are weighed at once.
    """
    return (traversal_in_turn if tree.tokens.device.type == "cpu" else traversal_at_once)(tree, law, chooser)


def traversal_in_turn(tree: TokenTree, law: Law, chooser: Chooser) -> Decided:
    """Traversal verification, one trial after the other: what stands behind the first node that passes is never
    looked at, which is most of a tree.
    """
    paths, laws = [], []
    for row, shape in enumerate(tree.shapes):
        node, left = _Trials(tree, law, chooser, row).root()
        paths.append(shape.path(node))
        laws.append(left)
    return Decided(paths, chooser.draw(torch.stack(laws)).tolist())


class _Trials:
    """The trials of one row. A subtree's outcome is the node that passed and what is left of its law, or None."""

    def __init__(self, tree: TokenTree, law: Law, chooser: Chooser, row: int) -> None:
        assert tree.log_q is not None
        self._log_q = tree.log_q[row].to(tree.tokens.device)  # a draft model may have a device of its own
        self._tokens = tree.ids[row]
        self._children = tree.shapes[row].children
        self._law, self._chooser, self._row = law, chooser, row

    def root(self) -> tuple[int, Tensor]:
        """The root's weight is and stays 1."""
        outcome, left, _ = self._children_of(0, 1.0)
        return outcome or (0, left)

    def _below(self, node: int, weight: float) -> tuple[int, Tensor] | None:
        if not self._children[node]:
            return (node, self._law.p(self._row, node)) if self._passes(weight) else None
        outcome, left, weight = self._children_of(node, weight)
        if outcome is None and self._passes(weight):
            return node, left
        return outcome

    def _children_of(self, node: int, weight: float) -> tuple[tuple[int, Tensor] | None, Tensor, float]:
        """The outcome of a node's children, and the node's own law and weight if all of them failed."""
        p, log_q = self._law.p(self._row, node), self._log_q[node]
        for child in self._children[node]:
            token = self._tokens[child]
            q = log_q.to(p.dtype).softmax(-1)
            outcome = self._below(child, min(1.0, weight * p[token].item() / max(q[token].item(), TINY)))
            if outcome is not None:
                return outcome, p, weight
            residual = torch.mul(p, weight).sub_(q).clamp_(min=0.0)
            mass = residual.sum().item()
            if mass > NO_MASS:
                p = residual.div_(mass)
            weight = _left(weight, mass) if node else 1.0
            if not weight:  # nothing passes here any more
                break
            log_q = without(log_q[None], torch.tensor([token]))[0]
        return None, p, weight

    def _passes(self, weight: float) -> bool:
        return weight > 0.0 and bool(self._chooser.accept(torch.tensor(weight, dtype=torch.float64)))


def _left(weight: float, mass: float) -> float:
    """The weight of a node below the root that lost a child, where w p - q had so much mass above zero."""
    return mass / (mass + (1.0 - weight)) if mass > NO_MASS else 0.0


def traversal_at_once(tree: TokenTree, law: Law, chooser: Chooser) -> Decided:
    """Traversal verification of all rows at once, with one host sync.

    What a node's weight is when its turn comes depends on no decision, for all before it have failed. So all weights
    are computed first, and the first node that passes is found afterwards.
    """
    failures = all_failing(tree, law, inherits=True)
    orders = [_children_first(shape) for shape in tree.shapes]
    order = torch.tensor(orders, device=failures.after.device)
    passes = failures.after.gather(1, order).double()
    reached = (1.0 - passes).cumprod(1).roll(1, 1)
    reached[:, 0] = 1.0
    chosen = chooser.one_of(passes * reached).tolist()
    nodes = [row[at] for row, at in zip(orders, chosen, strict=True)]
    return _decided(nodes, failures.laws(nodes, law), tree, chooser)


def recursive_rejection(tree: TokenTree, law: Law, chooser: Chooser) -> Decided:
    """Recursive rejection without replacement (Sequoia, arXiv 2402.12374; RSD, 2402.14160): the plain reference.

    At the node reached, children are tested in draw order with min(1, p/q); a rejected one leaves
    p := norm((p - q)+) and then disappears from q. When none is left the next token comes from that p.

    As in traversal, no test's probability depends on another one's outcome.
    """
    failures = all_failing(tree, law, inherits=False)
    tested = failures.entry.double()
    ends = torch.zeros_like(tested)
    for row, shape in enumerate(tree.shapes):
        chances = tested[row].tolist()
        reached = [1.0] * tree.num_nodes
        for node, children in enumerate(shape.children):
            for child in children:
                reached[child] = reached[node] * chances[child]
                reached[node] *= 1.0 - chances[child]
        live = [n == 0 or parent != NO_NODE for n, parent in enumerate(shape.parents)]
        ends[row] = ends.new_tensor([chance if alive else 0.0 for chance, alive in zip(reached, live, strict=True)])
    nodes = chooser.one_of(ends).tolist()
    return _decided(nodes, failures.laws(nodes, law), tree, chooser)


def _decided(nodes: list[int], laws: Tensor, tree: TokenTree, chooser: Chooser) -> Decided:
    paths = [shape.path(node) for shape, node in zip(tree.shapes, nodes, strict=True)]
    return Decided(paths, chooser.draw(laws).tolist())


def _children_first(shape: Topology) -> list[int]:
    """All nodes in the order of trial: each after its children, siblings in draw order; padding last."""
    order: list[int] = []

    def visit(node: int) -> None:
        for child in shape.children[node]:
            visit(child)
        order.append(node)

    visit(0)
    return order + [node for node, parent in enumerate(shape.parents) if node and parent == NO_NODE]


def _chain_nodes(tree: TokenTree, row: int) -> list[int]:
    nodes = [0]
    while tree.shapes[row].children[nodes[-1]]:
        nodes.append(tree.shapes[row].children[nodes[-1]][0])
    return nodes


DRAWN_RULES = {"block": block, "traversal": traversal, "recursive": recursive_rejection}
