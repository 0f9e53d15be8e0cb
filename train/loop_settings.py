"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.errors import BadRecipe
from specdec.train.schedule import Form

FREE_SETTINGS = ("save_every", "evaluate_every", "keep")
"""Settings that may change on resume without changing what is learned."""


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast.

    Attributes:
        steps: optimizer steps.
        rows_per_step: rows of all processes and micro-batches together.
        rows_at_once: rows of one forward; the rest of a step is accumulated.
        learning_rate, weight_decay, beta1, beta2, clip: of AdamW; `clip` bounds the gradient's norm, 0 does not.
        schedule, warmup, floor: see Schedule.
        bf16: autocast; weights and moments stay fp32.
        fsdp: weights, gradients and moments of what learns are shared among processes, see train.shards.
        seed: of data order and noise.
        save_every, evaluate_every: in steps; 0 only at the end.
        keep: checkpoints beside the best.
    """

    steps: int
    rows_per_step: int = 8
    rows_at_once: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    schedule: Form = "cosine"
    warmup: int = 0
    floor: float = 0.1
    bf16: bool = False
    fsdp: bool = False
    seed: int = 0
    save_every: int = 0
    evaluate_every: int = 0
    keep: int = 2

    def check(self, processes: int) -> None:
        """Refuse numbers that are out of range or do not suit so many processes.

        Raises:
            BadRecipe: says which.
        """
        if self.steps < 1 or self.rows_per_step < 1 or self.rows_at_once < 1:
            raise BadRecipe("steps, rows per step and rows at once are at least 1")
        if self.fsdp and processes < 2:
            raise BadRecipe("fsdp shares weights among processes, got 1; choose --processes 2 or more, or leave it out")
        if self.rows_per_step % (self.rows_at_once * processes):
            raise BadRecipe(
                f"{self.rows_per_step} rows per step cannot be shared by {processes} processes "
                f"with {self.rows_at_once} rows at once; make it a multiple of {self.rows_at_once * processes}"
            )
        if not self.learning_rate > 0:
            raise BadRecipe(f"the learning rate is positive, got {self.learning_rate:g}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.weight_decay >= 0 and self.clip >= 0):
            raise BadRecipe(
                f"betas lie in [0, 1), weight decay and clip are not negative, got {self.beta1:g}, {self.beta2:g}, "
                f"{self.weight_decay:g} and {self.clip:g}"
            )
        if min(self.save_every, self.evaluate_every) < 0 or self.keep < 1:
            raise BadRecipe("save_every and evaluate_every are 0 or more steps, keep is 1 or more")
