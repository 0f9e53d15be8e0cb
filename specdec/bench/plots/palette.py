"""Colours of plots and reports, for light and dark; series differ in lightness too."""

from __future__ import annotations

LIGHT = {
    "ink": "#1b2330",
    "muted": "#5b6675",
    "grid": "#e3e7ed",
    "line": "#c6cdd7",
    "page": "#ffffff",
    "panel": "#f6f8fa",
    "good": "#0f7b4f",
    "warn": "#9a5b00",
    "bad": "#b3261e",
    "s0": "#2463c9",
    "s1": "#d9730d",
    "s2": "#15936a",
    "s3": "#8a4bd3",
    "s4": "#c9306f",
    "s5": "#0d8fa8",
    "s6": "#8a6d1d",
    "s7": "#56647a",
}
DARK = {
    "ink": "#e6eaf0",
    "muted": "#9aa6b5",
    "grid": "#2a323d",
    "line": "#46515f",
    "page": "#12161c",
    "panel": "#1a2028",
    "good": "#4cc38a",
    "warn": "#f0b455",
    "bad": "#ff7b72",
    "s0": "#6ea8ff",
    "s1": "#ffa657",
    "s2": "#56d4a4",
    "s3": "#c297ff",
    "s4": "#ff85b3",
    "s5": "#5ed3e8",
    "s6": "#d9bf6b",
    "s7": "#a3b1c4",
}
SERIES = 8
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def variables(selector: str) -> str:
    """A style sheet that defines the colours as variables for a selector, by the reader's colour scheme."""
    light, dark = ("".join(f"--{name}:{value};" for name, value in colours.items()) for colours in (LIGHT, DARK))
    return f"{selector}{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{{selector}{{{dark}}}}}"


def series(name: str, names: list[str]) -> str:
    """The colour of one of several series; the ninth has the first one's again."""
    return f"var(--s{names.index(name) % SERIES})"
