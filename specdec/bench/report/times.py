"""Sections about time: a step's phases, what a verification costs, what a reader waits for."""

from __future__ import annotations

from specdec.bench.plots.breakdown_plot import breakdown_plot
from specdec.bench.plots.cost_plot import cost_plot
from specdec.bench.report.document import Block, Cell, Figure, Heading, Paragraph, Table
from specdec.bench.report.words import MISSING, Summary, labels, mebibytes, milliseconds, number

PHASES = ("draft", "verify", "accept", "other")
WIDTHS = 12


def steps_section(summary: Summary) -> list[Block]:
    """Where a step's time goes, and the speed-up that this predicts."""
    rows: list[list[str | Cell]] = []
    drawn: dict[str, dict[str, float]] = {}
    plain = None
    for name, method in summary["methods"].items():
        budget, predicted = method["overall"]["steps"], method["overall"]["prediction"]
        if not budget:
            continue
        drawn[labels(summary)[name]] = budget["per_step"]
        plain = predicted.get("plain_step_seconds", plain)
        rows.append(
            [
                labels(summary)[name],
                *(milliseconds(budget["per_step"][phase]) for phase in (*PHASES, "total")),
                milliseconds(budget["per_token"]),
                milliseconds(budget["prefill"]),
                number(predicted.get("predicted_decode")),
                number(predicted.get("measured_decode")),
            ]
        )
    if not rows:
        return []
    head = ["method", *(f"{phase}, ms" for phase in PHASES), "step, ms", "per token, ms", "prefill, ms"]
    note = (
        "Means over the steps of a batch. Predicted: tau / (cost of drafting + cost of verifying), costs in plain "
        "steps: what the models alone allow. Measured: ratio of decode speeds, without prefill; it falls short of the "
        "prediction by acceptance, commit and bookkeeping."
    )
    if plain:
        note += f" One plain step takes {milliseconds(plain)} ms."
    return [
        Heading("Time of a step"),
        Figure(breakdown_plot(drawn, plain)),
        Table([*head, "predicted speed-up", "measured speed-up"], rows),
        Paragraph(note, small=True),
    ]


def cost_section(summary: Summary) -> list[Block]:
    """Verification time by width."""
    costs = {
        labels(summary)[name]: {int(width): entry["seconds"] for width, entry in method["verify_cost"].items()}
        for name, method in summary["methods"].items()
        if method["verify_cost"]
    }
    widths = sorted({width for found in costs.values() for width in found})
    if len(widths) < 2:
        return []
    shown = widths if len(widths) <= WIDTHS else [widths[i * (len(widths) - 1) // (WIDTHS - 1)] for i in range(WIDTHS)]
    rows: list[list[str | Cell]] = [
        [name, *(milliseconds(found.get(width)) for width in shown)] for name, found in costs.items()
    ]
    note = (
        "Median milliseconds of a verification by the number of nodes in its forward, root included, at the contexts "
        "that the run met; widths met fewer than five times are left out."
    )
    return [
        Heading("Cost of a verification"),
        Figure(cost_plot(costs, list(labels(summary).values()))),
        Table(["method", *map(str, shown)], rows),
        Paragraph(note, small=True),
    ]


def latency_section(summary: Summary) -> list[Block]:
    """Percentiles of every latency, and peak memory."""
    rows: list[list[str | Cell]] = []
    for name, method in summary["methods"].items():
        found = method["overall"]["latency"]
        cells = [_percentiles(found[kind]) for kind in ("ttft", "token", "gap", "request")]
        rows.append([labels(summary)[name], *cells, mebibytes(method["overall"]["peak_memory_bytes"])])
    head = ["method", "first token", "per token", "arrival gap", "whole request", "peak memory"]
    meaning = summary["latency_definitions"]
    note = (
        "Milliseconds at p50 / p90 / p99 over requests, tokens or steps, repeats pooled. "
        + "; ".join(f"{meaning[kind]}" for kind in ("ttft", "token", "gap", "request"))
        + "."
    )
    return [Heading("Latency and memory"), Table(head, rows), Paragraph(note, small=True)]


def _percentiles(found: dict[str, float] | None) -> str:
    return MISSING if found is None else " / ".join(milliseconds(found[key]) for key in ("p50", "p90", "p99"))
