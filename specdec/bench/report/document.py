"""What a report consists of, before it is Markdown or HTML: plain texts, escaped by the renderers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Tone = Literal["", "good", "warn", "bad"]


@dataclass(frozen=True)
class Heading:
    """The title (level 1) or the beginning of a section (level 2)."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text; `small` for footnotes."""

    text: str
    small: bool = False


@dataclass(frozen=True)
class Callout:
    """A sentence that must not be overlooked."""

    text: str
    tone: Tone


@dataclass(frozen=True)
class Card:
    """One large number, with what it is."""

    value: str
    label: str
    tone: Tone = ""


@dataclass(frozen=True)
class Cards:
    """Large numbers side by side."""

    cards: Sequence[Card]


@dataclass(frozen=True)
class Cell:
    """A table's cell with a tone."""

    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """Rows under heads; the first `names` columns are words, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    names: int = 1


@dataclass(frozen=True)
class Figure:
    """A plot; its numbers are in a table nearby, so a renderer without pictures leaves it out."""

    svg: str


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    text: str


Block = Heading | Paragraph | Callout | Cards | Table | Figure | Code


@dataclass
class Document:
    """A report."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def add(self, *blocks: Block) -> None:
        """Append."""
        self.blocks.extend(blocks)
