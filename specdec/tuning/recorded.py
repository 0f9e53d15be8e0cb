"""Recorded steps of a benchmark run, read as acceptance traces, and the costs that the run itself met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec.bench.record import Record, read_records
from specdec.costs.interpolation import median_of
from specdec.costs.table import CostTable, VerifyPoint
from specdec.errors import SpecdecError
from specdec.tuning.traces import Step


@dataclass(frozen=True)
class Recorded:
    """One recorded generation.

    Attributes:
        steps: one for each target call after the prompt; records do not say how deep a tree was: all are taken to be as
            deep as the deepest one in which a node was tried.
        accepted: proposed tokens that were emitted, for each step.
        chain: no tree branched.
        draft, verify, total: seconds of each step; None where the run did not time them.
        alone: it was generated in a batch of one.
    """

    steps: tuple[Step, ...]
    accepted: tuple[int, ...]
    chain: bool
    draft: tuple[float, ...] | None
    verify: tuple[float, ...] | None
    total: tuple[float, ...]
    alone: bool


def read_recorded(path: Path) -> dict[str, list[Recorded]]:
    """Method -> its generations, of the methods whose records say what was drafted.

    Raises:
        SpecdecError: no run, or one without such a method.
    """
    by_method: dict[str, list[Record]] = {}
    for record in read_records(path):
        steps = record["steps"]
        if record["error"] is None and steps["emitted"] and None not in (steps["drafted"], steps["accepted"]):
            by_method.setdefault(record["method"], []).append(record)
    found = {}
    for method, records in by_method.items():
        deepest = max((depth for record in records for depth in record["steps"]["tried"] or []), default=1)
        found[method] = [_recorded(record, deepest) for record in records]
    drafting = {name: runs for name, runs in found.items() if any(step.nodes for run in runs for step in run.steps)}
    if not drafting:
        raise SpecdecError(f"{path} has no method whose records say what was drafted; run specdec bench with --drafter")
    return drafting


def _recorded(record: Record, deepest: int) -> Recorded:
    steps, context = [], record["prompt"]["tokens"]
    chain = bool(record["chain"])
    drafted, accepted = record["steps"]["drafted"] or [], record["steps"]["accepted"] or []
    for nodes, emitted in zip(drafted, record["steps"]["emitted"], strict=True):
        steps.append(Step(context, nodes, nodes if chain else min(nodes, deepest), emitted))
        context += emitted
    draft, verify = record["steps"]["draft"], record["steps"]["verify"]
    return Recorded(
        tuple(steps),
        tuple(accepted),
        chain,
        None if draft is None else tuple(draft),
        None if verify is None else tuple(verify),
        tuple(record["steps"]["total"]),
        record["batch"]["size"] == 1,
    )


def costs_of_run(runs: Sequence[Recorded]) -> CostTable | None:
    """What the steps of a method cost in the run: verification by nodes and context, and medians of the rest.

    None where the run was not timed by phases, or in batches. Drafting is part of `per_step`: its mean is all that a
    replay of the same steps needs.
    """
    timed = [run for run in runs if run.verify is not None and run.draft is not None and run.alone]
    if not timed:
        return None
    by_nodes: dict[int, list[float]] = {}
    rest = []
    for run in timed:
        for step, verify, total in zip(run.steps, run.verify or (), run.total, strict=True):
            by_nodes.setdefault(int(step.nodes) + 1, []).append(verify)
            rest.append(max(total - verify, 0.0))
    points = [VerifyPoint(1, 1, nodes, _mean(times), median_of(times)[1]) for nodes, times in by_nodes.items()]
    return CostTable(tuple(points), per_step=_mean(rest), source={"measured": "by the run itself"})


def measured_speed(runs: Sequence[Recorded]) -> float:
    """Tokens per second after the prompt, as the run measured them."""
    seconds = sum(sum(run.total) for run in runs)
    return sum(step.emitted for run in runs for step in run.steps) / seconds if seconds else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
