"""All numbers of a run in one JSON-able dict: for each method overall, by column and by raw category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.bench.measured_run import MeasuredRun, read_run
from specdec.bench.methods import NONE, PLAIN, PLAIN_AGAIN
from specdec.bench.record import write_json
from specdec.bench.spec_bench import file_name
from specdec.bench.statistics.acceptance import acceptance
from specdec.bench.statistics.bootstrap import METHOD
from specdec.bench.statistics.budget import PlainStep, plain_step, prediction, step_budget
from specdec.bench.statistics.cost import verify_cost
from specdec.bench.statistics.exactness import exactness
from specdec.bench.statistics.latency import DEFINITIONS, latency
from specdec.bench.statistics.null import against_itself
from specdec.bench.statistics.nvidia import acceptance_rate, speculation_profile
from specdec.bench.statistics.sample import Question, Sample, failures, samples_of, units_of
from specdec.bench.statistics.speedup import pair_up, speedup
from specdec.bench.statistics.throughput import peak_memory, throughput
from specdec.bench.statistics.vllm import vllm_keys

SUMMARY_FILE = "summary.json"
PROFILES = "profiles"
FORMAT = 1
ERRORS_LISTED = 5

Summary = dict[str, Any]


@dataclass(frozen=True)
class _Group:
    """The part of a run that one row of a table is about: one method's samples and the baseline's."""

    samples: list[Sample]
    base: list[Sample]
    loop: list[Sample]
    verdicts: list[dict[str, Any]]


def summarize(run_dir: Path) -> Summary:
    """Every number of a run; `write_summary` puts it into the run's directory.

    Records that ended in an error are left out and counted. Speed-ups need the method `plain`; without it they are
    missing.

    Raises:
        SpecdecError: the directory holds no run, or a record contradicts itself.
    """
    return summary_of(read_run(run_dir))


def summary_of(run: MeasuredRun) -> Summary:
    """The same for a run that has been read."""
    samples = samples_of(run.records)
    units = units_of(samples)
    of_method = {name: [s for s in samples if s.record["method"] == name] for name in run.methods}
    base, again = of_method.get(PLAIN, []), of_method.get(PLAIN_AGAIN, [])
    return {
        "format": FORMAT,
        "baseline": PLAIN,
        "loop": NONE,
        "interval": METHOD,
        "latency_definitions": DEFINITIONS,
        "columns": run.columns,
        "categories": run.categories,
        "questions": len({record["question_id"] for record in run.records}),
        "records": len(run.records),
        "manifest": run.manifest,
        "methods": {name: _method(run, name, of_method, units) for name in run.methods},
        "baseline_against_itself": against_itself(base, again) if base and again else None,
    }


def write_summary(summary: Summary, run_dir: Path) -> list[Path]:
    """Write summary.json, and profiles/METHOD/speculation_profile.json for each method that drafted.

    Returns:
        The files.
    """
    written = [run_dir / SUMMARY_FILE]
    write_json(written[0], summary)
    for name, method in summary["methods"].items():
        if method["speculation_profile"]:
            written.append(run_dir / PROFILES / file_name(name) / "speculation_profile.json")
            write_json(written[-1], method["speculation_profile"])
    return written


def _method(
    run: MeasuredRun, name: str, of_method: Mapping[str, list[Sample]], units: Mapping[Question, int]
) -> dict[str, Any]:
    """One method: who it is, its numbers by group, and the same under other tools' names."""
    records = [record for record in run.records if record["method"] == name]
    failed = failures(records)
    samples = of_method[name]
    whole = _Group(
        samples,
        of_method.get(PLAIN, []),
        of_method.get(NONE, []),
        [verdict for verdict in run.verdicts if verdict["method"] == name],
    )
    overall = _numbers(whole, units, stratified=True)
    of_question = {record["question_id"]: record for record in records}
    return {
        "lossy": next((record["lossy"] for record in records if record["lossy"]), None),
        "records": len(records),
        "errors": {"count": len(failed), "first": [_error(record) for record in failed[:ERRORS_LISTED]]},
        "overall": overall,
        "columns": {c: _numbers(_part(whole, of_question, "column", c), units) for c in run.columns},
        "categories": {c: _numbers(_part(whole, of_question, "category", c), units) for c in run.categories},
        "verify_cost": verify_cost(samples),
        "spec_bench": run.spec_bench.get(name),
        "vllm": vllm_keys(samples, len(failed), overall["acceptance"]),
        "nvidia": acceptance_rate(samples, overall["acceptance"]),
        "speculation_profile": speculation_profile(name, samples, overall["acceptance"], run.manifest),
    }


def _part(whole: _Group, of_question: Mapping[Question, Any], key: str, value: str) -> _Group:
    """The samples and verdicts of one column or category."""
    inside = {question for question, record in of_question.items() if record[key] == value}
    parts = [[s for s in samples if s.question in inside] for samples in (whole.samples, whole.base, whole.loop)]
    return _Group(
        parts[0],
        parts[1],
        parts[2],
        [verdict for verdict in whole.verdicts if verdict["question_id"] in inside],
    )


def _numbers(group: _Group, units: Mapping[Question, int], stratified: bool = False) -> dict[str, Any]:
    """Everything that is said of one method in one group."""
    budget = step_budget(group.samples)
    is_base = group.samples == group.base
    return {
        "requests": len(group.samples),
        "speedup": {} if is_base else speedup(pair_up(group.base, group.samples), units, stratified),
        "acceptance": acceptance(group.samples, units, stratified),
        "throughput": throughput(group.samples),
        "latency": latency(group.samples),
        "steps": budget,
        "prediction": prediction(budget, _plain_step(group), _decode_ratio(group.base, group.samples)),
        "peak_memory_bytes": peak_memory(group.samples),
        "exactness": exactness(group.verdicts),
    }


def _plain_step(group: _Group) -> PlainStep | None:
    """Of the baseline, or of our own loop where the baseline's first token was not timed."""
    return plain_step(group.base) or plain_step(group.loop)


def _decode_ratio(base: Sequence[Sample], method: Sequence[Sample]) -> float | None:
    """Decode speed over the baseline's, on the turns that both have."""
    turns = {(s.question, s.record["turn"]) for s in base} & {(s.question, s.record["turn"]) for s in method}
    speeds = [
        throughput([s for s in samples if (s.question, s.record["turn"]) in turns])["decode_tokens_per_second"]
        for samples in (method, base)
    ]
    return speeds[0] / speeds[1] if speeds[0] and speeds[1] else None


def _error(record: Any) -> dict[str, Any]:
    return {key: record[key] for key in ("question_id", "turn", "repeat", "error")}
