"""Recorded acceptance under another machine's costs. What comes out is a projection, never a measurement.

B generations go on side by side, each through the recorded ones in turn, beginning at different places; a step takes as
long as its drafting, one verification of all rows, and the rest. Three ways to draft are told apart:

    recorded    what was drafted is drafted
    length k    chains only: at most k tokens. Where the record accepted more, the rest follows in further steps: the
                drafter is taken to guess the same tokens from one token later. Nothing is known beyond what was drafted
    oracle      exactly what will be accepted is drafted, or nothing where nothing pays: no choice of length does better

The baseline decodes the same texts with the same costs, one token for each row and step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from specdec.costs.table import Costs
from specdec.tuning.recorded import Recorded, costs_of_run, measured_speed
from specdec.tuning.traces import Step

ORACLE = "oracle"
LEAST_STEPS = 64
"""Steps of a batch at least, so that a large one is not all beginnings."""
TOLERANCE = 0.1
"""A replay under the run's own costs gives the run's own tokens per second within this share."""

Way = Callable[[Recorded], list[Step]]


@dataclass(frozen=True)
class Projection:
    """What one way of drafting would do.

    Attributes:
        way: "recorded", "length 3", "oracle".
        batch: rows.
        tokens_per_second: of all rows.
        plain_tokens_per_second: the same without speculation.
        fits: the rows have room in the described memory.
    """

    way: str
    batch: int
    tokens_per_second: float
    plain_tokens_per_second: float
    fits: bool = True

    @property
    def speedup(self) -> float:
        """Over plain decoding in the same batch."""
        return self.tokens_per_second / self.plain_tokens_per_second


def simulate(
    runs: Sequence[Recorded], costs: Costs, batches: Sequence[int], lengths: Sequence[int]
) -> list[Projection]:
    """Every way of drafting in every batch size.

    Args:
        runs: recorded generations of one method.
        costs: of the machine to plan for.
        batches: rows.
        lengths: of chains; those beyond what was drafted are left out, and all are where a tree branched.
    """
    most = max(int(step.nodes) for run in runs for step in run.steps)
    ways: dict[str, Way] = {}
    if all(run.chain for run in runs):
        ways |= {f"length {length}": _capped(length) for length in lengths if length < most}
    ways |= {"recorded": lambda run: list(run.steps), ORACLE: oracle_steps}
    return [_project(way, runs, steps_of, costs, batch) for batch in batches for way, steps_of in ways.items()]


def _project(way: str, runs: Sequence[Recorded], steps_of: Way, costs: Costs, batch: int) -> Projection:
    speed = replayed([steps_of(run) for run in runs], costs, batch)
    plain = replayed([plain_steps(run) for run in runs], costs, batch)
    if way == ORACLE:
        speed = max(speed, plain)
    context = sum(step.context for run in runs for step in run.steps) / sum(len(run.steps) for run in runs)
    fits = getattr(costs, "fits", None)
    return Projection(way, batch, speed, plain, fits is None or fits(batch, context))


def replayed(texts: Sequence[Sequence[Step]], costs: Costs, batch: int = 1) -> float:
    """Tokens per second of `batch` rows that go through these texts' steps side by side.

    Args:
        texts: the steps of each generation.
        costs: seconds. Where they say `pads`, every row costs what the widest one does.
        batch: rows.
    """
    every = [step for text in texts for step in text]
    count = len(every) if batch == 1 else max(LEAST_STEPS, -(-len(every) // batch))
    places = [row * len(every) // batch for row in range(batch)]
    pads, tokens, seconds = getattr(costs, "pads", True), 0, 0.0
    for number in range(count):
        steps = [every[(place + number) % len(every)] for place in places]
        tokens += sum(step.emitted for step in steps)
        seconds += _seconds(steps, costs, pads)
    return tokens / seconds if seconds else 0.0


def _seconds(steps: Sequence[Step], costs: Costs, pads: bool) -> float:
    batch = len(steps)
    drafted = [step.nodes for step in steps]
    nodes = max(drafted) if pads else sum(drafted) / batch
    levels = max(step.levels for step in steps)
    context = sum(step.context for step in steps) / batch
    draft = costs.draft(levels, nodes, batch) if max(drafted) else 0.0
    emitted = sum(step.emitted for step in steps) / batch
    return draft + costs.verify(nodes + 1, batch, context) + costs.overhead(emitted)


def plain_steps(run: Recorded) -> list[Step]:
    """The same text, token by token."""
    first, tokens = run.steps[0].context, sum(step.emitted for step in run.steps)
    return [Step(first + place, 0, 0, 1) for place in range(tokens)]


def oracle_steps(run: Recorded) -> list[Step]:
    """Drafting nothing but what was accepted."""
    return [
        Step(step.context, accepted, accepted, step.emitted)
        for step, accepted in zip(run.steps, run.accepted, strict=True)
    ]


def capped_steps(run: Recorded, length: int) -> Iterator[Step]:
    """Chains of at most `length` tokens; a recorded step that emitted more becomes several."""
    for step in run.steps:
        left, nodes, context = step.emitted, int(step.nodes), step.context
        while left > 0:
            drafted = min(nodes, length)
            emitted = min(left, drafted + 1)
            yield Step(context, drafted, drafted, emitted)
            left, context = left - emitted, context + emitted
            nodes = max(nodes - emitted, 0)


def _capped(length: int) -> Way:
    return lambda run: list(capped_steps(run, length))


@dataclass(frozen=True)
class SelfCheck:
    """A replay under the run's own costs, beside what the run measured: tokens per second."""

    replayed: float
    measured: float

    @property
    def holds(self) -> bool:
        """They agree within TOLERANCE."""
        return abs(self.replayed - self.measured) <= TOLERANCE * self.measured


def self_check(runs: Sequence[Recorded]) -> SelfCheck | None:
    """Whether the replay reproduces the run; None where the run's steps were not timed by phases, one row at a time."""
    costs = costs_of_run(runs)
    if costs is None:
        return None
    return SelfCheck(replayed([run.steps for run in runs], costs), measured_speed(runs))
