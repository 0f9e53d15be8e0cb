"""Cost-padded targets: the same function at a larger price.

Extra MLP units whose output columns are zero, and extra layers whose output projections are zero, change no
logit beyond rounding but cost what a larger model costs. Every drafter keeps its acceptance, so a small target
can stand for a larger one in a benchmark, which must say so.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


@torch.no_grad()
def cost_padded(model: LlamaForCausalLM, *, parameters: int, extra_layers: int = 0) -> LlamaForCausalLM:
    """A Llama-style model that computes what `model` computes with at least so many parameters.

    Args:
        model: a LlamaForCausalLM.
        parameters: at least so many in all, reached by widening every MLP.
        extra_layers: layers to append whose output is zero.
    """
    config = cast(LlamaConfig, copy.deepcopy(model.config))
    hidden = int(config.hidden_size)
    config.num_hidden_layers += extra_layers
    missing = parameters - sum(p.numel() for p in model.parameters())
    per_unit = 3 * hidden * config.num_hidden_layers
    config.intermediate_size += -(-max(missing, 0) // per_unit // 16) * 16 + 16
    padded = LlamaForCausalLM(config).eval()
    padded = padded.bfloat16() if model.dtype == torch.bfloat16 else padded
    ours, theirs = padded.state_dict(), model.state_dict()
    for name, weight in ours.items():
        if name in theirs:
            _fill(name, weight, theirs[name])
    for layer in list(cast(nn.ModuleList, padded.model.layers))[len(theirs_layers(model)) :]:
        cast(Tensor, layer.get_submodule("self_attn.o_proj").weight).zero_()
        cast(Tensor, layer.get_submodule("mlp.down_proj").weight).zero_()
    padded.generation_config = copy.deepcopy(model.generation_config)
    return padded


def theirs_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a Llama-style model."""
    return cast(nn.ModuleList, model.get_submodule("model.layers"))


def _fill(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Copy a weight into the corner of a larger one; columns of added MLP units become zero."""
    if "down_proj" in name:
        ours.zero_()
    ours[tuple(slice(0, n) for n in theirs.shape)] = theirs
