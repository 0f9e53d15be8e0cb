"""Trees of drawn children that follow the draft law: DySpec (arXiv 2410.11744), and its form with other values.

The elements are *slots*: the j-th draw at a node. A slot's key is fixed before its token is drawn. Best-first growth
takes the open slot of largest key, reveals its token, and opens the slot of the next sibling and that of the token's
own first child. So growth uses what is drawn already, never the value of the token being decided, and nothing drawn
is dropped for its own probability: children are lossless with the rules for drawn children.

    DySpec:  reach(child) = reach(node) * q(y),   key(slot j) = reach(node) * (1 - q(y_1) - ... - q(y_{j-1}))

The paper runs the draft model once for every node. Here whole levels are run before it is known which of them the
budget reaches; then the best-first growth is replayed on the host. Every node of a level gets all its draws at once, in
draw order (that is the same law as drawing one by one), whether or not they are reached. Nodes whose first slot cannot
be reached any more are never run. So the tree is exactly that of the node-by-node growth with the same draws, for one
forward per level.

With a threshold, slots of smaller keys are not taken. With a threshold alone (a budget that is never reached) this
is the paper's layer-parallel variant: keys never grow downwards.

Dimensions: B rows, F nodes of a frontier, W draws at each, C columns, V vocabulary.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specdec.grow.chosen import ChosenGrowth
from specdec.grow.policy import Expand, Frontier, Grown, assembled
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE, TokenTree

FEW = 512
"""Tokens of a truncated law that are worth taking out of the vocabulary."""


class SlotValues(Protocol):
    """What slots and drawn tokens are worth, at a node that is reached with certainty."""

    @property
    def first(self) -> tuple[float, float]:
        """No first slot has a smaller key than the one, or a larger one than the other."""
        ...

    def seen(self, q: Tensor) -> Tensor:
        """What keys need of laws q [M, V]: some numbers of each, [M, ...]."""
        ...

    def of(self, seen: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """From what was seen of laws and the draws' q [M, W]: keys [M, W] and the reach of each drawn child [M, W].

        All on the host, in float64.
        Key j may use the law and draws before j; reach j may use draw j as well.
        """
        ...


class DraftProbabilities:
    """DySpec's values: a draw is accepted with its draft probability, a slot is as good as its chance of a trial."""

    first = (1.0, 1.0)

    def seen(self, q: Tensor) -> Tensor:
        """Nothing."""
        return q[:, :0]

    def of(self, seen: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Draft mass not drawn yet, and the draws' own."""
        left = 1.0 - shares.cumsum(-1)
        return torch.cat([torch.ones_like(left[:, :1]), left[:, :-1]], 1).clamp(min=0.0), shares


class DrawnGrowth:
    """Best-first over slots.

    Args:
        budget: most proposed nodes.
        depth: most levels.
        width: most children of a node.
        threshold: slots with a smaller key are not taken; without sampling, nodes of smaller value.
        values: what slots are worth.
    """

    def __init__(
        self, budget: int, depth: int, width: int, *, threshold: float = 0.0, values: SlotValues | None = None
    ) -> None:
        self.budget, self.depth, self.width, self.threshold = budget, depth, width, threshold
        self.values: SlotValues = values or DraftProbabilities()
        self._without_sampling = ChosenGrowth(budget, depth, width, least_value=threshold)

    @property
    def is_chain(self) -> bool:
        """Only when nodes may have one child."""
        return self.width == 1

    def grow(
        self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int, expand: Expand, most_children: int
    ) -> Grown:
        """Drawn children when sampling; without, the best tree by draft probability."""
        if not params.do_sample:
            return self._without_sampling.grow(root, params, chooser, room, expand, most_children)
        return self.grow_slots(root, params, chooser, room, expand, most_children).tree(root, self)

    def observe(self, tree: TokenTree, nodes: list[list[int]]) -> None:
        """Learns nothing."""

    def grow_slots(
        self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int, expand: Expand, most_children: int
    ) -> Slots:
        """Every draw that was made, whether or not the tree reaches it."""
        slots = Slots(root)
        frontier: Frontier | None = Frontier.of_roots(root)
        levels = min(self.depth, room)
        for level in range(1, levels + 1):
            assert frontier is not None
            logits = expand(frontier)
            if logits is None:
                slots.take_back()
                break
            law = params.warp(logits)
            slots.add(law, self._draw(law, slots, chooser, min(self.width, self.budget, most_children)))
            if level < levels:
                frontier = slots.next_frontier(self.budget, self.threshold, self.values.first, level)
            if frontier is None:
                break
        return slots

    def _draw(self, law: Tensor, slots: Slots, chooser: Chooser, width: int) -> Draws:
        """Draws at every node of the frontier; padding is left out, so that it costs no randomness."""
        laws = law.flatten(0, 1) if bool(slots.live.all()) else law[slots.live.to(law.device)]
        laws, ids = _without_empty(laws, width)
        q = laws.softmax(-1)
        tokens = chooser.draw_without_replacement(laws, min(width, q.shape[1]))
        exists = laws.gather(1, tokens).isfinite()
        seen = self.values.seen(q)
        names = tokens if ids is None else ids.gather(1, tokens)
        parts = [names.double(), q.gather(1, tokens).double(), exists.double(), seen.double()]
        widths = [part.shape[1] for part in parts]
        drawn, shares, real, seen = torch.cat(parts, 1).cpu().split(widths, dim=1)  # one transfer; the rest is small
        keys, reaches = self.values.of(seen, shares)
        return Draws(drawn.long(), shares, keys * real, reaches * real)


def _without_empty(laws: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """Laws [M, S] over the tokens [M, S] that truncation left, where these are few; else the laws [M, V] and None.

    All that follows then costs S and not V. Only where asking for S costs no wait.
    """
    if laws.device.type != "cpu" or laws.shape[1] <= FEW:
        return laws, None
    most = max(int((laws > -torch.inf).sum(1).max()), width)
    return laws.topk(most, dim=1) if most <= FEW else (laws, None)


@dataclass(frozen=True)
class Draws:
    """Draws at M nodes on the host, [M, W] each: tokens, their q, keys and reaches relative to the node's.

    Slots without a draw have key and reach 0.
    """

    tokens: Tensor
    shares: Tensor
    keys: Tensor
    reaches: Tensor


class Slots:
    """The slots of all expanded nodes of all rows, on the host.

    Attributes:
        laws: log-laws [B, F, V] of each frontier, on the device.
        tokens, shares, keys, children: [B, C, W]; children are columns, NO_NODE where a draw was not expanded.
        live: bool [B, F] of the last frontier; False for padding.
    """

    def __init__(self, root: Tensor) -> None:
        rows = root.shape[0]
        self.laws: list[Tensor] = []
        self.live = torch.ones(rows, 1, dtype=torch.bool)
        self._reach = self._cap = torch.ones(rows, 1, dtype=torch.float64)
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._bounds = torch.zeros(rows, 0, dtype=torch.float64)
        self._taken: list[list[tuple[int, int, int]]] | None = None
        self._device = root.device

    def _placed(self, values: Tensor) -> Tensor:
        """Values of the last frontier's live nodes [M, ...], in row-major order, as [B, F, ...]; 0 for padding."""
        shape = (*self.live.shape, *values.shape[1:])
        if values.shape[0] == self.live.numel():
            return values.view(shape)
        whole = values.new_zeros(shape)
        whole[self.live] = values
        return whole

    def add(self, law: Tensor, draws: Draws) -> None:
        """The draws at the last frontier, whose live nodes are in row-major order."""
        self.laws.append(law)
        keys = self._placed(draws.keys) * self._reach[:, :, None]
        # What the best-first growth has to fall to before it takes a slot: no more than on the way there.
        caps = keys.minimum(self._cap[:, :, None]).cummin(2).values
        self._child_reach = self._placed(draws.reaches) * self._reach[:, :, None]
        self._child_cap = caps
        self._bounds = torch.cat([self._bounds, caps.flatten(1)], 1)
        children = torch.full(keys.shape, NO_NODE)
        self._parts.append((self._placed(draws.tokens), self._placed(draws.shares), keys, children))

    def next_frontier(self, budget: int, threshold: float, first: tuple[float, float], depth: int) -> Frontier | None:
        """Last draws whose own first slot best-first growth may still take; None when there are none."""
        reach, cap = self._child_reach.flatten(1), self._child_cap.flatten(1)
        least = _least_taken(torch.cat([self._bounds, (reach * first[0]).minimum(cap)], 1), budget)
        bound = (reach * first[1]).minimum(cap)
        wanted = (bound > 0) & (bound >= least) & (bound >= threshold)
        num_nodes = int(wanted.sum(1).max())
        if num_nodes == 0:
            return None
        at = wanted.byte().argsort(dim=1, descending=True, stable=True)[:, :num_nodes]  # the wanted ones, in order
        live = wanted.gather(1, at)
        width = self._parts[-1][0].shape[2]
        start = sum(part[0].shape[1] for part in self._parts)
        parents_start = start - self._parts[-1][0].shape[1]
        new = torch.arange(start, start + num_nodes).expand_as(at).masked_fill(~live, NO_NODE)
        self._parts[-1][3].flatten(1).scatter_(1, at, new)
        tokens = self._parts[-1][0].flatten(1).gather(1, at).to(self._device)
        self.live, self._reach, self._cap = live, reach.gather(1, at), cap.gather(1, at)
        parents = (at // width + parents_start).masked_fill(~live, NO_NODE)
        return Frontier(tokens, parents, torch.full_like(parents, depth).masked_fill(~live, 0))

    def take_back(self) -> None:
        """The last frontier was not run after all."""
        self._parts[-1][3].fill_(NO_NODE)

    def best_first(self, policy: DrawnGrowth) -> tuple[list[list[tuple[int, int, int]]], list[Tensor]]:
        """Per row the slots taken, as (parent node, column, draw); and tokens, shares, keys, children [B, C, W]."""
        tokens, shares, keys, children = (torch.cat(part, 1) for part in zip(*self._parts, strict=True))
        if self._taken is None:
            self._taken = [
                _best_first(k, c, policy.budget, policy.threshold)
                for k, c in zip(keys.tolist(), children.tolist(), strict=True)
            ]
        return self._taken, [tokens, shares, keys, children]

    def tree(self, root: Tensor, policy: DrawnGrowth) -> Grown:
        """The slots that best-first growth takes, as a tree."""
        rows, (tokens, _, _, children) = self.best_first(policy)
        ids, columns = tokens.tolist(), children.tolist()
        return assembled(
            root,
            [[ids[b][column][draw] for _, column, draw in row] for b, row in enumerate(rows)],
            [[parent for parent, _, _ in row] for row in rows],
            self.laws,
            [[columns[b][column][draw] for _, column, draw in row] for b, row in enumerate(rows)],
        )


def _least_taken(bounds: Tensor, budget: int) -> Tensor | float:
    """No slot below this [B, 1] is taken, when slots [B, S] exist that are worth at least as much as their bounds."""
    return bounds.topk(budget, dim=1).values[:, -1:] if bounds.shape[1] >= budget else 0.0


def _best_first(
    keys: list[list[float]], children: list[list[int]], budget: int, threshold: float
) -> list[tuple[int, int, int]]:
    """Slots in the order of taking, as (parent node, column, draw). Of equal keys the earlier column, then draw."""
    open_slots = [(-keys[0][0], 0, 0, 0)]
    taken: list[tuple[int, int, int]] = []
    while open_slots and len(taken) < budget:
        negative, column, draw, node = heapq.heappop(open_slots)
        if negative == 0.0 or -negative < threshold:
            break
        taken.append((node, column, draw))
        if draw + 1 < len(keys[column]):
            heapq.heappush(open_slots, (-keys[column][draw + 1], column, draw + 1, node))
        child = children[column][draw]
        if child != NO_NODE:
            heapq.heappush(open_slots, (-keys[child][0], child, 0, len(taken)))
    return taken
