"""Growth by learned acceptance: nodes are worth what verification showed of their like, not their draft probability.

A draft probability is a poor estimate of acceptance: at temperature 1 a token with q = 0.05 that was drawn is often
accepted, since p need only be as large as q. Two tables, one for chosen and one for drawn children, hold acceptance by
the child's rank (for drawn children: the draw) and its draft probability. They are filled with what verification shows,
so they are right for this pair, this text and these sampling parameters after some dozens of steps.

    chosen:  value(child) = value(node) * a(rank, q(y)),  the best `budget` values are kept
    drawn:   key(slot j)  = reach(node) * stay_j * E_{y ~ R_j}[a(j, q(y))],   R_j is q without the draws before j
             reach(child) = reach(node) * stay_j * a(j, q(y)),   stay_{j+1} = stay_j * (1 - a(j, q(y_j)))

For chosen children a is the chance that the target's token is this child, for drawn ones the chance that this child is
accepted once its elder siblings are rejected. Only past steps enter the tables, and a slot's key looks at no draw but
the earlier ones, so both are lossless.

A table holds a at some probabilities, the knots. Between them a is a straight line in log q for drawn children; for
chosen ones, whose acceptance falls with q down to nothing, log a is. What is learned is not a itself but how many times
more often than first believed a child is accepted: with few outcomes a keeps the order that the draft gives, and no two
probabilities are thrown together.

Dimensions: B rows, F nodes of a frontier, K children, M nodes, W draws, G knots, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.errors import UnknownDrafter
from specdec.grow.chosen import ChosenGrowth
from specdec.grow.drawn import DrawnGrowth
from specdec.grow.levels import Children
from specdec.grow.policy import Expand, Grown
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE, TokenTree

KNOTS = (2**-12, 2**-10, 2**-8, 2**-6, 2**-5, 2**-4, 2**-3, 2**-2, 2**-1, 0.75, 0.9, 0.98, 1.0)
"""Draft probabilities at which acceptance is held, rising."""

LOWEST = math.log2(KNOTS[0])
LOG_KNOTS = np.log2(KNOTS)

RANKS = 16
"""Ranks with a row of their own; later ones share the last."""

LOOKED_AT = 16
"""Tokens of a law that a slot's key takes one by one; the rest counts as tokens of their mean probability."""

FORMAT = "specdec-calibration-2"
COUNTS = ("trials", "expected", "accepted")
Kind = Literal["chosen", "drawn"]
Doubles = NDArray[np.float64]


class AcceptanceTable:
    """Acceptance by rank and draft probability: what is believed at first, times what was seen over what was expected.

    Args:
        kind: which children it is about; decides what is believed before anything was seen.
        belief: how many acceptances that belief is worth, in each cell.
        memory: trials per cell after which its counts are halved, so that the table follows the text.

    Attributes:
        trials, expected, accepted: [RANKS, G]; outcomes between two knots count for both, by nearness.
        rates: [RANKS, G].
    """

    def __init__(self, kind: Kind, *, belief: float = 4.0, memory: float = 2000.0) -> None:
        self.belief, self.memory = belief, memory
        self.trials = torch.zeros(RANKS, len(KNOTS), dtype=torch.float64)
        self.expected = torch.zeros_like(self.trials)
        self.accepted = torch.zeros_like(self.trials)
        self._knots = torch.tensor(KNOTS, dtype=torch.float64).log2()
        self._prior = _prior(kind)
        # Below the knots a chosen child is worth in proportion to q, nothing at 0; a drawn one as much as at the first.
        self._falls = kind == "chosen"
        self.refresh()

    def of(self, shares: Tensor) -> Tensor:
        """Acceptance of children with these draft probabilities [..., K] in rank order."""
        ranks = torch.arange(shares.shape[-1], device=shares.device).clamp(max=RANKS - 1)
        return self._between(self._heights, shares, ranks.expand_as(shares))

    def of_ranks(self, count: int) -> Tensor:
        """Acceptance at the knots for each of the first ranks, [count, G]."""
        return self.rates[torch.arange(count).clamp(max=RANKS - 1)]

    def learn(self, outcomes: list[tuple[int, float, bool]]) -> None:
        """Rank, draft probability and fate of children that were tried."""
        if not outcomes:
            return
        ranks = torch.tensor([rank for rank, _, _ in outcomes]).clamp(max=RANKS - 1)
        shares = torch.tensor([share for _, share, _ in outcomes], dtype=torch.float64)
        fates = torch.tensor([float(fate) for _, _, fate in outcomes], dtype=torch.float64)
        believed = self._between(self._prior.log2() if self._falls else self._prior, shares, ranks)
        low, part, _ = self._place(shares)
        for knot, weight in ((low, 1.0 - part), (low + 1, part)):
            cells = ranks * len(KNOTS) + knot
            self.trials.view(-1).index_add_(0, cells, weight)
            self.expected.view(-1).index_add_(0, cells, weight * believed)
            self.accepted.view(-1).index_add_(0, cells, weight * fates)
        halved = torch.where(self.trials > self.memory, 0.5, 1.0).double()
        for name in COUNTS:
            getattr(self, name).mul_(halved)
        self.refresh()

    def refresh(self) -> None:
        """Rates from counts and belief."""
        self.set_rates(self._prior * (self.accepted + self.belief) / (self.expected + self.belief))

    def set_rates(self, rates: Tensor) -> None:
        """Take these rates [RANKS, G] until the next outcomes."""
        self.rates = rates.clamp(min=2**-40, max=1.0)
        self._heights = self.rates.log2() if self._falls else self.rates

    def _between(self, heights: Tensor, shares: Tensor, ranks: Tensor) -> Tensor:
        low, part, below = self._place(shares)
        rows = heights.to(shares.device, shares.dtype)
        height = torch.lerp(rows[ranks, low], rows[ranks, low + 1], part)
        return (height + below).exp2() if self._falls else height

    def _place(self, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The knot below each probability, how far it is to the next one, and log2 of how far below all knots."""
        knots, x = self._knots.to(shares.device, shares.dtype), shares.log2()
        inside = x.clamp(min=LOWEST, max=0.0)
        low = (torch.bucketize(inside, knots, right=True) - 1).clamp(max=len(KNOTS) - 2)
        return low, (inside - knots[low]) / (knots[low + 1] - knots[low]), (x - LOWEST).clamp(max=0.0)


def _prior(kind: Kind) -> Tensor:
    """What is believed of rank and probability at first, [RANKS, G].

    A chosen child is worth its draft probability. A first draw is often accepted whatever its probability, later ones
    less often: the orders of magnitude of a small draft model at temperatures around 1.
    """
    knots = torch.tensor(KNOTS, dtype=torch.float64)
    if kind == "chosen":
        return knots.expand(RANKS, -1).clone()
    ranks = torch.arange(RANKS, dtype=torch.float64)[:, None]
    return (0.35 + 0.6 * 0.45**ranks) * knots ** (0.35 - 0.22 * 0.6**ranks)


class DrawnValues:
    """Keys and reaches of drawn children by a table; see the module.

    A few numbers are left of each law. They are numpy's, whose calls on small arrays cost less than torch's.
    """

    def __init__(self, table: AcceptanceTable) -> None:
        self.table = table

    @property
    def first(self) -> tuple[float, float]:
        """The table's smallest and largest rate for a first draw."""
        return float(self.table.rates[0].min()), float(self.table.rates[0].max())

    def seen(self, q: Tensor) -> Tensor:
        """Probabilities of the likeliest tokens of each law, then mass and mean probability of the rest: [M, L + 2]."""
        likeliest = q.topk(min(LOOKED_AT, q.shape[1]), dim=1).values
        rest = (1.0 - likeliest.sum(1)).clamp(min=0.0)
        squares = (q.square().sum(1) - likeliest.square().sum(1)).clamp(min=0.0)
        mean = torch.where(rest > 1e-6, squares / rest.clamp(min=1e-6), 0.0)
        return torch.cat([likeliest, rest[:, None], mean[:, None]], 1)

    def of(self, seen: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """[M, W] each, for what was seen of laws and the draws' probabilities [M, W]."""
        drawn = shares.double().numpy()
        likeliest, rest, mean = np.split(seen.double().numpy(), [-2, -1], axis=1)
        masses, tokens = np.concatenate([likeliest, rest], 1), np.concatenate([likeliest, mean], 1)
        heights = np.log2(np.concatenate([tokens, drawn], 1).clip(KNOTS[0], 1.0))
        rates = self.table.of_ranks(drawn.shape[1]).numpy()
        of_ranks = np.stack([np.interp(heights, LOG_KNOTS, row) for row in rates], 1)  # [M, W (rank), L + 1 + W]
        of_tokens, of_drawn = np.split(of_ranks, [tokens.shape[1]], axis=2)
        accept = of_drawn.diagonal(axis1=1, axis2=2)
        stay = _exclusive((1.0 - accept).cumprod(1), 1.0)
        # E_{y ~ R_j}[a(j, q(y))]: the whole law's sum for draw j, without the part of the draws before j.
        whole, taken = (of_tokens * masses[:, None]).sum(-1), np.tril(of_drawn * drawn[:, None], -1).sum(-1)
        left = (1.0 - _exclusive(drawn.cumsum(1), 0.0)).clip(min=1e-6)
        expected = ((whole - taken).clip(min=0.0) / left).clip(max=1.0)
        return torch.from_numpy(stay * expected), torch.from_numpy(stay * accept)


def _exclusive(cumulated: Doubles, first: float) -> Doubles:
    """The same along dimension 1 without each entry's own part."""
    return np.concatenate([np.full_like(cumulated[:, :1], first), cumulated[:, :-1]], 1)


class CalibratedGrowth:
    """Best-first growth by learned acceptance.

    Args:
        budget: most proposed nodes.
        depth: most levels.
        width: most children of a node.
        children: "chosen", or "drawn" when sampling; at temperature 0 children are always chosen.
        path: JSON file to begin with; see `save`.
        threshold: least chance of being accepted for which a node is taken, even where the budget has room. A node
            pays where its chance is above what it costs: the seconds of one more node in a draft and a verify forward,
            over the seconds of one token.
    """

    def __init__(
        self,
        budget: int,
        depth: int,
        width: int,
        children: Children = "chosen",
        path: Path | None = None,
        *,
        threshold: float = 0.0,
    ) -> None:
        self.budget, self.depth, self.width, self.children = budget, depth, width, children
        self.tables: dict[Kind, AcceptanceTable] = {
            "chosen": AcceptanceTable("chosen"),
            "drawn": AcceptanceTable("drawn"),
        }
        chosen, drawn = self.tables["chosen"], self.tables["drawn"]
        self._chosen = ChosenGrowth(budget, depth, width, least_value=threshold, worth=chosen.of)
        self._drawn = DrawnGrowth(budget, depth, width, threshold=threshold, values=DrawnValues(drawn))
        self._last: tuple[TokenTree, list[list[tuple[int, float]]]] | None = None
        if path is not None:
            self.load(path)

    @property
    def is_chain(self) -> bool:
        """Only when nodes may have one child."""
        return self.width == 1

    def grow(
        self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int, expand: Expand, most_children: int
    ) -> Grown:
        """By the tables as they are."""
        if self.children == "drawn" and params.do_sample:
            return self._grow_drawn(root, params, chooser, room, expand, most_children)
        pool = self._chosen.grow_pool(root, room, expand, most_children)
        grown = pool.tree(root)
        traits = [
            list(zip(pool.ranks[row, entries].tolist(), pool.shares[row, entries].tolist(), strict=True))
            for row, entries in enumerate(pool.kept())
        ]
        self._last = (grown.tree, traits)
        return grown

    def _grow_drawn(
        self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int, expand: Expand, most_children: int
    ) -> Grown:
        slots = self._drawn.grow_slots(root, params, chooser, room, expand, most_children)
        grown = slots.tree(root, self._drawn)
        rows, (_, shares, _, _) = slots.best_first(self._drawn)
        q = shares.tolist()
        traits = [[(draw, q[b][column][draw]) for _, column, draw in row] for b, row in enumerate(rows)]
        self._last = (grown.tree, traits)
        return grown

    def observe(self, tree: TokenTree, nodes: list[list[int]]) -> None:
        """Learn from what was accepted of the tree grown last."""
        if self._last is None:
            return
        grown, traits = self._last
        self._last = None
        kind: Kind = "chosen" if grown.log_q is None else "drawn"
        outcomes = [
            outcome
            for row, path in enumerate(nodes)
            for outcome in _outcomes(kind, grown, traits[row], tree, path, row)
        ]
        self.tables[kind].learn(outcomes)

    def save(self, path: Path) -> None:
        """Write both tables as JSON."""
        kept = {kind: {name: getattr(table, name).tolist() for name in COUNTS} for kind, table in self.tables.items()}
        path.write_text(json.dumps({"format": FORMAT, "knots": KNOTS, **kept}), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Take the tables of a file that `save` wrote.

        Raises:
            UnknownDrafter: no such file, or not such a file.
        """
        content = _read(path)
        for kind, table in self.tables.items():
            for name in COUNTS:
                values = content[kind][name]
                if values.shape != table.trials.shape or not bool((values >= 0).all()):
                    raise UnknownDrafter(f"{path}: {kind}.{name} is not a table of {tuple(table.trials.shape)} counts")
                setattr(table, name, values)
            if bool((table.accepted > table.trials).any()):
                raise UnknownDrafter(f"{path}: {kind} has more acceptances than trials")
            table.refresh()


def _counts(rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _read(path: Path) -> dict[str, dict[str, Tensor]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or list(content["knots"]) != list(KNOTS):
            raise ValueError("another format")
        return {kind: {name: _counts(content[kind][name]) for name in COUNTS} for kind in ("chosen", "drawn")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnknownDrafter(f"{path} does not hold acceptance tables ({FORMAT}): {error}") from error


def _outcomes(
    kind: Kind, grown: TokenTree, traits: list[tuple[int, float]], scored: TokenTree, path: list[int], row: int
) -> Iterator[tuple[int, float, bool]]:
    """Rank, draft probability and fate of every child that was tried on the way down an accepted path."""
    ours, theirs = grown.tokens[row].tolist(), scored.tokens[row].tolist()
    node = 0
    for at, following in zip(path, [*path[1:], NO_NODE], strict=True):
        scored_children = [theirs[child] for child in scored.shapes[row].children[at]]
        tried = grown.shapes[row].children[node][: len(scored_children)]
        if [ours[child] for child in tried] != scored_children:  # another drafter's tree stands in this row
            return
        token = theirs[following] if following != NO_NODE else None
        for child in tried:
            taken = ours[child] == token
            yield (*traits[child - 1], taken)
            if taken:
                node = child
                if kind == "drawn":  # younger siblings were not tried
                    break
