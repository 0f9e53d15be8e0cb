"""The files of a run that regenerates: finished rows, answers of unfinished exchanges, settings.

    OUT.jsonl                  one line for each finished conversation or continuation, appended as they finish
    OUT.jsonl.partial          answers of conversations that are not finished yet
    OUT.jsonl.settings.json    what must not change when a run is gone on with

One process at a time writes them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from specdec.errors import SpecdecError
from specdec.json_lines import JsonLines, write_text
from specdec.train.answerer import Answer
from specdec.train.exchange import Exchange, RegenerateSettings
from specdec.train.source import shown


class AnswerBook:
    """What a run has been told, on the disk.

    Args:
        out: the file of finished rows; made, or gone on with.
        settings: must be those that it was begun with.

    Attributes:
        finished: keys of finished rows.
        answers: of the exchanges that are not finished, by key.

    Raises:
        SpecdecError: begun with other settings or by another command, open in another process, or unreadable.
    """

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

    def keep(self, exchange: Exchange) -> None:
        """Keep the newest answer of an unfinished conversation."""
        self._unfinished.add(exchange.key)
        self._partial.append([{"key": exchange.key, "answer": asdict(exchange.answers[-1])}])

    def finish(self, exchange: Exchange, settings: RegenerateSettings) -> None:
        """Write a row."""
        self._rows.append([exchange.line(settings)])
        self.finished.add(exchange.key)

    def _close(self) -> None:
        self._partial.close()
        self._rows.close()

    def __enter__(self) -> AnswerBook:
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
