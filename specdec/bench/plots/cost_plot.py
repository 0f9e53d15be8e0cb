"""What a verification costs by its width."""

from __future__ import annotations

from collections.abc import Mapping

from specdec.bench.plots.canvas import WIDTH, Canvas, empty, legend_height
from specdec.bench.plots.palette import series
from specdec.bench.plots.scale import Scale, short

TITLE = "Cost of a verification by width"
HEIGHT = 200


def cost_plot(seconds: Mapping[str, Mapping[int, float]], methods: list[str]) -> str:
    """Milliseconds over the number of nodes in the forward, one curve a method.

    Args:
        seconds: method -> width, the root included -> seconds of one verification.
        methods: in the order of colours.
    """
    shown = [name for name in methods if seconds.get(name)]
    if not shown:
        return empty(TITLE, "No verification cost: too few verifications of any one width were timed.")
    top = legend_height(shown) + 10
    canvas = Canvas(top + HEIGHT + 40, TITLE)
    canvas.legend(shown, [series(name, methods) for name in shown], 0)
    widest = max(max(seconds[name]) for name in shown)
    highest = 1000 * max(max(seconds[name].values()) for name in shown)
    across, up = Scale(0, max(widest, 2), 56, WIDTH - 20), Scale(0, highest * 1.08 or 1.0, top + HEIGHT, top)
    for tick in up.ticks(5):
        canvas.line(across.first, up(tick), across.last, up(tick), "axis" if tick == 0 else "grid")
        canvas.text(across.first - 6, up(tick) + 4, f"{short(tick)} ms", anchor="end", kind="muted")
    for tick in across.ticks(10):
        if tick == int(tick):
            canvas.text(across(tick), up.first + 17, short(tick), anchor="middle", kind="muted")
    canvas.text(
        WIDTH / 2, up.first + 34, "width: nodes in the forward, root included", anchor="middle", kind="muted small"
    )
    for name in shown:
        points = [(across(width), up(1000 * cost)) for width, cost in sorted(seconds[name].items())]
        canvas.curve(points, series(name, methods))
        for (x, y), (width, cost) in zip(points, sorted(seconds[name].items()), strict=True):
            canvas.dot(x, y, series(name, methods), f"{name}, width {width}: {1000 * cost:.3g} ms")
    return canvas.svg()
