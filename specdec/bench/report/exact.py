"""The section about exactness."""

from __future__ import annotations

from specdec.bench.report.document import Block, Cell, Heading, Paragraph, Table
from specdec.bench.report.words import MISSING, Summary, exact_cell, labels, number

LISTED = 5
"""Differences shown of each method; more are in summary.json, all of them in exactness.jsonl."""
VERDICTS = ("exact", "near-tie", "wrong", "not-compared")


def exactness_section(summary: Summary) -> list[Block]:
    """Verdicts by method, and the first differences."""
    rows: list[list[str | Cell]] = []
    differences: list[list[str | Cell]] = []
    reasons: dict[str, None] = {}
    for name, method in summary["methods"].items():
        found = method["overall"]["exactness"]
        if name == summary["baseline"] or not sum(found["records"].values()):
            continue
        questions = exact_cell(found["questions"], not method["lossy"])
        counts = [str(found["records"][verdict]) for verdict in VERDICTS]
        rows.append([labels(summary)[name], questions, *counts, number(found["widest_near_tie"], 4)])
        reasons |= dict.fromkeys(found["reasons"])
        for entry in found["differences"][:LISTED]:
            tone = "bad" if entry["verdict"] == "wrong" and not method["lossy"] else "warn"
            gap = MISSING if entry["gap"] is None else f"{entry['gap']:.4g}"
            place = MISSING if entry["position"] is None else str(entry["position"])
            where = f"question {entry['question_id']}, turn {entry['turn'] + 1}, repeat {entry['repeat'] + 1}"
            what = Cell(entry["verdict"], tone)
            differences.append([labels(summary)[name], where, entry["reason"] or MISSING, what, place, gap])
    if not rows:
        return [Heading("Exactness"), Paragraph("Nothing was compared with the baseline's answers.")]
    head = ["method", "exact questions", *(f"records {verdict}" for verdict in VERDICTS), "widest near tie, logits"]
    blocks: list[Block] = [Heading("Exactness"), Table(head, rows)]
    if differences:
        columns = ["method", "record", "reason", "verdict", "first difference at token", "gap, logits"]
        blocks.append(Table(columns, differences, names=3))
    note = (
        "By token ids against plain generation. A near tie is a difference where the target's scores of both tokens "
        "agree to rounding. A question is as bad as its worst record."
    )
    if reasons:
        note += f" Not compared: {'; '.join(reasons)}."
    return [*blocks, Paragraph(note, small=True)]
