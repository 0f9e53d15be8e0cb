"""What is asked of a target, what it says, and the interface of those who ask it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from specdec.train.example import Message

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Attributes:
        key: of the prompt; `turn` counts its answers from 0.
        messages, tools: the conversation so far, ending with what is asked.
        text: to be continued, instead of messages.
        temperature: 0 takes the most probable tokens.
        seed: of the draws.
    """

    key: str
    turn: int
    messages: tuple[Message, ...]
    tools: tuple[Any, ...]
    text: str | None
    temperature: float
    seed: int


@dataclass(frozen=True)
class Answer:
    """What the target said.

    Attributes:
        content: text without special tokens and without `reasoning`.
        finish: "length" when it stopped at its cap.
        reasoning: what it thought before, where that is told apart.
        prompt: of a continuation, the text that was continued.
        prompt_ids, answer_ids: exactly what was read and written, where it is known.
    """

    content: str
    finish: Finish
    reasoning: str | None = None
    prompt: str | None = None
    prompt_ids: tuple[int, ...] = ()
    answer_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why there is no answer; the prompt is asked again by the next run.

    Attributes:
        reason: one line.
        of_prompt: this prompt was refused or its answer is of no use, which says nothing of other prompts; otherwise it
            is the server that failed.
    """

    reason: str
    of_prompt: bool = False


class Answerer(Protocol):
    """Answers requests, several at a time."""

    @property
    def room(self) -> int:
        """How many more requests it takes now."""
        ...

    @property
    def waiting(self) -> int:
        """Requests without an outcome."""
        ...

    def submit(self, request: Request) -> None:
        """Take a request."""
        ...

    def wait(self) -> list[tuple[Request, Answer | Failure]]:
        """At least one outcome, as soon as there is one."""
        ...
