"""What the formats of EAGLE heads have in common: what tensor names say, and the names of EAGLE-3's first layer."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import Tensor

from specdec.formats.draft_vocabulary import take_vocabulary
from specdec.formats.folder import Folder
from specdec.formats.layer_json import layer_json
from specdec.heads.eagle3 import Eagle3Config
from specdec.heads.layer import LayerConfig

_LAYER = re.compile(r"layers\.(\d+)\.")
LEGACY_NORMS = {"fc_norm.0.weight": "aux_norm_low.weight", "fc_norm.1.weight": "aux_norm_mid.weight",
                "fc_norm.2.weight": "aux_norm_high.weight"}  # fmt: skip
"""Names of EAGLE-3.1's first checkpoints, which SGLang still reads."""


def count_layers(folder: Folder) -> int:
    """Decoder layers, from the names; a `midlayer` is the first."""
    return max((int(found[1]) for name in folder.names if (found := _LAYER.match(name))), default=0) + 1


def biases_of(folder: Folder, first: str) -> dict[str, bool]:
    """Fields of LayerConfig for the biases that are there; configs do not tell Qwen2's from Llama's."""
    return {
        "attention_bias": folder.has(f"{first}self_attn.q_proj.bias"),
        "output_bias": folder.has(f"{first}self_attn.o_proj.bias"),
        "mlp_bias": folder.has(f"{first}mlp.gate_proj.bias"),
    }


def own_norms(folder: Folder) -> dict[str, bool]:
    """Likewise for norms of query and key heads."""
    return {"qk_norm": any(name.endswith("self_attn.q_norm.weight") for name in folder.names)}


def ignore_frequencies(folder: Folder) -> None:
    """Older trainers stored the rotary frequencies, which follow from the config."""
    folder.ignore(*(name for name in folder.names if name.endswith("rotary_emb.inv_freq")))


def layer_fields(layer: LayerConfig, format: str) -> dict[str, Any]:
    """Fields of config.json for a layer whose q, k and v may have biases where o has none, as in Qwen2."""
    if layer.attention_bias and not layer.output_bias:
        return {**layer_json(replace(layer, attention_bias=False), format), "qkv_bias": True}
    return layer_json(layer, format)


def take_eagle3_tensors(folder: Folder, config: Eagle3Config, first: str) -> dict[str, Tensor]:
    """The head's state dict from a file that calls the first layer `first`."""
    tensors: dict[str, Tensor] = {}
    ignore_frequencies(folder)
    if config.draft_vocab_size < config.vocab_size:
        tensors |= take_vocabulary(folder, config.vocab_size, config.draft_vocab_size)
    else:
        _ignore_identity(folder)
    legacy = {theirs: ours for ours, theirs in LEGACY_NORMS.items()}
    for name in list(folder.names):
        if name in ("d2t", "t2d") or name.endswith("inv_freq"):
            continue
        ours = legacy.get(name, name)
        if ours.startswith(f"{first}."):
            ours = f"layers.0.{ours.removeprefix(f'{first}.')}"
        tensors[ours] = folder.take(name)
    return tensors


def _ignore_identity(folder: Folder) -> None:
    """A head that guesses every token needs no map; one that says something else is a problem."""
    for name, plain in (("d2t", 0), ("t2d", 1)):
        if folder.has(name) and bool((folder.take(name, kind=None) != plain).any()):
            folder.problem(f"{name} maps a vocabulary that is not reduced")


def eagle3_names(tensors: dict[str, Tensor], first: str) -> dict[str, Tensor]:
    """A head's state dict under the names of a format that calls the first layer `first`."""
    return {
        f"{first}.{name.removeprefix('layers.0.')}" if name.startswith("layers.0.") else name: tensor
        for name, tensor in tensors.items()
    }
