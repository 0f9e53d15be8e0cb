"""Medusa-2: a whole model directory whose weights also hold `medusa_head.{head}...`, trained together.

The model inside is the target. It is not the one that training began with, so these heads fit no other.
"""

from __future__ import annotations

from pathlib import Path

from specdec.drafters.directory import ADAPTED, CONFIG_MARK
from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.folder import Folder, copy_directory, write_json
from specdec.formats.medusa_tensors import head_count, loss_in_plain_medusa, plain_config, plain_tensors, read_plain

NAME = "medusa_2"
KINDS = ("medusa",)
_PREFIX = "medusa_head."


def matches(folder: Folder) -> bool:
    """An ordinary model's config.json, and tensors of heads beside the model's own."""
    if "model_type" not in folder.config:
        return False
    heads, _, _ = head_count(folder, _PREFIX)
    return heads > 0 and not all(name.startswith(_PREFIX) for name in folder.names)


def read(folder: Folder) -> HeadCheckpoint:
    """The heads; the model's own tensors are left to transformers."""
    _, _, own_output = head_count(folder, _PREFIX)
    config, tensors = read_plain(folder, _PREFIX, own_output=own_output)
    folder.ignore(*(name for name in folder.names if not name.startswith(_PREFIX)))
    said = folder.config.get("text_config") or folder.config
    target = {"hidden_size": config.hidden_size, "name": str(folder.path)}
    for word, field in (
        ("model_type", "model_type"),
        ("vocab_size", "vocab_size"),
        ("num_layers", "num_hidden_layers"),
    ):
        if field in said:
            target[word] = said[field]
    if CONFIG_MARK in folder.config:
        target[ADAPTED] = folder.config[CONFIG_MARK]
    return HeadCheckpoint("medusa", config, tensors, target, NAME, base=folder.path)


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """The target's directory with these heads in it; earlier heads are left out."""
    if checkpoint.base is None:
        raise BadCheckpoint(f"{NAME} holds heads and their model together; say where the model is (--base DIRECTORY)")
    if loss := loss_in_plain_medusa(checkpoint.config):
        raise BadCheckpoint(f"{NAME} cannot hold {loss}; write vllm_medusa or native")
    base = Folder(checkpoint.base)
    if checkpoint.target.get(ADAPTED) not in (None, base.config.get(CONFIG_MARK)):
        raise BadCheckpoint(
            f"{checkpoint.base} is not the model that these heads were trained together with; name that one with "
            "--base: OUT/target of the training run"
        )
    counts = {key: value for key, value in plain_config(checkpoint).items() if key != "base_model_name_or_path"}
    heads = plain_tensors(checkpoint, _PREFIX, own_output=checkpoint.config.output != "target")
    copy_directory(base, path, heads, without=_PREFIX)
    write_json(path / "config.json", {**base.require_config("model_type"), **counts})
