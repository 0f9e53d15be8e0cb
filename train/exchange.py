"""One exchange with the target: a conversation or a continuation, how far it has come, and the row that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdec.errors import BadData
from specdec.train.answerer import Answer, Request
from specdec.train.asked import Asked
from specdec.train.example import CUT, Message
from specdec.train.order import derived_seed


@dataclass(frozen=True)
class RegenerateSettings:
    """What decides the answers, and must be the same when a run is gone on with.

    Attributes:
        model: whose answers these are.
        temperatures: each prompt gets one of them, by its own hash: neither order nor batch matter.
        seed: of temperatures and draws.
        max_new_tokens: cap of each answer.
        prompt_tokens: of a text, continue so many tokens.
        max_turns: of a conversation; 0 for all.
        vocabulary: hash of the target's, where ids are kept.
        template, template_options: hash of the chat template, and what it was told beside the messages.
    """

    model: str
    temperatures: tuple[float, ...] = (0.0, 0.6, 1.0)
    seed: int = 0
    max_new_tokens: int = 1024
    prompt_tokens: int = 64
    max_turns: int = 0
    vocabulary: str | None = None
    template: str | None = None
    template_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.temperatures or min(self.temperatures) < 0:
            raise BadData(f"temperatures are {list(self.temperatures)}; expected one or more, each 0 or above")
        if self.max_new_tokens < 1 or self.prompt_tokens < 1:
            raise BadData("answers and beginnings of texts have at least one token")

    def temperature_of(self, key: str) -> float:
        """The temperature of a prompt."""
        return self.temperatures[derived_seed(self.seed, "temperature", key) % len(self.temperatures)]


@dataclass
class Exchange:
    """A conversation and how far it has come; a continuation is one of a single turn.

    Attributes:
        key: of the prompt, told apart from equal ones.
        asked: what is wanted.
        answers: what the target has said so far.
    """

    key: str
    asked: Asked
    answers: list[Answer]

    @property
    def finished(self) -> bool:
        """All turns are answered, or the last answer has no end, so that nothing can follow it."""
        turns = max(len(self.asked.turns), 1)
        return len(self.answers) >= turns or any(answer.finish == CUT for answer in self.answers)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far."""
        result: list[Message] = []
        for number, turn in enumerate(self.asked.turns[: len(self.answers) + 1]):
            result += turn
            if number < len(self.answers):
                result.append(_message(self.answers[number]))
        return tuple(result)

    def request(self, settings: RegenerateSettings) -> Request:
        """What is asked next."""
        turn = len(self.answers)
        seed = derived_seed(settings.seed, "answer", self.key, turn) % (1 << 31)
        temperature = settings.temperature_of(self.key)
        return Request(self.key, turn, self.messages, self.asked.tools, self.asked.text, temperature, seed)

    def line(self, settings: RegenerateSettings) -> dict[str, Any]:
        """The row that `prepare` reads."""
        answers, asked = self.answers, self.asked
        row: dict[str, Any] = {
            "id": self.key,
            "temperature": settings.temperature_of(self.key),
            "model": settings.model,
        }
        if asked.text is None:
            answered = self.asked.turns[: len(answers)]
            pairs = zip(answered, answers, strict=True)
            row["messages"] = [m for turn, answer in pairs for m in (*turn, _message(answer))]
            row["finish"] = [answer.finish for answer in answers]
            row |= {"tools": list(asked.tools)} if asked.tools else {}
        else:
            (answer,) = answers
            row |= {"prompt": answer.prompt, "completion": answer.content, "finish": answer.finish}
        if settings.vocabulary is not None and all(answer.answer_ids for answer in answers):
            row["vocabulary"] = settings.vocabulary
            row["turns"] = [
                {"prompt_ids": list(answer.prompt_ids), "answer_ids": list(answer.answer_ids)} for answer in answers
            ]
        return row


def _message(answer: Answer) -> Message:
    thought = {} if answer.reasoning is None else {"reasoning_content": answer.reasoning}
    return {"role": "assistant", "content": answer.content, **thought}
