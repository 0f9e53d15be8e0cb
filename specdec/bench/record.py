"""Records: one JSON line for each (method, question, turn, repeat), on disk before the next one begins.

A run that is killed loses at most the line it was writing. Reading tolerates a torn last line, and nothing else.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypedDict, cast

from specdec.errors import SpecdecError
from specdec.json_lines import write_text

RECORDS_FILE = "records.jsonl"

Finish = Literal["eos", "length", "stop", "error"]
History = Literal["own", "reference"]


class Batch(TypedDict):
    """Questions that were generated together: `size` rows, this one's `row`, and an `id` that is the same for every
    method, turn and repeat. `Seconds` are those of the whole batch.
    """

    size: int
    row: int
    id: int


class Sent(TypedDict):
    """The prompt: its number of `tokens`, the `sha256` of its ids, and whose answers the earlier turns hold."""

    tokens: int
    sha256: str
    history: History


class Seconds(TypedDict):
    """Wall-clock seconds of the call. `ttft` is the time to the first token, which is what `prefill` ends with; the
    parts are null where a method cannot know them.
    """

    total: float
    prefill: float | None
    draft: float | None
    verify: float | None
    accept: float | None
    other: float | None
    ttft: float | None


class Steps(TypedDict):
    """One entry for each target call after the prefill in which this row took part.

    `emitted` counts the target's own token; the prefill's token (or tokens, where a method verifies together with the
    prompt) belong to no step. `drafted`, `accepted`, `tried` (see `stats.StepRecord`) and the seconds of `draft`,
    `verify` and `accept` are null where a method does not tell. `total` is the time since the previous tokens came out.
    """

    drafted: list[int] | None
    accepted: list[int] | None
    emitted: list[int]
    tried: list[int] | None
    draft: list[float] | None
    verify: list[float] | None
    accept: list[float] | None
    total: list[float]


class Record(TypedDict):
    """What one method did with one turn of one question.

    Attributes:
        category: as the question file has it; `column` is the group it is reported in.
        turn: 0 for the first.
        repeat: 0 for the first.
        sequence: place of the generation in the order in which all of them ran; the rows of a batch share it.
        max_new_tokens: the cap.
        token_ids: new tokens, the end-of-text token included where one was emitted.
        text: of the new tokens, without special ones.
        children: how drafted tokens were obtained, see `TokenTree.log_q`; null when none was.
        chain: whether every tree was a chain; null where a method does not tell.
        target_calls: forwards of the target, the prompt's included.
        peak_memory_bytes: see `clock.PeakMemory`.
        lossy: the name of a rule that does not preserve the target's law.
        seed: torch's seed before the generation when sampling; null for greedy decoding.
    """

    method: str
    question_id: str | int
    category: str
    column: str
    turn: int
    repeat: int
    sequence: int
    batch: Batch
    prompt: Sent
    max_new_tokens: int
    token_ids: list[int]
    text: str
    finish: Finish
    error: str | None
    seconds: Seconds
    steps: Steps
    children: Literal["chosen", "drawn"] | None
    chain: bool | None
    target_calls: int | None
    peak_memory_bytes: int | None
    lossy: str | None
    seed: int | None


class RecordKey(NamedTuple):
    """What there is one record of."""

    method: str
    question_id: str | int
    turn: int
    repeat: int


def key_of(record: Record) -> RecordKey:
    """The key of a record."""
    return RecordKey(record["method"], record["question_id"], record["turn"], record["repeat"])


def read_records(path: Path) -> list[Record]:
    """All records of a run's directory or file, in the order in which they ran; a torn last line is left out.

    Raises:
        SpecdecError: no such file, a line in the middle that is not a record, or a record that is there twice.
    """
    file = path / RECORDS_FILE if path.is_dir() else path
    if not file.is_file():
        raise SpecdecError(f"{path} holds no run: no {RECORDS_FILE}; give a directory of specdec bench")
    records, _ = _parse(file)
    return records


class RecordWriter:
    """Appends records to a file that nobody else may write to meanwhile.

    Opening cuts off a torn last line, and the rows of a last batch that is not whole.

    Raises:
        SpecdecError: another process writes to the file, or it is damaged elsewhere than at its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise SpecdecError(f"another process is writing to {path}; wait for it or choose another --out") from error
        records, whole = _parse(path)
        self.records = _without_partial_batch(records)
        for record in records[len(self.records) :]:
            whole -= len(_line(record))
        self._file.truncate(whole)
        self._sync()

    def append(self, records: Sequence[Record]) -> None:
        """Write the rows of one generation; they are on disk when this returns."""
        self._file.write(b"".join(_line(record) for record in records))
        self._sync()
        self.records.extend(records)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write a file of JSON lines so that it is there whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _line(record: Record) -> bytes:
    """ASCII, so that no byte of a line can be mistaken for its end, and the same again after a round trip."""
    return json.dumps(record).encode() + b"\n"


def _parse(file: Path) -> tuple[list[Record], int]:
    """The records of a file and the number of bytes that they take; a torn last line is in neither."""
    lines = file.read_bytes().split(b"\n")
    records: list[Record] = []
    seen: set[RecordKey] = set()
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn or empty
        try:
            record = cast(Record, json.loads(line))
            key = key_of(record)
        except (ValueError, KeyError, TypeError) as error:
            raise SpecdecError(f"{file}, line {number}: not a record; restore the file or start anew") from error
        if key in seen:
            raise SpecdecError(f"{file}, line {number}: a second record of {', '.join(map(str, key))}")
        seen.add(key)
        records.append(record)
    return records, sum(len(line) + 1 for line in lines[:-1])


def _without_partial_batch(records: list[Record]) -> list[Record]:
    """Rows of a batch are written at once; when the last ones lack some, the batch is to be run again."""
    if not records:
        return []
    last = records[-1]["sequence"]
    rows = [record for record in records if record["sequence"] == last]
    return list(records) if len(rows) == rows[0]["batch"]["size"] else records[: -len(rows)]
