"""A decoder layer in the manner of Llama, for draft heads that have attention of their own.

RMSNorm, rotary positions, grouped-query attention and a gated MLP under Llama's submodule names, so that tensors of
published heads fit without renaming. Sizes come from the config of any target family; what a family does beyond that
(soft caps, sinks, parallel residuals) is not a head's concern.

Dimensions: B sequences, Q query tokens, C cache columns and queries, D hidden size, H query heads, G key-value heads,
E size of one head, R rotated part of E.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specdec.errors import SpecdecError
from specdec.joined import Joined

CosSin = tuple[Tensor, Tensor]
"""Cosines and sines of the positions of the queries, [B, 1, Q, R] each; the first half of the sines negative."""

FEW_QUERIES = 64
"""Up to here folding a group into the query rows is cheaper than copying keys and values for each of its heads."""


class LayerCache(Protocol):
    """What attention asks of a cache; transformers' caches have it."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """Append [B, G, Q, E] to one layer; returns all of that layer's keys and values, [B, G, C, E] each."""
        ...


@dataclass(frozen=True)
class LayerConfig:
    """Sizes and options of a layer; every field is JSON.

    Attributes:
        attention_bias: biases of the q, k and v projections.
        output_bias: bias of the o projection.
        qk_norm: RMSNorm over E of every query and key head before rotation, as in Qwen3.
        rope_theta: base of the rotary frequencies.
        rope_scaling: `rope_type` and what that type needs, see Rotary; None for the plain frequencies.
        partial_rotary_factor: share of E that is rotated.
        max_position_embeddings: the longest text the layer was made for; some rope types read it.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    max_position_embeddings: int = 2048

    @staticmethod
    def of(text_config: Any) -> LayerConfig:
        """Read from the config of a text model of any family, or from a config.json of such a model.

        What a family lacks takes Llama's value: no key-value heads means as many as query heads, no rotary positions
        (GPT-2, OPT) means the plain ones, an ungated MLP gives its width to a gated one.
        """
        config = SimpleNamespace(**text_config) if isinstance(text_config, Mapping) else text_config
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        theta, scaling, partial = _rope_of(config)
        family = str(getattr(config, "model_type", None) or "")
        bias = bool(_first(config, ("attention_bias",), False))
        return LayerConfig(
            hidden_size=hidden,
            intermediate_size=int(_first(config, _MLP_WIDTHS, 4 * hidden)),
            num_attention_heads=heads,
            num_key_value_heads=int(_first(config, ("num_key_value_heads",), heads)),
            head_dim=int(_first(config, ("head_dim",), hidden // heads)),
            rms_norm_eps=float(_first(config, _EPSILONS, 1e-6)),
            hidden_act=str(_first(config, _ACTIVATION_NAMES, "silu")),
            attention_bias=bias or bool(_first(config, ("qkv_bias",), family.startswith("qwen2"))),
            output_bias=bias,
            mlp_bias=bool(_first(config, ("mlp_bias",), False)),
            qk_norm=family.startswith("qwen3"),
            rope_theta=theta,
            rope_scaling=scaling,
            partial_rotary_factor=partial,
            max_position_embeddings=int(_first(config, ("max_position_embeddings",), 2048)),
        )


_MLP_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
_ACTIVATION_NAMES = ("hidden_activation", "hidden_act", "activation_function")


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of these attributes that is set; families name one thing differently."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), default)


def _rope_of(config: Any) -> tuple[float, dict[str, Any] | None, float]:
    """Base, scaling and rotated share, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    given = _first(config, ("rope_parameters", "rope_scaling"), {})
    if any(isinstance(value, Mapping) for value in given.values()):  # one entry for each layer kind
        given = given.get("full_attention") or next(value for value in given.values() if value)
    rope = dict(given)
    theta = float(rope.pop("rope_theta", None) or _first(config, ("rope_theta", "rotary_emb_base"), 10_000.0))
    share = rope.pop("partial_rotary_factor", None)
    partial = float(_first(config, ("partial_rotary_factor", "rotary_pct"), 1.0) if share is None else share)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    return theta, None if kind == "default" else {"rope_type": kind, **rope}, partial


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight, computed in float32 at least."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        if states.is_cpu and not torch.is_grad_enabled():
            return normed_at_once(states, self.weight, self.eps)
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(states.dtype)


def normed_at_once(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of [..., size] by a weight [size], where many small calls cost more than one that reads twice as much.

    Beside its negative a vector has mean 0 and its own mean square for variance, so that a layer norm, which is one
    call on a CPU, does the work of six.
    """
    size = states.shape[-1]
    return F.layer_norm(torch.cat([states, -states], -1), (2 * size,), eps=eps)[..., :size] * weight


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864) with scaling of type default, linear, llama3 or yarn (2309.00071).

    Types that choose their frequencies by the length of the text (dynamic, longrope) are refused: keys that lie in a
    cache were rotated by the frequencies of a shorter text, and drafts would depend on how the text was cut.

    Raises:
        SpecdecError: a type that is not known, or one whose numbers are missing.
    """

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        kind = (config.rope_scaling or {}).get("rope_type", "default")
        if kind not in _FREQUENCIES:
            raise SpecdecError(
                f"draft heads know the rope types {', '.join(_FREQUENCIES)}, got {kind!r}. "
                "Give the head positions of its own: rope_scaling=None"
            )
        try:
            frequencies, self.scale = _FREQUENCIES[kind](config)
        except KeyError as missing:
            raise SpecdecError(f"rope type {kind!r} needs {missing}, which rope_scaling does not give") from None
        # Not a buffer: a move to bfloat16 would round the frequencies. Made on the CPU even under a meta device.
        self._frequencies = frequencies

    def forward(self, positions: Tensor) -> CosSin:
        """Logical positions [B, Q] -> cosines and sines [B, 1, Q, R] in float32."""
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        return turns(positions, self._frequencies, self.scale)


def turns(positions: Tensor, frequencies: Tensor, scale: float) -> CosSin:
    """Of positions [B, Q] by float32 frequencies [R / 2]; what `rotate` asks for."""
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _plain(config: LayerConfig) -> tuple[Tensor, float]:
    """Frequencies [R / 2] = theta ** (-2 i / R)."""
    size = int(config.head_dim * config.partial_rotary_factor)
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    return 1.0 / config.rope_theta**exponents, 1.0


def _linear(config: LayerConfig) -> tuple[Tensor, float]:
    """All frequencies divided by the factor."""
    assert config.rope_scaling is not None
    return _plain(config)[0] / config.rope_scaling["factor"], 1.0


def _llama3(config: LayerConfig) -> tuple[Tensor, float]:
    """Low frequencies divided by the factor, high ones as they are, a linear passage between (Llama 3.1)."""
    assert config.rope_scaling is not None
    rope, plain = config.rope_scaling, _plain(config)[0]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = _original_length(config) * plain / (2 * math.pi)  # in a text of the original length
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (share + (1 - share) / rope["factor"]), 1.0


def _yarn(config: LayerConfig) -> tuple[Tensor, float]:
    """A ramp over the dimensions from plain to divided frequencies, and a scale on cosines and sines (section 3.2)."""
    assert config.rope_scaling is not None
    rope, plain = config.rope_scaling, _plain(config)[0]
    length, size = _original_length(config), 2 * len(plain)
    factor = rope.get("factor") or config.max_position_embeddings / length

    def dimension(turns: float) -> float:
        """The dimension that makes so many turns in a text of the original length."""
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(len(plain), dtype=torch.float32, device="cpu") - low) / ((high - low) or 0.001)
    divided = ramp.clamp(0, 1)
    return plain / factor * divided + plain * (1 - divided), _yarn_scale(rope, factor)


def _yarn_scale(rope: Mapping[str, Any], factor: float) -> float:
    """The scale on cosines and sines; DeepSeek's mscale pair divides one temperature by another."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


def _original_length(config: LayerConfig) -> int:
    assert config.rope_scaling is not None
    return config.rope_scaling.get("original_max_position_embeddings") or config.max_position_embeddings


_FREQUENCIES: dict[str, Callable[[LayerConfig], tuple[Tensor, float]]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    `keys_and_values` and `attend` are separate for heads whose keys come from elsewhere than their queries.
    Without gradients small projections are one product. `recomputed` as in MLP.

    Args:
        config: sizes.
        layer_index: which layer of the cache is this one's.
        input_size: width that the q, k and v projections read, where it is not D (EAGLE-3 reads 2 D).
    """

    def __init__(self, config: LayerConfig, layer_index: int, input_size: int | None = None) -> None:
        super().__init__()
        size, width = config.head_dim, input_size or config.hidden_size
        self.recomputed = False
        self.head_dim, self.layer_index = size, layer_index
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=config.attention_bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, bias=config.attention_bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, bias=config.attention_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._joined = Joined(self, ("q_proj", "k_proj", "v_proj"))

    def forward(self, states: Tensor, cos_sin: CosSin, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        """Attention of states [B, Q, input_size] over themselves and the cache -> [B, Q, D].

        `mask` is additive, [B or 1, 1, Q, C] in the states' dtype; None lets every query see every column.
        """
        if torch.is_grad_enabled():
            queries, (keys, values) = self.queries(states, cos_sin), self.keys_and_values(states, cos_sin)
        else:
            queries, keys, values = self._at_once(states, cos_sin)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_index)
        return self.attend(queries, keys, values, mask)

    def _at_once(self, states: Tensor, cos_sin: CosSin) -> tuple[Tensor, Tensor, Tensor]:
        """What `queries` and `keys_and_values` give, in fewer calls."""
        norms = None if isinstance(self.q_norm, nn.Identity) else (self.q_norm, self.k_norm)
        projected = self._joined(states).unflatten(-1, (-1, self.head_dim))
        return by_kind(projected, self._heads, self._groups, cos_sin, norms)

    def queries(self, states: Tensor, cos_sin: CosSin) -> Tensor:
        """[B, Q, input_size] -> rotated queries [B, H, Q, E]."""
        return rotate(self.q_norm(self._by_head(self.q_proj(states))), cos_sin)

    def keys_and_values(self, states: Tensor, cos_sin: CosSin) -> tuple[Tensor, Tensor]:
        """[B, Q, input_size] -> rotated keys and values, [B, G, Q, E] each."""
        keys = rotate(self.k_norm(self._by_head(self.k_proj(states))), cos_sin)
        return keys, self._by_head(self.v_proj(states))

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Queries [B, H, Q, E] over keys and values [B, G, C, E] -> [B, Q, D]."""
        mixed = _perhaps_recomputed(self, grouped_attention, queries, keys, values, mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _by_head(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _perhaps_recomputed(module: Any, compute: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """What `compute` gives; in training, where the module says so, without keeping what happens in between."""
    if module.recomputed and module.training and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(compute, *inputs, use_reentrant=False))
    return compute(*inputs)


def by_kind(
    projected: Tensor,
    heads: int,
    groups: int,
    cos_sin: CosSin,
    norms: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Projections [B, Q, H + 2 G, E] -> rotated queries [B, H, Q, E], rotated keys and values [B, G, Q, E].

    `norms` are those of query heads and of key heads.
    """
    turned, values = projected.split([heads + groups, groups], 2)
    if norms is not None:
        queries, keys = turned.split([heads, groups], 2)
        turned = torch.cat([norms[0](queries), norms[1](keys)], 2)
    turned = rotate(turned.transpose(1, 2), cos_sin)
    return turned[:, :heads], turned[:, heads:], values.transpose(1, 2)


def rotate(states: Tensor, cos_sin: CosSin) -> Tensor:
    """Turn the first R of E dimensions of [B, heads, Q, E] by their positions; the rest stays."""
    cos, sin = (part.to(states.dtype) for part in cos_sin)
    size = cos.shape[-1]
    if size == states.shape[-1]:
        return states * cos + states.roll(size // 2, -1) * sin
    turned, rest = states[..., :size], states[..., size:]
    return torch.cat([turned * cos + turned.roll(size // 2, -1) * sin, rest], -1)


def grouped_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """sdpa of [B, H, Q, E] over [B, G, C, E] -> [B, H, Q, E]."""
    group = queries.shape[1] // keys.shape[1]
    if group == 1:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    if queries.shape[2] > FEW_QUERIES:
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    folded = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[3])  # [B, G, group Q, E]
    mask = None if mask is None else mask.repeat(1, 1, group, 1)
    return F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask).reshape(queries.shape)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)).

    Without gradients small projections are one product. With `recomputed` the inner states are computed again in the
    backward pass.

    Raises:
        SpecdecError: an activation that is not known.
    """

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        if config.hidden_act not in _ACTIVATIONS:
            raise SpecdecError(
                f"draft heads know the activations {', '.join(_ACTIVATIONS)}, got hidden_act={config.hidden_act!r}"
            )
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.recomputed = False
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self._joined = Joined(self, ("gate_proj", "up_proj"))

    def forward(self, states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return _perhaps_recomputed(self, self._gated, states)

    def _gated(self, states: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.down_proj(self.activation(self.gate_proj(states)) * self.up_proj(states))
        gate, up = self._joined.apart(states)
        return self.down_proj(self.activation(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind its norm and beside its residual.

    Args:
        config: sizes.
        layer_index: which layer of the cache is this one's.
        input_norm: False leaves out the norm before attention (EAGLE-1's first layer).
    """

    def __init__(self, config: LayerConfig, layer_index: int, *, input_norm: bool = True) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if input_norm else nn.Identity()
        self.self_attn = Attention(config, layer_index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, cos_sin: CosSin, mask: Tensor | None, cache: LayerCache | None = None) -> Tensor:
        """[B, Q, D] -> [B, Q, D]; mask and cache as in Attention."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos_sin, mask, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def causal_mask(length: int, states: Tensor) -> Tensor:
    """Additive [1, 1, length, length] in dtype and device of `states`: each token sees itself and what is before."""
    hidden = torch.ones(length, length, dtype=torch.bool, device=states.device).triu(1)
    mask = states.new_zeros(1, 1, length, length)
    return mask.masked_fill_(hidden, torch.finfo(states.dtype).min)
