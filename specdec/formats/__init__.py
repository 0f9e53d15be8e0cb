"""Reading and writing draft heads in everybody's formats, one file per format.

A format is a module with

    NAME: str                                          as in `specdec convert --to NAME`
    KINDS: tuple[str, ...]                             kinds of heads it can hold
    matches(folder) -> bool                            by config.json and tensor names; no other format may agree
    read(folder) -> HeadCheckpoint                     through `folder.take`; what nobody takes is an error
    write(checkpoint, path) -> None                    into an empty directory; refuses what would be lost
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from specdec.errors import BadCheckpoint
from specdec.formats import (
    clover2,
    dflash,
    eagle,
    eagle3,
    hydra,
    kangaroo,
    medusa_2,
    medusa_v1,
    medusa_v2,
    mlp_speculator,
    native,
    speculators_dflash,
    speculators_eagle3,
    vllm_eagle3,
    vllm_medusa,
)
from specdec.formats.checkpoint import HeadCheckpoint, check_tensors
from specdec.formats.folder import Folder
from specdec.formats.replace import whole_directory


class Format(Protocol):
    """What a format's module offers."""

    NAME: str
    KINDS: tuple[str, ...]

    def matches(self, folder: Folder) -> bool:
        """Whether the files are of this format."""
        ...

    def read(self, folder: Folder) -> HeadCheckpoint:
        """The head in these files."""
        ...

    def write(self, checkpoint: HeadCheckpoint, path: Path) -> None:
        """Write the head into the empty directory `path`."""
        ...


FORMATS: tuple[Format, ...] = cast(
    tuple[Format, ...],
    (
        native,
        dflash,
        kangaroo,
        medusa_v1,
        medusa_v2,
        medusa_2,
        vllm_medusa,
        hydra,
        clover2,
        mlp_speculator,
        eagle,
        eagle3,
        vllm_eagle3,
        speculators_dflash,
        speculators_eagle3,
    ),
)  # fmt: skip
"""Every format, in no particular order: at most one matches. A drafter.json with a head makes it the native one."""

WITH_BASE = ("medusa_2",)
"""Formats that keep a head together with the target it was trained with."""


def detect(path: str | Path | Folder) -> Format | None:
    """The format of these files; None when they are no draft head (an ordinary model, say).

    Raises:
        BadCheckpoint: files that cannot be read, or that two formats claim.
    """
    folder = path if isinstance(path, Folder) else Folder(path)
    if native.matches(folder):
        return cast(Format, native)
    found = [known for known in FORMATS if known.matches(folder)]
    if len(found) > 1:
        names = " and ".join(known.NAME for known in found)
        raise BadCheckpoint(f"{folder.path} could be {names}; keep the files of one format in a directory")
    return found[0] if found else None


def read(path: str | Path) -> HeadCheckpoint:
    """The head in a directory or weight file, whatever its format.

    Raises:
        BadCheckpoint: no format matches, or the files are not exactly what the format says.
    """
    folder = Folder(path)
    known = detect(folder)
    if known is None:
        names = ", ".join(sorted(known.NAME for known in FORMATS))
        raise BadCheckpoint(f"{path} is no draft head in a known format ({names})")
    checkpoint = known.read(folder)
    folder.done()
    check_tensors(checkpoint, str(path))
    return checkpoint


def write(checkpoint: HeadCheckpoint, path: str | Path, format: str = "native", *, overwrite: bool = False) -> None:
    """Write a head as a directory of this format; it appears whole or not at all.

    Args:
        checkpoint: the head.
        path: the directory; must be empty or absent.
        format: NAME of a format.
        overwrite: replace a checkpoint that lies there.

    Raises:
        BadCheckpoint: an unknown format, one that would lose something of this head, or a directory that is not empty.
    """
    known = format_named(format)
    if checkpoint.kind not in known.KINDS:
        kinds = ", ".join(known.KINDS)
        able = ", ".join(sorted(other.NAME for other in FORMATS if checkpoint.kind in other.KINDS))
        raise BadCheckpoint(f"format {format} holds {kinds}, got a {checkpoint.kind} head; those go into {able}")
    if checkpoint.base is not None and format not in WITH_BASE:
        raise BadCheckpoint(
            f"{format} holds a head without its target, and this one was trained together with the model in "
            f"{checkpoint.base}, which would be lost; write {WITH_BASE[0]}, or the head alone (--head-only)"
        )
    check_tensors(checkpoint, f"the {checkpoint.kind} head")
    with whole_directory(Path(path).expanduser(), overwrite=overwrite) as folder:
        known.write(checkpoint, folder)


def format_named(name: str) -> Format:
    """The format of this NAME.

    Raises:
        BadCheckpoint: there is none.
    """
    for known in FORMATS:
        if name == known.NAME:
            return known
    names = ", ".join(sorted(known.NAME for known in FORMATS))
    raise BadCheckpoint(f"no format {name!r}; known formats are {names}")
