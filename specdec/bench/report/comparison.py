"""The report of several runs: what differs between them, and their numbers on the questions they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from specdec.bench.measured_run import MeasuredRun
from specdec.bench.plots.speedup_plot import speedup_plot
from specdec.bench.report.document import Block, Callout, Cell, Code, Document, Figure, Heading, Paragraph, Table
from specdec.bench.report.headline import cautions, geometric_mean
from specdec.bench.report.provenance import command_line, flat
from specdec.bench.report.words import MISSING, Summary, count, exact_cell, interval, labels, number, ratio_cell
from specdec.bench.statistics.sample import Sample, samples_of, units_of
from specdec.bench.statistics.speedup import geometric_mean as mean_ratio
from specdec.bench.statistics.speedup import pair_up
from specdec.bench.summary import summary_of

ALIGNED = ("target", "questions", "prompts", "settings", "hardware", "versions")
NO_RATIO = ("target", "hardware")
"""Where these differ, times of one run over times of another mean nothing."""
SHOWN_DIFFERENCES = 12


def comparison_document(runs: Sequence[MeasuredRun]) -> Document:
    """Several runs side by side on the questions whose first prompts are the same."""
    names = _names(runs)
    document = Document(f"specdec bench: {count(len(runs), 'run')} compared")
    document.add(Heading(document.title, 1), _runs_table(names, runs), *_differences(names, runs))
    shared = shared_questions(runs)
    document.add(*_alignment(names, runs, shared))
    if shared:
        aligned = [_restricted(run, shared) for run in runs]
        summaries = [summary_of(run) for run in aligned]
        document.add(*_cautions(names, summaries), *_speed(names, summaries), *_details(names, summaries))
        document.add(*_across(names, aligned))
    document.add(*_commands(names, runs))
    return document


def shared_questions(runs: Sequence[MeasuredRun]) -> set[tuple[str | int, str]]:
    """Question ids with the hash of their first prompt that all runs have."""
    found = [
        {(r["question_id"], r["prompt"]["sha256"]) for r in run.records if r["turn"] == 0 and r["error"] is None}
        for run in runs
    ]
    return set.intersection(*found)


def _names(runs: Sequence[MeasuredRun]) -> list[str]:
    """Letters with the directories' names."""
    return [f"{chr(ord('A') + index % 26)}: {run.path.resolve().name}" for index, run in enumerate(runs)]


def _runs_table(names: Sequence[str], runs: Sequence[MeasuredRun]) -> Table:
    rows: list[list[str | Cell]] = []
    for name, run in zip(names, runs, strict=True):
        manifest = run.manifest
        hardware = manifest.get("hardware") or {}
        machine = (hardware.get("gpu") or {}).get("name") or hardware.get("cpu") or MISSING
        started = ((manifest.get("starts") or [{}])[0]).get("started") or MISSING
        target = (manifest.get("target") or {}).get("name") or MISSING
        questions = (manifest.get("questions") or {}).get("name") or MISSING
        rows.append([name, str(target), str(questions), str(machine), str(started), str(len(run.records))])
    return Table(["run", "target", "questions", "machine", "started", "records"], rows, names=5)


def _differences(names: Sequence[str], runs: Sequence[MeasuredRun]) -> list[Block]:
    """Every field of the manifests that the runs do not agree on."""
    fields = [
        {key: value for section in ALIGNED for key, value in flat(run.manifest.get(section), section)} for run in runs
    ]
    keys = dict.fromkeys(key for found in fields for key in found)
    differing = [key for key in keys if len({found.get(key) for found in fields}) > 1]
    if not differing:
        return [Callout("Same target, questions, settings, machine and versions.", "good")]
    blocks: list[Block] = []
    if not same_clock(runs):
        what = " and ".join(part for part in NO_RATIO if any(key.split(".")[0] == part for key in differing)).replace(
            "hardware", "machine"
        )
        blocks.append(
            Callout(
                f"The runs differ in {what}: no times are compared across them, only each with its own baseline.", "bad"
            )
        )
    rows: list[list[str | Cell]] = [
        [key, *(found.get(key, MISSING) for found in fields)] for key in differing[:SHOWN_DIFFERENCES]
    ]
    blocks += [Heading("What differs"), Table(["field", *names], rows, names=1 + len(names))]
    if len(differing) > SHOWN_DIFFERENCES:
        blocks.append(Paragraph(f"and {len(differing) - SHOWN_DIFFERENCES} more fields.", small=True))
    return blocks


def same_clock(runs: Sequence[MeasuredRun]) -> bool:
    """Whether times of the runs may be divided by each other: one machine, one target."""
    first = runs[0].manifest
    return all(run.manifest.get(part) == first.get(part) for run in runs for part in NO_RATIO)


def _alignment(names: Sequence[str], runs: Sequence[MeasuredRun], shared: set[Any]) -> list[Block]:
    own = [len({record["question_id"] for record in run.records}) for run in runs]
    if not shared:
        return [Callout("The runs have no question with the same prompt in common: nothing is compared.", "bad")]
    if set(own) != {len(shared)}:
        each = ", ".join(f"{name} has {many}" for name, many in zip(names, own, strict=True))
        return [
            Callout(f"All numbers are of the {count(len(shared), 'question')} that the runs share; {each}.", "warn")
        ]
    return [Paragraph(f"All runs have the same {count(len(shared), 'question')}.")]


def _restricted(run: MeasuredRun, shared: set[tuple[str | int, str]]) -> MeasuredRun:
    kept = {question for question, _ in shared}
    return replace(
        run,
        records=[record for record in run.records if record["question_id"] in kept],
        verdicts=[verdict for verdict in run.verdicts if verdict["question_id"] in kept],
        spec_bench={},
    )


def _cautions(names: Sequence[str], summaries: Sequence[Summary]) -> list[Block]:
    found = [(name, block) for name, summary in zip(names, summaries, strict=True) for block in cautions(summary)]
    return [Callout(f"{name}. {block.text}", block.tone) for name, block in found if isinstance(block, Callout)]


def _speed(names: Sequence[str], summaries: Sequence[Summary]) -> list[Block]:
    """Each run's speed-ups over its own baseline."""
    groups: dict[str, dict[str, Any]] = {}
    rows: list[list[str | Cell]] = []
    for method in _methods(summaries):
        estimates = [_speedup(summary, method) for summary in summaries]
        if any(estimates):
            shown = _label(summaries, method)
            groups[shown] = {name: found for name, found in zip(names, estimates, strict=True) if found}
            rows.append([shown, *(ratio_cell(found) if found else MISSING for found in estimates)])
    note = "Geometric mean over prompts, each run over its own plain generation. " + str(summaries[0]["interval"])
    return [
        Heading("Speed-up over plain, run by run"),
        Figure(speedup_plot(groups, list(names))),
        Table(["method", *names], rows),
        Paragraph(note, small=True),
    ]


def _details(names: Sequence[str], summaries: Sequence[Summary]) -> list[Block]:
    rows: list[list[str | Cell]] = []
    for method in _methods(summaries):
        for name, summary in zip(names, summaries, strict=True):
            if method in summary["methods"]:
                entry = summary["methods"][method]
                found = entry["overall"]
                rows.append(
                    [
                        labels(summary)[method],
                        name,
                        interval(found["acceptance"].get("tau")),
                        number(found["throughput"]["tokens_per_second"], 1),
                        number(found["throughput"]["decode_tokens_per_second"], 1),
                        exact_cell(found["exactness"]["questions"], not entry["lossy"]),
                    ]
                )
    head = ["method", "run", "tau", "tokens/s", "decode tokens/s", "exact questions"]
    return [Heading("Numbers"), Table(head, rows, names=2)]


def _across(names: Sequence[str], runs: Sequence[MeasuredRun]) -> list[Block]:
    """Times of each run over the first run's, for the methods they share; nothing across machines or targets."""
    if not same_clock(runs):
        return []
    samples = [samples_of(run.records) for run in runs]
    units = {question: unit for found in samples for question, unit in units_of(found).items()}
    rows: list[list[str | Cell]] = []
    for method in runs[0].methods:
        base = _of(samples[0], method)
        pairs = [pair_up(base, _of(found, method)) for found in samples[1:]]
        cells = [ratio_cell(mean_ratio(found, units).as_dict()) if found else MISSING for found in pairs]
        rows.append([method, *cells])
    note = (
        "The same method in another run over the first run, by time per token on the same prompts. The runs were not "
        "interleaved: whatever the machine did differently on the day is part of the ratio. "
        "The row of plain shows how much."
    )
    return [
        Heading(f"Run over run, relative to {names[0]}"),
        Table(["method", *names[1:]], rows),
        Paragraph(note, small=True),
    ]


def _of(samples: Sequence[Sample], method: str) -> list[Sample]:
    return [sample for sample in samples if sample.record["method"] == method]


def _commands(names: Sequence[str], runs: Sequence[MeasuredRun]) -> list[Block]:
    lines = [
        f"# {name}\n{command_line(run.manifest['command'])}"
        for name, run in zip(names, runs, strict=True)
        if run.manifest.get("command")
    ]
    return [Heading("Reproduce"), Code("\n".join(lines))] if lines else []


def _methods(summaries: Sequence[Summary]) -> list[str]:
    return list(dict.fromkeys(name for summary in summaries for name in summary["methods"]))


def _label(summaries: Sequence[Summary], method: str) -> str:
    """Lossy in any run is lossy here."""
    found = [labels(summary)[method] for summary in summaries if method in summary["methods"]]
    return max(found, key=len)


def _speedup(summary: Summary, method: str) -> dict[str, Any] | None:
    return geometric_mean(summary["methods"][method]) if method in summary["methods"] else None
