"""Two drafters for one text: the first where it has something to propose, the second everywhere else, row by row.

SAM-Decoding (arXiv 2411.10666) and SuffixDecoding (2411.04975) pair a suffix match with a model in this way: a long
match is nearly free and often right, and without one the model drafts. Which matches are long enough is the first
drafter's own business (`suffix:min_match=5`). When all rows have a match the second drafter does not run at all; what
it misses it digests later.

Rows may differ in kind. If the second drafter draws its children, those of the first get a law in which they are
certain: its k-th child is the only possible k-th draw. Rules for drawn children then accept it as the walk would.

Dimensions: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed, Drafter
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE, TokenTree, topology

CERTAIN = 1e4
"""Difference of log-laws between one child and the next: its exponential is exactly 0, in float64 too."""


class HybridDrafter:
    """Per row the tree of `first`, or that of `second` where the first proposes nothing.

    Args:
        first: proposes chosen children, or nothing, without running a model: lookup, suffix, recycling.
        second: any drafter. One that runs the target's own layers serves all rows as soon as one row needs it.
    """

    def __init__(self, first: Drafter, second: Drafter) -> None:
        self.first, self.second = first, second
        self.taps: tuple[int, ...] = tuple(sorted({*first.taps, *second.taps}))

    def reset(self, batch_size: int, context: Context) -> None:
        """Both begin."""
        self.first.reset(batch_size, context)
        self.second.reset(batch_size, context)

    def observe(self, committed: Committed) -> None:
        """Both see everything."""
        self.first.observe(committed)
        self.second.observe(committed)

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """The first drafter's trees where there are any."""
        first = self.first.propose(root, params, chooser, room).up_to_depth(room)
        proposes = [drafted > 0 for drafted in first.num_drafted]
        if all(proposes):
            return first
        second = self.second.propose(root, params, chooser, room)
        if second.resume is not None or not any(proposes):
            return second
        return mixed(first, second.up_to_depth(room), proposes)

    def select(self, rows: list[int]) -> None:
        """Both keep these rows."""
        self.first.select(rows)
        self.second.select(rows)


def mixed(first: TokenTree, second: TokenTree, takes_first: list[bool]) -> TokenTree:
    """Per row one of two trees of the same roots; children of `first` are chosen, those of `second` may be drawn."""
    assert first.log_q is None, "the first drafter's children are chosen"
    width = max(first.num_nodes, second.num_nodes)
    first, second = first.padded_to(width), second.padded_to(width)
    at = torch.tensor(takes_first, device=second.tokens.device)
    tokens = torch.where(at[:, None], first.tokens, second.tokens)
    shapes = tuple(topology((first if takes else second).shapes[row].parents) for row, takes in enumerate(takes_first))
    if second.log_q is None:
        return TokenTree(tokens, shapes)
    log_q = second.log_q.clone()
    for row, takes in enumerate(takes_first):
        if takes:
            log_q[row] = certain_law(first, row, second.log_q)
    return TokenTree(tokens, shapes, log_q)


def certain_law(tree: TokenTree, row: int, like: Tensor) -> Tensor:
    """Log-laws [N, V] of one row under which the children of each node are drawn in node order, with certainty."""
    law = like.new_full(like.shape[1:], -torch.inf)
    law[:, 0] = 0.0  # nodes without children are not read, but must be laws
    tokens = tree.tokens[row].tolist()
    ranks: dict[int, int] = {}
    for node, parent in enumerate(tree.shapes[row].parents):
        if parent == NO_NODE:
            continue
        rank = ranks[parent] = ranks.get(parent, -1) + 1
        if rank == 0:
            law[parent, 0] = -torch.inf
        law[parent, tokens[node]] = -CERTAIN * rank
    return law
