"""Plots: well-formed drawings with everything inside the frame, for little data, much data and none."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from specdec.bench.plots.acceptance_plot import acceptance_plot
from specdec.bench.plots.breakdown_plot import breakdown_plot
from specdec.bench.plots.canvas import WIDTH, fitted, printable, text_width
from specdec.bench.plots.cost_plot import cost_plot
from specdec.bench.plots.histogram_plot import LAST, histogram_plot
from specdec.bench.plots.palette import DARK, LIGHT
from specdec.bench.plots.scale import Scale, whole_ticks
from specdec.bench.plots.speedup_plot import speedup_plot

SVG = "{http://www.w3.org/2000/svg}"
NASTY = "a <script>alert('x')</script> & \x00\ud800 method with quite a long name, longer than any margin"


def estimate(value: float, low: float | None = None, high: float | None = None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def many(count: int) -> list[str]:
    return [f"method-{number}:depth={number}" for number in range(count)]


def speedups(methods: list[str], columns: int) -> str:
    groups = {f"Column {n}": {m: estimate(1.5, 1.2, 3.9) for m in methods} for n in range(columns)}
    return speedup_plot(groups, methods)


def rates(depth: int) -> dict[str, list[float]]:
    return {"marginal": [0.8**n for n in range(1, depth + 1)], "conditional": [0.8] * depth}


DRAWINGS: dict[str, Callable[[list[str]], str]] = {
    "speedup": lambda methods: speedups(methods, 7),
    "acceptance": lambda methods: acceptance_plot({name: rates(30) for name in methods}, methods),
    "breakdown": lambda methods: breakdown_plot(
        {n: {"draft": 0.02, "verify": 0.4, "other": 0.1} for n in methods}, 0.9
    ),
    "histogram": lambda methods: histogram_plot({n: {1: 5, 2: 3, 40: 1} for n in methods}, methods),
    "cost": lambda methods: cost_plot({n: {1: 0.01, 8: 0.011, 64: 0.5} for n in methods}, methods),
}


def elements(svg: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter())


@pytest.mark.parametrize("kind", DRAWINGS)
@pytest.mark.parametrize("methods", [many(1), many(2), many(8), many(11), [NASTY]], ids=["1", "2", "8", "11", "nasty"])
def test_everything_drawn_lies_inside_the_frame(kind: str, methods: list[str]):
    root = ElementTree.fromstring(DRAWINGS[kind](methods))
    height = float(root.attrib["viewBox"].split()[3])
    for element in root.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert -0.1 <= float(element.attrib.get(name, 0)) <= WIDTH + 0.1, element.attrib
        for name in ("y", "y1", "y2", "cy"):
            assert -0.1 <= float(element.attrib.get(name, 0)) <= height + 0.1, element.attrib
        right = float(element.attrib.get("x", 0)) + float(element.attrib.get("width", "0").rstrip("%"))
        assert element.tag == f"{SVG}svg" or right <= WIDTH + 0.1, element.attrib


@pytest.mark.parametrize("kind", DRAWINGS)
def test_texts_of_a_line_do_not_overlap(kind: str):
    boxes: dict[str, list[tuple[float, float]]] = {}
    for element in elements(DRAWINGS[kind](many(8))):
        if element.tag == f"{SVG}text":
            wide, x = text_width(element.text or "") * 0.9, float(element.attrib["x"])
            left = x - wide * {"start": 0, "middle": 0.5, "end": 1}[element.attrib["text-anchor"]]
            boxes.setdefault(element.attrib["y"], []).append((left, left + wide))
    assert len(boxes) > 1
    for row in boxes.values():
        row.sort()
        for (_, end), (start, _) in pairwise(row):
            assert end <= start + 1, (row, kind)


@pytest.mark.parametrize("kind", DRAWINGS)
def test_hostile_names_are_text_and_nothing_else(kind: str):
    svg = DRAWINGS[kind]([NASTY])
    assert "<script" not in svg
    assert "\x00" not in svg
    svg.encode("utf-8")
    assert {element.tag.removeprefix(SVG) for element in elements(svg)} <= {
        "svg", "title", "style", "line", "rect", "text", "circle", "polyline",
    }  # fmt: skip


@pytest.mark.parametrize("kind", DRAWINGS)
def test_a_drawing_without_data_says_so(kind: str):
    texts = [element.text for element in elements(DRAWINGS[kind]([])) if element.tag == f"{SVG}text"]
    assert len(texts) == 1
    assert (texts[0] or "").startswith("No ")


@pytest.mark.parametrize("kind", DRAWINGS)
def test_a_drawing_needs_nothing_from_elsewhere_and_knows_both_colour_schemes(kind: str):
    svg = DRAWINGS[kind](many(2))
    assert "http" not in svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "url(" not in svg
    assert "prefers-color-scheme:dark" in svg
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", svg))
    assert used <= set(LIGHT) == set(DARK)


def test_bars_are_as_long_as_their_values_and_whiskers_end_at_the_interval():
    svg = elements(speedup_plot({"only": {"a": estimate(2.0, 1.5, 2.5), "b": estimate(1.0)}}, ["a", "b"]))
    bars = [float(e.attrib["width"]) for e in svg if e.tag == f"{SVG}rect" and e.find(f"{SVG}title") is not None]
    assert bars[0] == pytest.approx(2 * bars[1], abs=0.2)
    left = min(float(e.attrib["x1"]) for e in svg if e.attrib.get("class") == "axis")
    ends = sorted({float(e.attrib["x1"]) for e in svg if e.attrib.get("class") == "whisker"})
    assert [(end - left) / bars[1] for end in ends] == pytest.approx([1.5, 2.5], abs=0.01)


def test_a_whisker_that_dwarfs_the_values_is_cut_at_the_frame():
    svg = elements(speedup_plot({"only": {"a": estimate(2.0, 0.1, 400.0)}}, ["a"]))
    (bar,) = [float(e.attrib["width"]) for e in svg if e.tag == f"{SVG}rect" and e.find(f"{SVG}title") is not None]
    assert bar > 0.5 * (WIDTH - 230)
    caps = [e for e in svg if e.attrib.get("class") == "whisker" and e.attrib["x1"] == e.attrib["x2"]]
    assert len(caps) == 1


def test_a_method_keeps_its_colour_where_others_are_missing():
    everyone = ["plain", "a", "b"]
    alone = acceptance_plot({"b": rates(2)}, everyone)
    assert "fill:var(--s2)" in alone
    assert "fill:var(--s0)" not in alone


def test_steps_longer_than_the_last_bar_are_drawn_in_it():
    titles = [
        e.text for e in elements(histogram_plot({"a": {1: 1, LAST: 1, LAST + 9: 2}}, ["a"])) if e.tag == f"{SVG}title"
    ]
    assert f"a: 75.0% of steps emit {LAST}+ tokens" in titles


def test_phases_are_stacked_to_the_total():
    svg = elements(breakdown_plot({"a": {"draft": 0.001, "verify": 0.002, "accept": 0.0005, "other": 0.0005}}))
    widths = [float(e.attrib["width"]) for e in svg if e.tag == f"{SVG}rect" and e.find(f"{SVG}title") is not None]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert "4 ms" in [e.text for e in svg if e.tag == f"{SVG}text"]


def test_a_scale_puts_values_and_round_ticks_where_they_belong():
    scale = Scale(0, 2.3, 100, 560)
    assert (scale(0), scale(2.3), scale(1)) == (100, 560, 300)
    assert scale.ticks(5) == [0, 0.5, 1.0, 1.5, 2.0]
    assert whole_ticks(5, 10) == [1, 2, 3, 4, 5]
    assert whole_ticks(30, 10) == [1, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30]


def test_text_is_cut_to_the_room_it_has():
    assert fitted("short", 100) == "short"
    assert text_width(fitted("x" * 100, 80)) <= 80
    assert fitted("x" * 100, 80).endswith("…")
    assert printable("a\x00b\ud800c") == "a\ufffdb\ufffdc"
