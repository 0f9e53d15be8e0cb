"""The prompts of a stream, in order, each with its topic.

FILE.jsonl and other sources of rows    `prompt`, `messages`, `conversations`, `text` or `ids`; `topic` if it is known
any other file                          UTF-8 text with one prompt a line

A row without a topic has the name of its source as one, so that several files are several topics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from specdec.errors import BadData
from specdec.train.chat_template import ChatTemplate
from specdec.train.example import Message, messages_of, tools_of
from specdec.train.source import SourceRow, is_text, read_source, shown

COLUMNS = ("messages", "conversations", "prompt", "text")


@dataclass(frozen=True)
class StreamPrompt:
    """One request.

    Attributes:
        ids: token ids of the prompt.
        topic: what it is about, if that is known.
        place: file and line, for messages.
    """

    ids: list[int]
    topic: str | None = None
    place: str = ""

    @property
    def sha256(self) -> str:
        """Of the ids."""
        return hashlib.sha256(",".join(map(str, self.ids)).encode()).hexdigest()


def read_stream(
    sources: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, *, chat: bool | None = None
) -> Iterator[StreamPrompt]:
    """Prompts of all sources, as they are read.

    Args:
        sources: files, folders or data sets as in `read_source`.
        tokenizer: the target's.
        chat: a prompt of text is a user's message for the chat template; None when the tokenizer has one.

    Raises:
        BadData: names the file and the line that is no prompt; or there is no template for messages.
    """
    talks = bool(tokenizer.chat_template) if chat is None else chat
    template = ChatTemplate(tokenizer) if talks else None
    for source in sources:
        name = Path(source).expanduser().name.partition(".")[0] or str(source)
        for row in _rows(source):
            yield _prompt(row, name, tokenizer, template)


def _rows(source: str | Path) -> Iterator[SourceRow]:
    path = Path(source).expanduser()
    if not is_text(path):
        yield from read_source(source)
        return
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield SourceRow(f"{path}:{number}", {"prompt": line.removesuffix("\n")})
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"the prompts in {path} cannot be read: {error}") from error


def _prompt(
    row: SourceRow, name: str, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None
) -> StreamPrompt:
    topic = row.fields.get("topic", name)
    if not isinstance(topic, str):
        raise row.bad(f"topic is text, got {shown(topic)}")
    try:
        ids = _ids(row, tokenizer, template)
    except BadData as error:
        raise error if str(error).startswith(row.place) else row.bad(error) from error
    if not ids:
        raise row.bad("the prompt is empty")
    return StreamPrompt(ids, topic, row.place)


def _ids(row: SourceRow, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> list[int]:
    fields = row.fields
    if "ids" in fields:
        ids = fields["ids"]
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < len(tokenizer) for token in ids):
            raise row.bad(f"ids is a list of the target's token ids, got {shown(ids)}")
        return ids
    found = next((fields[column] for column in COLUMNS if column in fields), None)
    if isinstance(found, str) and template is None:
        return list(tokenizer(found)["input_ids"])
    if isinstance(found, str):
        asked: tuple[Message, ...] = ({"role": "user", "content": found},) if found.strip() else ()
    elif isinstance(found, list):
        asked = _asked(messages_of(found))
        if template is None:
            raise row.bad("holds messages; that needs a chat template and no --no-chat")
    else:
        raise row.bad(f"expected a prompt, messages, text or ids; it has {', '.join(fields) or 'nothing'}")
    if template is None or not asked:
        return []
    text = template.render(asked, tools_of(fields.get("tools")), ask=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _asked(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Up to and including the last question, whose answer is the request."""
    last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise BadData(f"nothing is asked in messages of the roles {', '.join(m['role'] for m in messages)}")
    return messages[: last + 1]
