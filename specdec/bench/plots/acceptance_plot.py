"""Acceptance by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specdec.bench.plots.canvas import WIDTH, Canvas, empty, legend_height
from specdec.bench.plots.palette import series
from specdec.bench.plots.scale import Scale, short, whole_ticks

TITLE = "Acceptance by depth"
PANELS = {
    "marginal": "marginal: steps whose path reached the depth",
    "conditional": "conditional: of those that could reach it",
}
HEIGHT = 190


def acceptance_plot(rates: Mapping[str, Mapping[str, Sequence[float]]], methods: list[str]) -> str:
    """Two panels over depth, one curve a method.

    Args:
        rates: method -> "marginal" and "conditional" -> rate at depth 1, 2, ...
        methods: in the order of colours.
    """
    shown = [name for name in methods if rates.get(name, {}).get("marginal")]
    if not shown:
        return empty(TITLE, "No acceptance by depth: no method drafted, or none says what it accepted.")
    deepest = max(len(rates[name]["marginal"]) for name in shown)
    top = legend_height(shown) + 22
    canvas = Canvas(top + HEIGHT + 38, TITLE)
    canvas.legend(shown, [series(name, methods) for name in shown], 0)
    width = (WIDTH - 40) / 2
    for index, (kind, words) in enumerate(PANELS.items()):
        left = index * (width + 40) + 34
        across = Scale(1, max(deepest, 2), left + 12, index * (width + 40) + width - 8)
        up = Scale(0, 1, top + HEIGHT, top)
        _frame(canvas, across, up, left, words, deepest)
        for name in shown:
            values = rates[name][kind]
            points = [(across(depth), up(value)) for depth, value in enumerate(values, 1)]
            canvas.curve(points, series(name, methods))
            for (x, y), (depth, value) in zip(points, enumerate(values, 1), strict=True):
                canvas.dot(x, y, series(name, methods), f"{name}, depth {depth}: {value:.3f}")
    return canvas.svg()


def _frame(canvas: Canvas, across: Scale, up: Scale, left: float, words: str, deepest: int) -> None:
    canvas.text(left, up.last - 9, words, kind="strong", within=across.last - left + 20)
    for tick in up.ticks(5):
        canvas.line(left, up(tick), across.last + 8, up(tick), "axis" if tick == 0 else "grid")
        canvas.text(left - 6, up(tick) + 4, short(tick), anchor="end", kind="muted")
    for depth in whole_ticks(deepest, 12):
        canvas.text(across(depth), up.first + 17, str(depth), anchor="middle", kind="muted")
    canvas.text((left + across.last) / 2, up.first + 33, "depth", anchor="middle", kind="muted small")
