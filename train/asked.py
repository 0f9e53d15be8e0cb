"""What the rows of a file of prompts ask the target: conversations turn by turn, or beginnings of texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from specdec.errors import BadData
from specdec.train.chat_template import is_readable
from specdec.train.example import SPEAKERS, Message, messages_of, tools_of
from specdec.train.source import SourceRow


@dataclass(frozen=True)
class Asked:
    """What one row of the prompts asks for.

    Attributes:
        turns: messages put before each answer; the system's and the user's first ones before the first.
        tools: shown to the target.
        text: the beginning to be continued, instead of turns.
    """

    turns: tuple[tuple[Message, ...], ...] = ()
    tools: tuple[Any, ...] = ()
    text: str | None = None

    @property
    def key(self) -> str:
        """A hash of all of it."""
        return hashlib.sha256(self._content().encode()).hexdigest()[:16]

    @property
    def whole(self) -> bool:
        """No text in it holds half a character."""
        return is_readable(self._content(ensure_ascii=False))

    def _content(self, *, ensure_ascii: bool = True) -> str:
        content = [self.turns, self.tools, self.text]
        return json.dumps(content, sort_keys=True, default=str, ensure_ascii=ensure_ascii)


@dataclass
class Prompts:
    """What rows ask for, read as it is wanted.

    Args:
        rows: of any source.
        chat, max_turns: see `asked_of`.
        skip_bad: pass over rows that cannot be used, and count them.

    Attributes:
        bad: rows that were passed over; `first_bad` says why the first was.

    Raises:
        BadData: while reading, for a row that cannot be used; with file and line.
    """

    rows: Iterable[SourceRow]
    chat: bool = True
    max_turns: int = 0
    skip_bad: bool = False
    bad: int = field(default=0, init=False)
    first_bad: str | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[Asked]:
        for row in self.rows:
            try:
                asked = asked_of(row, chat=self.chat, max_turns=self.max_turns)
            except BadData as error:
                if not self.skip_bad:
                    raise BadData(f"{error} (--skip-bad passes over such rows)") from error
                self.bad += 1
                self.first_bad = self.first_bad or str(error)
                continue
            yield asked


def asked_of(row: SourceRow, *, chat: bool = True, max_turns: int = 0) -> Asked:
    """What a row asks for.

    Args:
        row: with messages, conversations, prompt or text.
        chat: a `prompt` of text is a user's message; otherwise it is continued.
        max_turns: answers wanted at most; 0 for all.

    Raises:
        BadData: unreadable, none of these columns, or nothing is asked; begins with file and line.
    """
    if row.unreadable is not None:
        raise row.bad(row.unreadable)
    fields = row.fields
    try:
        for column in ("messages", "conversations"):
            if column in fields:
                return _asked(_replayed(fields[column]), fields, max_turns)
        prompt = fields.get("prompt")
        if isinstance(prompt, list):
            return _asked(_replayed(prompt), fields, max_turns)
        if isinstance(prompt, str) and prompt and chat:
            return _asked(({"role": "user", "content": prompt},), fields, max_turns)
    except BadData as error:
        raise row.bad(error) from error
    text = prompt if isinstance(prompt, str) else fields.get("text", fields.get("content"))
    if isinstance(text, str) and text.strip():
        return Asked(text=text)
    raise row.bad(f"expected messages, conversations, prompt or text; it has {', '.join(fields) or 'nothing'}")


def _replayed(raw: Any) -> tuple[Message, ...]:
    """The messages that are replayed; only these are checked, and answers may be anything: they are not kept.

    A tool's result belongs to a call that nobody will make again: there it ends.
    """
    if not isinstance(raw, list):
        return messages_of(raw)
    kept = list(takewhile(lambda entry: _role(entry) != "tool" and not _calls(entry), raw))
    if raw and not kept:
        raise BadData("nothing is asked before a tool is called")
    return messages_of([_ANSWER if _role(entry) == "assistant" else entry for entry in kept])


_ANSWER = {"role": "assistant", "content": "(to be replaced)"}


def _role(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return None
    return entry.get("role") or SPEAKERS.get(str(entry.get("from")).lower())


def _calls(entry: Any) -> bool:
    return isinstance(entry, dict) and bool(entry.get("tool_calls"))


def _asked(messages: tuple[Message, ...], fields: Mapping[str, Any], max_turns: int) -> Asked:
    """Everything but the answers."""
    turns: list[tuple[Message, ...]] = []
    pending: list[Message] = []
    for message in messages:
        if message["role"] != "assistant":
            pending.append(message)
        elif pending:
            turns.append(tuple(pending))
            pending = []
    if any(message["role"] == "user" for message in pending):
        turns.append(tuple(pending))
    if not turns or not any(message["role"] == "user" for message in turns[0]):
        raise BadData(f"nothing is asked in messages of the roles {', '.join(m['role'] for m in messages)}")
    return Asked(tuple(turns[: max_turns or None]), tools_of(fields.get("tools")))
