"""Conversations: what was asked and answered before a turn."""

from __future__ import annotations

from collections.abc import Iterable

from specdec.bench.methods import PLAIN
from specdec.bench.question import Question
from specdec.bench.record import History, Record, RecordKey, key_of
from specdec.errors import SpecdecError


class Conversations:
    """The answers of a run so far.

    Args:
        history: "own": a method sees its own earlier answers; "reference": all see the plain method's.
        records: that are there already.
    """

    def __init__(self, history: History, records: Iterable[Record] = ()) -> None:
        self.history: History = history
        self._answers: dict[RecordKey, str | None] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Take note of an answer."""
        self._answers[key_of(record)] = None if record["error"] is not None else record["text"]

    def messages(self, method: str, question: Question, turn: int, repeat: int) -> list[dict[str, str]]:
        """Roles and contents up to the question of this turn.

        Raises:
            SpecdecError: an earlier answer is missing, because its generation failed.
        """
        speaker = method if self.history == "own" else PLAIN
        messages = []
        for earlier in range(turn):
            answer = self._answers.get(RecordKey(speaker, question.id, earlier, repeat))
            if answer is None:
                raise SpecdecError(f"{speaker} has no answer to turn {earlier}")
            messages += [_message("user", question.turns[earlier]), _message("assistant", answer)]
        return [*messages, _message("user", question.turns[turn])]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
