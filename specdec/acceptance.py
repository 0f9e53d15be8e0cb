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
from typing import Literal

import torch
from torch import Tensor

from specdec.emitter import Emitter
from specdec.errors import UnsupportedGeneration
from specdec.law import Law, Place, TreeLaw
from specdec.sampling import Chooser
from specdec.tree import NO_NODE, TokenTree, Topology

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
        inner, last = [(i, node) for node in chain[:-1]], law.p(i, chain[-1])[None]
        stacked = torch.cat([law.p_at(inner), last]) if inner else last
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

    What a node's weight is when its turn comes depends on no decision, for all before it have failed. So the weights
    are computed for all rows at once, and the first node that passes is found afterwards.
    """
    failures = all_failing(tree, law, inherits=True)
    orders = [_children_first(shape) for shape in tree.shapes]
    order = torch.tensor(orders, device=failures.after.device)
    passes = failures.after.gather(1, order).double()
    reached = (1.0 - passes).cumprod(1).roll(1, 1)
    reached[:, 0] = 1.0
    chosen = chooser.one_of(passes * reached).tolist()
    return failures.decided([row[at] for row, at in zip(orders, chosen, strict=True)], tree, law, chooser)


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
    return failures.decided(chooser.one_of(ends).tolist(), tree, law, chooser)


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

    def decided(self, nodes: list[int], tree: TokenTree, law: Law, chooser: Chooser) -> Decided:
        """The paths to these nodes, one of each row, and tokens drawn from what is left there."""
        laws = [
            self.p[self.places[row, node]] if (row, node) in self.places else law.p(row, node)
            for row, node in enumerate(nodes)
        ]
        paths = [shape.path(node) for shape, node in zip(tree.shapes, nodes, strict=True)]
        return Decided(paths, chooser.draw(torch.stack(laws)).tolist())


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
            entry[children[these]] = (weight * _ratio(p[active], q, tokens[these])).clamp(max=1.0)
            residual = torch.mul(p[active], weight[:, None]).sub_(q).clamp_(min=0.0)
            mass = residual.sum(-1)
            has_mass = mass > NO_MASS
            residual.div_(mass.clamp(min=NO_MASS)[:, None])
            if inherits and depth:  # the root's weight, and that of all that begin anew, is and stays 1
                p[active] = residual  # without mass the weight is 0, and nobody asks for p
                weight.copy_((mass / (mass + (1 - weight))).masked_fill_(~has_mass, 0.0))
            else:
                p[active] = torch.where(has_mass[:, None], residual, p[active])
            log_q[active] = _without(log_q[active], tokens[these])
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


def _children_first(shape: Topology) -> list[int]:
    """All nodes in the order of trial: each after its children, siblings in draw order; padding last."""
    order: list[int] = []

    def visit(node: int) -> None:
        for child in shape.children[node]:
            visit(child)
        order.append(node)

    visit(0)
    return order + [node for node, parent in enumerate(shape.parents) if node and parent == NO_NODE]


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


def _without(log_q: Tensor, tokens: Tensor) -> Tensor:
    """The draft laws [M, V] after one draw of each. The logit is masked and softmax taken anew: dividing probabilities
    by the remaining mass underflows at low temperature.
    """
    return log_q.scatter(1, tokens[:, None], -torch.inf)


def _emit_decided(decided: Decided, tree: TokenTree, law: TreeLaw, emitter: Emitter) -> Acceptance:
    """Emit each row's decided tokens until a stopping criterion ends it."""
    tokens = tree.ids
    paths, emitted = [], []
    for i, row in enumerate(law.rows):
        path, out = decided.paths[i], []
        for node, follower in zip([0, *path], [*path, None], strict=True):
            token = decided.next_tokens[i] if follower is None else tokens[i][follower]
            scores = law.scores(i, node)[None] if emitter.scores is not None else None
            emitter.emit([row], [token], scores, law.logits[i, node][None])
            out.append(token)
            if emitter.finished[row]:
                break
        paths.append(path[: len(out) - 1])
        emitted.append(out)
    return Acceptance(paths, emitted)
