"""Checkpoints that survive being killed at any moment.

A checkpoint is a directory `step-000123`. It is written under another name, flushed to the disk and renamed, so that
a directory of that name is always whole; one that is removed loses its name first. Where a step is saved again, the old
directory moves to `.replaced-step-000123` for a moment and counts until the new one is there. `latest` and `best` are
relative links, replaced by a rename as well. Rotation removes older ones, never what a link points to.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specdec.errors import BadCheckpoint, SpecdecError

STATE, WEIGHTS = "state.json", "training.safetensors"
LATEST, BEST = "latest", "best"
_LOCK = ".lock"
_UNFINISHED, _REPLACED = ".unfinished-", ".replaced-"
_NAME = re.compile(rf"(?:{re.escape(_REPLACED)})?step-(\d+)$")
_CUT_SHORT = re.compile("I/O error|No space left|PytorchStreamWriter|inline_container")
"""How safetensors and torch.save tell that a file could not be written; neither raises an OSError."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: created when first written to.
        keep: how many to keep, beside what `best` points to; at least 1.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = max(keep, 1)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else may write here in this block; a process that dies, however it does, leaves no lock.

        Raises:
            SpecdecError: another process is in such a block.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SpecdecError(
                    f"another process is writing to {self.folder}; wait for it or choose another --out"
                ) from error
            yield

    def save(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
        """Write one: `write` fills the directory, `state` is stored as JSON beside.

        Raises:
            OSError: the disk is full or not writable, in one line; earlier checkpoints are untouched.
        """
        try:
            return self._save(step, write, state)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not isinstance(error, OSError) and not _CUT_SHORT.search(str(error)):
                raise
            raise OSError(self._unwritten(step, error)) from error

    def _save(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
        final = self.folder / f"step-{step:06d}"
        unfinished = self._unfinished(final.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clear_unfinished()
        unfinished.mkdir()
        try:
            write(unfinished)
            (unfinished / STATE).write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
            flush(unfinished)
            if final.exists():
                os.replace(final, self._replaced(final))
            os.replace(unfinished, final)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            self._settle_replaced()
            raise
        _flush_directory(self.folder)
        self._settle_replaced()
        self.link(LATEST, final)
        self.rotate()
        return final

    def _unwritten(self, step: int, error: Exception) -> str:
        """What to say when a checkpoint cannot be written."""
        latest = self.latest()
        kept = f"{latest.name} is whole" if latest else "nothing was saved before"
        reason = " ".join(str(error).split())[:160]
        if isinstance(error, RuntimeError):  # torch.save names a line of its source and two positions in the file
            reason = "writing was cut short"
        free = shutil.disk_usage(self.folder).free if self.folder.is_dir() else 0
        return (
            f"the checkpoint of step {step} cannot be written to {self.folder} ({reason}; {free / 1e6:.0f} MB free)"
            f"; {kept}. Make room and run the same command again: it goes on from there"
        )

    def link(self, name: str, checkpoint: Path) -> None:
        """Let `name` point to a checkpoint, in one move."""
        fresh = self._unfinished(name)
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(checkpoint.name)
        os.replace(fresh, self.folder / name)
        _flush_directory(self.folder)

    def latest(self) -> Path | None:
        """What `latest` points to, the last that was saved; where it points nowhere, the one of the highest step."""
        return self._linked(LATEST) or max(self.all(), key=step_of, default=None)

    def best(self) -> Path | None:
        """What `best` points to."""
        linked = self._linked(BEST)
        return linked.resolve() if linked else None

    def weights(self) -> dict[str, Tensor]:
        """The fp32 weights that a finished run hands on: of the best checkpoint where it validated, else its last.

        Raises:
            BadCheckpoint: there is none.
        """
        checkpoint = self.best() or self.latest()
        if checkpoint is None:
            raise BadCheckpoint(f"{self.folder} holds no checkpoint to go on from")
        return load_file(checkpoint / WEIGHTS)

    def all(self) -> list[Path]:
        """Every whole checkpoint, also one that was to be replaced when a save was killed."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if _NAME.match(path.name) and (path / STATE).is_file()]
        replaced = {self._replaced(path) for path in found}
        return [path for path in found if path not in replaced]

    def rotate(self) -> None:
        """Remove the oldest beyond `keep`, but nothing that a link points to."""
        linked = [self._linked(name) for name in (LATEST, BEST)]
        for path in sorted(self.all(), key=step_of)[: -self.keep]:
            if path not in linked:
                self._remove(path)

    def offer(self) -> Path | None:
        """Let `drafter` lead to the best drafter, to the newest one where none was measured; None without any.

        Once there is a best checkpoint the link goes through `best`, so that it follows by itself.
        """
        name = BEST if self.best() else LATEST
        if not (self.folder / name).exists():
            return None
        fresh = self._unfinished("drafter")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(f"{name}/drafter")
        os.replace(fresh, self.folder / "drafter")
        return self.folder / "drafter"

    def clear_unfinished(self) -> None:
        """Remove what a killed save left, and give back its name to a checkpoint that was to be replaced."""
        self._settle_replaced()
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _linked(self, name: str) -> Path | None:
        """The whole checkpoint that a link points to."""
        final = self.folder / (self.folder / name).resolve().name
        return next((path for path in self.all() if path in (final, self._replaced(final))), None)

    def _settle_replaced(self) -> None:
        """Remove the old directory of a step once the new one is there; put it back where that never came."""
        for path in self.folder.glob(f"{_REPLACED}*"):
            final = self.folder / path.name.removeprefix(_REPLACED)
            if final.exists():
                self._remove(path)
            else:
                os.replace(path, final)

    def _remove(self, checkpoint: Path) -> None:
        """Take the name away first: half a checkpoint must not look like a whole one."""
        gone = self._unfinished(f"gone-{checkpoint.name}")
        os.replace(checkpoint, gone)
        shutil.rmtree(gone)

    def _unfinished(self, name: str) -> Path:
        return self.folder / f"{_UNFINISHED}{name}"

    def _replaced(self, checkpoint: Path) -> Path:
        return self.folder / f"{_REPLACED}{checkpoint.name}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    found = _NAME.match(checkpoint.name)
    if not found:
        raise BadCheckpoint(f"{checkpoint} is not a checkpoint directory; those are called step-NNNNNN")
    return int(found[1])


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint.

    Raises:
        BadCheckpoint: missing or not an object.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text())
    except (OSError, ValueError) as error:
        raise BadCheckpoint(f"{checkpoint / STATE} cannot be read: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise BadCheckpoint(f"{checkpoint / STATE} is no checkpoint state: it has no step")
    return state


def check_identity(saved: dict[str, Any], ours: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue a run with other data, another objective or another number of processes.

    Raises:
        BadCheckpoint: names every field that differs.
    """
    before, now = _flat(saved), _flat(ours)
    differing = [
        f"{key} {now.get(key)!r} (checkpoint: {before.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise BadCheckpoint(
            f"{checkpoint} belongs to another run: {'; '.join(differing)}. "
            "Use another --out, or the settings of that run"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def write_whole(file: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{_UNFINISHED}{file.name}")
    with unfinished.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(unfinished, file)


def flush(folder: Path) -> None:
    """Force every file of a directory onto the disk, then the directories."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _flush_directory(path)
    _flush_directory(folder)


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
