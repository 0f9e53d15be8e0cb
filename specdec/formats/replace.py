"""A directory that appears whole or not at all: written under another name, forced onto the disk, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specdec.errors import BadCheckpoint


@contextmanager
def whole_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory beside `path` to write into; it takes the name `path` when the block ends well.

    Args:
        path: where it shall be; parents are made.
        overwrite: a checkpoint that lies there is replaced as a whole.

    Raises:
        BadCheckpoint: something is there already.
    """
    _refuse_occupied(path, overwrite)
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        unfinished.chmod(0o777 & ~_umask())
        yield unfinished
        _flush(unfinished)
        _move(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _refuse_occupied(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise BadCheckpoint(f"{path} is a file; name a directory")
    inside = sorted(path.iterdir())
    if not inside:
        return
    if not overwrite:
        raise BadCheckpoint(f"{path} is not empty; name another directory or allow overwriting (--force)")
    is_checkpoint = (path / "config.json").is_file() or (path / "drafter.json").is_file()
    if not is_checkpoint or path.is_symlink() or any(entry.is_dir() for entry in inside):
        raise BadCheckpoint(f"{path} is not a checkpoint directory and is not overwritten; name another directory")


def _move(unfinished: Path, path: Path) -> None:
    """Give the new directory its name; an old one is moved aside first and removed last."""
    if path.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        os.replace(path, aside)
        os.replace(unfinished, path)
        shutil.rmtree(aside)
    else:
        os.replace(unfinished, path)
    _flush_one(path.parent)


def _flush(folder: Path) -> None:
    for entry in folder.rglob("*"):
        _flush_one(entry)
    _flush_one(folder)


def _flush_one(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # directories cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
