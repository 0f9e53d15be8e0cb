"""What the host reads from a device and uploads to it, counted where Python does it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")
"""Methods that wait for the device and bring a value to the host."""


@dataclass
class Traffic:
    """Counts.

    Attributes:
        reads: by method, of tensors on the device.
        uploads: tensors that went from the host to the device.
        warned: synchronising calls that CUDA's debug mode reported, reads and uploads among them; 0 on the CPU.
    """

    reads: Counter[str] = field(default_factory=Counter)
    uploads: int = 0
    warned: int = 0


class _Watch(TorchFunctionMode):
    def __init__(self, device: torch.device, traffic: Traffic) -> None:
        super().__init__()
        self.device, self.traffic = device, traffic

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        here = isinstance(args[0], Tensor) and args[0].device.type == self.device.type if args else False
        name = getattr(function, "__name__", "")
        result = function(*args, **(kwargs or {}))
        moved_here = isinstance(result, Tensor) and result.device.type == self.device.type
        if here and (name in READS or (name == "to" and not moved_here)):
            self.traffic.reads[name] += 1
        elif moved_here and (name == "tensor" or (name in ("to", "cuda", "copy_") and not here)):
            self.traffic.uploads += 1
        return result


@contextmanager
def watched(device: torch.device) -> Iterator[Traffic]:
    """Count within. On a CUDA device its debug mode counts too, so that what Python does not show is not missed.

    On the CPU tensors of the host count like those of a device: there the numbers are upper bounds.
    """
    traffic = Traffic()
    with warnings.catch_warnings(record=True) as caught, _Watch(device, traffic):
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield traffic
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    traffic.warned = sum("synchronizing" in str(warning.message) for warning in caught)


def step_by_step(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, generate: Callable[[], Any]
) -> list[tuple[int, Traffic]]:
    """Traffic of every step of a generation, each with its number of rows; the prefill is left out."""
    import specdec.api
    from specdec.decode import decode

    seen: list[tuple[int, Traffic]] = []

    def stepwise(*args: Any, **options: Any) -> Iterator[Any]:
        steps = decode(*args, **options)
        yield next(steps)
        while True:
            with watched(device) as traffic:
                step = next(steps, None)
            if step is None:
                return
            seen.append((len(step.rows), traffic))
            yield step

    monkeypatch.setattr(specdec.api, "decode", stepwise)
    generate()
    return seen
