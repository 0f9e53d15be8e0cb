"""specdec's own format: drafter.json with the head's configuration and the target's fingerprint, model.safetensors."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from specdec.drafters.directory import DrafterJson, read_drafter_json, write_drafter_json
from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint, config_from_json
from specdec.formats.folder import Folder, write_tensors
from specdec.heads.kinds import HEADS

NAME = "native"
KINDS = tuple(HEADS)


def matches(folder: Folder) -> bool:
    """A drafter.json that describes a head; those of words and draft models carry no weights of their own."""
    described = folder.json("drafter.json")
    return described is not None and "head" in described


def read(folder: Folder) -> HeadCheckpoint:
    """Configuration from drafter.json, tensors as they are."""
    described = read_drafter_json(folder.path)
    where = folder.path / "drafter.json"
    if described.kind not in HEADS:
        raise BadCheckpoint(f"{where} is a head of kind {described.kind!r}; known kinds are {', '.join(sorted(HEADS))}")
    config = config_from_json(HEADS[described.kind].config, described.head, f"{where}: head")
    tensors = {name: folder.take(name, kind=None) for name in folder.names}
    return HeadCheckpoint(described.kind, config, tensors, described.target, NAME, described.extra)


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """Any head can be written."""
    described = DrafterJson(
        checkpoint.kind, target=checkpoint.target, head=asdict(checkpoint.config), extra=checkpoint.extra
    )
    write_drafter_json(path, described)
    write_tensors(path / "model.safetensors", checkpoint.tensors)
