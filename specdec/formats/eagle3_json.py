"""config.json of EAGLE-3 heads, as SafeAILab, SGLang and vLLM share it: a Llama config with the head's own fields.

Layer ids come in two conventions. `eagle_aux_hidden_state_layer_ids` at the top is the number of layers that have run,
our taps; vLLM reads it first. The field of the same name in `eagle_config` names the layers whose output is taken, one
less; SGLang reads that one alone. Both are written, and where a file has both they must agree. A file with neither
means the standard three of its target.

Flags are always written, since readers take an absent one for different things.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.eagle_tensors import LEGACY_NORMS, biases_of, count_layers, layer_fields, own_norms
from specdec.formats.folder import Folder
from specdec.formats.layer_json import checked_config, read_layer
from specdec.heads.eagle3 import Eagle3Config, standard_taps

IDS = "eagle_aux_hidden_state_layer_ids"
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
MADE_ANEW = (
    "architectures", "model_type", "num_hidden_layers", "vocab_size", "draft_vocab_size", "target_hidden_size",
    "num_aux_hidden_states", "qkv_bias", "layer_types", "sliding_window", "tie_word_embeddings", "eagle_config", IDS,
    *FLAGS,
)  # fmt: skip
SLIDING = "sliding_attention"


def read_head(folder: Folder, first: str) -> Eagle3Config:
    """The head that a flat config.json and the names of tensors describe."""
    said = folder.require_config("vocab_size")
    where = str(folder.path / "config.json")
    return head_config(folder, first, said, read_taps(said, where), where)


def head_config(folder: Folder, first: str, said: dict[str, Any], taps: Any, where: str) -> Eagle3Config:
    """The head of these fields; what tensors tell is taken from them."""
    layer = read_layer({"model_type": "llama", **said}, where)
    layer = replace(layer, **biases_of(folder, f"{first}."), **own_norms(folder))
    guesses = folder.shape("lm_head.weight")[0] if folder.has("lm_head.weight") else said["vocab_size"]
    if said.get("draft_vocab_size") not in (None, guesses):
        folder.problem(f"lm_head.weight has {guesses} rows, draft_vocab_size is {said['draft_vocab_size']}")
    wide = said.get("target_hidden_size") or layer.hidden_size
    if not isinstance(wide, int) or folder.shape("fc.weight")[-1] % wide:
        raise BadCheckpoint(f"{where}: fc.weight reads {folder.shape('fc.weight')[-1]}, no multiple of {wide}")
    normed = {
        "norm_before_fc": folder.has("input_norm.weight"),
        "fc_norm": folder.has("fc_norm.0.weight") or folder.has(LEGACY_NORMS["fc_norm.0.weight"]),
    }
    flags = {flag: said.get(flag) or normed.get(flag, False) for flag in FLAGS}
    return checked_config(
        Eagle3Config, where, layer=layer, vocab_size=said["vocab_size"], draft_vocab_size=guesses,
        num_layers=count_layers(folder), taps=taps, num_taps=folder.shape("fc.weight")[-1] // wide,
        target_hidden_size=None if wide == layer.hidden_size else wide, fc_bias=folder.has("fc.bias"),
        own_embedding=folder.has("embed_tokens.weight"), own_lm_head=folder.has("lm_head.weight"),
        sliding_window=read_window(said, where), **flags,
    )  # fmt: skip


def read_taps(said: dict[str, Any], where: str) -> list[int] | None:
    """Taps from either place; None when the file names none."""
    nested = said.get("eagle_config") or {}
    if not isinstance(nested, dict):
        raise BadCheckpoint(f"{where}: eagle_config is {nested!r}, expected an object")
    if nested.get("use_aux_hidden_state") is False:
        raise BadCheckpoint(f"{where}: use_aux_hidden_state is false; specdec reads EAGLE-3 heads on hidden states")
    run, outputs = said.get(IDS), nested.get(IDS)
    for ids in (run, outputs):
        if ids is not None and not (isinstance(ids, list) and all(type(number) is int for number in ids)):
            raise BadCheckpoint(f"{where}: {IDS} is {ids!r}, expected a list of layer numbers")
    from_outputs = None if outputs is None else [number + 1 for number in outputs]
    if run and from_outputs and run != from_outputs:
        raise BadCheckpoint(
            f"{where}: {IDS} is {run} (layers that have run) and in eagle_config {outputs} (layers whose output is "
            f"taken, {from_outputs}); keep the one that the head was trained with"
        )
    return run or from_outputs or None


def read_window(said: dict[str, Any], where: str) -> int | None:
    """The sliding window, when all layers have it."""
    kinds = said.get("layer_types") or []
    if SLIDING not in kinds:
        return None
    if set(kinds) != {SLIDING}:
        raise BadCheckpoint(f"{where}: layer_types is {kinds!r}; specdec reads heads whose layers are of one kind")
    return said.get("sliding_window")


def taps_to_write(checkpoint: HeadCheckpoint) -> list[int] | None:
    """The head's taps, or the standard ones where the target is known; None leaves them to the reader."""
    taps, layers = checkpoint.config.taps, checkpoint.target.get("num_layers")
    if taps is None and layers is not None:
        taps = standard_taps(layers)
    return None if taps is None else list(taps)


def flags_json(config: Eagle3Config) -> dict[str, Any]:
    """Every flag, set or not."""
    return {flag: getattr(config, flag) for flag in FLAGS}


def head_json(checkpoint: HeadCheckpoint, architecture: str, format: str) -> dict[str, Any]:
    """The flat config.json."""
    config: Eagle3Config = checkpoint.config
    written: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "qwen3" if config.layer.qk_norm else "llama",
        **layer_fields(config.layer, format),
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size if config.own_lm_head else None,
        "target_hidden_size": config.feature_size,
        "num_aux_hidden_states": config.num_taps,
        "tie_word_embeddings": False,
        **flags_json(config),
        **window_json(config),
    }
    taps = taps_to_write(checkpoint)
    nested: dict[str, Any] = {"use_aux_hidden_state": True}
    if taps is not None:
        written[IDS], nested[IDS] = taps, [tap - 1 for tap in taps]
    return {**written, "eagle_config": nested}


def window_json(config: Eagle3Config) -> dict[str, Any]:
    """Fields for a sliding window, where there is one."""
    if config.sliding_window is None:
        return {}
    return {"layer_types": [SLIDING] * config.num_layers, "sliding_window": config.sliding_window}


def refuse(format: str, losses: dict[str, bool], instead: str) -> None:
    """Raise BadCheckpoint for the first thing that a format's readers would not compute."""
    for what, lost in losses.items():
        if lost:
            raise BadCheckpoint(f"{format} cannot hold {what}: its readers would compute something else; {instead}")
