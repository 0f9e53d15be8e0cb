"""Linear layers that read the same input as one product, where they are so small that to call them costs more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_ELEMENTS = 1 << 18
"""Of each weight. Larger ones are worth their memory once, and cost what they read."""


@dataclass(frozen=True)
class _Seen:
    """A part as it was when it was joined."""

    part: nn.Linear
    parameters: tuple[Tensor, ...]
    state: tuple[tuple[int, int], ...]

    @staticmethod
    def of(part: nn.Linear) -> _Seen:
        parameters = (part.weight,) if part.bias is None else (part.weight, part.bias)
        return _Seen(part, parameters, tuple((tensor.data_ptr(), tensor._version) for tensor in parameters))

    def is_still(self, part: Any) -> bool:
        """The same part with the same values, and nobody listens to it."""
        if part is not self.part or _is_altered(part):
            return False
        now = part._parameters
        if now["weight"] is not self.parameters[0] or now["bias"] is not (self.parameters[1:] or (None,))[0]:
            return False
        return all(
            (tensor.data_ptr(), tensor._version) == state
            for tensor, state in zip(self.parameters, self.state, strict=True)
        )


class Joined:
    """Parts of a module, by name, side by side.

    Small plain linear layers become one matrix, made at the first call and again when a weight has changed; anything
    else (large, quantised, packed, adapted, watched) is called as it is.
    """

    def __init__(self, owner: nn.Module, names: tuple[str, ...]) -> None:
        self._modules, self._names = owner._modules, names
        self._seen: tuple[_Seen, ...] = ()
        self._sizes: list[int] = []
        self._weight = self._bias = None

    def __call__(self, states: Tensor) -> Tensor:
        """[..., in] -> [..., sum of out]."""
        if self._is_joined():
            return F.linear(states, self._weight, self._bias)  # type: ignore[arg-type]
        return torch.cat([self._modules[name](states) for name in self._names], -1)  # type: ignore[misc]

    def apart(self, states: Tensor) -> Sequence[Tensor]:
        """[..., in] -> [..., out] of each part; large parts' outputs are not copied."""
        if self._is_joined():
            return F.linear(states, self._weight, self._bias).split(self._sizes, -1)  # type: ignore[arg-type]
        return [self._modules[name](states) for name in self._names]  # type: ignore[misc]

    def _is_joined(self) -> bool:
        """Whether the parts are one matrix; makes it where they can be and it is missing or old."""
        if not self._is_current():
            parts: Any = [self._modules[name] for name in self._names]
            self._seen = ()
            if not all(map(_is_small_and_plain, parts)):
                return False
            self._join(parts)
        return True

    def _is_current(self) -> bool:
        modules = self._modules
        for name, seen in zip(self._names, self._seen, strict=False):
            if not seen.is_still(modules[name]):
                return False
        return bool(self._seen)

    def _join(self, parts: list[nn.Linear]) -> None:
        self._weight = torch.cat([part.weight.detach() for part in parts])
        has_bias = any(part.bias is not None for part in parts)
        self._bias = torch.cat([_bias_of(part) for part in parts]) if has_bias else None
        self._sizes = [part.out_features for part in parts]
        self._seen = tuple(map(_Seen.of, parts))


def _is_small_and_plain(part: Any) -> bool:
    return (
        type(part) is nn.Linear
        and not _is_altered(part)
        and part.weight.numel() <= MOST_ELEMENTS
        and not part.weight.is_inference()  # such tensors do not say when they change
    )


def _is_altered(part: Any) -> bool:
    return bool("forward" in part.__dict__ or part._forward_hooks or part._forward_pre_hooks)


def _bias_of(part: nn.Linear) -> Tensor:
    return part.weight.new_zeros(part.out_features) if part.bias is None else part.bias.detach()
