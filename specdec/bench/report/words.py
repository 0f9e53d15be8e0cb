"""How numbers are written in reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdec.bench.report.document import Cell, Tone

MISSING = "-"
Summary = Mapping[str, Any]


def label(name: str, method: Mapping[str, Any]) -> str:
    """A method's name; a lossy one always says so."""
    return f"{name} (lossy: {method['lossy']})" if method["lossy"] else name


def labels(summary: Summary) -> dict[str, str]:
    """Name -> label of every method."""
    return {name: label(name, method) for name, method in summary["methods"].items()}


def number(value: float | None, digits: int = 2) -> str:
    """With so many digits after the point."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return MISSING if value is None else f"{100 * value:.{digits}f} %"


def milliseconds(seconds: float | None) -> str:
    """With three significant digits or to the millisecond."""
    if seconds is None:
        return MISSING
    ms = 1000 * seconds
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def mebibytes(count: int | None) -> str:
    """A number of bytes."""
    return MISSING if count is None else f"{count / 2**20:,.0f} MiB"


def interval(estimate: Mapping[str, Any] | None, digits: int = 2) -> str:
    """A value and its interval in brackets."""
    if not estimate:
        return MISSING
    if estimate["low"] is None or estimate["low"] == estimate["high"]:
        return f"{estimate['value']:.{digits}f}"
    return f"{estimate['value']:.{digits}f} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def ratio_cell(estimate: Mapping[str, Any] | None) -> Cell:
    """A speed-up with its interval, coloured where the interval excludes 1."""
    tone: Tone = ""
    if estimate and estimate["low"] is not None:
        tone = "good" if estimate["low"] > 1 else "bad" if estimate["high"] < 1 else ""
    return Cell(interval(estimate), tone)


def exact_cell(counts: Mapping[str, int], lossless: bool) -> Cell:
    """Exact questions of all, and what the others are."""
    total = sum(counts.values())
    if not total:
        return Cell(MISSING)
    others = [f"{counts[kind]} {kind}" for kind in ("near-tie", "wrong", "not-compared") if counts[kind]]
    text = ", ".join([f"{counts['exact']}/{total}", *others])
    return Cell(text, "bad" if counts["wrong"] and lossless else "warn" if others else "good")


def count(how_many: int, noun: str) -> str:
    """A number with its noun: 1 question, 2 questions."""
    return f"{how_many:,} {noun}{'' if how_many == 1 else 's'}"
