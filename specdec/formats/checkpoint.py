"""A draft head as it lies in a file: kind, configuration, tensors and what is said of its target.

Every format reads into this and writes from it; so any two formats that can hold the same head convert into each other.
"""

from __future__ import annotations

import types
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from specdec.errors import BadCheckpoint, SpecdecError
from specdec.heads.kinds import HEADS

Config = TypeVar("Config")


@dataclass(frozen=True)
class HeadCheckpoint:
    """A draft head in memory, independent of any format.

    Attributes:
        kind: a key of `specdec.heads.kinds.HEADS`, such as "medusa".
        config: that kind's configuration object.
        tensors: exactly the state dict of the head's module, in the dtypes of the file.
        target: what the files say of the target, under the names of `drafters.directory.fingerprint`
            (vocab_size, hidden_size, num_layers, ...), which are checked, and `name`, which is not.
        format: NAME of the format it was read from.
        extra: by format NAME, what the head does not need but a faithful rewrite in that format does.
        base: directory of the target's own weights, where a format keeps head and target together.
    """

    kind: str
    config: Any
    tensors: dict[str, Tensor]
    target: dict[str, Any] = field(default_factory=dict)
    format: str = "native"
    extra: dict[str, Any] = field(default_factory=dict)
    base: Path | None = None

    @property
    def num_parameters(self) -> int:
        """Numbers in all floating-point tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values() if tensor.is_floating_point())


def check_tensors(checkpoint: HeadCheckpoint, where: str) -> None:
    """Hold the tensors to the state dict of the module that the configuration describes.

    Raises:
        BadCheckpoint: names every missing, unexpected and wrong-shaped tensor.
    """
    try:
        with torch.device("meta"):
            head = HEADS[checkpoint.kind].head(checkpoint.config)
    except SpecdecError as error:  # a rope type or an activation that heads do not have
        raise BadCheckpoint(f"{where}: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    problems = [f"{name} is missing" for name in expected if name not in got]
    problems += [f"{name} is unexpected" for name in got if name not in expected]
    problems += [
        f"{name} has shape {list(got[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in got and got[name] != shape
    ]
    if problems:
        raise BadCheckpoint(f"{where}: {shortened(problems)}")


def shortened(problems: list[str], most: int = 8) -> str:
    """One line of a list that may be long."""
    rest = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {rest} more" if rest > 0 else "")


def config_from_json(config_class: type[Config], raw: Any, where: str) -> Config:
    """A configuration object from what `dataclasses.asdict` and JSON made of it; nested ones too.

    Raises:
        BadCheckpoint: names the field that is missing, unknown or of another type.
    """
    if not isinstance(raw, dict):
        raise BadCheckpoint(f"{where} is {type(raw).__name__}, expected an object")
    hints = get_type_hints(config_class)
    known = {f.name: f for f in fields(config_class)}  # type: ignore[arg-type]
    if unknown := sorted(set(raw) - set(known)):
        raise BadCheckpoint(f"{where} has unknown fields {', '.join(unknown)}; it was written by another version")
    missing = [
        name for name, f in known.items()
        if name not in raw and f.default is MISSING and f.default_factory is MISSING
    ]  # fmt: skip
    if missing:
        raise BadCheckpoint(f"{where} lacks the fields {', '.join(missing)}")
    try:
        return config_class(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in raw.items()})
    except BadCheckpoint:
        raise
    except ValueError as error:  # what the configuration itself refuses
        raise BadCheckpoint(f"{where}: {error}") from error


def _value(hint: Any, raw: Any, where: str) -> Any:
    """A JSON value as the annotated type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return raw
    if origin in (Union, types.UnionType):
        return _one_of(arguments, raw, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return config_from_json(hint, raw, where)
    if origin is Literal and raw in arguments:
        return raw
    if origin in (tuple, list) and isinstance(raw, list | tuple):
        item = arguments[0] if arguments else Any
        return origin(_value(item, value, f"{where}[{index}]") for index, value in enumerate(raw))
    plain = origin or hint
    if plain is float and isinstance(raw, int | float) and not isinstance(raw, bool):
        return float(raw)
    if plain in (int, bool, str, dict, types.NoneType) and type(raw) is plain:
        return raw
    raise BadCheckpoint(f"{where} is {raw!r}, expected {getattr(hint, '__name__', hint)}")


def _one_of(options: tuple[Any, ...], raw: Any, where: str) -> Any:
    """The first member of a union that the value has the type of."""
    for option in options:
        try:
            return _value(option, raw, where)
        except BadCheckpoint:
            continue
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise BadCheckpoint(f"{where} is {raw!r}, expected {names}")
