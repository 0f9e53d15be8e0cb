"""The acceptance rules: which proposed tokens survive, and which token follows them.

How the children of a node were obtained decides which rule is lossless:

    children chosen (`log_q is None`)     walk: draw one token from p at the node, follow it if a child holds it
    children drawn without replacement    block verification on a chain, traversal verification on a tree;
                                          recursive rejection is the plain reference
    no sampling                           walk: follow the argmax

The walk is lossless for any children whatever, so it also serves drawn ones where processors or criteria
with state allow one call per emitted token only.

Dimensions: B rows of the tree, N nodes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from specdec.emitter import Emitter, apply
from specdec.errors import UnsupportedGeneration
from specdec.sampling import Chooser
from specdec.tree import TokenTree

Rule = Literal["auto", "walk", "block", "traversal", "recursive"]

NO_MASS = 1e-12
"""A residual with less mass than this is rounding: fall back to p, never to NaN or noise."""


@dataclass(frozen=True)
class Acceptance:
    """What one step accepted.

    Attributes:
        paths: per row, the accepted nodes below the root whose tokens are final and were followed by another.
        tokens: per row, the emitted tokens: those of the path, then next_token. When a stopping criterion
            ended the row on a proposed token, that token is next_token.
    """

    paths: list[list[int]]
    tokens: list[list[int]]

    @property
    def next_tokens(self) -> list[int]:
        """The last emitted token of each row: the root of its next tree."""
        return [row[-1] for row in self.tokens]


class Law(Protocol):
    """The target's distribution at the nodes of one step's trees."""

    def p(self, row: int, node: int) -> Tensor:
        """Probabilities [V] at a node, after all processing, in float32 or float64."""
        ...


class TreeLaw:
    """p at tree nodes, processed with each node's own history; at once where history does not matter."""

    def __init__(self, tree: TokenTree, logits: Tensor, emitter: Emitter, rows: list[int]) -> None:
        self.tree, self.logits, self.emitter, self.rows = tree, logits, emitter, rows
        self._tokens = tree.ids
        self._scores: dict[tuple[int, int], Tensor] = {}
        if emitter.processes_nodes_at_once:
            flat = logits.flatten(0, 1)
            wide = flat.to(copy=True, dtype=emitter.scores_dtype(flat.dtype))
            scores = apply(emitter.processors, tree.tokens.reshape(-1, 1), wide).view(*logits.shape)
            self._scores = {(i, n): scores[i, n] for i in range(len(rows)) for n in range(tree.num_nodes)}

    def scores(self, row: int, node: int) -> Tensor:
        """Processed log-scores [V] at a node."""
        if (row, node) not in self._scores:
            path_tokens = [self._tokens[row][n] for n in self.tree.shapes[row].path(node)]
            self._scores[row, node] = self.emitter.process_node(self.rows[row], path_tokens, self.logits[row, node])
        return self._scores[row, node]

    def p(self, row: int, node: int) -> Tensor:
        """Probabilities [V] at a node."""
        return self.scores(row, node).softmax(-1)


def accept(tree: TokenTree, logits: Tensor, emitter: Emitter, rows: list[int], rule: Rule = "auto") -> Acceptance:
    """Apply the lossless rule for this tree, emit the tokens, and say what was accepted.

    Args:
        tree: the scored trees of the running rows.
        logits: raw target logits [B, N, V].
        emitter: receives every emitted token.
        rows: the emitter's row of each tree row.
        rule: "auto", or the name of a rule that is lossless for this tree.

    Raises:
        UnsupportedGeneration: the named rule is not one, or would not be lossless for these children.
    """
    chosen = tree.log_q is None
    needs_walk = emitter.in_step or emitter.one_call_per_token
    if rule == "auto":
        drawn_rule = "block" if tree.is_chain else "traversal"
        rule = "walk" if chosen or not emitter.params.do_sample or needs_walk else drawn_rule
    if rule == "walk" or tree.depth == 0:  # without a proposal all rules draw from p
        return walk_in_step(tree, logits, emitter, rows) if emitter.in_step else walk(tree, logits, emitter, rows)
    if rule not in DRAWN_RULES:
        known = ", ".join(("auto", "walk", *DRAWN_RULES))
        raise UnsupportedGeneration(f"there is no acceptance rule {rule!r}; the lossless ones are {known}.")
    if chosen:
        raise UnsupportedGeneration(
            f"rule {rule!r} needs children drawn from a known law; these were chosen. Use rule='walk'."
        )
    if needs_walk:
        raise UnsupportedGeneration(f"rule {rule!r} cannot serve processors or criteria with state; use rule='walk'.")
    if rule == "block" and not tree.is_chain:
        raise UnsupportedGeneration("block verification is for chains; use rule='traversal' for trees.")
    law = TreeLaw(tree, logits, emitter, rows)
    decided = DRAWN_RULES[rule](tree, law, emitter.chooser)
    return _emit_decided(decided, tree, law, emitter)


# --- Chosen children ---------------------------------------------------------------------------------


def walk(tree: TokenTree, logits: Tensor, emitter: Emitter, rows: list[int]) -> Acceptance:
    """Argmax walk and draw-and-follow: choose a token at the node reached, descend if a child holds it.

    Each row by itself. A node's logits are processed only when the walk reaches it.
    """
    argmax = logits.argmax(-1).tolist() if emitter.takes_argmax else None  # the step's one host sync
    tokens = tree.ids
    paths: list[list[int]] = []
    emitted: list[list[int]] = []
    for i, row in enumerate(rows):
        path: list[int] = []
        out: list[int] = []
        node: int | None = 0
        while node is not None:
            if node:
                path.append(node)
            here = logits[i, node][None]
            if argmax is None:
                token = emitter.choose([row], here)[0]
            else:
                token = argmax[i][node]
                emitter.emit([row], [token], None, here)
            out.append(token)
            node = None if emitter.finished[row] else _child_holding(token, tree, tokens, i, node)
        paths.append(path)
        emitted.append(out)
    return Acceptance(paths, emitted)


def walk_in_step(tree: TokenTree, logits: Tensor, emitter: Emitter, rows: list[int]) -> Acceptance:
    """The same walk with all rows of the batch advancing together, so that batch-wide processors with
    state see the calls of plain `generate`. It ends where the first running row finds no child.
    """
    tokens = tree.ids
    group = list(range(emitter.batch_size))
    paths: list[list[int]] = [[] for _ in rows]
    emitted: list[list[int]] = [[] for _ in rows]
    nodes = [0] * len(rows)
    while True:
        here = logits.new_zeros(len(group), logits.shape[-1])  # rows that finished earlier get no logits
        here[rows] = logits[range(len(rows)), nodes]
        was_running = [i for i, row in enumerate(rows) if not emitter.finished[row]]
        chosen = emitter.choose(group, here)
        for i in was_running:
            emitted[i].append(chosen[rows[i]])
        running = [i for i, row in enumerate(rows) if not emitter.finished[row]]
        following = [_child_holding(chosen[rows[i]], tree, tokens, i, nodes[i]) for i in running]
        if not running or None in following:
            return Acceptance(paths, emitted)
        for i, child in zip(running, following, strict=True):
            assert child is not None
            nodes[i] = child
            paths[i].append(child)


def _child_holding(token: int, tree: TokenTree, tokens: list[list[int]], row: int, node: int) -> int | None:
    return next((child for child in tree.shapes[row].children[node] if tokens[row][child] == token), None)


# --- Children drawn without replacement -----------------------------------------------------------------


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
    p_rows = []
    for i, chain in enumerate(chains):
        stacked = torch.stack([law.p(i, node) for node in chain])
        p_rows.append(torch.cat([stacked, stacked[-1:].expand(width - drafted[i], -1)]))
    p = torch.stack(p_rows)  # [B, width + 1, V]
    order = torch.tensor([[*chain, *[chain[-1]] * (width - n)] for chain, n in zip(chains, drafted, strict=True)])
    order = order.to(p.device)
    log_q = tree.log_q.to(p.device, p.dtype)
    q = log_q.gather(1, order[:, :, None].expand(-1, -1, log_q.shape[2])).softmax(-1)
    tokens = tree.tokens.to(p.device).gather(1, order)
    num_drafted = torch.tensor(drafted, device=p.device)

    weights = [p.new_ones(p.shape[0])]
    for i in range(width):
        ratio = _ratio(p[:, i], q[:, i], tokens[:, i + 1])
        weights.append((weights[-1] * ratio).clamp(max=1.0))
    w = torch.stack(weights, 1)  # [B, width + 1]
    residual = (w[:, :, None] * p - q).clamp(min=0.0)
    mass = residual.sum(-1)
    passes = torch.where(mass > NO_MASS, mass / (mass + 1 - w), torch.zeros_like(mass))
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
    """
    assert tree.log_q is not None
    tokens = tree.ids
    paths, next_tokens = [], []
    for i in range(len(tree.shapes)):
        leaf, p = _first_passing(i, 0, None, tree, tokens, law, chooser)
        assert p is not None, "the root's weight is 1"
        paths.append(tree.shapes[i].path(leaf))
        next_tokens.append(int(chooser.draw(p[None])))
    return Decided(paths, next_tokens)


def _first_passing(
    row: int, node: int, weight: Tensor | None, tree: TokenTree, tokens: list[list[int]], law: Law, chooser: Chooser
) -> tuple[int, Tensor | None]:
    """The first node of this subtree that passes, with the law of its next token; None when all failed.

    `weight` is None for the root, whose weight is and stays 1.
    """
    assert tree.log_q is not None
    p = law.p(row, node)
    w = p.new_ones(()) if weight is None else weight
    log_q = tree.log_q[row, node].to(p.device, p.dtype)
    for child in tree.shapes[row].children[node]:
        token = tokens[row][child]
        q = log_q.softmax(-1)
        child_weight = (w * p[token] / q[token].clamp(min=torch.finfo(q.dtype).tiny)).clamp(max=1.0)
        passed, final = _first_passing(row, child, child_weight, tree, tokens, law, chooser)
        if final is not None:
            return passed, final
        residual = (w * p - q).clamp(min=0.0)
        mass = residual.sum()
        if mass > NO_MASS:
            p, w = residual / mass, (mass / (mass + 1 - w) if weight is not None else w)
        elif weight is not None:
            w = torch.zeros_like(w)
        log_q = _without(log_q, token)
    if weight is None or bool(chooser.accept(w)):
        return node, p
    return node, None


def recursive_rejection(tree: TokenTree, law: Law, chooser: Chooser) -> Decided:
    """Recursive rejection without replacement (Sequoia, arXiv 2402.12374; RSD, 2402.14160): the plain reference.

    At the node reached, children are tested in draw order with min(1, p/q); a rejected one leaves
    p := norm((p - q)+) and then disappears from q. When none is left the next token comes from that p.
    """
    assert tree.log_q is not None
    tokens = tree.ids
    paths, next_tokens = [], []
    for i, shape in enumerate(tree.shapes):
        node, p = 0, law.p(i, 0)
        children = list(shape.children[0])
        log_q = tree.log_q[i, 0].to(p.device, p.dtype)
        while children:
            child = children.pop(0)
            token = tokens[i][child]
            q = log_q.softmax(-1)
            ratio = p[token] / q[token].clamp(min=torch.finfo(q.dtype).tiny)
            if bool(chooser.accept(ratio.clamp(max=1.0))):
                node, p = child, law.p(i, child)
                children, log_q = list(shape.children[child]), tree.log_q[i, child].to(p.device, p.dtype)
                continue
            residual = (p - q).clamp(min=0.0)
            mass = residual.sum()
            p = residual / mass if mass > NO_MASS else p
            log_q = _without(log_q, token)
        paths.append(shape.path(node))
        next_tokens.append(int(chooser.draw(p[None])))
    return Decided(paths, next_tokens)


DRAWN_RULES = {"block": block, "traversal": traversal, "recursive": recursive_rejection}


def _chain_nodes(tree: TokenTree, row: int) -> list[int]:
    nodes = [0]
    while tree.shapes[row].children[nodes[-1]]:
        nodes.append(tree.shapes[row].children[nodes[-1]][0])
    return nodes


def _ratio(p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
    """p(x)/q(x) of one token per row from [B, V] laws."""
    at = tokens[:, None]
    return (p.gather(1, at) / q.gather(1, at).clamp(min=torch.finfo(q.dtype).tiny))[:, 0]


def _without(log_q: Tensor, token: int) -> Tensor:
    """The draft law after a draw. The logit is masked and softmax taken anew: dividing probabilities by the
    remaining mass underflows at low temperature.
    """
    remaining = log_q.clone()
    remaining[token] = -torch.inf
    return remaining


def _emit_decided(decided: Decided, tree: TokenTree, law: TreeLaw, emitter: Emitter) -> Acceptance:
    """Emit each row's decided tokens until a stopping criterion ends it."""
    tokens = tree.ids
    paths, emitted = [], []
    for i, row in enumerate(law.rows):
        path, out = decided.paths[i], []
        for node, follower in zip([0, *path], [*path, None], strict=True):
            token = decided.next_tokens[i] if follower is None else tokens[i][follower]
            scores = law.scores(i, node)[None]
            emitter.emit([row], [token], scores, law.logits[i, node][None])
            out.append(token)
            if emitter.finished[row]:
                break
        paths.append(path[: len(out) - 1])
        emitted.append(out)
    return Acceptance(paths, emitted)
