"""EAGLE-1 heads as SafeAILab publishes them (EAGLE-2 and HASS use the same); vLLM and SGLang read them, too.

config.json is a Llama config with `bias` for that of `fc`, which counts as true where it is absent; weights lie in
pytorch_model.bin or model.safetensors. The first layer has no input norm, nothing follows the last. With Dovetail's
gate, `W_1`, `W_2` and `W_z` (rows are inputs) and `input_layernorm` stand in place of `fc`; its copy of the target's
output matrix is not needed.

vLLM has no bias of `fc`; SafeAILab's loader wants the embedding in the file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.eagle_tensors import biases_of, count_layers, ignore_frequencies, layer_fields, own_norms
from specdec.formats.folder import Folder, write_json, write_tensors
from specdec.formats.layer_json import checked_config, read_layer, rest_of_config
from specdec.heads.eagle import EagleConfig

NAME = "eagle"
KINDS = ("eagle",)

MADE_ANEW = ("architectures", "model_type", "num_hidden_layers", "vocab_size", "bias", "qkv_bias")
GATE = {"fuse.feature.weight": "W_1", "fuse.embedding.weight": "W_2", "fuse.gate.weight": "W_z"}
"""Dovetail multiplies from the left: its matrices are the transposes of ours."""


def matches(folder: Folder) -> bool:
    """A fusion and a first layer without any norm before attention."""
    fused = folder.has("fc.weight") or folder.has("W_z")
    normed = folder.has("layers.0.input_layernorm.weight") or folder.has("layers.0.hidden_norm.weight")
    return fused and folder.has("layers.0.post_attention_layernorm.weight") and not normed


def read(folder: Folder) -> HeadCheckpoint:
    """Layers, biases and fusion are told from the names of tensors."""
    said = folder.require_config("vocab_size")
    where = str(folder.path / "config.json")
    gated = folder.has("W_z")
    told = {**biases_of(folder, "layers.0."), **own_norms(folder)}
    config = checked_config(
        EagleConfig, where,
        layer=replace(read_layer({"model_type": "llama", **said}, where), **told),
        vocab_size=said["vocab_size"],
        num_layers=count_layers(folder),
        fusion="gate" if gated else "linear",
        fc_bias=folder.has("fc.bias") or (said.get("bias") is True and not gated),
        own_embedding=folder.has("embed_tokens.weight"),
    )  # fmt: skip
    ignore_frequencies(folder)
    if gated:
        folder.ignore("lm_head.weight")
    tensors = {ours: folder.take(ours) for ours in folder.names if ours.startswith(("layers.", "fc.", "embed_tokens."))
               and not ours.endswith("inv_freq")}  # fmt: skip
    tensors |= _read_gate(folder) if gated else {}
    target = {"vocab_size": config.vocab_size, "hidden_size": config.layer.hidden_size}
    extra = rest_of_config(folder, MADE_ANEW)
    if folder.files[0].suffix != ".safetensors":
        extra["weights"] = "bin"
    return HeadCheckpoint("eagle", config, tensors, target, NAME, {NAME: extra} if extra else {})


def _read_gate(folder: Folder) -> dict[str, Tensor]:
    tensors = {ours: folder.take(theirs, (None, None)).T.contiguous() for ours, theirs in GATE.items()}
    return {**tensors, "fuse.norm.weight": folder.take("input_layernorm.weight")}


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """As safetensors, or as the pickle that it was read from."""
    config: EagleConfig = checkpoint.config
    if config.layer.qk_norm:
        raise BadCheckpoint(f"{NAME} has Llama's layers, whose queries and keys are not normed, and these are")
    extra: dict[str, Any] = dict(checkpoint.extra.get(NAME, {}))
    pickled = extra.pop("weights", None) == "bin"
    written = {
        **extra,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **layer_fields(config.layer, NAME),
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "bias": config.fc_bias,
    }
    tensors = {_name(ours): tensor.T if ours in GATE else tensor for ours, tensor in checkpoint.tensors.items()}
    write_json(path / "config.json", written)
    write_tensors(path / ("pytorch_model.bin" if pickled else "model.safetensors"), tensors)


def _name(ours: str) -> str:
    return "input_layernorm.weight" if ours == "fuse.norm.weight" else GATE.get(ours, ours)
