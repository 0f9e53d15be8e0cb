"""What learns, spread over processes: FSDP2, `torch.distributed.fsdp.fully_shard` (ZeRO-3, arXiv 1910.02054).

Each process keeps its part of every weight, gradient and moment. torch is called itself: accelerate 1.15 turns FSDP
into DDP on CPUs without a word, and tests there would then say nothing of what runs on GPUs. Checkpoints, validation
and whoever drafts see the whole module, which lies in host memory and is brought up to date by `gather`.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from specdec.target import Target


class Shards:
    """A module in parts, and the way to and from the whole one.

    Args:
        whole: stays whole, moves to host memory (4 bytes for each fp32 weight, in every process).
        device: of this process's parts.
        processes: of the run.
    """

    def __init__(self, whole: nn.Module, device: torch.device, processes: int) -> None:
        self.whole = whole.to("cpu")
        self.module = copy.deepcopy(self.whole)
        self._mesh = init_device_mesh(device.type, (processes,))

    def spread(self, outermost: nn.Module) -> None:
        """Divide the module's weights among the processes; `outermost` holds it, and its forward gathers them."""
        for layer in gathered_apart(self.module):
            fully_shard(layer, mesh=self._mesh)
        fully_shard(outermost, mesh=self._mesh)

    @torch.no_grad()
    def gather(self) -> None:
        """Bring what was learned into the whole module. Every process has to call it."""
        for part, weight in self._pairs():
            weight.copy_(part.full_tensor())

    @torch.no_grad()
    def scatter(self) -> None:
        """Take the whole module's weights into the parts."""
        for part, weight in self._pairs():
            part.copy_(part_of(weight, part))

    def _pairs(self) -> list[tuple[DTensor, Tensor]]:
        return [
            (cast(DTensor, part), weight)
            for part, weight in zip(self.module.parameters(), self.whole.parameters(), strict=True)
            if part.requires_grad
        ]


def gathered_apart(module: nn.Module) -> list[nn.Module]:
    """Layers whose weights are gathered only while they run: those of a draft model.

    A draft head is gathered as one: its layers run once for every depth, and its kinds read weights directly.
    """
    return list(Target(module).layers) if isinstance(module, PreTrainedModel) else []


def part_of(whole: Tensor, like: DTensor) -> DTensor:
    """This process's part of a tensor that every process has, divided as another one is."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def whole_state(state: Any) -> Any:
    """An optimizer's state with whole tensors in host memory, as it is without shards. Every process has to call it."""
    if isinstance(state, dict):
        return {name: whole_state(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole_state(value) for value in state]
    return state.full_tensor().cpu() if isinstance(state, DTensor) else state


def load_moments(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer a state of whole tensors; where its parameters are shards it takes its parts of them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: _fitting(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _fitting(value: Any, parameter: Tensor) -> Any:
    """A moment has its parameter's shape; the number of steps has none."""
    if isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape:
        return part_of(value, parameter)
    return value
