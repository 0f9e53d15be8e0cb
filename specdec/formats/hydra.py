"""Hydra and Hydra++: config.json and hydra_lm_head.pt.

Names are those of the trainers: `hydra_mlp.{head}.{place}.linear.weight`, where Hydra++ has a dropout before every
block and before the output matrix, which shifts the places to 1, 3, 5, ... Blocks after a head's first are one module
repeated, so the file holds equal copies. Copies of the target's embedding are known and not needed.

The trainers do not write the sizes of Hydra++'s layer: it is "as the target's". Its heads, rotary base and norm are
then taken from the target when the head is loaded (HydraConfig.prefix_from_target). We write them: `prefix_config`.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint, config_from_json
from specdec.formats.folder import Folder, same_values, write_json, write_tensors
from specdec.formats.layer_json import checked_config, read_layer
from specdec.heads.hydra import HydraConfig, HydraHead
from specdec.heads.layer import LayerConfig

NAME = "hydra"
KINDS = ("hydra",)
PREFIX = "prefix_embeding_layer."
FIELDS = (
    "hydra_num_heads", "hydra_num_layers", "hydra_head_arch", "base_model_name_or_path", "grounded_heads",
    "hidden_state_offset", "prefix_config",
)  # fmt: skip
"""Fields of config.json that are made anew on writing."""

COPIES = ("input_embed_fn.weight", f"{PREFIX}embed_tokens.weight", f"{PREFIX}layers.0.self_attn.rotary_emb.inv_freq")
"""Tensors that the trainers save and no reader needs."""

_BLOCK = re.compile(r"hydra_mlp\.(\d+)\.(\d+)\.linear\.weight")


def matches(folder: Folder) -> bool:
    """Blocks under Hydra's names, or a config that names one of its architectures."""
    return any(_BLOCK.fullmatch(name) for name in folder.names) or "hydra_head_arch" in folder.config


def read(folder: Folder) -> HeadCheckpoint:
    """Heads, blocks and architecture from the names; the config may say otherwise."""
    raw, where = folder.require_config(), str(folder.path / "config.json")
    places = [(int(found[1]), int(found[2])) for name in folder.names if (found := _BLOCK.fullmatch(name))]
    if not places:
        raise BadCheckpoint(f"{where}: hydra_head_arch {raw['hydra_head_arch']!r} is not known; mlp and prefix-mlp are")
    if raw.get("hidden_state_offset", 0) != 0:
        raise BadCheckpoint(f"{where}: hidden_state_offset is {raw['hidden_state_offset']!r}; only 0 is known")
    shifted = any(name.startswith(PREFIX) for name in folder.names)
    heads, blocks = (len(set(indices)) for indices in zip(*places, strict=True))  # `take` names gaps between them
    vocab_size, hidden = (*folder.shape(_output_name(0, shifted, "weight")), 0)[:2]
    config = checked_config(
        HydraConfig,
        where,
        hidden_size=hidden,
        vocab_size=vocab_size,
        num_heads=heads,
        num_layers=blocks,
        grounded=folder.has(f"{_block_name(0, 0, shifted)}.res_connection.weight"),
        shared_blocks=_are_shared(folder, heads, blocks, shifted),
        prefix=_read_prefix(folder, raw, hidden) if shifted else None,
        prefix_from_target=shifted and "prefix_config" not in raw,
    )
    tensors = _take(folder, config)
    folder.ignore(*COPIES)
    target: dict[str, Any] = {"hidden_size": hidden, "vocab_size": vocab_size}
    if name := raw.get("base_model_name_or_path"):
        target["name"] = name
    extra = {key: value for key, value in raw.items() if key not in FIELDS}
    if folder.files[0].suffix == ".safetensors":
        extra["weights"] = "safetensors"
    return HeadCheckpoint("hydra", config, tensors, target, NAME, {NAME: extra} if extra else {})


def _block_name(head: int, block: int, shifted: bool) -> str:
    return f"hydra_mlp.{head}.{2 * block + 1 if shifted else block}"


def _output_name(head: int, shifted: bool, kind: str) -> str:
    return f"hydra_lm_head.{head}.1.{kind}" if shifted else f"hydra_lm_head.{head}.{kind}"


def _are_shared(folder: Folder, heads: int, blocks: int, shifted: bool) -> bool:
    """Whether all blocks after the first of each head are copies of one."""
    for head in range(heads):
        for kind in ("weight", "bias"):
            names = [f"{_block_name(head, block, shifted)}.linear.{kind}" for block in range(1, blocks)]
            if not all(folder.has(name) for name in names):
                continue  # which `take` will name
            copies = [folder.take(name) for name in names]
            if not all(same_values(copy, copies[0]) for copy in copies[1:]):
                return False
    return True


def _read_prefix(folder: Folder, raw: dict[str, Any], hidden: int) -> LayerConfig:
    """What the config says of Hydra++'s layer; or what its shapes show, heads being a guess until it is fitted."""
    if "prefix_config" in raw:
        where = f"{folder.path / 'config.json'}: prefix_config"
        layer = config_from_json(LayerConfig, raw["prefix_config"], where)
        read_layer(asdict(layer), where)  # for its checks
        return layer
    layer = f"{PREFIX}layers.0"
    queries, keys = (folder.shape(f"{layer}.self_attn.{name}_proj.weight")[0] for name in "qk")
    size = next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if queries % size == 0 and keys % size == 0)
    return LayerConfig(
        hidden_size=hidden,
        intermediate_size=folder.shape(f"{layer}.mlp.gate_proj.weight")[0],
        num_attention_heads=queries // size,
        num_key_value_heads=keys // size,
        head_dim=size,
        attention_bias=folder.has(f"{layer}.self_attn.q_proj.bias"),
        output_bias=folder.has(f"{layer}.self_attn.o_proj.bias"),
        mlp_bias=folder.has(f"{layer}.mlp.gate_proj.bias"),
    )


def _take(folder: Folder, config: HydraConfig) -> dict[str, Tensor]:
    """The state dict; all copies of shared blocks are taken, the last one is kept."""
    with torch.device("meta"):
        expected = HydraHead(config).state_dict()
    return {ours: folder.take(theirs, tuple(expected[ours].shape)) for theirs, ours in _names(config, expected).items()}


def _names(config: HydraConfig, state: dict[str, Any]) -> dict[str, str]:
    """Every name in a published file, and the name of our state dict that it holds."""
    shifted, names = config.prefix is not None, {}
    for ours in state:
        if ours.startswith("prefix."):
            names[PREFIX + ours.removeprefix("prefix.")] = ours
            continue
        _, head, part, rest = ours.split(".", 3)
        if part == "lm_head":
            names[_output_name(int(head), shifted, rest)] = ours
        elif part == "first":
            names[f"{_block_name(int(head), 0, shifted)}.{rest}"] = ours
        else:
            index, rest = rest.split(".", 1)
            repeated = range(config.num_layers - 1) if config.shared_blocks else (int(index),)
            names |= {f"{_block_name(int(head), 1 + block, shifted)}.{rest}": ours for block in repeated}
    return names


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """As a pickle, which is what the published loader opens; as safetensors when it was read from one."""
    config: HydraConfig = checkpoint.config
    extra = dict(checkpoint.extra.get(NAME, {}))
    suffix = "safetensors" if extra.pop("weights", None) == "safetensors" else "pt"
    described: dict[str, Any] = {
        "hydra_num_heads": config.num_heads,
        "hydra_num_layers": config.num_layers,
        "hydra_head_arch": "mlp" if config.prefix is None else "prefix-mlp",
        "grounded_heads": config.grounded,
        "hidden_state_offset": 0,
    }
    if name := checkpoint.target.get("name"):
        described["base_model_name_or_path"] = name
    if config.prefix is not None and not config.prefix_from_target:
        described["prefix_config"] = asdict(config.prefix)
    write_json(path / "config.json", described | extra)
    names = _names(config, checkpoint.tensors)
    write_tensors(
        path / f"hydra_lm_head.{suffix}", {theirs: checkpoint.tensors[ours] for theirs, ours in names.items()}
    )
