"""Where the time of a step goes."""

from __future__ import annotations

from collections.abc import Mapping

from specdec.bench.plots.canvas import WIDTH, Canvas, empty, legend_height, text_width
from specdec.bench.plots.scale import Scale, short

TITLE = "Time of one step by phase"
PHASES = ("draft", "verify", "accept", "other")
ROW = 26


def breakdown_plot(seconds: Mapping[str, Mapping[str, float]], plain_step: float | None = None) -> str:
    """Stacked horizontal bars in milliseconds, one a method.

    Args:
        seconds: method -> phase -> seconds per step.
        plain_step: seconds of a step without speculation, drawn as a dashed line.
    """
    if not seconds:
        return empty(TITLE, "No step times: no method tells them.")
    top = legend_height(PHASES) + 18
    canvas = Canvas(top + ROW * len(seconds) + 26, TITLE)
    canvas.legend(PHASES, [f"var(--s{index})" for index in range(len(PHASES))], 0)
    left = min(max(text_width(name) for name in seconds) + 12, 250)
    totals = {name: sum(parts.get(phase, 0.0) for phase in PHASES) for name, parts in seconds.items()}
    longest = 1000 * max(*totals.values(), plain_step or 0.0)
    scale = Scale(0, longest * 1.02 or 1.0, left, WIDTH - 74)
    bottom = top + ROW * len(seconds)
    for tick in scale.ticks(6):
        canvas.line(scale(tick), top, scale(tick), bottom, "axis" if tick == 0 else "grid")
        canvas.text(scale(tick), bottom + 17, f"{short(tick)} ms", anchor="middle", kind="muted")
    for row, (name, parts) in enumerate(seconds.items()):
        y = top + ROW * row + 5
        canvas.text(left - 10, y + 12, name, anchor="end", within=left - 10)
        _stack(canvas, scale, y, name, parts)
    if plain_step:
        canvas.line(scale(1000 * plain_step), top - 4, scale(1000 * plain_step), bottom, "mark")
        canvas.text(scale(1000 * plain_step), top - 8, "one plain step", anchor="middle", kind="muted small")
    for row, total in enumerate(totals.values()):
        canvas.text(scale(1000 * total) + 6, top + ROW * row + 17, f"{1000 * total:.3g} ms", kind="small")
    return canvas.svg()


def _stack(canvas: Canvas, scale: Scale, y: float, name: str, parts: Mapping[str, float]) -> None:
    done = 0.0
    for index, phase in enumerate(PHASES):
        spent = 1000 * parts.get(phase, 0.0)
        x, width = scale(done), scale(spent) - scale(0)
        canvas.bar(x, y, width, ROW - 10, f"var(--s{index})", f"{name}, {phase}: {spent:.3g} ms")
        done += spent
