"""Showing which tokens are supervised: one segment for each token, coloured or with plain marks."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rich.text import Text
from transformers import PreTrainedTokenizerBase

COLOURS = {True: ("black on green3", "black on dark_sea_green2"), False: ("grey58", "grey70")}
"""Styles of supervised and other tokens; neighbours alternate, so that every token's edges are seen."""

SPECIAL = "bold italic"
OPEN, CLOSE, EDGE = "⟦", "⟧", "·"
ESCAPES = {"\n": "⏎\n", "\t": "⇥", "\r": "␍"}
UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Segment:
    """One token as it is shown, or the several that make up one character."""

    text: str
    supervised: bool
    special: bool = False


def segments(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], supervised: Iterable[bool]) -> Iterator[Segment]:
    """Tokens as text. Tokens that are parts of one character come together, if they are supervised alike."""
    specials = set(tokenizer.all_special_ids)
    held: list[int] = []
    mark = False
    for token, wanted in zip(ids, supervised, strict=True):
        if held and (wanted != mark or token in specials):
            yield Segment(_shown(str(tokenizer.decode(held))), mark)
            held = []
        mark = wanted
        if token in specials:
            yield Segment(str(tokenizer.decode([token])), wanted, special=True)
            continue
        held.append(token)
        text = str(tokenizer.decode(held))
        if UNFINISHED not in text or len(held) == 4:  # no character has more than four bytes
            yield Segment(_shown(text), wanted)
            held = []
    if held:
        yield Segment(_shown(str(tokenizer.decode(held))), mark)


def coloured(shown: Iterable[Segment]) -> Text:
    """For a terminal: supervised tokens on green, shades alternating from token to token."""
    result = Text()
    for place, segment in enumerate(shown):
        style = COLOURS[segment.supervised][place % 2]
        result.append(segment.text, f"{SPECIAL} {style}" if segment.special else style)
    return result


def plain(shown: Iterable[Segment]) -> str:
    """Without colours: supervised runs in ⟦ ⟧, a dot between tokens."""
    parts: list[str] = []
    inside = False
    for segment in shown:
        if segment.supervised != inside:
            parts.append(OPEN if segment.supervised else CLOSE)
        elif parts:
            parts.append(EDGE)
        inside = segment.supervised
        parts.append(segment.text)
    return "".join(parts) + (CLOSE if inside else "")


def _shown(text: str) -> str:
    """Control characters made visible: a terminal must not obey what a data set says."""
    return "".join(ESCAPES.get(letter) or (_code(letter) if _hidden(letter) else letter) for letter in text)


def _hidden(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cf", "Co", "Cs")


def _code(letter: str) -> str:
    return f"\\u{ord(letter):04x}"
