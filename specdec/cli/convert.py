"""`specdec convert`: a draft head from one published format into another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from specdec import formats
from specdec.cli.console import out
from specdec.cli.options import Json
from specdec.errors import SpecdecError
from specdec.formats.checkpoint import HeadCheckpoint

NAMES = ", ".join(known.NAME for known in formats.FORMATS)


def _known(name: str) -> str:
    """A callback for names of formats: a wrong one is wrong usage."""
    if name not in NAMES.split(", "):
        raise typer.BadParameter(f"got {name!r}, expected one of {NAMES}")
    return name


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A draft head: its directory or weight file.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option("--to", metavar="FORMAT", help=f"One of {NAMES}.", callback=_known, show_default=False),
    ],
    directory: Annotated[
        Path | None,
        typer.Option("--out", help="The directory to write; by default SRC's name and the format's, here."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that lies there.")] = False,
    target: Annotated[
        str | None,
        typer.Option("--target", help="The target's name, for formats that state it; kept as it is otherwise."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="The target's directory, for formats that hold head and target together."),
    ] = None,
    head_only: Annotated[
        bool, typer.Option("--head-only", help="Leave the target behind that SRC holds together with the head.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a draft head in another format; what the format cannot hold is an error, never dropped.

    Example: specdec convert medusa-vicuna-7b-v1.3 --to vllm_medusa --out heads
    """
    checkpoint = prepared(formats.read(source), target, base, head_only)
    path = directory or default_path(source, to)
    formats.write(checkpoint, path, to, overwrite=force)
    written = formats.read(path)
    facts = {
        "path": str(path),
        "from": checkpoint.format,
        "format": written.format,
        "kind": written.kind,
        "parameters": written.num_parameters,
    }
    if as_json:
        print(json.dumps(facts))
    else:
        size = f"{written.num_parameters:,} parameters"
        out.print(f"{path}: a {written.kind} head of {size} as {written.format}, read from {checkpoint.format}")


def prepared(checkpoint: HeadCheckpoint, target: str | None, base: Path | None, head_only: bool) -> HeadCheckpoint:
    """The head with what the command line says about its target."""
    if base is not None and head_only:
        raise SpecdecError("--base and --head-only contradict each other; give one of them")
    if base is not None:
        if not (base / "config.json").is_file():
            raise SpecdecError(f"--base {base} is not a model directory: it has no config.json")
        checkpoint = replace(checkpoint, base=base)
    if head_only:
        checkpoint = replace(checkpoint, base=None)
    return checkpoint if target is None else replace(checkpoint, target={**checkpoint.target, "name": target})


def default_path(source: str, format_name: str) -> Path:
    """A directory here that is named after the source and the format."""
    given = Path(source).expanduser().absolute()
    folder = given if given.is_dir() else given.parent
    return Path(f"{folder.name}-{format_name}")
