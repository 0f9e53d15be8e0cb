"""The target adapter: any causal language model of transformers behind four calls, no modelling code of ours.

It knows which attention mask the model's layers eat, hands out hidden states (taps), and runs layers
lo..hi with the model's own norms, heads and scalings by swapping its list of layers.

Masks are additive, 0 and the dtype's minimum: eager attention *adds* a boolean mask to the scores and goes silently
wrong, sdpa takes both. FlexAttention alone takes a BlockMask, and no other.

Dimensions: B sequences, Q query tokens, C cache columns, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from specdec.errors import UnsupportedModel

Form = Literal["tree", "chain"]
LOGIT_SCALING = ("logit_scale", "logits_scaling", "final_logit_softcapping")
"""What a family may do to its logits: a factor, a divisor, a soft cap."""
MASKED_ATTENTION = ("eager", "sdpa", "specdec_sdpa")
"""Attention implementations that take an additive 4-D mask."""
FLEX = "flex_attention"
"""The attention implementation that takes a BlockMask."""

Mask = Tensor | BlockMask | dict[str, Tensor | BlockMask | None] | None
"""What an attention implementation eats, one for each layer kind where a model has several."""

BEFORE_NORM = -1
"""The tap of the last layer's output before the final norm, which no index of `hidden_states` names."""

RECURRENT_KINDS = ("linear_attention", "conv", "mamba", "recurrent", "hybrid", "mamba2", "moe_mamba")


@dataclass
class TargetOutput:
    """What one forward returned.

    Attributes:
        logits: [B, Q or fewer, V], raw, in the model's dtype.
        taps: hidden states by transformers' `hidden_states` index (or BEFORE_NORM), [B, Q, D] each.
        hidden: output of the last layer that ran, before any norm, when layers lo..hi were run.
    """

    logits: Tensor
    taps: dict[int, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None


class _Given(nn.Module):
    """Stands in for a layer whose output is already known; everything else is the layer's own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: not a submodule, so that parameters are not registered twice
        self.output: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_layer")[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class Target:
    """A causal language model as the rest of specdec sees it (draft models use it too).

    Raises:
        UnsupportedModel: encoder-decoder, recurrent state, no cache, or an attention implementation
            that takes no tree mask. The message names what to do.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        refuse_unsupported(model)
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.attention = str(self.config._attn_implementation)
        self.vocab_size = int(self.config.vocab_size)
        self.form: Form = "tree"  # specdec.probe may lower it to "chain"
        self.kinds = layer_kinds(self.config)
        self.takes_positions = "position_ids" in _forward_parameters(model)
        self.takes_logits_to_keep = "logits_to_keep" in _forward_parameters(model)
        self._parent, self._name = find_layers(model, int(self.config.num_hidden_layers))
        self.layers: nn.ModuleList = getattr(self._parent, self._name)
        self._bottoms: dict[int, nn.ModuleList] = {}
        self._tops: dict[int, nn.ModuleList] = {}
        # A config takes its time to say that it lacks something.
        self._scaling = [getattr(self.config, name, None) for name in LOGIT_SCALING]
        self._tuple_length: int | None = None
        self._knows_form = False

    @property
    def num_layers(self) -> int:
        """L, decoder layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    @property
    def embedding(self) -> nn.Module:
        """The module that turns ids into the first layer's input."""
        return self.model.get_input_embeddings()

    @property
    def lm_head(self) -> nn.Module:
        """The module that turns normed states into logits, before any scaling that the family adds."""
        return cast(nn.Module, self.model.get_output_embeddings())

    @property
    def logit_weight(self) -> Tensor:
        """[V, D]: the output matrix with the family's factor or divisor in it, for heads that begin as its copies."""
        weight = cast(Tensor, self.lm_head.weight)
        scale, divisor, _ = self._scaling
        return weight if scale is None and divisor is None else weight * (scale or 1) / (divisor or 1)

    def logits_of(self, states: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D] after the final norm, with the scale or cap that some families add."""
        logits = self.lm_head(states)
        scale, divisor, cap = self._scaling
        if scale is not None:  # Cohere
            logits = logits * scale
        if divisor is not None:  # Granite
            logits = logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap  # Gemma

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states and masks."""
        return self.model.dtype

    @property
    def max_positions(self) -> int | None:
        """The longest text the model was made for, when its config says."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def window(self) -> int | None:
        """Columns that a sliding-window layer sees, itself included."""
        return getattr(self.config, "sliding_window", None)

    @property
    def chunk(self) -> int | None:
        """Chunk length of chunked attention."""
        return getattr(self.config, "attention_chunk_size", None)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Mask,
        cache: Cache,
        *,
        taps: tuple[int, ...] = (),
        keep_logits: int | None = 0,
    ) -> TargetOutput:
        """Run all layers on `input_ids` [B, Q], appending Q columns to the cache.

        Args:
            input_ids: token ids [B, Q].
            positions: logical positions [B, Q].
            mask: additive [B, 1, Q, C + Q] or a BlockMask, one per layer kind for models with several, or None
                for the model's own causal mask.
            cache: appended to.
            taps: `hidden_states` indices to return, or BEFORE_NORM.
            keep_logits: logits of the last so many positions only; 0 for all, None for none.
        """
        kwargs: dict[str, Any] = {}
        if self.takes_positions:
            kwargs["position_ids"] = positions
        if self.takes_logits_to_keep:
            kwargs["logits_to_keep"] = _no_positions(input_ids) if keep_logits is None else keep_logits
        output = self.call(
            taps, input_ids=input_ids, attention_mask=mask, past_key_values=cache, use_cache=True, **kwargs
        )
        if keep_logits and not self.takes_logits_to_keep:
            output.logits = output.logits[:, -keep_logits:]
        return output

    def call(self, taps: tuple[int, ...], **inputs: Any) -> TargetOutput:
        """The model's own forward with these keyword arguments, and the taps of every position that ran."""
        indices = [tap for tap in taps if tap != BEFORE_NORM]
        if indices:
            inputs["output_hidden_states"] = indices
        with self._last_layer(BEFORE_NORM in taps) as last, self.uncompiled_on_cpu():
            output = self.model(**inputs, return_dict=True)
        return TargetOutput(output.logits, {tap: output.hidden_states[tap] for tap in indices} | last)

    @contextmanager
    def uncompiled_on_cpu(self) -> Iterator[None]:
        """Inside, FlexAttention on a CPU runs as it is written.

        Compiled there, every shape costs half a minute, and where a mask reads tensors by query and shapes change the
        C++ that comes out does not build (torch 2.13). On other devices, and with other attention, nothing happens.
        """
        if self.attention != FLEX or self.device.type != "cpu":
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield

    @contextmanager
    def _last_layer(self, wanted: bool) -> Iterator[dict[int, Tensor]]:
        """Collects the last layer's output under BEFORE_NORM while the model runs, when it is wanted."""
        collected: dict[int, Tensor] = {}
        if not wanted:
            yield collected
            return

        def store(_module: nn.Module, _inputs: Any, output: Any) -> None:
            collected[BEFORE_NORM] = self._states(output)

        hook = self.layers[-1].register_forward_hook(store)
        try:
            yield collected
        finally:
            hook.remove()

    def forward_bottom(
        self,
        num_layers: int,
        input_ids: Tensor,
        positions: Tensor,
        mask: Mask,
        cache: Cache,
        *,
        keep_logits: int | None = 0,
    ) -> TargetOutput:
        """Layers 0..num_layers, then the model's own norm and head.

        Returns logits of that early exit and `hidden` [B, Q, D], the state before the norm, from which
        `forward_top` continues.
        """
        captured: list[Any] = []
        hook = self.layers[num_layers - 1].register_forward_hook(lambda _m, _i, output: captured.append(output))
        try:
            with self._swapped(self._bottom(num_layers)):
                result = self.forward(input_ids, positions, mask, cache, keep_logits=keep_logits)
        finally:
            hook.remove()
        result.hidden = self._states(captured[0])
        return result

    def _states(self, output: Any) -> Tensor:
        """The states in what a layer returned; its form is remembered, for stand-ins have to return the same."""
        self._knows_form = True
        self._tuple_length = len(output) if isinstance(output, tuple) else None
        return output[0] if isinstance(output, tuple) else output

    def forward_top(
        self,
        first_layer: int,
        hidden: Tensor,
        input_ids: Tensor,
        positions: Tensor,
        mask: Mask,
        cache: Cache,
        *,
        taps: tuple[int, ...] = (),
    ) -> TargetOutput:
        """Layers first_layer.. on states [B, Q, D] that the layers below already made.

        The list of layers keeps its length, so that per-layer settings read by index stay aligned. Taps are
        served for layers that run here; a tap at or below `first_layer` must come from the drafter's own states.
        """
        if any(0 <= tap < first_layer for tap in taps):
            raise ValueError(f"taps {taps} lie below layer {first_layer}, where this forward begins")
        collected: dict[int, Tensor] = {}
        hooks = [self._collect(tap, first_layer, collected) for tap in taps if tap != BEFORE_NORM]
        last = tuple(tap for tap in taps if tap == BEFORE_NORM)
        try:
            with self._resumed(first_layer, hidden):
                result = self.forward(input_ids, positions, mask, cache, taps=last)
        finally:
            for hook in hooks:
                hook.remove()
        result.taps |= collected
        return result

    def norm_and_head(self, hidden: Tensor, *, taps: tuple[int, ...] = ()) -> TargetOutput:
        """The final norm and the head alone, with whatever the family does between and after them.

        On states that a forward tapped as BEFORE_NORM, logits and the tap after the norm come out with the bits of
        that forward, where its batch had the same shape.

        Args:
            hidden: [B, Q, D], the last layer's output before the final norm.
            taps: L, the states after the norm, and BEFORE_NORM, the given ones; there are no others here.
        """
        if any(tap not in (self.num_layers, BEFORE_NORM) for tap in taps):
            raise ValueError(f"taps {taps} of layers that do not run between the last layer and the logits")
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        if not self._knows_form:
            self.call((BEFORE_NORM,), input_ids=ids[:1, :1], use_cache=False)
        after: list[Tensor] = []
        hook = self._parent.register_forward_hook(lambda _m, _i, output: after.append(output[0]))
        try:
            with self._resumed(self.num_layers, hidden), self.uncompiled_on_cpu():
                output = self.model(input_ids=ids, use_cache=False, return_dict=True)
        finally:
            hook.remove()
        known = {self.num_layers: after[0], BEFORE_NORM: hidden}
        return TargetOutput(output.logits, {tap: known[tap] for tap in taps})

    @contextmanager
    def _resumed(self, first_layer: int, hidden: Tensor) -> Iterator[None]:
        """Let the layers below `first_layer` answer with states that are known."""
        given = cast(list[_Given], list(self._top(first_layer))[:first_layer])
        output = hidden if self._tuple_length is None else (hidden, *[None] * (self._tuple_length - 1))
        for stand_in in given:
            stand_in.output = output
        try:
            with self._swapped(self._top(first_layer)):
                yield
        finally:
            for stand_in in given:
                stand_in.output = None

    def _collect(self, tap: int, first_layer: int, collected: dict[int, Tensor]) -> Any:
        """A hook that stores hidden_states[tap]; with layers replaced, transformers' own capture miscounts."""
        if tap == self.num_layers:
            raise ValueError("the tap after the final norm is not available in a resumed forward")

        def store(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            collected[tap] = args[0] if args else kwargs["hidden_states"]

        return self.layers[tap].register_forward_pre_hook(store, with_kwargs=True)

    def _bottom(self, num_layers: int) -> nn.ModuleList:
        if num_layers not in self._bottoms:
            self._bottoms[num_layers] = nn.ModuleList(list(self.layers)[:num_layers])
        return self._bottoms[num_layers]

    def _top(self, first_layer: int) -> nn.ModuleList:
        if first_layer not in self._tops:
            given = [_Given(layer) for layer in list(self.layers)[:first_layer]]
            self._tops[first_layer] = nn.ModuleList([*given, *list(self.layers)[first_layer:]])
        return self._tops[first_layer]

    @contextmanager
    def _swapped(self, layers: nn.ModuleList) -> Iterator[None]:
        setattr(self._parent, self._name, layers)
        try:
            yield
        finally:
            setattr(self._parent, self._name, self.layers)


def _no_positions(input_ids: Tensor) -> Tensor:
    """`logits_to_keep` may list positions; this list is empty."""
    return torch.empty(0, dtype=torch.long, device=input_ids.device)


def _forward_parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def layer_kinds(config: Any) -> tuple[str, ...]:
    """The layer kinds of a text config; one kind means one mask, several mean a mask per kind.

    Models without `layer_types` use one mask for all layers: sliding when a window is set, else full.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return tuple(sorted(set(kinds)))
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        return ("sliding_attention",)
    return ("full_attention",)


def find_layers(model: PreTrainedModel, num_layers: int) -> tuple[nn.Module, str]:
    """The module and attribute that hold the list of decoder layers.

    The decoder is searched first: a vision tower beside it may have as many layers.
    """
    for root in (model.get_decoder(), model):
        for module in root.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                    return module, name
    raise UnsupportedModel(
        f"{type(model).__name__} has no list of {num_layers} decoder layers. "
        "specdec needs a decoder-only transformer; use plain model.generate() for this one."
    )


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel for what can be known without running the model."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{name} is an encoder-decoder model; specdec decodes decoder-only causal language models. "
            "Use plain model.generate() for it."
        )
    if not model.can_generate():
        raise UnsupportedModel(f"{name} has no language-model head; load it with AutoModelForCausalLM.")
    config = model.config.get_text_config(decoder=True)
    recurrent = [kind for kind in getattr(config, "layer_types", None) or () if kind in RECURRENT_KINDS]
    if recurrent or getattr(model, "_is_stateful", False):
        kinds = ", ".join(sorted(set(recurrent))) or "recurrent"
        raise UnsupportedModel(
            f"{name} has layers with a running state ({kinds}) that cannot take back a rejected token. "
            "Use plain model.generate(), or an attention-only model of the same family."
        )
    attention = config._attn_implementation
    if attention not in (*MASKED_ATTENTION, FLEX):
        raise UnsupportedModel(
            f"attention implementation {attention!r} takes no tree mask. "
            'Call model.set_attn_implementation("sdpa") (or "eager") first.'
        )
