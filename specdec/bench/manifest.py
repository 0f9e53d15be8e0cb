"""The manifest: everything needed to judge a run's numbers, written before the first of them.

Part of it is the run's identity. A directory goes on only with a run of the same identity.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from specdec.bench.record import write_json
from specdec.drafters.directory import fingerprint
from specdec.environment import git_commit, now, weights_sample
from specdec.errors import SpecdecError
from specdec.packed import is_packed

MANIFEST_FILE = "manifest.json"
FORMAT = 1
IDENTITY = ("format", "target", "methods", "questions", "prompts", "settings", "hardware", "versions")
"""Fields that must agree for a run to be resumed."""
SMALL_FILE = 1 << 20


def described_target(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """Name, size and hashes of a target."""
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    return {
        "name": name,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.config.get_text_config(decoder=True)._attn_implementation,
        "packed": is_packed(model),
        "fingerprint": fingerprint(model),
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "weights_sample_sha256": weights_sample(model),
        "generation_config": json.loads(model.generation_config.to_json_string()),
    }


def folder_sha256(path: Path) -> str | None:
    """Of the names and sizes of a directory's files and their first mebibyte each; None when it is no directory."""
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(SMALL_FILE))
    return digest.hexdigest()


def identity_sha256(identity: dict[str, Any]) -> str:
    """Of a manifest's identity."""
    return hashlib.sha256(json.dumps(_as_read({key: identity[key] for key in IDENTITY})).encode()).hexdigest()


class Manifest:
    """The manifest in a directory.

    Args:
        folder: of the run; created if need be.
        identity: the fields of IDENTITY, and further ones that the first start writes down.

    Raises:
        SpecdecError: the directory holds another run, or things that are no run.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.path = folder / MANIFEST_FILE
        earlier = _read(folder)
        if earlier is not None:
            different = first_difference(earlier, _as_read(identity))
            if different is not None:
                raise SpecdecError(f"{folder} holds another run: {different}; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        self.values = earlier or {**_as_read(identity), "command": sys.argv, "starts": [], "finished": None}

    def start(self, records_before: int, more: dict[str, Any]) -> None:
        """Note that the run begins, or goes on after so many records; on disk when this returns."""
        load = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
        entry = {"started": now(), "records_before": records_before, "git_commit": git_commit(), "load_average": load}
        self.values["starts"].append({**entry, **more})
        self.values["finished"] = None
        self.write()

    def add(self, more: dict[str, Any]) -> None:
        """Add to the last start, such as its warm-up log; on disk when this returns."""
        self.values["starts"][-1].update(more)
        self.write()

    def finish(self) -> None:
        """Every record is there."""
        self.values["finished"] = now()
        self.write()

    def write(self) -> None:
        """Replace the file by the present values."""
        write_json(self.path, self.values)


def is_finished(folder: Path) -> bool:
    """The directory holds a run with all its records."""
    earlier = _read(folder)
    return earlier is not None and bool(earlier.get("finished"))


def first_difference(earlier: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first field of the identity in which two manifests differ, and how; None when they agree."""
    for key in IDENTITY:
        different = _difference(key, earlier.get(key), ours[key])
        if different is not None:
            return different
    return None


def _difference(name: str, there: Any, here: Any) -> str | None:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            different = _difference(f"{name}.{key}", there.get(key), here.get(key))
            if different is not None:
                return different
        return None
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        found = (_difference(f"{name}[{place}]", a, b) for place, (a, b) in enumerate(zip(there, here, strict=True)))
        return next((different for different in found if different is not None), None)
    return None if there == here else f"{name} is {_short(there)} there and {_short(here)} here"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(v.get("name", v) if isinstance(v, dict) else v) for v in value)[:100] or "nothing"
    return str(value)[:60]


def _as_read(value: Any) -> Any:
    """As it would be read from a file, tuples being lists there."""
    return json.loads(json.dumps(value))


def _read(folder: Path) -> dict[str, Any] | None:
    if folder.is_file():
        raise SpecdecError(f"{folder} is a file; --out is a directory")
    path = folder / MANIFEST_FILE
    if not path.is_file():
        if folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise SpecdecError(f"{folder} is not empty and holds no run; choose another --out")
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecdecError(f"{path} is damaged ({error}); choose another --out") from error
