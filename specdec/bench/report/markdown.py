"""A report as Markdown; figures are left out, their numbers are in the tables."""

from __future__ import annotations

import re

from specdec.bench.plots.canvas import printable
from specdec.bench.report.document import Block, Callout, Cards, Cell, Code, Document, Heading, Paragraph, Table

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$&!])")
_TONES = {"bad": "**Attention.** ", "warn": "**Note.** ", "good": "", "": ""}


def markdown(document: Document) -> str:
    """The whole file."""
    parts = [_block(block) for block in document.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(printable(text).split()))


def _block(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {escaped(block.text)}"
        case Paragraph():
            return escaped(block.text)
        case Callout():
            return f"> {_TONES[block.tone]}{escaped(block.text)}"
        case Cards():
            return "\n".join(f"- **{escaped(card.value)}** {escaped(card.label)}" for card in block.cards)
        case Table():
            return _table(block)
        case Code():
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", block.text)), default=0))
            return f"{fence}\n{printable(block.text)}\n{fence}"
        case _:
            return ""


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    rule = ["---" if place < table.names else "---:" for place in range(len(table.head))]
    rows = [[escaped(cell.text if isinstance(cell, Cell) else cell) for cell in row] for row in table.rows]
    lines = [[escaped(head) for head in table.head], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
