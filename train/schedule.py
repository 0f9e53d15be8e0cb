"""Learning rate by step: warm-up, then cosine, linear, constant or warm-up-stable-decay.

A pure function of the step, so that a resumed run has nothing to restore.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from specdec.errors import BadRecipe

Form = Literal["cosine", "linear", "constant", "wsd"]


@dataclass(frozen=True)
class Schedule:
    """Multiplier of the learning rate.

    Args:
        form: "cosine", "linear", "constant", or "wsd": constant until `decay_share` of the steps is left, then linear.
        steps: of the whole run.
        warmup: steps that rise linearly from 0.
        floor: the multiplier at the end, for all but "constant".
        decay_share: of "wsd".

    Raises:
        BadRecipe: an unknown form, or a warm-up as long as the run.
    """

    form: Form = "cosine"
    steps: int = 1
    warmup: int = 0
    floor: float = 0.1
    decay_share: float = 0.2

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise BadRecipe(f"no schedule {self.form!r}; there are {', '.join(get_args(Form))}")
        if not 0 <= self.warmup < max(self.steps, 1):
            raise BadRecipe(f"a warm-up of {self.warmup} steps does not fit into {self.steps} steps")

    def __call__(self, step: int) -> float:
        """The multiplier of step 0, 1, ... steps - 1."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - 1 - self.warmup, 1)
        falls = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * min(done, 1.0))) / 2,
            "wsd": min(1.0, (1 - done) / self.decay_share),
        }[self.form]
        return falls if self.form == "constant" else self.floor + (1 - self.floor) * max(falls, 0.0)
