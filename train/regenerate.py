"""Regenerating: the target answers the prompts of a data set itself, and what it says becomes training data.

A drafter has to predict the target, so the target's own answers teach more than anybody else's. Conversations are
replayed turn by turn: each question is asked with the target's own earlier answers before it. A base model continues
the beginnings of texts. A finished answer is on the disk before the next one is asked for, and is never asked for
again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from specdec.errors import SpecdecError
from specdec.train.answer_book import AnswerBook
from specdec.train.answerer import Answerer, Failure
from specdec.train.asked import Asked
from specdec.train.chat_template import HALF
from specdec.train.example import CUT
from specdec.train.exchange import Exchange, RegenerateSettings

FAILURES_IN_A_ROW = 20
"""So many failures of the server without an answer in between end the run: it is down."""

REFUSED_AT_FIRST = 1000
"""So many refused prompts before anything is answered end the run: the same is wrong with all of them. Data that is
sorted by length may begin with many that are too long, and refusals take little time.
"""


@dataclass
class Regenerated:
    """What a run came to.

    Attributes:
        found: rows that were finished already.
        finished: rows finished by this run; `answers` counts their turns, `cut` those that stopped at the cap.
        failed: rows without an answer; `first_failure` says why the first has none.
    """

    found: int = 0
    finished: int = 0
    answers: int = 0
    cut: int = 0
    failed: int = 0
    first_failure: str | None = None
    by_temperature: dict[float, int] = field(default_factory=dict)


def regenerate(
    rows: Iterable[Asked],
    answerer: Answerer,
    out: Path,
    settings: RegenerateSettings,
    *,
    tell: Callable[[Regenerated], None] = lambda _so_far: None,
) -> Regenerated:
    """Get the target's answer to every row that `out` does not hold yet.

    Args:
        rows: what is asked; read as answers come, so there may be any number.
        answerer: asks the target.
        out: a file of JSON lines that `prepare` reads; gone on with when it is there.
        settings: must be those that `out` was begun with.
        tell: hears of the numbers so far.

    Raises:
        SpecdecError: `out` was begun with other settings, is written to by another process, the server is down
            (`FAILURES_IN_A_ROW`), or every prompt is refused (`REFUSED_AT_FIRST`).
    """
    with AnswerBook(out, settings) as book:
        report = Regenerated()
        fresh = _exchanges(rows, book, settings, report)
        going: dict[str, Exchange] = {}
        ready: deque[Exchange] = deque()
        luck = _Luck(answered=book.begun)
        while True:
            while answerer.room > 0 and (exchange := ready.popleft() if ready else next(fresh, None)):
                going[exchange.key] = exchange
                answerer.submit(exchange.request(settings))
            if not answerer.waiting:
                return report
            for request, outcome in answerer.wait():
                exchange = going.pop(request.key)
                if isinstance(outcome, Failure):
                    _note_failure(report, outcome)
                    luck.failed(outcome)
                else:
                    luck.succeeded()
                    exchange.answers.append(outcome)
                    if not exchange.finished:
                        book.keep(exchange)
                        ready.append(exchange)
                    else:
                        book.finish(exchange, settings)
                        _note(report, exchange, settings)
            tell(report)


def _note(report: Regenerated, exchange: Exchange, settings: RegenerateSettings) -> None:
    temperature = settings.temperature_of(exchange.key)
    report.finished += 1
    report.answers += len(exchange.answers)
    report.cut += sum(answer.finish == CUT for answer in exchange.answers)
    report.by_temperature[temperature] = report.by_temperature.get(temperature, 0) + 1


def _note_failure(report: Regenerated, failure: Failure) -> None:
    report.failed += 1
    report.first_failure = report.first_failure or failure.reason


@dataclass
class _Luck:
    """Ends a run that cannot succeed.

    Refused prompts count only until something is answered, in this run or before: the next run meets all of them one
    after another, as what was finished between them is not asked again, and has to get past them.
    """

    answered: bool
    failures: int = 0
    refused: int = 0

    def succeeded(self) -> None:
        self.answered, self.failures = True, 0

    def failed(self, failure: Failure) -> None:
        """Count a failure.

        Raises:
            SpecdecError: there were too many.
        """
        if not failure.of_prompt:
            self.failures += 1
        elif not self.answered:
            self.refused += 1
        if self.failures >= FAILURES_IN_A_ROW:
            raise SpecdecError(
                f"{self.failures} prompts in a row had no answer; the last reason: {failure.reason}. Finished answers "
                "are kept"
            )
        if self.refused >= REFUSED_AT_FIRST:
            raise SpecdecError(
                f"all of the first {self.refused} prompts were refused; the last reason: {failure.reason}. If others "
                "can be answered, put those first"
            )


def _exchanges(
    rows: Iterable[Asked], book: AnswerBook, settings: RegenerateSettings, report: Regenerated
) -> Iterator[Exchange]:
    """What is still to be asked. Equal prompts are told apart by counting them."""
    seen: Counter[str] = Counter()
    for asked in rows:
        plain = asked.key
        key = f"{plain}-{seen[plain]}" if seen[plain] else plain
        seen[plain] += 1
        if key in book.finished:
            report.found += 1
            continue
        exchange = Exchange(key, asked, book.answers.pop(key, []))
        if exchange.finished:  # killed between the last answer and its line
            book.finish(exchange, settings)
            _note(report, exchange, settings)
            continue
        if not asked.whole:
            _note_failure(report, Failure(f"the prompt holds {HALF}", of_prompt=True))
            continue
        yield exchange
