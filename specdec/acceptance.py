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

from torch import Tensor

from specdec.drawn_rules import DRAWN_RULES, Decided
from specdec.emitter import Emitter
from specdec.errors import UnsupportedGeneration
from specdec.law import TreeLaw
from specdec.tree import TokenTree

Rule = Literal["auto", "walk", "block", "traversal", "recursive"]


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
