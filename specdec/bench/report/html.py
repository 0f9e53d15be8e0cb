"""A report as one HTML file that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from specdec.bench.plots.canvas import printable
from specdec.bench.report.document import Block, Callout, Cards, Cell, Code, Document, Figure, Heading, Paragraph, Table
from specdec.bench.report.style import STYLE


def html(document: Document) -> str:
    """The whole file. Every text passes through ElementTree, which escapes it."""
    page = Element("html", {"lang": "en"})
    head = SubElement(page, "head")
    SubElement(head, "meta", {"charset": "utf-8"})
    SubElement(head, "meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"})
    _text(SubElement(head, "title"), document.title)
    SubElement(head, "style").text = STYLE
    main = SubElement(SubElement(page, "body"), "main")
    for block in document.blocks:
        _add(main, block)
    return "<!DOCTYPE html>\n" + ElementTree.tostring(page, encoding="unicode", method="html") + "\n"


def _add(parent: Element, block: Block) -> None:
    match block:
        case Heading():
            _text(SubElement(parent, f"h{block.level}"), block.text)
        case Paragraph():
            _text(SubElement(parent, "p", {"class": "small"} if block.small else {}), block.text)
        case Callout():
            _text(SubElement(parent, "p", {"class": f"callout {block.tone}", "role": "note"}), block.text)
        case Cards():
            _cards(parent, block)
        case Table():
            _table(parent, block)
        case Figure():
            SubElement(parent, "figure").append(ElementTree.fromstring(_without_namespace(block.svg)))
        case Code():
            _text(SubElement(SubElement(parent, "pre"), "code"), block.text)


def _cards(parent: Element, block: Cards) -> None:
    row = SubElement(parent, "div", {"class": "cards"})
    for card in block.cards:
        box = SubElement(row, "div", {"class": f"card {card.tone}".strip()})
        _text(SubElement(box, "div", {"class": "value"}), card.value)
        _text(SubElement(box, "div", {"class": "label"}), card.label)


def _table(parent: Element, block: Table) -> None:
    if not block.rows:
        return
    table = SubElement(SubElement(parent, "div", {"class": "scroll", "tabindex": "0"}), "table")
    head = SubElement(SubElement(table, "thead"), "tr")
    for place, words in enumerate(block.head):
        kind = {"class": "name"} if place < block.names else {}
        _breakable(SubElement(head, "th", {"scope": "col", **kind}), words)
    body = SubElement(table, "tbody")
    for row in block.rows:
        line = SubElement(body, "tr")
        for place, cell in enumerate(row):
            shown = cell if isinstance(cell, Cell) else Cell(cell)
            kind = f"{'name ' if place < block.names else ''}{shown.tone}".strip()
            cellbox = SubElement(line, "td", {"class": kind} if kind else {})
            (_breakable if place < block.names else _text)(cellbox, shown.text)


def _text(element: Element, text: str) -> None:
    element.text = printable(text)


def _breakable(element: Element, text: str) -> None:
    """Text that may be broken after punctuation, as in early-exit:layer=2,depth=3; copied, it is still the same."""
    first, *rest = re.split(r"(?<=[,:_])(?=\w)|(?<=/)(?=\w\w)", printable(text))
    element.text = first
    for piece in rest:
        SubElement(element, "wbr").tail = piece


def _without_namespace(svg: str) -> str:
    """Inside HTML an svg element needs no namespace, and ElementTree would write a prefix for one."""
    return svg.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)
