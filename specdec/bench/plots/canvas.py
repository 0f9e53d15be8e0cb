"""Drawing by absolute coordinates into one SVG element, with text that knows about how wide it is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from xml.etree import ElementTree

from specdec.bench.plots.palette import FONT, variables

WIDTH = 760
SIZE = 12
"""Of text, in pixels of the drawing."""
_STYLE = (
    variables(".plot")
    + f".plot{{font-family:{FONT};font-size:{SIZE}px;font-variant-numeric:tabular-nums;width:100%;height:auto}}"
    + ".plot text{fill:var(--ink)}.plot .muted{fill:var(--muted)}.plot .small{font-size:10.5px;"
    + "paint-order:stroke;stroke:var(--page);stroke-width:3px}"
    + ".plot .strong{font-weight:600}.plot .grid{stroke:var(--grid)}.plot .axis{stroke:var(--line)}"
    + ".plot .mark{stroke:var(--ink);stroke-dasharray:4 3}.plot .whisker{stroke:var(--ink);stroke-width:1.3}"
)
_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Canvas:
    """One drawing.

    Args:
        height: in pixels of a drawing WIDTH wide; a reader's page scales it.
        title: what it shows, for readers who do not see it.
    """

    def __init__(self, height: float, title: str) -> None:
        box = f"0 0 {WIDTH} {height:.0f}"
        named = {"xmlns": "http://www.w3.org/2000/svg", "class": "plot", "viewBox": box, "role": "img"}
        self.root = ElementTree.Element("svg", {**named, "style": f"max-width:{WIDTH}px"})
        ElementTree.SubElement(self.root, "title").text = printable(title)
        ElementTree.SubElement(self.root, "style").text = _STYLE

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """A straight line of one of the kinds grid, axis, mark, whisker."""
        self._add("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": kind})

    def bar(self, x: float, y: float, width: float, height: float, colour: str, says: str = "") -> None:
        """A filled rectangle; `says` appears under the pointer."""
        place: dict[str, object] = {"x": x, "y": y, "width": max(width, 0), "height": height}
        self._add("rect", {**place, "style": f"fill:{colour}", "rx": 1.5}, says)

    def curve(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """Straight pieces from point to point."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._add("polyline", {"points": path, "style": f"fill:none;stroke:{colour};stroke-width:1.8"})

    def dot(self, x: float, y: float, colour: str, says: str = "") -> None:
        """A point; `says` appears under the pointer."""
        self._add("circle", {"cx": x, "cy": y, "r": 3, "style": f"fill:{colour}"}, says)

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", kind: str = "", within: float | None = None
    ) -> None:
        """A line of text on the baseline y, cut to `within` pixels; what was cut appears under the pointer."""
        shown = text if within is None else fitted(text, within)
        element = self._add("text", {"x": x, "y": y, "text-anchor": anchor, "class": kind})
        element.text = printable(shown)
        if shown != text:
            ElementTree.SubElement(element, "title").text = printable(text)

    def legend(self, labels: Sequence[str], colours: Sequence[str], y: float) -> None:
        """Squares with their labels in as many lines as `legend_height` has room for."""
        for label, colour, (x, row) in zip(labels, colours, _legend_places(labels), strict=True):
            self.bar(x, y + 18 * row, 10, 10, colour)
            self.text(x + 15, y + 18 * row + 9.5, label, within=WIDTH - x - 20)

    def svg(self) -> str:
        """The drawing."""
        return ElementTree.tostring(self.root, encoding="unicode")

    def _add(self, tag: str, attributes: dict[str, object], says: str = "") -> ElementTree.Element:
        named = {
            key: f"{v:.1f}" if isinstance(v, float) else printable(str(v)) for key, v in attributes.items() if v != ""
        }
        element = ElementTree.SubElement(self.root, tag, named)
        if says:
            ElementTree.SubElement(element, "title").text = printable(says)
        return element


def legend_height(labels: Sequence[str]) -> float:
    """Pixels that a legend takes, with the space after it."""
    return 18 * (1 + max((row for _, row in _legend_places(labels)), default=0)) + 8


def _legend_places(labels: Sequence[str]) -> list[tuple[float, int]]:
    """Left edge and line of each label."""
    places, x, row = [], 0.0, 0
    for label in labels:
        width = min(text_width(label) + 33, WIDTH)
        if x and x + width > WIDTH:
            x, row = 0.0, row + 1
        places.append((x, row))
        x += width
    return places


def text_width(text: str, size: float = SIZE) -> float:
    """About how many pixels a text takes, on the safe side: fonts differ."""
    return sum(1.0 if unicodedata.east_asian_width(letter) in "WF" else 0.57 for letter in text) * size


def fitted(text: str, width: float) -> str:
    """The text, or as much of its beginning as fits, with an ellipsis."""
    while text_width(text) > width and len(text) > 1:
        text = text.rstrip("…")[:-1] + "…"
    return text


def printable(text: str) -> str:
    """The text without characters that XML cannot hold: control characters, halves of surrogate pairs."""
    return _FORBIDDEN.sub("\ufffd", text)


def empty(title: str, why: str) -> str:
    """A drawing that says why there is nothing to see."""
    canvas = Canvas(40, title)
    canvas.text(0, 24, why, kind="muted")
    return canvas.svg()
