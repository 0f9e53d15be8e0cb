"""Measures what a verification costs on this machine: medians of interleaved repeats, after a warm-up.

Repeats go round over all sizes, so that a slow minute of the machine touches every point and not one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch

from specdec.costs import store
from specdec.costs.interpolation import Clock, median_of
from specdec.costs.table import CostTable, VerifyPoint
from specdec.errors import SpecdecError
from specdec.target import Target
from specdec.tree import TokenTree
from specdec.verifier import Verifier

NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTEXTS = (64, 512)
WARM_UP = 2
CANARY_REPEATS = 5
TOLERANCE = 0.2
"""Costs that were kept hold while a fresh look at two of them differs by less than this share, or by the noise."""

Tell = Callable[[str, int, int], None]
"""Called with what happens next, what is done, and all there is to do."""


@dataclass(frozen=True)
class Grid:
    """What to measure: every combination.

    Attributes:
        nodes: of a tree, the root included.
        contexts: committed tokens of each row.
        batches: rows.
        repeats: of each combination.

    Raises:
        SpecdecError: an empty list, or a size below 1.
    """

    nodes: tuple[int, ...] = NODES
    contexts: tuple[int, ...] = CONTEXTS
    batches: tuple[int, ...] = (1,)
    repeats: int = 9

    def __post_init__(self) -> None:
        for name in ("nodes", "contexts", "batches"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise SpecdecError(f"costs are measured for {name} of at least 1, got {getattr(self, name)}")
        if self.repeats < 1:
            raise SpecdecError(f"costs are measured at least once, got repeats={self.repeats}")

    def within(self, positions: int | None) -> Grid:
        """Only what fits a model of so many positions.

        Raises:
            SpecdecError: nothing does.
        """
        if positions is None or max(self.contexts) + max(self.nodes) <= positions:
            return self
        nodes = tuple(n for n in self.nodes if n <= positions // 2) or (1,)
        room = positions - max(nodes)
        if room < 1:
            raise SpecdecError(f"a model of {positions} positions has no room for a verification")
        contexts = tuple(dict.fromkeys(min(context, room) for context in self.contexts))
        return Grid(nodes, contexts, self.batches, self.repeats)

    def is_covered_by(self, table: CostTable) -> bool:
        """Whether a table has all of it."""
        there = {(point.batch, point.context, point.nodes) for point in table.verifications}
        return there.issuperset(product(self.batches, self.contexts, self.nodes))


def measured_costs(
    target: Target, grid: Grid | None = None, *, fresh: bool = False, clock: Clock = time.perf_counter,
    tell: Tell | None = None,
) -> CostTable:  # fmt: skip
    """Verification costs of this target on this machine: kept ones while they hold, else measured now and kept.

    Args:
        target: in the state in which it will be used: dtype, device, optimised or not, torch's threads.
        grid: what is wanted; by default one row, 1 to 64 nodes, after 64 and 512 tokens.
        fresh: measure in any case.
        clock: seconds.
        tell: told before every round.
    """
    grid = (grid or Grid()).within(target.max_positions)
    key = store.fingerprint(target)
    kept = None if fresh else store.read(key)
    if kept is not None and grid.is_covered_by(kept) and still_holds(kept, target, grid, clock):
        return kept
    points = measure_verifications(target, grid, clock=clock, tell=tell)
    table = CostTable(tuple(points), source=store.described(target), measured_at=time.time())
    store.write(key, table)
    return table


def still_holds(table: CostTable, target: Target, grid: Grid, clock: Clock = time.perf_counter) -> bool:
    """Whether two points measured now, the narrowest and the widest, agree with the table up to noise."""
    ends = tuple(dict.fromkeys((min(grid.nodes), max(grid.nodes))))
    canary = Grid(ends, (min(grid.contexts),), (min(grid.batches),), CANARY_REPEATS)
    known = {(point.batch, point.context, point.nodes): point for point in table.verifications}
    for point in measure_verifications(target, canary, clock=clock):
        kept = known[point[:3]]
        if abs(point.seconds - kept.seconds) > max(TOLERANCE * kept.seconds, 2 * kept.spread):
            return False
    return True


@torch.no_grad()
def measure_verifications(
    target: Target, grid: Grid, *, clock: Clock = time.perf_counter, tell: Tell | None = None
) -> list[VerifyPoint]:
    """Median seconds of `Verifier.score` for every combination of the grid."""
    pasts = {(b, c): _past(target, b, c, max(grid.nodes)) for b, c in product(grid.batches, grid.contexts)}
    wait = _waiter(target.device)
    seconds: dict[tuple[int, int, int], list[float]] = {}
    rounds = grid.repeats + WARM_UP
    for number in range(rounds):
        if tell is not None:
            tell("measuring verification", number, rounds)
        for (batch, context), verifier in pasts.items():
            for nodes in grid.nodes:
                tree = _tree(target, batch, nodes)
                wait()
                started = clock()
                verifier.score(tree)
                wait()
                elapsed = clock() - started
                verifier.context.keep([[]] * batch)
                if number >= WARM_UP:
                    seconds.setdefault((batch, context, nodes), []).append(elapsed)
    return [VerifyPoint(*size, *median_of(values)) for size, values in seconds.items()]


def _past(target: Target, batch: int, context: int, nodes: int) -> Verifier:
    """A verifier whose rows have so many committed tokens."""
    verifier = Verifier(target, capacity=context + nodes)
    verifier.context.prefill([_ids(target, context, row) for row in range(batch)])
    return verifier


def _tree(target: Target, batch: int, nodes: int) -> TokenTree:
    """Chains; a tree of as many nodes has the same forward under another mask."""
    root = torch.full((batch,), _ids(target, 1, 0)[0], device=target.device)
    return TokenTree.of_chains(root, [_ids(target, nodes - 1, row) for row in range(batch)])


def _ids(target: Target, count: int, seed: int) -> list[int]:
    """Ordinary tokens, different for each row; which ones does not matter."""
    return [(7 + 13 * seed + 31 * place) % target.vocab_size for place in range(count)]


def _waiter(device: torch.device) -> Callable[[], None]:
    """Waits until the device has done all its work; a CPU has nothing pending."""
    if device.type == "cpu":
        return lambda: None
    return getattr(torch, device.type).synchronize
