"""Medusa heads that use the target's output matrix: config.json with version 2, medusa_lm_head.safetensors.

Tensors `{head}.{block}.linear.weight|bias` alone. The trainer of this format also trains the target's output matrix
and does not save it, so some published heads are less accurate than they were in training.
"""

from __future__ import annotations

from pathlib import Path

from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.folder import Folder, write_json, write_tensors
from specdec.formats.medusa_tensors import (
    head_count,
    loss_in_plain_medusa,
    plain_config,
    plain_tensors,
    read_plain,
    rest_of_config,
)

NAME = "medusa_v2"
KINDS = ("medusa",)


def matches(folder: Folder) -> bool:
    """Blocks under bare numbers, and no output matrix."""
    heads, _, has_output = head_count(folder, "")
    return heads > 0 and not has_output


def read(folder: Folder) -> HeadCheckpoint:
    """All tensors; the config only says which target."""
    config, tensors = read_plain(folder, "", own_output=False)
    extra = {key: value for key, value in rest_of_config(folder).items() if key != "version"}
    target = {"hidden_size": config.hidden_size}
    if name := folder.config.get("base_model_name_or_path"):
        target["name"] = name
    return HeadCheckpoint("medusa", config, tensors, target, NAME, {NAME: extra} if extra else {})


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """Only heads without output matrices of their own."""
    if checkpoint.config.output != "target":
        raise BadCheckpoint(
            f"{NAME} has no place for the output matrices of these heads; write medusa_v1, vllm_medusa or native"
        )
    if loss := loss_in_plain_medusa(checkpoint.config):
        raise BadCheckpoint(f"{NAME} cannot hold {loss}; write native")
    config = {**plain_config(checkpoint), "version": "2", **checkpoint.extra.get(NAME, {})}
    write_json(path / "config.json", config)
    write_tensors(path / "medusa_lm_head.safetensors", plain_tensors(checkpoint, "", own_output=False))
