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
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from specdec.errors import BadData, SpecdecError
from specdec.json_lines import JsonLines, write_text
from specdec.train.chat_template import readable
from specdec.train.example import CUT, SPEAKERS, Message, messages_of, tools_of
from specdec.train.order import derived_seed
from specdec.train.source import SourceRow, shown

FAILURES_IN_A_ROW = 20
"""So many failures of the server without an answer in between end the run: it is down."""

REFUSED_AT_FIRST = 1000
"""So many refused prompts before anything is answered end the run: the same is wrong with all of them. Data that is
sorted by length may begin with many that are too long, and refusals take little time.
"""

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
        return hashlib.sha256(self._content().encode()).hexdigest()[:16]

    @property
    def whole(self) -> bool:
        """No text in it holds half a character."""
        return is_whole(self._content(ensure_ascii=False))

    def _content(self, *, ensure_ascii: bool = True) -> str:
        content = [self.turns, self.tools, self.text]
        return json.dumps(content, sort_keys=True, default=str, ensure_ascii=ensure_ascii)


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


HALF = "half a character (a lone surrogate), which no text can hold"


def is_whole(text: str) -> bool:
    """Whether UTF-8 can hold a text: JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        readable(text)
    except BadData:
        return False
    return True


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
        BadData: unreadable, none of these columns, or nothing is asked; begins with file and line.
    """
    if row.unreadable is not None:
        raise row.bad(row.unreadable)
    fields = row.fields
    try:
        for column in ("messages", "conversations"):
            if column in fields:
                return _asked(_replayed(fields[column]), fields, max_turns)
        prompt = fields.get("prompt")
        if isinstance(prompt, list):
            return _asked(_replayed(prompt), fields, max_turns)
        if isinstance(prompt, str) and prompt and chat:
            return _asked(({"role": "user", "content": prompt},), fields, max_turns)
    except BadData as error:
        raise row.bad(error) from error
    text = prompt if isinstance(prompt, str) else fields.get("text", fields.get("content"))
    if isinstance(text, str) and text.strip():
        return Asked(text=text)
    raise row.bad(f"expected messages, conversations, prompt or text; it has {', '.join(fields) or 'nothing'}")


def _replayed(raw: Any) -> tuple[Message, ...]:
    """The messages that are replayed; only these are checked, and answers may be anything: they are not kept.

    A tool's result belongs to a call that nobody will make again: there it ends.
    """
    if not isinstance(raw, list):
        return messages_of(raw)
    kept = list(takewhile(lambda entry: _role(entry) != "tool" and not _calls(entry), raw))
    if raw and not kept:
        raise BadData("nothing is asked before a tool is called")
    return messages_of([_ANSWER if _role(entry) == "assistant" else entry for entry in kept])


_ANSWER = {"role": "assistant", "content": "(to be replaced)"}


def _role(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return None
    return entry.get("role") or SPEAKERS.get(str(entry.get("from")).lower())


def _calls(entry: Any) -> bool:
    return isinstance(entry, dict) and bool(entry.get("tool_calls"))


def _asked(messages: tuple[Message, ...], fields: Mapping[str, Any], max_turns: int) -> Asked:
    """Everything but the answers."""
    turns: list[tuple[Message, ...]] = []
    pending: list[Message] = []
    for message in messages:
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


@dataclass
class Prompts:
    """What rows ask for, read as it is wanted.

    Args:
        rows: of any source.
        chat, max_turns: see `asked_of`.
        skip_bad: pass over rows that cannot be used, and count them.

    Attributes:
        bad: rows that were passed over; `first_bad` says why the first was.

    Raises:
        BadData: while reading, for a row that cannot be used; with file and line.
    """

    rows: Iterable[SourceRow]
    chat: bool = True
    max_turns: int = 0
    skip_bad: bool = False
    bad: int = field(default=0, init=False)
    first_bad: str | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[Asked]:
        for row in self.rows:
            try:
                asked = asked_of(row, chat=self.chat, max_turns=self.max_turns)
            except BadData as error:
                if not self.skip_bad:
                    raise BadData(f"{error} (--skip-bad passes over such rows)") from error
                self.bad += 1
                self.first_bad = self.first_bad or str(error)
                continue
            yield asked


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
    with _Book(out, settings) as book:
        report = Regenerated()
        fresh = _replays(rows, book, settings, report)
        going: dict[str, _Replay] = {}
        ready: deque[_Replay] = deque()
        luck = _Luck(answered=book.begun)
        while True:
            while answerer.room > 0 and (replay := ready.popleft() if ready else next(fresh, None)):
                going[replay.key] = replay
                answerer.submit(replay.request(settings))
            if not answerer.waiting:
                return report
            for request, outcome in answerer.wait():
                replay = going.pop(request.key)
                if isinstance(outcome, Failure):
                    _note_failure(report, outcome)
                    luck.failed(outcome)
                else:
                    luck.succeeded()
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
        if not asked.whole:
            _note_failure(report, Failure(f"the prompt holds {HALF}", of_prompt=True))
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
        self.out, self.settings_file = out, out.with_name(f"{out.name}.settings.json")
        partial = out.with_name(f"{out.name}.partial")
        self._files = (out, partial)
        ours = json.loads(json.dumps(asdict(settings)))
        self._check_settings(ours)  # opening cuts a torn last line off, and these files may be somebody else's
        self._rows = JsonLines(out)
        self._partial = JsonLines(partial)
        try:
            self._check_settings(ours)  # until now another process may have begun
            write_text(self.settings_file, json.dumps(ours, indent=2) + "\n")
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

    @property
    def begun(self) -> bool:
        """An answer has been kept, of a finished row or another."""
        return any(file.is_file() and file.stat().st_size > 0 for file in self._files)

    def _check_settings(self, ours: dict[str, Any]) -> None:
        if not self.begun:
            return
        if not self.settings_file.is_file():
            raise SpecdecError(f"{self.out} exists and was not written by this command; choose another --out")
        before = self._read_settings()
        differing = [f"{name} {ours[name]!r} (before: {before.get(name)!r})"
                     for name in ours if ours[name] != before.get(name)]  # fmt: skip
        if differing:
            raise SpecdecError(
                f"{self.out} was begun with other settings: {'; '.join(differing)}. Use those, or another --out"
            )

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
