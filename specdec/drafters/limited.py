"""Any drafter under a length policy.

Drafters that grow trees hand their growth policy over: lengths are then decided row by row, and while trees grow.
Others are only given less room. Where the policy says 0 for all rows, the drafter is not asked at all, and digests
later what it was shown meanwhile.

Dimensions: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

import time
from typing import Any, cast

import torch
from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed, Drafter
from specdec.errors import UnknownDrafter
from specdec.lengths.goodput import GoodputLength
from specdec.lengths.growth import LimitedGrowth, nodes_within
from specdec.lengths.policy import LengthPolicy, Row, Step
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE, TokenTree

TEXT_DEPTH = 16
"""Levels that a drafter without any depth of its own is taken to have."""


class LimitedDrafter:
    """Proposes what `drafter` proposes, as deep as `length` allows.

    Args:
        drafter: its growth policy, if it has one, is replaced by one with limits; it should not be used by itself
            any more. Under another length policy it gets the new one in its place.
        length: decides how deep.

    Raises:
        UnknownDrafter: the policy decides while trees grow, and the drafter grows none.
    """

    def __init__(self, drafter: Drafter, length: LengthPolicy) -> None:
        if isinstance(drafter, LimitedDrafter):
            drafter = drafter.drafter
        self.drafter, self.length = drafter, length
        self.taps = drafter.taps
        policy = getattr(drafter, "policy", None)
        self.growth: LimitedGrowth | None = None
        if policy is not None:
            policy = policy.growth if isinstance(policy, LimitedGrowth) else policy
            self.growth = LimitedGrowth(policy, length)
            cast(Any, drafter).policy = self.growth
        elif length.stops:
            raise UnknownDrafter(
                f"{type(length).__name__} decides by draft laws while a tree grows, and {type(drafter).__name__} has "
                "none; use length=constant, heuristic, thompson or goodput"
            )
        if isinstance(length, GoodputLength) and self.growth is not None:
            length.nodes = _Nodes(self.growth)
        self._params = SamplingParams()
        self._tree: TokenTree | None = None
        self._limit = 0
        self._began = self._ended = 0.0

    def reset(self, batch_size: int, context: Context) -> None:
        """Begin; what the policy keeps is its own business."""
        self._tree = None
        self.length.begin(batch_size)
        self.drafter.reset(batch_size, context)

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """The drafter's trees within the limits of each row."""
        self._began, self._params = time.perf_counter(), params
        limits = self.length.limits(root.shape[0], min(room, self._depth()))
        self._limit = min(max(limits), room)
        if self._limit < 1:
            self._tree = TokenTree.of_roots(root)
        else:
            if self.growth is not None:
                self.growth.limits = limits
            self._tree = self.drafter.propose(root, params, chooser, self._limit)
            if self.growth is None and self._tree.resume is None:
                self._tree = self._tree.up_to_depths(limits)
        self._ended = time.perf_counter()
        return self._tree

    def _depth(self) -> int:
        """Levels that the drafter may draft."""
        if self.growth is not None:
            return max(self.growth.depth, 1)
        depth = getattr(self.drafter, "depth", None) or getattr(self.drafter, "tokens", None)
        return depth if isinstance(depth, int) and depth > 0 else TEXT_DEPTH

    @torch.inference_mode()
    def observe(self, committed: Committed) -> None:
        """Tell the policy what came of its trees; the drafter sees everything."""
        if self._tree is not None and committed.tree is not None and committed.nodes is not None:
            self.length.observe(self._step(committed, committed.tree, committed.nodes))
        self._tree = None
        self.drafter.observe(committed)

    def _step(self, committed: Committed, scored: TokenTree, nodes: list[list[int]]) -> Step:
        assert self._tree is not None
        ours, knows = self._tree, self.length.watches_tokens and self.growth is not None
        drafted_something = self._limit > 0
        rows = [_row(ours, scored, row, path, knows) for row, path in enumerate(nodes)]
        tokens = self.growth.tokens if self.growth is not None and drafted_something else None
        labels = None
        if self.length.wants_labels and tokens is not None and scored is ours and committed.logits is not None:
            labels = acceptance_labels(ours, committed.logits, self._params)
        return Step(
            rows, self._limit, ours.num_nodes - 1, self._ended - self._began if drafted_something else 0.0,
            time.perf_counter() - self._ended, tokens, labels,
        )  # fmt: skip

    def select(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self.length.select(rows)
        self.drafter.select(rows)


class _Nodes:
    """Proposed nodes of a row by levels; an object, so that drafters can be copied and pickled."""

    def __init__(self, growth: LimitedGrowth) -> None:
        self._growth = growth

    def __call__(self, levels: int) -> int:
        return nodes_within(self._growth.growth, levels)


def _row(ours: TokenTree, scored: TokenTree, row: int, path: list[int], with_tokens: bool) -> Row | None:
    """What came of one row; None when another drafter's tree was verified there."""
    shape = scored.shapes[row]
    if scored is not ours and not _is_part_of(scored, ours, row):
        return None
    children = shape.children[path[-1]]
    accepted = len(path) - 1
    tokens: list[tuple[int, bool]] = []
    if with_tokens and scored is ours:
        tokens = [*((node, True) for node in path[1:]), *((child, False) for child in children)]
    return Row(max(shape.depths), accepted, accepted + bool(children), tuple(tokens))


def _is_part_of(scored: TokenTree, ours: TokenTree, row: int) -> bool:
    """Whether a row of a scored tree is one of ours, maybe cut: every path of it is there."""
    mine, theirs = ours.tokens[row].tolist(), scored.tokens[row].tolist()
    places: dict[int, int] = {0: 0}
    for node, parent in enumerate(scored.shapes[row].parents):
        if parent == NO_NODE:
            continue
        above = ours.shapes[row].children[places[parent]]
        found = next((child for child in above if mine[child] == theirs[node]), None)
        if found is None:
            return False
        places[node] = found
    return True


def acceptance_labels(tree: TokenTree, logits: Tensor, params: SamplingParams) -> Tensor:
    """Probability [B, N] that each node is accepted once its parent is, on the host; processors are left out.

    p of a chosen child; min(1, p / q) of a first drawn one; at temperature 0 whether it is the target's choice.

    Args:
        tree: as scored.
        logits: raw target logits [B, N, V] of its nodes.
        params: of the generation.
    """
    parents = torch.tensor([shape.parents for shape in tree.shapes], device=logits.device).clamp(min=0)
    rows = torch.arange(len(parents), device=logits.device)[:, None]
    tokens = tree.tokens.to(logits.device)
    if not params.do_sample:
        return (logits.argmax(-1)[rows, parents] == tokens).float().cpu()
    p = params.warp(logits).softmax(-1)[rows, parents, tokens]
    if tree.log_q is None:
        return p.cpu()
    q = tree.log_q.to(logits.device).softmax(-1)[rows, parents, tokens]
    return (p / q.clamp(min=1e-30)).clamp(max=1.0).cpu()
