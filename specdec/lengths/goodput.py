"""Goodput: the length of most expected tokens per second, for the whole batch, 0 where speculation does not pay.

SmartSpec (arXiv 2406.14066). Of B rows that draft k levels with n(k) nodes each, a step is expected to give

    goodput(k) = B * (1 + a_1 + a_1 a_2 + ... + a_1 ... a_k) / (draft(k) + verify(B, 1 + n(k)) + overhead)

The paper takes one rate for all depths, a moving average, and a linear cost model; here each depth has its own rate,
and costs are given or measured. Wide batches make verification expensive, and unlike acceptance make it not pay: then
k = 0, which is plain decoding without a draft forward. While k = 0 nothing is learned, so now and then two steps draft
nevertheless: after 8 plain steps, and after twice as many each time that it did not help, up to 128.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from specdec.costs.table import Costs, CostTable, step_seconds
from specdec.errors import UnknownDrafter
from specdec.lengths.costs import MeasuredCosts
from specdec.lengths.policy import LengthPolicy, Step
from specdec.lengths.survival import AcceptanceByDepth, expected_tokens

FIRST_WAIT, LONGEST_WAIT = 8, 128
"""Plain steps between two probes."""

PROBE = 2
"""Steps of a probe: in the first one, drafters digest what they missed, and its time is not that of drafting."""


class GoodputLength(LengthPolicy):
    """One length for all rows of a step.

    Args:
        costs: a cost table in a JSON file, see `specdec.costs.table`; None measures while decoding. What was measured
            is of the machine and not of the text: it stays from one generation to the next in any case.
        memory: trials of a depth after which its counts are halved.
        carry_over: keep acceptance, too.

    Raises:
        SpecdecError: a file without costs.
        UnknownDrafter: no memory.
    """

    def __init__(self, *, costs: str | None = None, memory: int = 200, carry_over: bool = False) -> None:
        super().__init__(carry_over=carry_over)
        if memory < 1:
            raise UnknownDrafter(f"length=goodput takes memory >= 1, got {memory}")
        self.costs: Costs = MeasuredCosts() if costs is None else CostTable.load(Path(costs).expanduser())
        self.memory = memory
        self.nodes: Callable[[int], int] = lambda levels: levels
        """Proposed nodes of a row by levels; a chain's, until somebody knows better."""
        self.forget()

    def begin(self, batch_size: int) -> None:
        """The first proposal of a generation also digests the prompt."""
        super().begin(batch_size)
        self._digests = True

    def forget(self) -> None:
        """No acceptance seen, no probe due."""
        self.acceptance = AcceptanceByDepth(self.memory)
        self._wait, self._plain_steps, self._probe_left = FIRST_WAIT, 0, 0
        self._turn, self._digests = 0, True

    def limits(self, rows: int, most: int) -> list[int]:
        """The best length, or that of a probe."""
        if isinstance(self.costs, MeasuredCosts) and not self.costs.knows():
            self._turn += 1
            return [most if self._turn % 2 else most // 2] * rows
        goodputs = self.goodputs(rows, most)
        best = goodputs.index(max(goodputs))
        if best:
            self._wait, self._probe_left = FIRST_WAIT, 0
        else:
            best = self._probe(goodputs)
        self._plain_steps = 0 if best else self._plain_steps + 1
        return [best] * rows

    def _probe(self, goodputs: list[float]) -> int:
        """The best length above 0 when it is time to try one, else 0."""
        if not self._probe_left and self._plain_steps >= self._wait:
            self._probe_left = PROBE
            self._wait = min(2 * self._wait, LONGEST_WAIT)
        if not self._probe_left:
            return 0
        self._probe_left -= 1
        return goodputs.index(max(goodputs[1:]), 1)

    def goodputs(self, rows: int, most: int) -> list[float]:
        """Expected tokens per second of 0 to `most` levels."""
        tokens = expected_tokens([self.acceptance.rate(level) for level in range(most)])
        nodes = [self.nodes(k) if k else 0 for k in range(most + 1)]
        return [
            rows * expected / max(step_seconds(self.costs, nodes[k], k, expected, rows), 1e-12)
            for k, expected in enumerate(tokens)
        ]

    def observe(self, step: Step) -> None:
        """Acceptance of every row, and what the step took."""
        for row in step.rows:
            if row is not None:
                self.acceptance.learn(row)
        if isinstance(self.costs, MeasuredCosts) and all(row is not None for row in step.rows):
            width = len(step.rows) * (1 + step.nodes)
            self.costs.learn(width, step.limit, step.verify_seconds, None if self._digests else step.draft_seconds)
        self._digests = step.limit == 0
