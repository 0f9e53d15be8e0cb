"""DFlash drafters as z-lab publishes them; vLLM and SGLang read the same: config.json and model.safetensors.

A Qwen3 config of the draft layers, with `dflash_config`: `target_layer_ids` name target layers whose *output* is
tapped, one less than the index in `hidden_states`. No embedding and no output matrix, unless the drafter guesses fewer
tokens: then `lm_head.weight` and `d2t`, without which a server would silently emit wrong tokens.

Newer files keep all settings in `dflash_config`, older ones some at the top; the nested one counts. Flags are
always written, since readers differ in what they take an absent one for.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.draft_vocabulary import take_vocabulary
from specdec.formats.folder import Folder, write_json, write_tensors
from specdec.formats.layer_json import checked_config, layer_json, read_layer, rest_of_config
from specdec.heads.dflash import FULL, SLIDING, DFlashConfig

NAME = "dflash"
KINDS = ("dflash",)

SETTINGS = (
    "target_layer_ids", "mask_token_id", "block_size", "sample_from_anchor", "input_embedding_scale",
    "output_multiplier", "final_logit_softcapping",
)  # fmt: skip
"""What `dflash_config` may hold; older files have some of it at the top."""
MADE_ANEW = (
    "architectures", "model_type", "num_hidden_layers", "vocab_size", "draft_vocab_size", "layer_types",
    "sliding_window", "use_sliding_window", "max_window_layers", "num_target_layers", "is_causal", "dflash_config",
    "tie_word_embeddings", *SETTINGS,
)  # fmt: skip
_LAYER = re.compile(r"layers\.(\d+)\.")
MAX_WINDOW_LAYERS = 28
"""Qwen3's own default: in configs without `layer_types`, the first layer that slides."""


def matches(folder: Folder) -> bool:
    """Settings of DFlash, in a config that is not in the speculators format."""
    config = folder.config
    named = any(str(name).startswith("DFlash") for name in config.get("architectures") or ())
    return "speculators_model_type" not in config and (named or "dflash_config" in config)


def read(folder: Folder) -> HeadCheckpoint:
    """Layers are counted from the names of tensors."""
    where = str(folder.path / "config.json")
    config = folder.require_config("vocab_size")
    settings = _settings(config, where)
    if not isinstance(settings["target_layer_ids"], list):
        raise BadCheckpoint(f"{where}: target_layer_ids is {settings['target_layer_ids']!r}, expected a list")
    num_layers = count_layers(folder)
    sliding, window = sliding_layers(config, num_layers, where)
    head = checked_config(
        DFlashConfig, where,
        layer=replace(read_layer({"model_type": "qwen3", **config}, where), qk_norm=True),
        num_layers=num_layers,
        taps=[layer + 1 if isinstance(layer, int) else layer for layer in settings["target_layer_ids"]],
        block_size=settings.get("block_size", 16),
        mask_token_id=settings["mask_token_id"],
        vocab_size=config["vocab_size"],
        draft_vocab_size=folder.shape("lm_head.weight")[0] if folder.has("lm_head.weight") else None,
        sliding_layers=list(sliding),
        sliding_window=window,
        causal=(config.get("dflash_config") or {}).get("causal", config.get("is_causal")),
        sample_from_anchor=settings.get("sample_from_anchor", False),
        embedding_scale=settings.get("input_embedding_scale", 1.0),
        logit_scale=settings.get("output_multiplier", 1.0),
        logit_softcap=settings.get("final_logit_softcapping"),
    )  # fmt: skip
    target = {"vocab_size": head.vocab_size, "hidden_size": head.hidden_size}
    if isinstance(config.get("num_target_layers"), int):
        target["num_layers"] = config["num_target_layers"]
    extra = rest_of_config(folder, MADE_ANEW)
    return HeadCheckpoint("dflash", head, take_tensors(folder, head), target, NAME, {NAME: extra} if extra else {})


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """Config and tensors, as z-lab's loader and vLLM look for them."""
    config: DFlashConfig = checkpoint.config
    written = {
        **checkpoint.extra.get(NAME, {}),
        "architectures": ["DFlashDraftModel"],
        **transformer_json(config, NAME),
        "tie_word_embeddings": False,
        "block_size": config.block_size,
        "dflash_config": _dflash_config(config),
    }
    if config.draft_vocab_size is not None:
        written["draft_vocab_size"] = config.draft_vocab_size
    if config.causal is not None:
        written["is_causal"] = config.causal
    if "num_layers" in checkpoint.target:
        written["num_target_layers"] = checkpoint.target["num_layers"]
    write_json(path / "config.json", written)
    write_tensors(path / "model.safetensors", checkpoint.tensors)


def _settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings of both places, the nested ones first."""
    nested = config.get("dflash_config") or {}
    if not isinstance(nested, dict):
        raise BadCheckpoint(f"{where}: dflash_config is {nested!r}, expected an object")
    settings = {name: config[name] for name in SETTINGS if config.get(name) is not None}
    settings |= {name: nested[name] for name in SETTINGS if nested.get(name) is not None}
    if missing := [name for name in ("target_layer_ids", "mask_token_id") if name not in settings]:
        raise BadCheckpoint(f"{where}: dflash_config lacks {', '.join(missing)}")
    return settings


def _dflash_config(config: DFlashConfig) -> dict[str, Any]:
    if 0 in config.taps:
        raise BadCheckpoint(f"{NAME} names the layers whose output is tapped and has no name for the embedding, tap 0")
    written: dict[str, Any] = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": [tap - 1 for tap in config.taps],
        "sample_from_anchor": config.sample_from_anchor,
        "input_embedding_scale": config.embedding_scale,
        "output_multiplier": config.logit_scale,
    }
    if config.logit_softcap is not None:
        written["final_logit_softcapping"] = config.logit_softcap
    if config.causal is not None:
        written["causal"] = config.causal
    return written


def transformer_json(config: DFlashConfig, format: str) -> dict[str, Any]:
    """The draft layers as a Qwen3 config."""
    if not config.layer.qk_norm:
        raise BadCheckpoint(f"{format} has Qwen3's layers, whose queries and keys are normed, and these are not")
    return {
        "model_type": "qwen3",
        **layer_json(config.layer, format),
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "layer_types": list(config.layer_kinds),
        "sliding_window": config.sliding_window,
        "use_sliding_window": bool(config.sliding_layers),
        "max_window_layers": min(config.sliding_layers, default=config.num_layers),
    }


def count_layers(folder: Folder) -> int:
    """Draft layers, from the names of tensors."""
    return max((int(found[1]) for name in folder.names if (found := _LAYER.match(name))), default=-1) + 1


def sliding_layers(config: dict[str, Any], num_layers: int, where: str) -> tuple[tuple[int, ...], int | None]:
    """Which layers slide, and their window; by the rules of Qwen3's config where `layer_types` is absent."""
    uses_window = config.get("use_sliding_window", config.get("model_type") != "qwen3")
    window = config.get("sliding_window") if uses_window else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", MAX_WINDOW_LAYERS)
        kinds = [SLIDING if window and isinstance(first, int) and i >= first else FULL for i in range(num_layers)]
    if not isinstance(kinds, list) or any(kind not in (FULL, SLIDING) for kind in kinds) or len(kinds) < num_layers:
        raise BadCheckpoint(f"{where}: layer_types is {kinds!r}, expected {FULL} or {SLIDING} for {num_layers} layers")
    sliding = tuple(index for index, kind in enumerate(kinds[:num_layers]) if kind == SLIDING)
    return sliding, window if sliding else None


def take_tensors(folder: Folder, config: DFlashConfig) -> dict[str, Tensor]:
    """The head's state dict; names are the same. What a vocabulary of its own lacks is made or named."""
    names = [name for name in folder.names if name not in ("d2t", "t2d")]
    tensors = {name: folder.take(name) for name in names}
    if config.draft_vocab_size == config.vocab_size and not folder.has("d2t"):
        everything = torch.ones(config.vocab_size, dtype=torch.bool)
        return tensors | {"d2t": torch.zeros(config.vocab_size, dtype=torch.long), "t2d": everything}
    if config.draft_vocab_size is not None:
        tensors |= take_vocabulary(folder, config.vocab_size, config.draft_vocab_size)
    return tensors
