"""Medusa heads with output matrices of their own: config.json and medusa_lm_head.pt or .safetensors.

Tensors `{head}.{block}.linear.weight|bias` and `{head}.{blocks}.weight`. The config's number of heads is not to be
trusted (a published one says 2 where the file holds 5): heads and blocks are counted from the names.
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

NAME = "medusa_v1"
KINDS = ("medusa",)


def matches(folder: Folder) -> bool:
    """Blocks and output matrices under bare numbers."""
    heads, _, has_output = head_count(folder, "")
    return heads > 0 and has_output


def read(folder: Folder) -> HeadCheckpoint:
    """All tensors; the config only says which target."""
    config, tensors = read_plain(folder, "", own_output=True)
    extra = rest_of_config(folder)
    if folder.files[0].suffix == ".safetensors":
        extra["weights"] = "safetensors"
    target = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size}
    if name := folder.config.get("base_model_name_or_path"):
        target["name"] = name
    return HeadCheckpoint("medusa", config, tensors, target, NAME, {NAME: extra} if extra else {})


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """As a pickle, which is what the published loader opens; as safetensors when it was read from one."""
    if checkpoint.config.output == "target":
        raise BadCheckpoint(
            f"{NAME} has an output matrix for each head, and these heads use the target's; write medusa_v2 or native"
        )
    if loss := loss_in_plain_medusa(checkpoint.config):
        raise BadCheckpoint(f"{NAME} cannot hold {loss}; write vllm_medusa or native")
    extra = dict(checkpoint.extra.get(NAME, {}))
    suffix = "safetensors" if extra.pop("weights", None) == "safetensors" else "pt"
    write_json(path / "config.json", {**plain_config(checkpoint), **extra})
    write_tensors(path / f"medusa_lm_head.{suffix}", plain_tensors(checkpoint, "", own_output=True))
