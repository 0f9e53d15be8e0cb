"""One measured record as the statistics see it; the time of a batch is shared out among its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from specdec.bench.record import Record

Question = str | int
Phase = Literal["prefill", "draft", "verify", "accept"]
PHASES: tuple[Phase, ...] = ("draft", "verify", "accept")
"""What a step's time is spent on; the rest of the step is called other."""


@dataclass(frozen=True)
class Sample:
    """What one method did with one turn of one question, once.

    Attributes:
        record: as measured; its seconds are those of the whole batch.
        share: this row's part of the batch's time, by its part of the batch's tokens: sums over rows count every
            second once. 1 in a batch of one.
        calls: verifications of the whole batch, 0 where the method does not say.
    """

    record: Record
    share: float
    calls: int

    @property
    def name(self) -> str:
        """Words that lead to the record."""
        record = self.record
        return f"{record['method']}, question {record['question_id']}, turn {record['turn']}, repeat {record['repeat']}"

    @property
    def question(self) -> Question:
        """The question's id."""
        return self.record["question_id"]

    @property
    def column(self) -> str:
        """The group that the question is reported in."""
        return self.record["column"]

    @property
    def tokens(self) -> int:
        """Number of new tokens."""
        return len(self.record["token_ids"])

    @property
    def later_tokens(self) -> int:
        """Tokens after those that the prefill brought."""
        return sum(self.steps("emitted")) if self.knows("emitted") else max(self.tokens - 1, 0)

    @property
    def time(self) -> float:
        """Seconds from the call to its return, this row's share."""
        return self.share * self.record["seconds"]["total"]

    @property
    def first_token(self) -> float | None:
        """Seconds until the first token was there; not shared out, since every row of a batch waits for it."""
        seconds = self.record["seconds"]
        return seconds["prefill"] if seconds["ttft"] is None else seconds["ttft"]

    @property
    def decode_time(self) -> float | None:
        """Seconds after the first token, this row's share; None where the first token's time is not known."""
        first = self.first_token
        return None if first is None else max(self.time - self.share * first, 0.0)

    @property
    def latency(self) -> float:
        """Seconds until the last token was there: a row of a batch may end before the batch does."""
        total, first = self.record["seconds"]["total"], self.first_token
        if self.record["batch"]["size"] == 1 or first is None or not self.steps("total"):
            return total
        return min(first + sum(self.steps("total")), total)

    def spent(self, phase: Phase) -> float | None:
        """Seconds of one phase, this row's share."""
        seconds = self.record["seconds"][phase]
        return None if seconds is None else self.share * seconds

    def steps(self, name: str) -> list[Any]:
        """One per-step list; empty where the method does not say."""
        return self._steps.get(name) or []

    def knows(self, name: str) -> bool:
        """Whether the method says this of its steps, be it that there were none."""
        return self._steps.get(name) is not None

    @property
    def _steps(self) -> dict[str, Any]:
        return cast(dict[str, Any], self.record["steps"])


def samples_of(records: Iterable[Record]) -> list[Sample]:
    """The records that ran through; failed ones are left out, see `failures`."""
    batches: dict[tuple[str, int, int, int], list[Record]] = {}
    for record in records:
        if record["error"] is None:
            key = (record["method"], record["turn"], record["repeat"], record["batch"]["id"])
            batches.setdefault(key, []).append(record)
    return [sample for rows in batches.values() for sample in _shared_out(rows)]


def failures(records: Iterable[Record]) -> list[Record]:
    """The records that ended in an error."""
    return [record for record in records if record["error"] is not None]


def units_of(samples: Iterable[Sample]) -> dict[Question, int]:
    """Question -> the unit it is resampled with: questions that are timed in one batch stand or fall together."""
    return {sample.question: sample.record["batch"]["id"] for sample in samples}


def _shared_out(rows: Sequence[Record]) -> list[Sample]:
    """The rows of one batch, each with its part of the time."""
    everyone = sum(len(row["token_ids"]) for row in rows)
    calls = max(len(row["steps"]["emitted"]) for row in rows)
    shares = [len(row["token_ids"]) / everyone if everyone else 1 / len(rows) for row in rows]
    return [Sample(row, share, calls) for row, share in zip(rows, shares, strict=True)]
