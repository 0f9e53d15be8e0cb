"""From a row's columns to an example: a conversation, a prompt with its completion, or plain text.

    messages            [{"role", "content", ...}], with `tools` beside them
    conversations       ShareGPT: [{"from", "value"}], or messages under that name
    prompt, completion  two strings, or two lists of messages
    turns               token ids as `specdec data regenerate` kept them
    text, content       plain text

The first of these that a row has decides; other columns are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specdec.errors import BadData
from specdec.train.source import SourceRow, shown

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""ShareGPT's names of who speaks."""

CUT = "length"
"""`finish` of an answer that stopped at its cap: it has no end, so none is learned."""

BEGINNING = 1000
"""Characters by which texts that begin alike are known."""


@dataclass(frozen=True)
class Conversation:
    """Messages; the assistant's are supervised.

    Attributes:
        messages: `role`, `content` and whatever else the chat template knows (tool_calls, reasoning_content, ...).
        tools: JSON schemas that the template shows to the model.
        first: messages before this one are context alone.
        cut: numbers of messages that stopped at their cap.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    first: int = 0
    cut: frozenset[int] = frozenset()

    @property
    def answers(self) -> list[int]:
        """Numbers of the messages to be learned.

        What the assistant says before anybody else has spoken is context: nobody knows what the target would have read.
        """
        roles = [message["role"] for message in self.messages]
        asked = next((number for number, role in enumerate(roles) if role != "assistant"), len(roles))
        return [n for n, role in enumerate(roles) if role == "assistant" and n >= max(self.first, asked)]

    @property
    def beginning(self) -> str:
        """What was asked first; conversations of the same beginning stay together when some are held out."""
        asked = [m.get("content") for m in self.messages if m["role"] != "assistant"]
        return json.dumps(asked[:2], sort_keys=True, default=str)


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, both without any template; the latter is supervised."""

    prompt: str
    completion: str
    cut: bool = False

    @property
    def beginning(self) -> str:
        """See Conversation; without a prompt the text begins with its completion."""
        return self.prompt or self.completion[:BEGINNING]


@dataclass(frozen=True)
class PlainText:
    """Text of which every token is supervised."""

    text: str
    cut: bool = False

    @property
    def beginning(self) -> str:
        """See Conversation."""
        return self.text[:BEGINNING]


@dataclass(frozen=True)
class TokenTurns:
    """Prompts and answers as ids, exactly as the target read and wrote them; the answers are supervised.

    `vocabulary` is the hash of the vocabulary that the ids belong to.
    """

    turns: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    vocabulary: str

    @property
    def beginning(self) -> str:
        """See Conversation."""
        return str(self.turns[0][0])


Example = Conversation | Completion | PlainText | TokenTurns


def example_of(row: SourceRow) -> Example:
    """The example in a row.

    Raises:
        BadData: unreadable, without a known column, or with one that holds something else; begins with its place.
    """
    if row.unreadable is not None:
        raise row.bad(row.unreadable)
    fields = row.fields
    for columns, make in FORMS:
        if all(column in fields for column in columns):
            try:
                return make(fields)
            except BadData as error:
                raise row.bad(error) from error
    known = "; ".join(" and ".join(columns) for columns, _ in FORMS)
    raise row.bad(f"none of the known columns ({known}); it has {', '.join(map(str, fields)) or 'no column at all'}")


def _turns(fields: dict[str, Any]) -> TokenTurns:
    turns, vocabulary = fields["turns"], fields["vocabulary"]
    try:
        read = tuple((tuple(turn["prompt_ids"]), tuple(turn["answer_ids"])) for turn in turns)
    except (TypeError, KeyError) as error:
        raise BadData(f"turns is {shown(turns)}, expected a list of prompt_ids and answer_ids") from error
    whole = all(type(token) is int and token >= 0 for turn in read for ids in turn for token in ids)
    if not read or not all(prompt and answer for prompt, answer in read) or not whole:
        raise BadData("turns holds no ids, or something else than ids")
    return TokenTurns(read, str(vocabulary))


def _messages(fields: dict[str, Any]) -> Conversation:
    return _conversation(fields["messages"], fields)


def _share_gpt(fields: dict[str, Any]) -> Conversation:
    return _conversation(fields["conversations"], fields)


def _conversation(raw: Any, fields: dict[str, Any], first: int = 0) -> Conversation:
    messages = messages_of(raw)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant" and number >= first]
    if not answers:
        raise BadData("no message of the assistant, so nothing to learn from")
    made = Conversation(messages, tools_of(fields.get("tools")), first, _cut(fields.get("finish"), answers))
    if not made.answers:
        raise BadData("the assistant speaks without having been asked, so nothing to learn from")
    return made


def messages_of(raw: Any) -> tuple[Message, ...]:
    """Messages in the words of chat templates, from those of OpenAI or ShareGPT.

    Raises:
        BadData: something else; says which message.
    """
    if not isinstance(raw, list) or not raw:
        raise BadData(f"expected a list of messages, got {shown(raw)}")
    return tuple(_message(entry, number) for number, entry in enumerate(raw, start=1))


def _cut(finish: Any, answers: list[int]) -> frozenset[int]:
    """`finish` lists one word for each answer."""
    if not isinstance(finish, list):
        return frozenset()
    return frozenset(number for number, word in zip(answers, finish, strict=False) if word == CUT)


def _message(entry: Any, number: int) -> Message:
    if not isinstance(entry, dict):
        raise BadData(f"message {number} is {shown(entry)}, expected an object with role and content")
    given = {name: value for name, value in entry.items() if value is not None}
    if "from" in given and "role" not in given:
        given["role"] = SPEAKERS.get(str(given.pop("from")).lower(), "unknown")
        given["content"] = given.pop("value", None)
    role = given.get("role")
    if role not in ROLES:
        raise BadData(f"message {number} has the role {role!r}; known are {', '.join(ROLES)}")
    if "tool_calls" in given:
        given["tool_calls"] = [_tool_call(call, number) for call in given["tool_calls"]]
    content = given.setdefault("content", "" if role == "assistant" else None)
    if isinstance(content, list):
        given["content"] = content = [_part(part) for part in content]
    if not isinstance(content, str | list) or (role == "user" and not content):
        raise BadData(f"message {number} ({role}) has the content {shown(content)}, expected text")
    if role == "assistant" and not any(given.get(said) for said in ("content", "tool_calls", "reasoning_content")):
        raise BadData(f"message {number} is an empty answer")
    return given


def _part(part: Any) -> Any:
    """Templates ask whether a part has an image; a column without a value is none."""
    return {name: held for name, held in part.items() if held is not None} if isinstance(part, dict) else part


def _tool_call(call: Any, number: int) -> Any:
    """Templates print a call's arguments as JSON; given as a string they would be quoted twice."""
    if not isinstance(call, dict):
        raise BadData(f"message {number} has the tool call {shown(call)}, expected an object")
    function = call.get("function", call)
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            parsed = json.loads(function["arguments"])
        except ValueError:
            return call
        if isinstance(parsed, dict):
            function = {**function, "arguments": parsed}
            return {**call, "function": function} if "function" in call else function
    return call


def tools_of(raw: Any) -> tuple[Any, ...]:
    """JSON schemas of tools, from a list or from its JSON.

    Raises:
        BadData: something else.
    """
    if isinstance(raw, str):
        try:
            raw = json.loads(raw) if raw.strip() else []
        except ValueError as error:
            raise BadData(f"tools is no JSON: {shown(raw)}") from error
    if raw is not None and not isinstance(raw, list):
        raise BadData(f"tools is {shown(raw)}, expected a list of JSON schemas")
    return tuple(raw or ())


def _completion(fields: dict[str, Any]) -> Conversation | Completion:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], fields, first=len(prompt))
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise BadData(
            f"prompt and completion are {shown(prompt)} and {shown(completion)}; expected two texts, the second one "
            "not empty, or two lists of messages"
        )
    return Completion(prompt, completion, fields.get("finish") == CUT)


def _plain(column: str) -> Callable[[dict[str, Any]], PlainText]:
    def make(fields: dict[str, Any]) -> PlainText:
        text = fields[column]
        if not isinstance(text, str) or not text.strip():
            raise BadData(f"{column} is {shown(text)}, expected text")
        return PlainText(text, fields.get("finish") == CUT)

    return make


FORMS: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any]], Example]], ...] = (
    (("turns", "vocabulary"), _turns),
    (("messages",), _messages),
    (("conversations",), _share_gpt),
    (("prompt", "completion"), _completion),
    (("text",), _plain("text")),
    (("content",), _plain("content")),
)
"""Columns, and what makes an example of them."""
