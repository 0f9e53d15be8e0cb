"""EAGLE-3 heads in vLLM's own layout: the first layer is `layers.0`, further ones follow.

A reduced vocabulary without `d2t` would be served with wrong tokens and no error; here it is named as missing. vLLM has
no bias of `fc`.
"""

from __future__ import annotations

from pathlib import Path

from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.eagle3_json import MADE_ANEW, head_json, read_head, refuse
from specdec.formats.eagle_tensors import take_eagle3_tensors
from specdec.formats.folder import Folder, write_json, write_tensors
from specdec.formats.layer_json import rest_of_config

NAME = "vllm_eagle3"
KINDS = ("eagle3",)


def matches(folder: Folder) -> bool:
    """By the two norms of the first layer, outside the speculators format."""
    return "speculators_model_type" not in folder.config and folder.has("layers.0.hidden_norm.weight")


def read(folder: Folder) -> HeadCheckpoint:
    """Sizes from config.json, variants from it and from the names of tensors."""
    config = read_head(folder, "layers.0")
    tensors = take_eagle3_tensors(folder, config, "layers.0")
    target = {"vocab_size": config.vocab_size, "hidden_size": config.feature_size}
    extra = rest_of_config(folder, MADE_ANEW)
    return HeadCheckpoint("eagle3", config, tensors, target, NAME, {NAME: extra} if extra else {})


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """Everything but a bias of `fc`, and biases that are not on all four projections of attention."""
    config = checkpoint.config
    mixed = config.layer.attention_bias != config.layer.output_bias
    refuse(NAME, {"a bias of fc": config.fc_bias, "biases of only some projections": mixed}, "write eagle3 or native")
    architecture = "Eagle3Qwen3ForCausalLM" if config.layer.qk_norm else "Eagle3LlamaForCausalLM"
    written = {**checkpoint.extra.get(NAME, {}), **head_json(checkpoint, architecture, NAME)}
    write_json(path / "config.json", written)
    write_tensors(path / "model.safetensors", checkpoint.tensors)
