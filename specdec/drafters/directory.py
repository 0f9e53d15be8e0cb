"""Drafter directories: drafter.json says the kind, its options and the target it was made for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from specdec.errors import DrafterMismatch, UnknownDrafter

FORMAT_VERSION = 1
_OF_HEADS = ("head", "extra")

ADAPTED = "adapted"
"""In a fingerprint: the mark of a target whose weights were changed while its drafter learned; no field elsewhere."""
CONFIG_MARK = "specdec_adapted"
"""Where that target's config.json holds the mark. There it survives dtypes, packing, quantisation and moves."""


@dataclass(frozen=True)
class DrafterJson:
    """Contents of drafter.json.

    Attributes:
        kind: "draft-model" (the model lies beside this file), a drafter word, or a kind of draft head.
        options: option strings as in a drafter specification.
        target: the fingerprint of the target, see `fingerprint`; an absent field fits any.
        head: a draft head's configuration; its tensors lie beside this file. None for the other kinds.
        extra: what other formats said of a head beyond that, by format, kept for a rewrite.
        format_version: of this file.
    """

    kind: str
    options: dict[str, str] = field(default_factory=dict)
    target: dict[str, Any] = field(default_factory=dict)
    head: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def drafter_in(path: Path) -> Path:
    """Where a drafter lies: in the path itself, or of a training run or one of its checkpoints, in a folder of it.

    Of a run the best drafter is meant, the newest one where none was measured, also after it was broken off.
    """
    if not (path / "drafter.json").is_file():
        for place in ("best/drafter", "drafter", "latest/drafter"):
            if (path / place).is_dir():
                return path / place
    return path


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What must agree between a drafter's target and the model it is used with."""
    config = model.config.get_text_config(decoder=True)
    values = {
        "model_type": config.model_type,
        "vocab_size": int(config.vocab_size),
        "hidden_size": int(config.hidden_size),
        "num_layers": int(config.num_hidden_layers),
    }
    tokenizer = tokenizer_hash(Path(model.name_or_path)) if model.name_or_path else None
    rest = {"tokenizer": tokenizer, ADAPTED: getattr(model.config, CONFIG_MARK, None)}
    return values | {key: value for key, value in rest.items() if value is not None}


def tokenizer_hash(path: Path) -> str | None:
    """sha256 of a model directory's tokenizer.json, when it has one."""
    file = path / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def write_drafter_json(path: Path, described: DrafterJson) -> None:
    """Write drafter.json into a directory, creating it; fields of heads only where there is one."""
    path.mkdir(parents=True, exist_ok=True)
    raw = {key: value for key, value in asdict(described).items() if described.head is not None or key not in _OF_HEADS}
    (path / "drafter.json").write_text(json.dumps(raw, indent=2) + "\n")


def read_drafter_json(path: Path) -> DrafterJson:
    """Read and check a directory's drafter.json.

    Raises:
        UnknownDrafter: not JSON, a missing, unknown or malformed field, or another format version.
    """
    file = path / "drafter.json"
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UnknownDrafter(f"{file} is not readable JSON: {error}") from error
    known = DrafterJson.__dataclass_fields__
    version = raw.get("format_version", FORMAT_VERSION) if isinstance(raw, dict) else FORMAT_VERSION
    if version != FORMAT_VERSION:  # first: a newer format may have other fields
        raise UnknownDrafter(f"{file} has format version {version}; this specdec reads version {FORMAT_VERSION}")
    if not isinstance(raw, dict) or "kind" not in raw or set(raw) - set(known):
        raise UnknownDrafter(f"{file} must be an object with 'kind' and otherwise only {', '.join(known)}")
    objects = {name: raw.get(name, {}) for name in ("options", "target", "head", "extra")}
    if not isinstance(raw["kind"], str) or not all(isinstance(value, dict) for value in objects.values()):
        raise UnknownDrafter(f"{file}: 'kind' is a string, {', '.join(map(repr, objects))} are objects")
    options = {key: str(value) for key, value in objects["options"].items()}
    if options.get("table", "none") != "none":  # beside this file, where it says no other place
        options["table"] = str(path / Path(options["table"]).expanduser())
    return DrafterJson(raw["kind"], options, objects["target"], raw.get("head"), objects["extra"])


def check_fingerprint(described: DrafterJson, path: Path, model: PreTrainedModel) -> None:
    """`check_target` with what drafter.json says."""
    check_target(described.target, path, model)


def check_target(target: dict[str, Any], path: Path, model: PreTrainedModel) -> None:
    """Refuse a drafter that was made for another target.

    Args:
        target: what its files say of the target, in the words of `fingerprint`; other words are not compared.
        path: of the drafter, for the message.
        model: the target.

    Raises:
        DrafterMismatch: names every field that differs.
    """
    actual = fingerprint(model)
    if target.get(ADAPTED) not in (None, actual.get(ADAPTED)):
        raise DrafterMismatch(
            f"the drafter in {path} was trained together with its target, whose weights changed with it; load that "
            f"target, which lies where the training run wrote it, got {model.name_or_path or 'another model'!r}"
        )
    wrong = [f"{key} {actual[key]} (drafter: {value})" for key, value in target.items()
             if key in actual and actual[key] != value]  # fmt: skip
    if wrong:
        raise DrafterMismatch(f"the drafter in {path} was made for another target; this one has {', '.join(wrong)}")
