"""A directory of somebody's checkpoint: its JSON files, and its tensors with an account of which were used.

Names and shapes are known without loading. `take` marks a tensor as used and notes what is wrong with it; `done` names
everything that was missing, left over or of the wrong shape in one error. Nothing in a file is ever run: pickles
are opened for tensors only.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import shortened

Numbers = Literal["float", "int", "bool"]
PICKLES = (".bin", ".pt", ".pth")
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states", "trainer_state")
"""Beginnings of file names that trainers leave beside weights."""


@dataclass(frozen=True)
class _Entry:
    """One tensor: where it lies and its shape; the tensor itself when it came from a pickle."""

    file: Path
    shape: tuple[int, ...]
    tensor: Tensor | None = None


class Folder:
    """A checkpoint directory, or one weight file with the directory's JSON files beside it.

    Args:
        path: the directory or the weight file.

    Raises:
        BadCheckpoint: from its methods, for any file that is not what it should be; one line each.
    """

    def __init__(self, path: str | Path) -> None:
        given = Path(path).expanduser()
        if not given.exists():
            raise BadCheckpoint(f"there is no {given}")
        self.path = given if given.is_dir() else given.parent
        self._only = None if given.is_dir() else given
        self._used: set[str] = set()
        self._problems: list[str] = []

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; empty when there is none (see `require_config`)."""
        return self.json("config.json") or {}

    def require_config(self, *names: str) -> dict[str, Any]:
        """config.json, which must be there and have these fields."""
        if not (self.path / "config.json").is_file():
            raise BadCheckpoint(f"{self.path} has no config.json; copy it from where the weights came from")
        if lacking := [name for name in names if name not in self.config]:
            raise BadCheckpoint(f"{self.path / 'config.json'} lacks {', '.join(lacking)}")
        return self.config

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object of the directory, or None when there is no such file."""
        file = self.path / name
        if not file.is_file():
            return None
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BadCheckpoint(f"{file} is not readable JSON: {_first_line(error)}") from error
        if not isinstance(value, dict):
            raise BadCheckpoint(f"{file} holds {type(value).__name__}, expected a JSON object")
        return value

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The weight files: those of an index, else all .safetensors, else all pickles; () for none."""
        if self._only is not None:
            return (self._only,)
        for index, suffixes in (("model.safetensors.index.json", (".safetensors",)),
                                ("pytorch_model.bin.index.json", PICKLES)):  # fmt: skip
            shards = self._shards(index)
            if shards:
                return shards
            found = sorted(file for file in self.path.iterdir() if file.suffix in suffixes and file.is_file())
            if kept := tuple(file for file in found if not file.name.startswith(NOT_WEIGHTS)):
                return kept
        return ()

    def _shards(self, index: str) -> tuple[Path, ...]:
        listed = self.json(index)
        if listed is None:
            return ()
        weight_map = listed.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise BadCheckpoint(f"{self.path / index} has no weight_map of tensor names to file names")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise BadCheckpoint(f"{self.path / index} points out of its directory: {name!r}")
            if not (self.path / name).is_file():
                raise BadCheckpoint(f"{self.path / index} lists {name}, which is not there; fetch it too")
        return tuple(self.path / name for name in names)

    @cached_property
    def _entries(self) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        duplicates = []
        for file in self.files:
            for name, entry in _entries_of(file).items():
                if name in entries:
                    duplicates.append(f"{name} lies in {entries[name].file.name} and in {file.name}")
                entries[name] = entry
        if duplicates:
            raise BadCheckpoint(f"{self.path}: {shortened(duplicates)}; keep one of the files")
        return entries

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors, in the order of the files."""
        return self._entries.keys()

    def has(self, name: str) -> bool:
        """Whether a tensor of this name is there."""
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that must be there."""
        if name not in self._entries:
            raise BadCheckpoint(f"{self.path}: {name} is missing")
        return self._entries[name].shape

    def take(self, name: str, shape: tuple[int | None, ...] | None = None, kind: Numbers | None = "float") -> Tensor:
        """Load a tensor and mark it as used.

        Args:
            name: as in the file.
            shape: expected; None in a place for any size there, None as a whole for any shape.
            kind: of its numbers; None for any.

        Returns:
            the tensor in the file's dtype; one on the meta device when something is wrong, which `done` will raise.
        """
        entry = self._entries.get(name)
        placeholder = torch.empty([size or 0 for size in shape or ()], device="meta")
        if entry is None:
            self._problems.append(f"{name} is missing")
            return placeholder
        self._used.add(name)
        if shape is not None and not _fits(entry.shape, shape):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            self._problems.append(f"{name} has shape {list(entry.shape)}, expected [{wanted}]")
            return placeholder
        tensor = _load(name, entry)
        if kind not in (None, _kind(tensor)):
            self._problems.append(f"{name} holds {str(tensor.dtype).removeprefix('torch.')}, expected {kind} numbers")
        return tensor

    def ignore(self, *names: str) -> None:
        """Mark tensors as known and not needed; names that are not there are fine."""
        self._used.update(names)

    def problem(self, message: str) -> None:
        """Note something that `done` will raise together with the rest."""
        self._problems.append(message)

    def done(self) -> None:
        """Raise one BadCheckpoint for everything that was noted, and for tensors that nobody took."""
        leftover = [f"{name} is unexpected" for name in self._entries if name not in self._used]
        if problems := [*self._problems, *leftover]:
            raise BadCheckpoint(f"{self._only or self.path}: {shortened(problems)}")


def _entries_of(file: Path) -> dict[str, _Entry]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                return {name: _Entry(file, tuple(opened.get_slice(name).get_shape())) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:
            raise BadCheckpoint(f"cannot load {file}: no whole safetensors file ({_first_line(error)})") from error
    if file.suffix not in PICKLES:
        raise BadCheckpoint(f"{file} is no weight file; those end in .safetensors, {', '.join(PICKLES)}")
    tensors = _unpickled(file)
    return {name: _Entry(file, tuple(tensor.shape), tensor) for name, tensor in tensors.items()}


def _unpickled(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a pickle; anything in it that is not a plain tensor or container is refused, not run."""
    try:
        # Mapping the file instead of reading it is possible for the zip form alone.
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        asks_for_code = any(phrase in str(error) for phrase in ("Unsupported global", "Unsupported class", "GLOBAL"))
        reason = "it asks for code to be run" if asks_for_code else "it is no whole pickle of tensors"
        raise BadCheckpoint(f"{file} is refused: {reason}; specdec opens pickles for tensors only") from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
    ):
        raise BadCheckpoint(f"{file} does not hold a mapping of names to tensors")
    return loaded


def _load(name: str, entry: _Entry) -> Tensor:
    if entry.tensor is not None:
        return entry.tensor
    try:
        with safe_open(entry.file, framework="pt") as opened:
            return opened.get_tensor(name)
    except Exception as error:
        raise BadCheckpoint(f"{entry.file}: {name} cannot be read: {_first_line(error)}") from error


def _fits(actual: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(actual) == len(expected) and all(e in (None, a) for a, e in zip(actual, expected, strict=True))


def _kind(tensor: Tensor) -> Numbers:
    if tensor.dtype == torch.bool:
        return "bool"
    return "float" if tensor.is_floating_point() else "int"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:200] if lines else type(error).__name__


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in storages of their own: safetensors refuses shared ones, a pickle would write all of them."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != own.numel() * own.element_size():
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        apart[name] = own
    return apart


def copy_directory(source: Folder, path: Path, added: Mapping[str, Tensor], *, without: str) -> None:
    """Copy a model's directory into `path`, with tensors added in a file of their own.

    Args:
        source: the model.
        path: an empty directory.
        added: tensors that the model does not have.
        without: tensors whose names begin so are left out.
    """
    weights = {*source.files, *source.path.glob("*.index.json")}
    for file in source.path.iterdir():
        if file.is_file() and file not in weights and not file.name.startswith(NOT_WEIGHTS):
            shutil.copyfile(file, path / file.name)
    kept = [[name for name in _entries_of(file) if not name.startswith(without)] for file in source.files]
    groups = [names for names in kept if names]
    weight_map, total = {}, 0
    for number, names in enumerate([*groups, list(added)], 1):
        name_of_file = f"model-{number:05d}-of-{len(groups) + 1:05d}.safetensors"
        tensors = {name: added[name] if number > len(groups) else source.take(name, kind=None) for name in names}
        write_tensors(path / name_of_file, tensors)
        weight_map.update(dict.fromkeys(names, name_of_file))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a file are copies of each other: dtype, shape and every number."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write an indented JSON object."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a .safetensors file, or a pickle of the plain mapping where the name ends so; dtypes are kept."""
    plain = _apart(tensors)
    if file.suffix == ".safetensors":
        save_file(plain, file, metadata={"format": "pt"})
    else:
        torch.save(plain, file)
