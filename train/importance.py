"""Which layers, MLP units, head groups and channels of a model matter, measured on text.

Layers by the angle between what goes in and what comes out (Gromov et al., arXiv 2403.17887); the rest by the size of
what they contribute (activation importance, Minitron, arXiv 2407.14679, section 2.2). One pass over the text
measures all of it.

Dimensions: M tokens, D hidden size, F MLP units, G head groups, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.errors import BadRecipe
from specdec.train.batch import Documents
from specdec.train.order import Piece
from specdec.train.prune import Kept, Sizes, cut, text_config


@dataclass(frozen=True)
class Importance:
    """What was measured; larger matters more. All in float64.

    Attributes:
        layers: [L] mean angle between a layer's input and output, over pi.
        units: [L, F] size of what an MLP unit adds to the states.
        groups: [L, G] the same of a group of query heads.
        channels: [D] size of a channel after the norms, over all of them.
    """

    layers: Tensor
    units: Tensor
    groups: Tensor
    channels: Tensor


def cut_by_importance(model: PreTrainedModel, sizes: Sizes, rows: Sequence[Tensor]) -> PreTrainedModel:
    """The model cut to these sizes, the least important parts gone.

    Args:
        model: of a family that can be cut; left as it is.
        sizes: 0 keeps a size.
        rows: ids [S] of calibration texts.

    Raises:
        UnsupportedModel: another family.
        BadRecipe: a size larger than the model's, or no text.
    """
    return cut(model, chosen(measure_importance(model, rows), sizes))


def calibration_rows(documents: Documents, row_length: int, count: int) -> list[Tensor]:
    """The beginnings of so many documents, spread over all of them."""
    usable = [number for number, length in enumerate(documents.lengths) if length > 1]
    step = max(len(usable) // count, 1)
    return [
        documents.piece(Piece(number, 0, min(documents.lengths[number], row_length))).ids
        for number in usable[::step][:count]
    ]


def chosen(importance: Importance, sizes: Sizes) -> Kept:
    """The most important indices; ties go to the lower one.

    Raises:
        BadRecipe: a size larger than what there is.
    """
    layers = _largest(importance.layers, sizes.num_layers, "num_layers")
    units = tuple(_largest(importance.units[i], sizes.intermediate_size, "intermediate_size") for i in layers)
    groups = tuple(_largest(importance.groups[i], sizes.num_key_value_heads, "num_key_value_heads") for i in layers)
    return Kept(layers, units, groups, _largest(importance.channels, sizes.hidden_size, "hidden_size"))


def _largest(values: Tensor, count: int, name: str) -> tuple[int, ...]:
    if count > len(values):
        raise BadRecipe(f"{name} of a cut is at most the model's {len(values)}, got {count}")
    order = values.argsort(descending=True, stable=True)[: count or len(values)]
    return tuple(sorted(order.tolist()))


@torch.no_grad()
def measure_importance(model: PreTrainedModel, rows: Sequence[Tensor]) -> Importance:
    """Run the texts once and measure.

    Raises:
        UnsupportedModel: a model that cannot be cut.
        BadRecipe: no text.
    """
    config = text_config(model)
    if not any(len(row) for row in rows):
        raise BadRecipe("importance is measured on text; there is none")
    sums = _Sums(config, model.device)
    was_training = model.training
    model.eval()
    try:
        with sums.listening(model):
            for row in rows:
                if len(row):
                    model(input_ids=row[None].to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        model.train(was_training)
    return sums.importance(model)


class _Sums:
    """Sums over tokens, filled by hooks."""

    def __init__(self, config: Any, device: torch.device) -> None:
        layers, groups = config.num_hidden_layers, config.num_key_value_heads
        self.tokens = 0
        self.groups = groups

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.angles, self.units = zeros(layers), zeros(layers, config.intermediate_size)
        self.channels = zeros(config.hidden_size)
        self.attention: list[Tensor | None] = [None] * layers

    @contextmanager
    def listening(self, model: PreTrainedModel) -> Iterator[None]:
        """Hooks on layers, norms, and what goes into the projections back to the states."""
        decoder = cast(Any, model.get_decoder())
        hooks = []
        for number, layer in enumerate(decoder.layers):
            hooks.append(layer.register_forward_hook(self._layer(number)))
            hooks.append(layer.mlp.down_proj.register_forward_pre_hook(self._into_mlp_output(number)))
            hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(self._into_attention_output(number)))
            hooks += [norm.register_forward_hook(self._norm)
                      for norm in (layer.input_layernorm, layer.post_attention_layernorm)]  # fmt: skip
        hooks.append(decoder.norm.register_forward_hook(self._norm))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _layer(self, number: int) -> Callable[..., None]:
        def store(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            before, after = inputs[0].double(), (output[0] if isinstance(output, tuple) else output).double()
            cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
            self.angles[number] += cosine.clamp(-1, 1).arccos().sum() / torch.pi
            self.tokens += before.shape[:-1].numel() if number == 0 else 0

        return store

    def _into_mlp_output(self, number: int) -> Callable[..., None]:
        def store(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.units[number] += inputs[0].double().square().flatten(0, -2).sum(0)

        return store

    def _into_attention_output(self, number: int) -> Callable[..., None]:
        def store(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            heads = inputs[0].double().flatten(0, -2).unflatten(-1, (self.groups, -1)).transpose(0, 1)
            products = heads.transpose(1, 2) @ heads
            before = self.attention[number]
            self.attention[number] = products if before is None else before + products

        return store

    def _norm(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.channels += output.double().square().flatten(0, -2).sum(0)

    def importance(self, model: PreTrainedModel) -> Importance:
        """Root mean squares of contributions: |activation| |output weights|."""
        layers = cast(Any, model.get_decoder()).layers
        units = [row.sqrt() * layer.mlp.down_proj.weight.double().norm(dim=0)
                 for row, layer in zip(self.units, layers, strict=True)]  # fmt: skip
        groups = [self._group_sizes(cast(Tensor, products), layer.self_attn.o_proj.weight.double())
                  for products, layer in zip(self.attention, layers, strict=True)]  # fmt: skip
        scale = self.tokens**-0.5
        return Importance(self.angles / self.tokens, torch.stack(units) * scale, torch.stack(groups) * scale,
                          self.channels.sqrt() * scale)  # fmt: skip

    def _group_sizes(self, products: Tensor, weight: Tensor) -> Tensor:
        """[G] root of sum over tokens of |W_g x_g|^2, from the sums of x_g x_g^T [G, h, h]."""
        parts = weight.unflatten(1, (self.groups, -1)).transpose(0, 1)
        return torch.einsum("gdi,gij,gdj->g", parts, products, parts).clamp(min=0).sqrt()
