"""Faster forwards for narrow trees, for plain and speculative decoding alike.

On a CPU the default fp32 matrix product has a cliff: two rows cost twice one row, so that any verification costs two
decode steps. oneDNN with prepacked weights has none, and makes single rows faster, too. With grouped-query attention
and a mask, transformers' sdpa path copies keys and values once for every query head of a group; folding the group into
the query rows avoids it on any device.

Both change the model in place through public surfaces and nothing else: parameters, state dict and classes stay.
`deoptimize` takes everything back.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FOLDED = "specdec_sdpa"
TYPICAL_ROWS = 8
"""Rows that oneDNN lays the packed weights out for."""
MIN_FLOAT32_ELEMENTS = 1 << 18
"""Below this a call through oneDNN costs more than it saves: 26 against 6 microseconds for 128 x 128."""


def optimize(model: PreTrainedModel, *, min_elements: int | None = None) -> PreTrainedModel:
    """Pack linear layers (CPU) and fold grouped queries (sdpa) in place; returns the model.

    Args:
        model: any transformers model.
        min_elements: pack weights from this size on; by default all in bfloat16, and in float32 those that do not
            fit a core's cache, since small ones are faster as they are (docs/benchmarks).

    Packed weights are a second copy of the linear layers' memory. They follow in-place changes of the weights and a
    move to another dtype by packing anew. Training, other devices, and bfloat16 on a CPU without products for it keep
    the ordinary product. Output differs from the unoptimised model's by rounding only, so compare against a baseline
    with the same optimisation. Calling it twice changes nothing.
    """
    if torch.backends.mkldnn.is_available():
        for module in model.modules():
            if type(module) is nn.Linear and "forward" not in module.__dict__ and _pays(module.weight, min_elements):
                module.forward = PackedForward(module)  # type: ignore[method-assign]
    if model.config.get_text_config(decoder=True)._attn_implementation == "sdpa":
        AttentionInterface.register(FOLDED, folded_attention)
        AttentionMaskInterface.register(FOLDED, sdpa_mask)
        model.set_attn_implementation(FOLDED)
    return model


def _packable(dtype: torch.dtype) -> bool:
    """Whether this CPU takes packed weights of a dtype: bfloat16 wants AVX-512 or AVX-NE-CONVERT."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _takes_bfloat16())


@functools.cache
def _takes_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _pays(weight: Tensor, min_elements: int | None) -> bool:
    if not _packable(weight.dtype):
        return False
    if min_elements is None:
        min_elements = 0 if weight.dtype == torch.bfloat16 else MIN_FLOAT32_ELEMENTS
    return weight.numel() >= min_elements


def deoptimize(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `optimize`; does nothing on a model that is not optimised. Returns the model."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), PackedForward):
            del module.forward
    if model.config.get_text_config(decoder=True)._attn_implementation == FOLDED:
        model.set_attn_implementation("sdpa")
    return model


def is_packed(model: nn.Module) -> bool:
    """True when linear layers run through oneDNN, whose cost has no cliff at two and three rows."""
    return any(isinstance(module.__dict__.get("forward"), PackedForward) for module in model.modules())


class PackedForward:
    """A linear layer's forward through oneDNN's prepacked product.

    The packed copy is made at the first call and again when the weight has changed.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = [linear]  # in a list: a deep copy must not walk in circles through the module
        self._packed: Tensor | None = None
        self._of: tuple[int, int, torch.dtype] | None = None

    def __call__(self, input: Tensor) -> Tensor:
        """input [..., in_features] -> [..., out_features]."""
        linear = self._linear[0]
        weight = linear.weight
        if (
            weight.device.type != "cpu"
            or input.dtype != weight.dtype
            or not _packable(weight.dtype)
            or (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))
        ):
            return F.linear(input, weight, linear.bias)
        state = (weight.data_ptr(), weight._version, weight.dtype)
        if state != self._of:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TYPICAL_ROWS)
            self._of = state
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, linear.bias, "none", [], "")

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedForward:
        return PackedForward(copy.deepcopy(self._linear[0], memo))

    def __reduce__(self) -> Any:
        return PackedForward, (self._linear[0],)


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa on grouped queries without copying keys and values.

    query [B, H, Q, D] with H = r Hkv heads becomes [B, Hkv, r Q, D]; the mask's rows repeat r times. Anything else
    goes to transformers' own function.
    """
    groups = query.shape[1] // key.shape[1]
    foldable = (
        groups > 1 and query.shape[2] > 1 and attention_mask is not None and attention_mask.shape[1] == 1
        and kwargs.get("position_bias") is None and kwargs.get("cache") is None and kwargs.get("softcap") is None
    )  # fmt: skip
    if not foldable or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)  # type: ignore[return-value]
    batch, _, width, size = query.shape
    folded = query.reshape(batch, key.shape[1], groups * width, size)
    output = F.scaled_dot_product_attention(
        folded, key, value, attn_mask=attention_mask.repeat(1, 1, groups, 1), dropout_p=dropout, scale=scaling
    )
    output = output.reshape(batch, -1, width, value.shape[-1])
    return output.transpose(1, 2).contiguous(), None
