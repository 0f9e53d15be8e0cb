"""Low-rank adapters on a target's linear layers (LoRA, arXiv 2106.09685), by the optional package peft.

An adapted layer computes W x + (alpha / rank) B A x. B begins at zero, so fresh adapters change nothing, and with the
adapters off the target is the original one, bit for bit: one model in memory gives both laws.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdec.environment import weights_sample
from specdec.errors import BadRecipe
from specdec.target import Target

MARK_LENGTH = 16


@dataclass(frozen=True)
class LoRASettings:
    """Sizes of the adapters.

    Attributes:
        rank: of the change of each weight.
        alpha: the change is scaled by alpha / rank.
        dropout: of what goes into the adapters.
        modules: ends of names of the layers that get one; none means every linear layer of the decoder's layers, and
            the output matrix unless it is the embedding.

    Raises:
        BadRecipe: a number out of range, or modules that are no names.
    """

    rank: int = 32
    alpha: float = 16.0
    dropout: float = 0.0
    modules: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise BadRecipe(
                f"[head.lora] rank is at least 1, alpha positive and dropout from 0 to below 1, got {self.rank}, "
                f"{self.alpha:g} and {self.dropout:g}"
            )
        if not all(isinstance(name, str) and name for name in self.modules):
            raise BadRecipe(f"[head.lora] modules are names of layers, got {self.modules!r}")


class Adapters(nn.Module):
    """The adapters of one model: their weights are this module's, their places are inside the model.

    The model is changed in place: its linear layers are wrapped and nothing but the adapters learns. As a module of
    their own the adapters can be saved, and put into training or evaluation mode, without the model.

    Args:
        target: the model to adapt.
        settings: sizes.

    Raises:
        BadRecipe: peft is missing, or `modules` names layers that are not there or cannot be adapted.
    """

    def __init__(self, target: Target, settings: LoRASettings) -> None:
        super().__init__()
        peft = require_peft()
        model = target.model
        self.original = weights_sample(model)
        names = adapted_names(target, settings.modules)
        transposed = isinstance(model.get_submodule(names[0]), Conv1D)
        config = peft.LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, bias="none",
            target_modules=names, fan_in_fan_out=transposed, task_type="CAUSAL_LM",
        )  # fmt: skip
        with warnings.catch_warnings():  # peft 0.21 reads a name that transformers 5.23 calls deprecated
            warnings.simplefilter("ignore", FutureWarning)
            self._wrapper = [peft.get_peft_model(model, config)]  # in a list: the target must not become a submodule
        layer = importlib.import_module("peft.tuners.lora").LoraLayer
        self._layers: list[tuple[str, Any]] = [
            (name, module) for name, module in model.named_modules() if isinstance(module, layer)
        ]
        for name, module in self._layers:
            parts = {"A": module.lora_A, "B": module.lora_B, "dropout": module.lora_dropout}
            self.add_module(name.replace(".", "/"), nn.ModuleDict(parts))

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within this the model is the original one."""
        for _, layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for _, layer in self._layers:
                layer.enable_adapters(True)

    @contextmanager
    @torch.no_grad()
    def merged(self) -> Iterator[None]:
        """Within this the adapters are folded into the weights, as in the target that will be used.

        Taking a sum back by a difference would not give the same bits, so the weights are kept on the host meanwhile.
        """
        kept = [layer.weight.detach().to("cpu", copy=True) for _, layer in self._layers]
        try:
            for _, layer in self._layers:
                layer.merge()
            yield
        finally:
            for (_, layer), weight in zip(self._layers, kept, strict=True):
                layer.unmerge()
                layer.weight.copy_(weight)

    def mark(self) -> str:
        """What tells the target with these adapters apart from every other one: a hash of all that made it."""
        digest = hashlib.sha256(self.original.encode())
        for name, value in self.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        for name, layer in self._layers:
            digest.update(f"{name} {layer.scaling}".encode())
        return digest.hexdigest()[:MARK_LENGTH]

    def save(self, path: Path) -> None:
        """Write the adapters as peft does: adapter_config.json and adapter_model.safetensors."""
        self._wrapper[0].save_pretrained(path, save_embedding_layers=False)
        (path / "README.md").unlink(missing_ok=True)  # a form to fill in

    def fold(self) -> PreTrainedModel:
        """Fold the adapters into the weights for good; the model is an ordinary one again."""
        return self._wrapper[0].merge_and_unload()

    def remove(self) -> PreTrainedModel:
        """Take the adapters out; the model is the original one again."""
        return self._wrapper[0].unload()


def require_peft() -> Any:
    """The package peft.

    Raises:
        BadRecipe: it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise BadRecipe("adapters on the target need the package peft: pip install peft") from error


def adapted_names(target: Target, ends: list[str]) -> list[str]:
    """Whole names of the layers that get an adapter.

    Raises:
        BadRecipe: an end of no name, or an output matrix that is the embedding too.
    """
    model = target.model
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    tied = target.lm_head.weight is target.embedding.weight
    inside = {id(module) for module in target.layers.modules()}
    if not ends:
        return [
            name for name, module in linear.items() if id(module) in inside or (module is target.lm_head and not tied)
        ]
    for end in ends:
        if not any(_ends_with(name, end) for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise BadRecipe(f"[head.lora] modules: {type(model).__name__} has no linear layer {end!r}; it has {known}")
    chosen = [name for name in linear if any(_ends_with(name, end) for end in ends)]
    if tied and any(linear[name] is target.lm_head for name in chosen):
        raise BadRecipe(
            f"[head.lora] modules: the output matrix of {type(model).__name__} is its embedding too, and an adapter "
            "would part them; leave it out"
        )
    return chosen


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
