"""Sections about what became of the drafted tokens."""

from __future__ import annotations

from specdec.bench.plots.acceptance_plot import acceptance_plot
from specdec.bench.plots.histogram_plot import histogram_plot
from specdec.bench.report.document import Block, Cell, Figure, Heading, Paragraph, Table
from specdec.bench.report.words import MISSING, Summary, interval, labels, number, percent

DEPTHS = 10
"""Deeper ones are in summary.json."""


def acceptance_section(summary: Summary) -> list[Block]:
    """Tau in both weights, rates, and acceptance by depth."""
    fates = {labels(summary)[name]: m["overall"]["acceptance"] for name, m in summary["methods"].items()}
    drafting = {name: found for name, found in fates.items() if found.get("marginal")}
    rows: list[list[str | Cell]] = [
        [
            name,
            interval(found["tau"]),
            number(found["tau_per_request"]),
            percent(found.get("acceptance_rate")),
            number(found.get("nodes_per_step")),
            percent(found.get("wasted_share")),
            f"{found['steps']:,}",
        ]
        for name, found in fates.items()
        if found
    ]
    if not rows:
        return []
    head = ["method", "tau", "tau by request", "accepted / drafted", "nodes per step", "wasted", "steps"]
    blocks: list[Block] = [Heading("Acceptance"), Table(head, rows)]
    if drafting:
        blocks.append(Figure(acceptance_plot(drafting, list(fates))))
        deepest = min(max(len(found["marginal"]) for found in drafting.values()), DEPTHS)
        by_depth: list[list[str | Cell]] = []
        for name, found in drafting.items():
            for kind in ("marginal", "conditional"):
                rates = [percent(rate, 0) for rate in found[kind][:deepest]]
                by_depth.append([name, kind, *rates, *[MISSING] * (deepest - len(rates))])
        blocks.append(Table(["method", "accepted at depth", *map(str, range(1, deepest + 1))], by_depth, names=2))
    note = (
        "tau: tokens per target call and row, next_token included, the prefill's token not; each step weighs the same. "
        "By request: the mean of each answer's own tau. Marginal: share of all steps whose accepted path reached the "
        "depth; conditional: of the steps where a token of that depth could have been accepted. "
        "tau = 1 + sum of the marginals - share of steps that ended inside a draft; this is checked for every record."
    )
    return [*blocks, Paragraph(note, small=True)]


def tokens_per_step_section(summary: Summary) -> list[Block]:
    """How many tokens a step emits."""
    counts = {
        labels(summary)[name]: {int(tokens): times for tokens, times in found["tokens_per_step"].items()}
        for name, method in summary["methods"].items()
        if (found := method["overall"]["acceptance"]).get("drafted") or len(found.get("tokens_per_step", ())) > 1
    }
    if not counts:
        return []
    order = list(labels(summary).values())
    longest = min(max(max(found) for found in counts.values()), DEPTHS)
    rows: list[list[str | Cell]] = []
    for name, found in counts.items():
        total = sum(found.values())
        shares = [found.get(tokens, 0) / total for tokens in range(1, longest + 1)]
        more = sum(times for tokens, times in found.items() if tokens > longest) / total
        rows.append([name, *(percent(share, 0) for share in shares), percent(more, 0)])
    head = ["method", *map(str, range(1, longest + 1)), "more"]
    return [Heading("Tokens per step"), Figure(histogram_plot(counts, order)), Table(head, rows)]
