"""Regenerating: the target answers the prompts of a data set itself, and what it says becomes training data.

A drafter has to predict the target, so the target's own answers teach more than anybody else's. Conversations are
replayed turn by turn: each question is asked with the target's own earlier answers before it. A base model continues
the beginnings of texts.

    OUT.jsonl                  one line for each finished conversation or continuation, appended as they finish
    OUT.jsonl.partial          answers of conversations that are not finished yet
    OUT.jsonl.settings.json    what must not change when a run is gone on with

A finished answer is on the disk before the next one is asked for, and is never asked for again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from specdec.errors import BadData, SpecdecError
from specdec.json_lines import JsonLines, write_text
from specdec.train.example import CUT, Message, messages_of, tools_of
from specdec.train.order import derived_seed
from specdec.train.source import SourceRow, shown

FAILURES_IN_A_ROW = 20
"""So many failures without an answer in between end the run: something is wrong with all of them."""

Finish = Literal["stop", "length"]


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
        content = json.dumps([self.turns, self.tools, self.text], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


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
    """Why there is no answer; the prompt is asked again by the next run."""

    reason: str


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
    """

    model: str
    temperatures: tuple[float, ...] = (0.0, 0.6, 1.0)
    seed: int = 0
    max_new_tokens: int = 1024
    prompt_tokens: int = 64
    max_turns: int = 0
    vocabulary: str | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        if not self.temperatures or min(self.temperatures) < 0:
            raise BadData(f"temperatures are {list(self.temperatures)}; expected one or more, each 0 or above")
        if self.max_new_tokens < 1 or self.prompt_tokens < 1:
            raise BadData("answers and beginnings of texts have at least one token")

    def temperature_of(self, key: str) -> float:
        """The temperature of a prompt."""
        return self.temperatures[derived_seed(self.seed, "temperature", key) % len(self.temperatures)]


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


def asked_of(row: SourceRow, *, chat: bool = True, max_turns: int = 0) -> Asked:
    """What a row asks for.

    Args:
        row: with messages, conversations, prompt or text.
        chat: a `prompt` of text is a user's message; otherwise it is continued.
        max_turns: answers wanted at most; 0 for all.

    Raises:
        BadData: none of these columns, or nothing is asked; begins with file and line.
    """
    fields = row.fields
    try:
        for column in ("messages", "conversations"):
            if column in fields:
                return _asked(messages_of(fields[column]), fields, max_turns)
        prompt = fields.get("prompt")
        if isinstance(prompt, list):
            return _asked(messages_of(prompt), fields, max_turns)
        if isinstance(prompt, str) and prompt and chat:
            return _asked(({"role": "user", "content": prompt},), fields, max_turns)
    except BadData as error:
        raise row.bad(error) from error
    text = prompt if isinstance(prompt, str) else fields.get("text", fields.get("content"))
    if isinstance(text, str) and text.strip():
        return Asked(text=text)
    raise row.bad(f"expected messages, conversations, prompt or text; it has {', '.join(fields) or 'nothing'}")


def _asked(messages: tuple[Message, ...], fields: Mapping[str, Any], max_turns: int) -> Asked:
    """Everything but the answers. A tool's result belongs to a call that nobody will make again: there it ends."""
    turns: list[tuple[Message, ...]] = []
    pending: list[Message] = []
    for message in messages:
        if message["role"] == "tool" or message.get("tool_calls"):
            break
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
        SpecdecError: `out` was begun with other settings, is written to by another process, or nothing succeeds.
    """
    with _Book(out, settings) as book:
        report = Regenerated()
        fresh = _replays(rows, book, settings, report)
        going: dict[str, _Replay] = {}
        ready: deque[_Replay] = deque()
        unlucky = 0
        while True:
            while answerer.room > 0 and (replay := ready.popleft() if ready else next(fresh, None)):
                going[replay.key] = replay
                answerer.submit(replay.request(settings))
            if not answerer.waiting:
                return report
            for request, outcome in answerer.wait():
                replay = going.pop(request.key)
                if isinstance(outcome, Failure):
                    unlucky += 1
                    _note_failure(report, outcome, unlucky)
                else:
                    unlucky = 0
                    replay.answers.append(outcome)
                    if not replay.finished:
                        book.keep(replay)
                        ready.append(replay)
                    else:
                        book.finish(replay, settings)
                        _note(report, replay, settings)
            tell(report)


def _note(report: Regenerated, replay: _Replay, settings: RegenerateSettings) -> None:
    temperature = settings.temperature_of(replay.key)
    report.finished += 1
    report.answers += len(replay.answers)
    report.cut += sum(answer.finish == CUT for answer in replay.answers)
    report.by_temperature[temperature] = report.by_temperature.get(temperature, 0) + 1


def _note_failure(report: Regenerated, failure: Failure, in_a_row: int) -> None:
    report.failed += 1
    report.first_failure = report.first_failure or failure.reason
    if in_a_row >= FAILURES_IN_A_ROW:
        raise SpecdecError(
            f"{in_a_row} prompts in a row had no answer; the last reason: {failure.reason}. Finished answers are kept"
        )


def _replays(
    rows: Iterable[Asked], book: _Book, settings: RegenerateSettings, report: Regenerated
) -> Iterator[_Replay]:
    """What is still to be asked. Equal prompts are told apart by counting them."""
    seen: Counter[str] = Counter()
    for asked in rows:
        plain = asked.key
        key = f"{plain}-{seen[plain]}" if seen[plain] else plain
        seen[plain] += 1
        if key in book.finished:
            report.found += 1
            continue
        replay = _Replay(key, asked, book.answers.pop(key, []))
        if replay.finished:  # killed between the last answer and its line
            book.finish(replay, settings)
            _note(report, replay, settings)
            continue
        yield replay


@dataclass
class _Replay:
    """A conversation and how far it has come; a continuation is one of a single turn."""

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


class _Book:
    """The files of a run: finished rows, answers of unfinished ones, settings."""

    def __init__(self, out: Path, settings: RegenerateSettings) -> None:
        self.settings_file = out.with_name(f"{out.name}.settings.json")
        there = out.is_file() and out.stat().st_size > 0
        self._check_settings(out, settings, there)
        self._rows = JsonLines(out)
        self._partial = JsonLines(out.with_name(f"{out.name}.partial"))
        try:
            self.finished = {str(row.get("id")) for row in self._rows}
            self.answers: dict[str, list[Answer]] = {}
            self._unfinished: set[str] = set()
            for kept in self._partial:
                if kept["key"] not in self.finished:
                    self._unfinished.add(kept["key"])
                    self.answers.setdefault(kept["key"], []).append(_answer_of(kept["answer"]))
        except BaseException:
            self._close()
            raise

    def _check_settings(self, out: Path, settings: RegenerateSettings, there: bool) -> None:
        ours = json.loads(json.dumps(asdict(settings)))
        if self.settings_file.is_file():
            before = self._read_settings()
            differing = [f"{name} {ours[name]!r} (before: {before.get(name)!r})"
                         for name in ours if ours[name] != before.get(name)]  # fmt: skip
            if there and differing:
                raise SpecdecError(
                    f"{out} was begun with other settings: {'; '.join(differing)}. Use those, or another --out"
                )
        elif there:
            raise SpecdecError(f"{out} exists and was not written by this command; choose another --out")
        write_text(self.settings_file, json.dumps(ours, indent=2) + "\n")

    def _read_settings(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.settings_file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise SpecdecError(
                f"{self.settings_file} cannot be read ({error}); restore it, or another --out"
            ) from error

    def keep(self, replay: _Replay) -> None:
        """Keep the newest answer of an unfinished conversation."""
        self._unfinished.add(replay.key)
        self._partial.append([{"key": replay.key, "answer": asdict(replay.answers[-1])}])

    def finish(self, replay: _Replay, settings: RegenerateSettings) -> None:
        """Write a row."""
        self._rows.append([replay.line(settings)])
        self.finished.add(replay.key)

    def _close(self) -> None:
        self._partial.close()
        self._rows.close()

    def __enter__(self) -> _Book:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if error is None and self._unfinished <= self.finished:
            self._partial.path.unlink()


def _answer_of(raw: dict[str, Any]) -> Answer:
    try:
        ids = {name: tuple(raw[name]) for name in ("prompt_ids", "answer_ids")}
        return Answer(**{**raw, **ids})
    except (KeyError, TypeError) as error:
        raise SpecdecError(f"kept answer {shown(raw)} cannot be read; remove the .partial file") from error
