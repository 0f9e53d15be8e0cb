"""Growth by learned acceptance: nodes are worth what verification showed of their like, not their draft probability.

A draft probability is a poor estimate of acceptance: at temperature 1 a token with q = 0.05 that was drawn is often
accepted, since p need only be as large as q. Two tables, one for chosen and one for drawn children, hold acceptance by
the child's rank (for drawn children: the draw) and by the bin of its draft probability. They are filled with what
verification shows, so they are right for this pair, this text and these sampling parameters after some dozens of steps.

    chosen:  value(child) = value(node) * a(rank, q(y)),  the best `budget` values are kept
    drawn:   key(slot j)  = reach(node) * stay_j * E_{y ~ R_j}[a(j, q(y))],   R_j is q without the draws before j
             reach(child) = reach(node) * stay_j * a(j, q(y)),   stay_{j+1} = stay_j * (1 - a(j, q(y_j)))

For chosen children a is the chance that the target's token is this child, for drawn ones the chance that this child is
accepted once its elder siblings are rejected. Only past steps enter the tables, and a slot's key looks at no draw but
the earlier ones, so both are lossless.

Dimensions: B rows, F nodes of a frontier, K children, M nodes, W draws, G bins, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from specdec.errors import UnknownDrafter
from specdec.grow.chosen import ChosenGrowth
from specdec.grow.drawn import DrawnGrowth
from specdec.grow.levels import Children
from specdec.grow.policy import Expand, Grown
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE, TokenTree

EDGES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 0.9, 0.98)
"""Upper ends of all bins but the last. At most 64 tokens of a law lie above the first."""

RANKS = 16
"""Ranks with a row of their own; later ones share the last."""

FORMAT = "specdec-calibration-1"
Kind = Literal["chosen", "drawn"]


class AcceptanceTable:
    """Trials and acceptances by rank and bin of the draft probability, [RANKS, G] each.

    Args:
        kind: which children it is about; decides what is believed before anything was seen.
        belief: how many trials that belief is worth.
        memory: trials per cell after which both counts are halved, so that the table follows the text.
    """

    def __init__(self, kind: Kind, *, belief: float = 8.0, memory: float = 2000.0) -> None:
        self.belief, self.memory = belief, memory
        self.trials = torch.zeros(RANKS, len(EDGES) + 1, dtype=torch.float64)
        self.accepted = torch.zeros_like(self.trials)
        self._edges = torch.tensor(EDGES, dtype=torch.float64)
        self._prior = _prior(kind)
        self.rates = self._prior.clone()

    def bins(self, shares: Tensor) -> Tensor:
        """Bin of each draft probability."""
        return torch.bucketize(shares.double(), self._edges.to(shares.device))

    def of(self, shares: Tensor) -> Tensor:
        """Acceptance of children with these draft probabilities [..., K] in rank order."""
        ranks = torch.arange(shares.shape[-1], device=shares.device).clamp(max=RANKS - 1)
        return self.rates.to(shares.device, shares.dtype)[ranks.expand_as(shares), self.bins(shares)]

    def learn(self, outcomes: list[tuple[int, float, bool]]) -> None:
        """Rank, draft probability and fate of children that were tried."""
        if not outcomes:
            return
        ranks = torch.tensor([rank for rank, _, _ in outcomes]).clamp(max=RANKS - 1)
        cells = ranks * self.trials.shape[1] + self.bins(torch.tensor([share for _, share, _ in outcomes]))
        fates = torch.tensor([float(fate) for _, _, fate in outcomes], dtype=torch.float64)
        self.trials.view(-1).index_add_(0, cells, torch.ones_like(fates))
        self.accepted.view(-1).index_add_(0, cells, fates)
        halved = torch.where(self.trials > self.memory, 0.5, 1.0).double()
        self.trials *= halved
        self.accepted *= halved
        self.refresh()

    def refresh(self) -> None:
        """Rates from counts and belief."""
        self.rates = (self.accepted + self.belief * self._prior) / (self.trials + self.belief)


def _prior(kind: Kind) -> Tensor:
    """What is believed of rank and bin at first: a chosen child is worth its draft probability; the first draw is often
    accepted whatever its probability, later ones less often (orders of magnitude of a small draft model).
    """
    ends = torch.tensor([0.0, *EDGES, 1.0], dtype=torch.float64)
    middle = (ends[:-1] + ends[1:]) / 2
    ranks = torch.arange(RANKS, dtype=torch.float64)[:, None]
    if kind == "chosen":
        return middle.expand(RANKS, -1).clone()
    return middle ** (0.8 - 0.55 * 0.4**ranks)


class DrawnValues:
    """Keys and reaches of drawn children by a table; see the module."""

    def __init__(self, table: AcceptanceTable) -> None:
        self.table = table

    @property
    def first(self) -> tuple[float, float]:
        """The table's smallest and largest rate for a first draw."""
        return float(self.table.rates[0].min()), float(self.table.rates[0].max())

    def of(self, q: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """[M, W] each, for laws q [M, V] and draws' probabilities [M, W]."""
        accept = self.table.of(shares)
        stay = _exclusive((1.0 - accept).cumprod(1), 1.0)
        return stay * self._expected(q, shares), stay * accept

    def _expected(self, q: Tensor, shares: Tensor) -> Tensor:
        """E_{y ~ R_j}[a(j, q(y))], [M, W]: the law's mass by bins, without the draws before j."""
        num_bins, width = len(EDGES) + 1, shares.shape[1]
        likeliest = q.topk(min(64, q.shape[1]), dim=1).values  # all that do not lie in the lowest bin
        mass = q.new_zeros(q.shape[0], num_bins).scatter_add_(1, self.table.bins(likeliest), likeliest)
        mass[:, 0] += (1.0 - likeliest.sum(1)).clamp(min=0.0)
        drawn = torch.nn.functional.one_hot(self.table.bins(shares), num_bins) * shares[:, :, None]
        left = (mass[:, None] - _exclusive(drawn.cumsum(1), 0.0)).clamp(min=0.0)  # [M, W, G]
        rates = self.table.rates.to(q.device, q.dtype)[torch.arange(width, device=q.device).clamp(max=RANKS - 1)]
        return (left * rates).sum(-1) / left.sum(-1).clamp(min=1e-30)


def _exclusive(cumulated: Tensor, first: float) -> Tensor:
    """The same along dimension 1 without each entry's own part."""
    return torch.cat([torch.full_like(cumulated[:, :1], first), cumulated[:, :-1]], 1)


class CalibratedGrowth:
    """Best-first growth by learned acceptance.

    Args:
        budget: most proposed nodes.
        depth: most levels.
        width: most children of a node.
        children: "chosen", or "drawn" when sampling; at temperature 0 children are always chosen.
        path: JSON file to begin with; see `save`.
    """

    def __init__(
        self, budget: int, depth: int, width: int, children: Children = "chosen", path: Path | None = None
    ) -> None:
        self.budget, self.depth, self.width, self.children = budget, depth, width, children
        self.tables: dict[Kind, AcceptanceTable] = {
            "chosen": AcceptanceTable("chosen"),
            "drawn": AcceptanceTable("drawn"),
        }
        self._chosen = ChosenGrowth(budget, depth, width, worth=self.tables["chosen"].of)
        self._drawn = DrawnGrowth(budget, depth, width, values=DrawnValues(self.tables["drawn"]))
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
        kept = {
            kind: {"trials": table.trials.tolist(), "accepted": table.accepted.tolist()}
            for kind, table in self.tables.items()
        }
        path.write_text(json.dumps({"format": FORMAT, "edges": EDGES, **kept}), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Take the tables of a file that `save` wrote.

        Raises:
            UnknownDrafter: no such file, or not such a file.
        """
        content = _read(path)
        for kind, table in self.tables.items():
            for name in ("trials", "accepted"):
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
        if content["format"] != FORMAT or list(content["edges"]) != list(EDGES):
            raise ValueError("another format")
        names = ("trials", "accepted")
        return {kind: {name: _counts(content[kind][name]) for name in names} for kind in ("chosen", "drawn")}
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
