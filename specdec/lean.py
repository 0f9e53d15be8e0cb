"""A small model's steps without what makes transformers' forward general: for draft models, which take many small ones.

A step of a few nodes through a small model is dispatch and little else. transformers builds a mask, positions, an
output object and a call for every part of every family; a model in the manner of Llama needs none of that. Its own
modules are called in the order in which they are used, so weights, packed or quantised layers and adapters are
whatever they are at that moment; only small matrices are copied, to be joined. Prompts, and whatever else is no small
step, go through the model's own forward.

Which models that is right for is not looked up in a list: the parts have to be there, and steps have to give the
logits of the model's own forward. A draft may round differently from its model: the law that its tokens come from is
the one that verification is told.

Dimensions: B sequences, Q query nodes, C cache columns and queries, D hidden size, H query heads, G key-value heads,
E size of one head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from specdec.context import Context, Runner
from specdec.heads.layer import CosSin, by_kind, grouped_attention, normed_at_once, turns
from specdec.joined import Joined
from specdec.target import MASKED_ATTENTION, Form, Mask, Target, TargetOutput

AGREES = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Largest difference from the model's own logits, as a share of the largest of them, by dtype."""
AGREES_NARROW = 0.05
"""The same in 16 bits and less, where the order of roundings shows."""

STATIC_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary types whose frequencies do not depend on the length of the text."""


class NotLean(Exception):
    """The model has other parts; says which."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm by the weight of a module, [E] or [D]."""

    module: Any
    eps: float

    @staticmethod
    def of(owner: Any, name: str) -> Norm:
        """By what transformers' norms of this kind are made of."""
        module = _part(owner, name)
        if [parameter for parameter, _ in module.named_parameters()] != ["weight"]:
            raise NotLean("a norm that has more, or less, than a weight")
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(eps, float):
            raise NotLean("a norm without an epsilon")
        return Norm(module, eps)

    def __call__(self, states: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        if not states.is_cpu:
            return F.rms_norm(states, states.shape[-1:], self.module.weight, self.eps)
        return normed_at_once(states, self.module.weight, self.eps)


class LeanLayer:
    """One decoder layer: attention and a gated MLP, each behind its norm and beside its residual.

    Linear parts are looked up at every call, so that an adapter that took a part's place is called as well.
    """

    def __init__(self, layer: Any, index: int, head_size: int) -> None:
        self.index, self.head_size = index, head_size
        self.attention, self.mlp = _part(layer, "self_attn"), _part(layer, "mlp")
        self.norm, self.norm_after = Norm.of(layer, "input_layernorm"), Norm.of(layer, "post_attention_layernorm")
        of_heads = [Norm.of(self.attention, name) for name in _OF_HEADS if hasattr(self.attention, name)]
        self.qkv = Joined(self.attention, ("q_proj", "k_proj", "v_proj"))
        self.gate_and_up = Joined(self.mlp, ("gate_proj", "up_proj"))
        self.heads, self.groups = (
            _part(self.attention, name).out_features // head_size for name in ("q_proj", "k_proj")
        )
        if len(of_heads) == 1:
            raise NotLean("a norm of queries or of keys, but not of both")
        self.of_heads = (of_heads[0], of_heads[1]) if of_heads else None
        if not callable(getattr(self.mlp, "act_fn", None)):
            raise NotLean("an MLP without an activation")

    @property
    def linear_parts(self) -> list[nn.Module]:
        """What is called as a module."""
        return [_part(self.attention, f"{name}_proj") for name in "qkvo"] + [_part(self.mlp, name) for name in _OF_MLP]

    @property
    def norms(self) -> list[Norm]:
        """What is not."""
        return [self.norm, self.norm_after, *(self.of_heads or ())]

    def __call__(self, hidden: Tensor, cos_sin: CosSin, mask: Tensor | None, cache: Cache) -> Tensor:
        """hidden [B, Q, D] -> [B, Q, D]."""
        hidden = hidden + self._attend(self.norm(hidden), cos_sin, mask, cache)
        gate, up = self.gate_and_up.apart(self.norm_after(hidden))
        return hidden + self.mlp.down_proj(self.mlp.act_fn(gate) * up)

    def _attend(self, states: Tensor, cos_sin: CosSin, mask: Tensor | None, cache: Cache) -> Tensor:
        rows, width, _ = states.shape
        projected = self.qkv(states).view(rows, width, -1, self.head_size)
        queries, keys, values = by_kind(projected, self.heads, self.groups, cos_sin, self.of_heads)
        keys, values = cache.update(keys, values, self.index)
        mixed = grouped_attention(queries, keys, values, mask)
        return self.attention.o_proj(mixed.transpose(1, 2).flatten(2))


_OF_MLP = ("gate_proj", "up_proj", "down_proj")
_OF_HEADS = ("q_norm", "k_norm")


class LeanModel:
    """What a Context asks of a model; see the module.

    Args:
        target: the model's adapter, probed.

    Raises:
        NotLean: it has other parts than this forward knows, or parts that something else watches or moves.
    """

    def __init__(self, target: Target) -> None:
        decoder: Any = target.model.get_decoder()
        rotary = _part(decoder, "rotary_emb")
        if target.form != "tree" or target.kinds != ("full_attention",) or target.attention not in MASKED_ATTENTION:
            raise NotLean("attention that is not full, or takes no additive mask")
        if getattr(rotary, "rope_type", None) not in STATIC_ROTARY:
            raise NotLean("rotary positions that depend on the text's length")
        self.target, self.rotary = target, rotary
        head_size = 2 * rotary.inv_freq.numel()
        self.layers = [LeanLayer(layer, index, head_size) for index, layer in enumerate(target.layers)]
        self.norm = Norm.of(decoder, "norm")
        self._check_parts()
        # What a Context asks for in every step.
        self.num_layers, self.kinds, self.window, self.chunk = target.num_layers, target.kinds, None, None
        self.form: Form = "tree"

    def _check_parts(self) -> None:
        """Nothing of the model is left out, and nobody listens to a part that is not called as a module."""
        model = self.target.model
        called = [self.target.embedding, self.target.lm_head, *(p for layer in self.layers for p in layer.linear_parts)]
        norms = [self.norm.module, *(norm.module for layer in self.layers for norm in layer.norms)]
        known = {id(p) for module in (*called, *norms) for p in module.parameters()}
        if any(id(p) not in known for p in model.parameters()):
            raise NotLean("parameters that this forward would leave out")
        heard = {id(part) for module in called for part in module.modules()}
        for module in model.modules():
            if hasattr(module, "_hf_hook") or (id(module) not in heard and _is_altered(module)):
                raise NotLean("modules that are watched, compiled or patched")

    @property
    def device(self) -> torch.device:
        """Where input ids go; a model asks all its parameters in turn."""
        return self.norm.module.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and masks."""
        return self.norm.module.weight.dtype

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Mask,
        cache: Cache,
        *,
        taps: tuple[int, ...] = (),
        keep_logits: int = 0,
    ) -> TargetOutput:
        """As Target.forward; lean where every node has a row in an additive mask, or is one that sees all."""
        small = mask.ndim == 4 if isinstance(mask, Tensor) else mask is None and input_ids.shape[1] == 1
        if taps or not small or keep_logits is None:
            return self.target.forward(input_ids, positions, mask, cache, taps=taps, keep_logits=keep_logits)
        assert mask is None or isinstance(mask, Tensor)
        hidden = self.target.embedding(input_ids)
        cos, sin = turns(positions, self.rotary.inv_freq.float(), self.rotary.attention_scaling)
        cos_sin = cos.to(hidden.dtype), sin.to(hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, cos_sin, mask, cache)
        return TargetOutput(self.target.logits_of(self.norm(hidden[:, -keep_logits:])))


def _part(owner: Any, name: str) -> Any:
    part = getattr(owner, name, None)
    if not isinstance(part, nn.Module):
        raise NotLean(f"no {name}")
    return part


def _is_altered(module: nn.Module) -> bool:
    """Whether to call this module is more than to run its class's forward."""
    return (
        bool(module._forward_hooks or module._forward_pre_hooks)
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or "_orig_mod" in module._modules  # torch.compile's wrapper, whose class takes seconds to import
    )


_agrees: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()
"""Of models whose steps were compared: under which circumstances, and whether they gave the same logits."""


def lean(target: Target) -> Runner:
    """The model as a Context should run it: lean where that gives the same logits, else as it is.

    Compared once for each model while dtype, device and attention stay as they are, by a few forwards of a few tokens.
    """
    try:
        model = LeanModel(target)
        circumstances = (target.attention, target.dtype, target.device.type)
        if _agrees.get(target.model, (None,))[0] != circumstances:
            _agrees[target.model] = circumstances, agrees(model, target)
        return model if _agrees[target.model][1] else target
    except Exception:  # parts under these names may be anything; the model's own forward is right for all of them
        return target


@torch.inference_mode()
def agrees(model: LeanModel, target: Target) -> bool:
    """Whether a tree, rows of a batch and a single step give the logits of the model's own forward, within rounding."""
    ours, theirs = (_logits_of_steps(runner, target.vocab_size) for runner in (model, target))
    largest = max(float(logits.abs().max()) for logits in theirs)
    apart = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    return apart <= AGREES.get(target.dtype, AGREES_NARROW) * largest


def _logits_of_steps(runner: Runner, vocab_size: int) -> list[Tensor]:
    """Two rows of unequal length: siblings and a child after the prompts, a token each, then one row alone."""
    ids = torch.randint(0, vocab_size, (2, 10), generator=torch.Generator().manual_seed(0))
    prompts, nodes, last = ids.split([6, 3, 1], 1)
    context = Context(runner)
    context.prefill([prompts[0].tolist(), prompts[1, 2:].tolist()])
    sees = torch.tensor([[True, False, False], [False, True, False], [True, False, True]]).expand(2, -1, -1)
    tree = context.run(nodes, torch.tensor([0, 0, 1]).expand(2, -1), sees).logits
    context.keep([[0, 2], [1]])
    after = context.extend(last, [1, 1]).logits
    context.select([0])
    return [logits.float() for logits in (tree, after, context.extend(last[:1], [1]).logits)]
