"""Speed-up by column and method, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdec.bench.plots.canvas import WIDTH, Canvas, empty, legend_height, text_width
from specdec.bench.plots.palette import series
from specdec.bench.plots.scale import Scale, short

TITLE = "Speed-up over plain generation by column, with intervals"
Groups = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""column -> method -> estimate with value, low, high (None for no interval)."""


def speedup_plot(groups: Groups, methods: list[str]) -> str:
    """Horizontal bars, one block a column and one bar a method; whiskers are intervals, the dashed line is 1.

    Args:
        groups: estimates; methods may be missing from a column.
        methods: in the order of colours and bars.
    """
    shown = [name for name in methods if any(name in block for block in groups.values())]
    if not shown:
        return empty(TITLE, "No speed-up: nothing was measured on the same prompts as the baseline.")
    bar = 14 if len(shown) <= 4 else 11
    heights = [bar * sum(name in block for name in shown) + 14 for block in groups.values()]
    top = legend_height(shown) + 18
    canvas = Canvas(top + sum(heights) + 24, TITLE)
    canvas.legend(shown, [series(name, methods) for name in shown], 0)
    left = min(max(text_width(column) for column in groups) + 12, 230)
    scale = Scale(0, _largest(groups) * 1.02, left, WIDTH - 52)
    _axis(canvas, scale, top, top + sum(heights))
    for index, (column, estimates) in enumerate(groups.items()):
        y = top + sum(heights[:index]) + 7
        canvas.text(left - 10, y + (heights[index] - 14) / 2 + 3, column, anchor="end", within=left - 10)
        for row, name in enumerate(name for name in shown if name in estimates):
            _bar(canvas, scale, y + bar * row, bar - 3, name, estimates[name], series(name, methods))
    return canvas.svg()


def _axis(canvas: Canvas, scale: Scale, top: float, bottom: float) -> None:
    for tick in scale.ticks(6):
        canvas.line(scale(tick), top, scale(tick), bottom, "axis" if tick == 0 else "grid")
        canvas.text(scale(tick), bottom + 16, f"{short(tick)}x", anchor="middle", kind="muted")
    canvas.line(scale(1), top - 4, scale(1), bottom, "mark")
    canvas.text(scale(1), top - 8, "plain", anchor="middle", kind="muted small")


def _bar(canvas: Canvas, scale: Scale, y: float, height: float, name: str, at: Mapping[str, Any], colour: str) -> None:
    value, low, high = at["value"], at["low"], at["high"]
    middle = y + height / 2
    says = f"{name}: {value:.3f}x" + ("" if low is None else f" ({low:.3f} to {high:.3f})")
    canvas.bar(scale(0), y, scale(value) - scale(0), height, colour, says)
    reach = min(max(value, high or 0), scale.end)
    if low is not None:
        canvas.line(scale(low), middle, scale(reach), middle, "whisker")
        for end in (low, high):
            if end <= scale.end:  # a whisker without an end goes on beyond the frame
                canvas.line(scale(end), middle - 3, scale(end), middle + 3, "whisker")
    canvas.text(scale(reach) + 5, middle + 3.8, f"{value:.2f}x", kind="small")


def _largest(groups: Groups) -> float:
    """The longest whisker, unless it dwarfs the values."""
    estimates = [at for block in groups.values() for at in block.values()]
    value = max(1.0, *(at["value"] for at in estimates))
    return min(1.6 * value, max(1.05, value, *(at["high"] or 0 for at in estimates)))
