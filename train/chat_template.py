"""Which characters of a rendered conversation the assistant wrote, for the chat template of any tokenizer.

A template is a program; nobody but itself knows where it puts an answer. So it is asked by differences: the history
is rendered with and without each answer, and what the answer adds is the answer, its end-of-turn token included. A
template that marks answers itself (`{% generation %}`) is believed.

Templates of reasoning models drop old thinking as soon as another turn follows. What the target really read before
its third answer then is no prefix of the whole conversation: such conversations become one row for each answer, each
with the history as the target saw it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from specdec.errors import BadData
from specdec.train.example import Conversation, Message

_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """Text of one training row.

    Attributes:
        text: as the template gave it, special tokens spelled out.
        spans: the characters [start, stop) to be learned, in order.
        marks: one flag for each token of the text, from a template that marks answers itself; None otherwise.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    marks: tuple[bool, ...] | None = None


class ChatTemplate:
    """Renders conversations and says what in them is supervised.

    Args:
        tokenizer: the target's.
        template: Jinja; the tokenizer's own when None.
        options: further names for the template, such as {"enable_thinking": False}.
        today: what templates that print the date are told, so that one run renders one text.

    Raises:
        BadData: there is no template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        options: Mapping[str, Any] | None = None,
        today: datetime | None = None,
    ) -> None:
        self.tokenizer, self.options = tokenizer, dict(options or {})
        self.text = template or _own_template(tokenizer)
        self.marks_answers = bool(_MARKS_ANSWERS.search(self.text))
        self.today = today or datetime.now()
        self._dated = _with_date(self.text, self.today)
        self._specials = _special_texts(tokenizer)

    @property
    def sha256(self) -> str:
        """Of the template's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, messages: tuple[Message, ...], tools: tuple[Any, ...] = (), *, ask: bool = False) -> str:
        """The text of messages; `ask` adds the opening of the next answer.

        Raises:
            BadData: the template refuses these messages.
        """
        return self._apply(messages, tools, tokenize=False, add_generation_prompt=ask)

    def rows(self, conversation: Conversation) -> list[Rendered]:
        """The conversation as one row, or as one for each answer where the template rewrites history.

        Raises:
            BadData: the template refuses it, or renders a history differently once the answer follows.
        """
        answers = [
            number
            for number, message in enumerate(conversation.messages)
            if message["role"] == "assistant" and number >= conversation.first
        ]
        turns = [self._turn(conversation, number) for number in answers]
        whole = turns[-1].text
        if all(whole.startswith(turn.text) for turn in turns):
            answers, turns = answers[-1:], [Rendered(whole, tuple(span for turn in turns for span in turn.spans))]
        if not self.marks_answers:
            return turns
        return [self._marked(row, conversation, number) for row, number in zip(turns, answers, strict=True)]

    def _turn(self, conversation: Conversation, number: int) -> Rendered:
        """Everything up to one answer, of which the answer is supervised."""
        history, tools = conversation.messages[:number], conversation.tools
        text = self.render(conversation.messages[: number + 1], tools)
        start = self._start(text, history, tools)
        end = self._end(text, start)
        if number in conversation.cut:
            end = _end_of_content(text, start, end, conversation.messages[number])
        return Rendered(text, ((start, end),))

    def _start(self, text: str, history: tuple[Message, ...], tools: tuple[Any, ...]) -> int:
        """Where the answer begins: behind what the target is given to open it with."""
        if not history:
            return 0
        asked = self.render(history, tools, ask=True)
        if text.startswith(asked):
            return len(asked)
        plain = self.render(history, tools)  # the opening may hold more than the template writes before an answer
        if not text.startswith(plain):
            place = _common(plain, text)
            raise BadData(
                "the chat template renders the history differently once the answer follows (they part at character "
                f"{place}: {plain[place : place + 30]!r} became {text[place : place + 30]!r}); what the target would "
                "have read is not known, so this conversation cannot be trained on with this template"
            )
        return max(len(plain), _common(asked, text))

    def _end(self, text: str, start: int) -> int:
        """White space behind the end-of-turn token is the template's: the target stops before it."""
        end = start + len(text[start:].rstrip())
        return end if text[start:end].endswith(self._specials) else len(text)

    def _marked(self, row: Rendered, conversation: Conversation, last: int) -> Rendered:
        """With the template's own marks of the row that ends in message `last`."""
        encoded = self._apply(
            conversation.messages[: last + 1],
            conversation.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return Rendered(row.text, row.spans, tuple(bool(mark) for mark in encoded["assistant_masks"]))

    def _apply(self, messages: tuple[Message, ...], tools: tuple[Any, ...], **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=self._dated,
                **how,
                **self.options,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            roles = ", ".join(message["role"] for message in messages)
            reason = " ".join(str(error).split())[:200]
            raise BadData(f"the chat template refuses messages of the roles {roles or '(none)'}: {reason}") from error


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise BadData(
            "these are conversations, and the tokenizer has no chat template: give one with --template, or name a "
            "target that has one"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise BadData(f"the tokenizer has several chat templates and no default: {error}; give --template") from error


def _with_date(template: str, today: datetime) -> str:
    """Calls of strftime_now(format) replaced by the text that they give for this day."""
    call = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
    return re.sub(call, lambda found: f'"{today.strftime(found[2])}"', template)


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Special and added tokens as text: an answer's end-of-turn token is among them, where there is one."""
    added = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    return tuple(sorted(token for token in {*added, *map(str, tokenizer.all_special_tokens)} if token.strip()))


def _common(one: str, other: str) -> int:
    """Length of the longest common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _end_of_content(text: str, start: int, end: int, message: Message) -> int:
    """The end of what the message says, without what the template puts behind it."""
    content = message["content"]
    said = content.strip() if isinstance(content, str) else ""
    found = text.rfind(said, start, end) if said else -1
    return end if found < 0 else found + len(said)
