"""How many tokens a step emits."""

from __future__ import annotations

import math
from collections.abc import Mapping

from specdec.bench.plots.canvas import WIDTH, Canvas, empty
from specdec.bench.plots.palette import series
from specdec.bench.plots.scale import Scale, whole_ticks

TITLE = "Tokens per step"
LAST = 16
"""Longer steps are drawn in the last bar."""
ACROSS = 3
PANEL_HEIGHT = 140


def histogram_plot(counts: Mapping[str, Mapping[int, int]], methods: list[str]) -> str:
    """One panel a method: the share of steps that emitted 1, 2, ... tokens.

    Args:
        counts: method -> tokens -> number of steps.
        methods: in the order of colours.
    """
    shown = [name for name in methods if sum(counts.get(name, {}).values())]
    if not shown:
        return empty(TITLE, "No tokens per step: no method tells them.")
    shares = {name: _shares(counts[name]) for name in shown}
    longest = max(max(share) for share in shares.values())
    highest = max(max(share.values()) for share in shares.values())
    canvas = Canvas(PANEL_HEIGHT * math.ceil(len(shown) / ACROSS) + 4, TITLE)
    width = WIDTH / ACROSS
    for index, name in enumerate(shown):
        left, top = width * (index % ACROSS), PANEL_HEIGHT * (index // ACROSS)
        mean = sum(n * times for n, times in counts[name].items()) / sum(counts[name].values())
        canvas.text(left + 8, top + 14, name, kind="strong", within=width - 104)
        canvas.text(left + width - 18, top + 14, f"mean {mean:.2f}", anchor="end", kind="muted small")
        across = Scale(0.5, longest + 0.5, left + 8, left + width - 18)
        up = Scale(0, highest, top + PANEL_HEIGHT - 26, top + 36)
        _bars(canvas, across, up, shares[name], name, series(name, methods), longest)
    return canvas.svg()


def _shares(counts: Mapping[int, int]) -> dict[int, float]:
    total = sum(counts.values())
    shares: dict[int, float] = {}
    for tokens, times in counts.items():
        shares[min(tokens, LAST)] = shares.get(min(tokens, LAST), 0.0) + times / total
    return shares


def _bars(
    canvas: Canvas, across: Scale, up: Scale, shares: Mapping[int, float], name: str, colour: str, longest: int
) -> None:
    width = across(2) - across(1)
    for tokens, share in sorted(shares.items()):
        left = across(tokens) - width * 0.42
        says = f"{name}: {share:.1%} of steps emit {_label(tokens)} tokens"
        canvas.bar(left, up(share), min(width * 0.84, 40), up(0) - up(share), colour, says)
    tallest = max(shares, key=lambda tokens: shares[tokens])
    canvas.text(across(tallest) - width * 0.42, up(shares[tallest]) - 4, f"{shares[tallest]:.0%}", kind="muted small")
    canvas.line(across.first, up(0), across.last, up(0), "axis")
    for tokens in whole_ticks(longest, 10):
        middle = across(tokens) - width * 0.42 + min(width * 0.84, 40) / 2
        canvas.text(middle, up(0) + 14, _label(tokens), anchor="middle", kind="muted small")


def _label(tokens: int) -> str:
    return f"{LAST}+" if tokens == LAST else str(tokens)
