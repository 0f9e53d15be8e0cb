"""Which characters of a rendered conversation the assistant wrote, for the chat template of any tokenizer.

A template is a program; nobody but itself knows where it puts an answer. So it is asked by differences: the history
is rendered with and without each answer, and what the answer adds is the answer, its end-of-turn token included. A
template that marks answers itself (`{% generation %}`) is believed.

Templates of reasoning models drop old thinking as soon as another turn follows. What the target really read before
its third answer then is no prefix of the whole conversation: such conversations become one row for each answer, each
with the history as the target saw it.

Templates differ in whether they read content that is a list of parts, by role. That is asked of them, too: where a
list is printed as it is, refused or dropped, text parts are joined beforehand.
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

HALF = "half a character (a lone surrogate), which no text can hold"

_PROBE = "probed"
"""Text that is looked for in what a template renders."""

_PROBED_AMONG = {
    "system": ("system", "user"), "developer": ("developer", "user"), "assistant": ("user", "assistant"),
    "tool": ("user", "assistant", "tool"),
}  # fmt: skip
"""The shortest conversation with a message of a role, where one alone is none."""

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
        self._reads: dict[str, bool] = {}

    @property
    def sha256(self) -> str:
        """Of the template's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, messages: tuple[Message, ...], tools: tuple[Any, ...] = (), *, ask: bool = False) -> str:
        """The text of messages; `ask` adds the opening of the next answer.

        Raises:
            BadData: the template refuses these messages, or they hold what no tokenizer reads.
        """
        return readable(self._apply(messages, tools, tokenize=False, add_generation_prompt=ask))

    def rows(self, conversation: Conversation) -> list[Rendered]:
        """The conversation as one row, or as one for each answer where the template rewrites history.

        Raises:
            BadData: the template refuses it, or renders a history differently once the answer follows.
        """
        answers = conversation.answers
        turns = [self._turn(conversation, number) for number in answers]
        whole = turns[-1].text
        if all(whole.startswith(turn.text[: turn.spans[-1][1]]) for turn in turns):
            answers, turns = answers[-1:], [Rendered(whole, tuple(span for turn in turns for span in turn.spans))]
        if not self.marks_answers:
            return turns
        return [self._marked(row, conversation, number) for row, number in zip(turns, answers, strict=True)]

    def _turn(self, conversation: Conversation, number: int) -> Rendered:
        """Everything up to one answer, of which the answer is supervised."""
        history, tools = conversation.messages[:number], conversation.tools
        message = conversation.messages[number]
        text = self.render((*history, message), tools)
        start = self._start(text, history, tools)
        if number in conversation.cut:
            end = self._end_of_said(text, start, history, message, tools)
        else:
            end = self._end(text, start, (*history, message), tools)
        return Rendered(text, ((start, end),))

    def _start(self, text: str, history: tuple[Message, ...], tools: tuple[Any, ...]) -> int:
        """Where the answer begins: behind what the target is given to open it with."""
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

    def _end(self, text: str, start: int, messages: tuple[Message, ...], tools: tuple[Any, ...]) -> int:
        """Where the target stops: at the end-of-turn token, without what the template puts behind it.

        That is white space; or a token that closes the text, and is not there when another answer is asked for.
        """
        end = self._end_of_special(text, start, len(text))
        if end is None:
            return len(text)
        closing = max(len(special) for special in self._specials if text[:end].endswith(special))
        before = self._end_of_special(text, start, end - closing)
        if before is None or self.render(messages, tools, ask=True).startswith(text[:end]):
            return end
        return before

    def _end_of_special(self, text: str, start: int, stop: int) -> int | None:
        """Where text[start:stop] ends but for white space, if that is with a special token."""
        end = start + len(text[start:stop].rstrip())
        return end if text[start:end].endswith(self._specials) else None

    def _end_of_said(
        self, text: str, start: int, history: tuple[Message, ...], message: Message, tools: tuple[Any, ...]
    ) -> int:
        """The end of what the message says: where more of it would stand. Where that is not to be seen, the start."""
        longer = self.render((*history, _longer(message)), tools)
        end = longer.rfind(_PROBE)  # the last one: an answer may say the same word
        return end if end >= start and text[:end] == longer[:end] else start

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
        return self._applied([self._joined(message) for message in messages], tools, **how)

    def _joined(self, message: Message) -> Message:
        """With content that the template reads: parts one behind the other, where it reads no list."""
        content, role = message.get("content"), message["role"]
        if not isinstance(content, list) or self._reads_parts(role):
            return message
        if not all(map(_is_text, content)):
            raise BadData(f"the chat template reads no list as content of the role {role}, and not all parts are text")
        return {**message, "content": "".join(part["text"] for part in content)}

    def _reads_parts(self, role: str) -> bool:
        """Whether the template writes the text of parts, and does not drop them or print the list as it is."""
        if role not in self._reads:
            parts = [{"type": "text", "text": f"{_PROBE}{number}"} for number in range(2)]
            messages = [{"role": name, "content": parts} for name in _PROBED_AMONG.get(role, (role,))]
            try:
                text = self._applied(messages, (), tokenize=False, add_generation_prompt=False)
            except BadData:
                text = ""
            written = [len(re.findall(rf"(?<!['\"]){part['text']}(?!['\"])", text)) for part in parts]
            self._reads[role] = min(written) == len(messages)
        return self._reads[role]

    def _applied(self, messages: list[Message], tools: tuple[Any, ...], **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                chat_template=self._dated,
                **how,
                **self.options,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            roles = ", ".join(message["role"] for message in messages)
            reason = " ".join(str(error).split())[:200]
            raise BadData(f"the chat template refuses messages of the roles {roles or '(none)'}: {reason}") from error


def readable(text: str) -> str:
    """The text itself.

    Raises:
        BadData: it holds half a character, as JSON can spell it (\\ud83d); tokenizers take whole ones.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise BadData(f"character {error.start + 1} of the text is {half}, half of a surrogate pair") from error
    return text


def is_readable(text: str) -> bool:
    """Whether UTF-8 can hold a text: JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        readable(text)
    except BadData:
        return False
    return True


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


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _longer(message: Message) -> Message:
    """Going on with the probe where the message stops: in its content, or in its thinking when it has no content."""
    content = message["content"]
    if not content and message.get("reasoning_content"):
        return {**message, "reasoning_content": message["reasoning_content"].rstrip() + _PROBE}
    if isinstance(content, str):
        return {**message, "content": content.rstrip() + _PROBE}
    *before, last = content
    last = {**last, "text": last["text"].rstrip() + _PROBE} if _is_text(last) else last
    return {**message, "content": [*before, last]}
