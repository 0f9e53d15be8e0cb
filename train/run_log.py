"""OUT/log.jsonl: a JSON object for every step and validation, each once, however often the run was broken."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from specdec.train.checkpoint import write_whole


class RunLog:
    """Appends to a file of JSON lines.

    A run that was killed has logged steps after its last checkpoint, perhaps half a line. They are run again; so with
    the first step that is written, the file is cut before that step.

    Args:
        path: of the file; made when first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cut = False

    def write(self, event: dict[str, Any]) -> None:
        """Append one event; on disk, as far as the system is concerned, when this returns.

        Raises:
            OSError: the file cannot be written.
        """
        try:
            if not self._cut:
                self._cut_before(event["step"])
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise OSError(f"the log {self.path} cannot be written: {error}; checkpoints are whole") from error

    def _cut_before(self, step: int) -> None:
        self._cut = True
        if self.path.is_file():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _is_before(line, step)]
            write_whole(self.path, "".join(f"{line}\n" for line in kept))
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a log."""
    if not path.is_file():
        return []
    return [event for line in path.read_text(encoding="utf-8").splitlines() if (event := _parsed(line)) is not None]


def _is_before(line: str, step: int) -> bool:
    event = _parsed(line)
    return event is not None and event["step"] < step


def _parsed(line: str) -> dict[str, Any] | None:
    with suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            return event
    return None
