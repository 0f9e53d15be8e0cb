"""Files of JSON lines that grow while a program runs and that nothing can tear; and files that are whole or not there.

An appended line is on the disk when `append` returns. A process that is killed loses at most the line it was writing:
opening the file again cuts off a torn last line, and finds damage anywhere else.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from specdec.errors import SpecdecError


class JsonLines:
    """Appends objects to a file that nobody else may write to meanwhile.

    Args:
        path: of the file; created when it is not there.

    Raises:
        SpecdecError: another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise SpecdecError(f"another process is writing to {path}; wait for it or choose another --out") from error
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        whole, step = end, 1 << 16
        while whole:
            start = max(0, whole - step)
            self._file.seek(start)
            found = self._file.read(whole - start).rfind(b"\n")
            if found >= 0:
                whole = start + found + 1
                break
            whole = start
        if whole < end:
            self._file.truncate(whole)
            self._sync()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every object, in order, read as they come.

        Raises:
            SpecdecError: a line that is no object; names it.
        """
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise SpecdecError(f"{self.path}:{number}: not JSON; restore the file or start anew") from error
                if not isinstance(row, dict):
                    raise SpecdecError(f"{self.path}:{number}: expected a JSON object; restore the file or start anew")
                yield row

    def keep(self, count: int) -> None:
        """Forget all but the first so many objects."""
        with self.path.open("rb") as file:
            size = sum(len(line) for line in islice(file, count))
        self._file.truncate(size)
        self._sync()

    def append(self, rows: Sequence[Any]) -> None:
        """Write objects together; they are on the disk when this returns."""
        # ASCII, so that no byte of a line can be mistaken for its end.
        self._file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let others write to it."""
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary neighbour, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # Half a surrogate pair, as from a file's name, becomes its escape: UTF-8 has none, and JSON reads it back.
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
