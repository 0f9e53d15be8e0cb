"""Which parameters an optimizer moves, how fast, and which of them decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from specdec.errors import BadRecipe


def parameter_groups(
    module: nn.Module, weight_decay: float, rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not; frozen parameters are left out.

    Args:
        module: what learns.
        weight_decay: of matrices.
        rates: multipliers of the learning rate by the first word of a parameter's name; 1 where none is given.

    Raises:
        BadRecipe: nothing would learn.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            key = (rates or {}).get(name.partition(".")[0], 1.0), parameter.ndim <= 1
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise BadRecipe("no parameter of this drafter learns")
    return [
        {"params": groups[rate, vector], "weight_decay": 0.0 if vector else weight_decay}
        | ({} if rate == 1 else {"rate": rate})
        for rate, vector in sorted(groups)
    ]
