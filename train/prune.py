"""A smaller model cut out of a larger one of a Llama-like family: fewer layers, MLP units, head groups, channels.

What is kept is said by index (`Kept`); which indices those should be is `train.importance`'s business. Minitron
(arXiv 2407.14679) cuts the same things and then distils.

Dimensions: D hidden size, F MLP units, G groups of query heads (one for each key-value head), H head size, L layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec.errors import BadRecipe, UnsupportedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of what can be cut: RMSNorm before attention and a gated MLP, under Llama's names."""


@dataclass(frozen=True)
class Sizes:
    """What to cut a model to; 0 keeps a size as it is.

    Attributes:
        num_layers: layers that stay.
        intermediate_size: MLP units of each layer.
        num_key_value_heads: head groups of each layer; each group keeps all its query heads.
        hidden_size: channels.

    Raises:
        BadRecipe: a negative size.
    """

    num_layers: int = 0
    intermediate_size: int = 0
    num_key_value_heads: int = 0
    hidden_size: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise BadRecipe(f"{name} of a cut is at least 1, or 0 to keep it, got {value}")


@dataclass(frozen=True)
class Kept:
    """Indices that stay, in the old model's numbering.

    Attributes:
        layers: ascending.
        units: of each kept layer's MLP; equally many.
        groups: of each kept layer's attention; equally many.
        channels: of the hidden states.
    """

    layers: tuple[int, ...]
    units: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    channels: tuple[int, ...]


def everything(model: PreTrainedModel) -> Kept:
    """All there is."""
    config = text_config(model)
    layers = tuple(range(config.num_hidden_layers))
    units, groups = tuple(range(config.intermediate_size)), tuple(range(config.num_key_value_heads))
    return Kept(layers, (units,) * len(layers), (groups,) * len(layers), tuple(range(config.hidden_size)))


def cut(model: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """A new model of the same family with what is kept; the old one is left as it is.

    With nothing cut, logits are the same to the bit. Norms average over channels, so their weights are scaled by
    sqrt(D / D') and their epsilon by D / D': channels that were 0 can go without changing anything.

    Raises:
        UnsupportedModel: another family.
        BadRecipe: indices that are not there, or unequally many of them.
    """
    config = text_config(model)
    _check(config, kept)
    smaller = _config(config, kept)
    attention = config._attn_implementation
    result = AutoModelForCausalLM.from_config(smaller, dtype=model.dtype, attn_implementation=attention)
    with torch.no_grad():
        result.load_state_dict(_tensors(model, config, kept))
    result.generation_config = copy.deepcopy(model.generation_config)
    return cast(Any, result).eval().to(model.device)


def text_config(model: PreTrainedModel) -> Any:
    """The config of a model that can be cut.

    Raises:
        UnsupportedModel: another family.
    """
    if model.config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be cut: only the families {', '.join(FAMILIES)} can. Begin with a smaller "
            "model of this family, or with a fresh one"
        )
    return model.config


def head_size(config: Any) -> int:
    """H."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _check(config: Any, kept: Kept) -> None:
    wanted = [
        ("layers", (kept.layers,), config.num_hidden_layers),
        ("MLP units", kept.units, config.intermediate_size),
        ("head groups", kept.groups, config.num_key_value_heads),
        ("channels", (kept.channels,), config.hidden_size),
    ]
    for name, lists, there in wanted:
        if len({len(chosen) for chosen in lists}) != 1 or not lists[0]:
            raise BadRecipe(f"a cut keeps some {name}, equally many in each layer")
        if any(sorted({*chosen}) != list(chosen) or not 0 <= chosen[0] <= chosen[-1] < there for chosen in lists):
            raise BadRecipe(f"a cut keeps {name} in ascending order out of {there}")
    if not len(kept.layers) == len(kept.units) == len(kept.groups):
        raise BadRecipe("a cut says for each layer that it keeps which MLP units and head groups stay")


def _config(config: Any, kept: Kept) -> Any:
    """The smaller model's config."""
    smaller = copy.deepcopy(config)
    smaller.head_dim = head_size(config)
    smaller.num_attention_heads = len(kept.groups[0]) * (config.num_attention_heads // config.num_key_value_heads)
    smaller.num_key_value_heads = len(kept.groups[0])
    smaller.intermediate_size = len(kept.units[0])
    smaller.num_hidden_layers = len(kept.layers)
    smaller.hidden_size = len(kept.channels)
    smaller.rms_norm_eps = config.rms_norm_eps * config.hidden_size / smaller.hidden_size
    if getattr(config, "layer_types", None):
        smaller.layer_types = [config.layer_types[layer] for layer in kept.layers]
    return smaller


def _tensors(model: PreTrainedModel, config: Any, kept: Kept) -> dict[str, Tensor]:
    """The smaller model's state dict."""
    tensors = {}
    for name, value in model.state_dict().items():
        found = _IN_LAYER.fullmatch(name)
        if found is None:
            tensors[name] = _sliced(name, value, _OUTSIDE[name], config, kept, 0)
        elif int(found[1]) in kept.layers:
            place = kept.layers.index(int(found[1]))
            tensors[f"model.layers.{place}.{found[2]}"] = _sliced(name, value, _INSIDE[found[2]], config, kept, place)
    return tensors


def _sliced(name: str, value: Tensor, axes: tuple[str, ...], config: Any, kept: Kept, place: int) -> Tensor:
    for axis, what in enumerate(axes):
        value = value.index_select(axis, _INDICES[what](value.shape[axis], config, kept, place).to(value.device))
    if name.endswith("norm.weight") and axes == ("channels",):
        value = value * (config.hidden_size / len(kept.channels)) ** 0.5
    return value.contiguous()


def _blocks(chosen: tuple[int, ...], size: int) -> Tensor:
    """Indices of blocks of `size` that lie one after the other."""
    return (torch.tensor(chosen)[:, None] * size + torch.arange(size)).reshape(-1)


_INDICES: dict[str, Callable[[int, Any, Kept, int], Tensor]] = {
    "all": lambda size, _config, _kept, _place: torch.arange(size),
    "channels": lambda _size, _config, kept, _place: torch.tensor(kept.channels),
    "units": lambda _size, _config, kept, place: torch.tensor(kept.units[place]),
    "keys": lambda _size, config, kept, place: _blocks(kept.groups[place], head_size(config)),
    "queries": lambda _size, config, kept, place: _blocks(
        kept.groups[place], head_size(config) * config.num_attention_heads // config.num_key_value_heads
    ),
}
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_INSIDE: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj.weight": ("queries", "channels"), "self_attn.q_proj.bias": ("queries",),
    "self_attn.k_proj.weight": ("keys", "channels"), "self_attn.k_proj.bias": ("keys",),
    "self_attn.v_proj.weight": ("keys", "channels"), "self_attn.v_proj.bias": ("keys",),
    "self_attn.o_proj.weight": ("channels", "queries"), "self_attn.o_proj.bias": ("channels",),
    "self_attn.q_norm.weight": ("all",), "self_attn.k_norm.weight": ("all",),
    "mlp.gate_proj.weight": ("units", "channels"), "mlp.gate_proj.bias": ("units",),
    "mlp.up_proj.weight": ("units", "channels"), "mlp.up_proj.bias": ("units",),
    "mlp.down_proj.weight": ("channels", "units"), "mlp.down_proj.bias": ("channels",),
    "input_layernorm.weight": ("channels",), "post_attention_layernorm.weight": ("channels",),
}  # fmt: skip
"""Axes of the tensors of a layer; the four families have no others."""
_OUTSIDE: dict[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("all", "channels"),
    "model.norm.weight": ("channels",),
    "lm_head.weight": ("all", "channels"),
}
