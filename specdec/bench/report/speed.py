"""Sections about speed-ups: by column and category, the slowest prompts, Spec-Bench's own number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.bench.plots.speedup_plot import speedup_plot
from specdec.bench.report.document import Block, Cell, Figure, Heading, Paragraph, Table
from specdec.bench.report.words import MISSING, Summary, count, interval, labels, number, ratio_cell


def columns_section(summary: Summary) -> list[Block]:
    """Speed-ups by column, drawn and in a table, and by raw category where these are finer."""
    shown = compared_methods(summary)
    if not shown:
        return []
    groups = {column: _estimates(summary, shown, "columns", column) for column in summary["columns"]}
    if len(groups) > 1:
        groups["All"] = {labels(summary)[name]: summary["methods"][name]["overall"]["speedup"] for name in shown}
    drawn = {
        column: {name: speed["geometric_mean"] for name, speed in found.items() if speed}
        for column, found in groups.items()
    }
    order = [labels(summary)[name] for name in summary["methods"]]
    blocks: list[Block] = [Heading("Speed-up by column"), Figure(speedup_plot(drawn, order))]
    blocks.append(_table("column", [labels(summary)[name] for name in shown], groups))
    if len(summary["categories"]) > len(summary["columns"]):
        fine = {category: _estimates(summary, shown, "categories", category) for category in summary["categories"]}
        blocks += [Heading("Speed-up by category"), _table("category", [labels(summary)[n] for n in shown], fine)]
    return [*blocks, Paragraph(f"Geometric mean over prompts. Intervals: {summary['interval']}", small=True)]


def slowest_section(summary: Summary) -> list[Block]:
    """The prompts on which each method does worst."""
    rows = []
    for name in compared_methods(summary):
        speed = summary["methods"][name]["overall"]["speedup"]
        worst = ", ".join(f"{entry['question_id']} ({entry['ratio']:.2f}x)" for entry in speed["slowest"])
        slower = f"{speed['prompts_slower']}/{speed['prompts']}"
        rows.append([labels(summary)[name], worst, slower, f"{speed['tenth_percentile']:.2f}x"])
    if not rows:
        return []
    head = ["method", "slowest questions (speed-up)", "prompts slower than plain", "tenth percentile"]
    return [Heading("Where it pays least"), Table(head, rows, names=2)]


def itself_section(summary: Summary) -> list[Block]:
    """The baseline against itself, where it was measured twice."""
    itself = summary["baseline_against_itself"]
    if not itself or not itself["estimates"]:
        return []
    tries = len(itself["estimates"])
    text = (
        f"{itself['containing_one']} of {count(tries, 'interval')} of plain-again over plain contain 1. "
        f"Where nothing differs, as few or fewer would with probability {itself['odds']:.2g}."
    )
    rows = [[str(number), interval(estimate, 3)] for number, estimate in enumerate(itself["estimates"], 1)]
    return [Heading("Baseline against itself"), Paragraph(text), Table(["repeat", "speed-up"], rows)]


def spec_bench_section(summary: Summary) -> list[Block]:
    """Spec-Bench's formula: from true counts, and from the answer files with its re-tokenised baseline."""
    rows = []
    for name in compared_methods(summary):
        method = summary["methods"][name]
        official = (method["spec_bench"] or {}).get("overall") or {}
        rows.append(
            [
                labels(summary)[name],
                interval(method["overall"]["speedup"]["spec_bench_formula_from_counts"]),
                number(official.get("speedup")),
                number(official.get("mean_accepted_tokens")),
            ]
        )
    if not rows:
        return []
    note = (
        "Spec-Bench divides mean tokens per second over questions by the baseline's mean. Its scripts count the "
        "baseline's tokens anew from its text; the first column uses the tokens that were generated. Neither pairs "
        "prompts: read the geometric mean above for the speed-up, and these to compare with published tables."
    )
    head = ["method", "ratio of means, true counts", "Spec-Bench formula on answer files", "#mean accepted tokens"]
    return [Heading("Spec-Bench's numbers"), Table(head, rows), Paragraph(note, small=True)]


def compared_methods(summary: Summary) -> list[str]:
    """Methods with a speed-up."""
    return [name for name, method in summary["methods"].items() if method["overall"]["speedup"]]


def _estimates(summary: Summary, names: Sequence[str], kind: str, group: str) -> dict[str, Any]:
    return {labels(summary)[name]: summary["methods"][name][kind][group]["speedup"] for name in names}


def _table(what: str, names: Sequence[str], groups: dict[str, dict[str, Any]]) -> Table:
    rows: list[list[str | Cell]] = []
    for group, speeds in groups.items():
        prompts = max((speed["prompts"] for speed in speeds.values() if speed), default=0)
        found = [speeds[name].get("geometric_mean") for name in names]
        rows.append([group, str(prompts), *(ratio_cell(estimate) if estimate else MISSING for estimate in found)])
    return Table([what, "prompts", *names], rows)
