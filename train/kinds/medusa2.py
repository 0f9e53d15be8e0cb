"""Medusa-2: heads and target learn together, the target by low-rank adapters (arXiv 2401.10774, section 2.2.2).

The loss is that of the heads, weighted down, and a base term that holds the target where it was: the divergence of the
adapted law from the original one, which the same model gives with its adapters off (self-distillation, section 2.3.2).
The heads are compared with the adapted law, without gradient: that is the one that will verify them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from specdec.drafter import Drafter
from specdec.drafters.directory import ADAPTED, read_drafter_json, write_drafter_json
from specdec.errors import BadRecipe
from specdec.train.adapters import Adapters
from specdec.train.batch import TrainBatch
from specdec.train.features import TargetFeatures
from specdec.train.kinds.draft_model import recomputed_layers
from specdec.train.kinds.medusa import MedusaTraining
from specdec.train.objective import Objective, Term
from specdec.train.recipe import MEDUSA_2

Form = Literal["constant", "linear", "sine"]
BASE = "base"
"""Name of the term that holds the target near the original one."""


@dataclass(frozen=True)
class JointWeights:
    """Weights of the joint loss: base * L_base + heads * form(progress) * sum over depths d of decay ** d * L_d.

    Attributes:
        base: of the base term.
        heads: of all heads together, the published 0.2.
        form: "constant", or rising over the run to the whole weight: "linear", or "sine" (a quarter of a wave).
        steps, rows_per_step: of the run, to know its progress from the number of a row.

    Raises:
        BadRecipe: a negative weight, or an unknown form.
    """

    base: float
    heads: float
    form: str
    steps: int
    rows_per_step: int

    def __post_init__(self) -> None:
        if self.base < 0 or not self.heads > 0:
            raise BadRecipe(
                f"[head] base_weight is not negative and head_weight positive, got {self.base:g} and {self.heads:g}"
            )
        if self.form not in get_args(Form):
            raise BadRecipe(f"[head] head_schedule is {', '.join(get_args(Form))}, got {self.form!r}")

    def of_heads(self, row_number: int) -> float:
        """The heads' weight in the step that a row belongs to."""
        progress = (row_number // self.rows_per_step + 1) / self.steps
        rising = {"constant": 1.0, "linear": progress, "sine": math.sin(math.pi / 2 * progress)}
        return self.heads * rising[self.form]


class Medusa2Training:
    """Trains Medusa heads and adapters on their target.

    Args:
        heads: the heads, warmed up on the frozen target, and that target.
        adapters: of the same target.
        weights: of the joint loss.
        recompute: logits and the target's layers are made again in the backward pass instead of being kept.
    """

    kind = MEDUSA_2
    taps: tuple[int, ...] = ()
    needs_logits = True

    def __init__(
        self, heads: MedusaTraining, adapters: Adapters, weights: JointWeights, *, recompute: bool = False
    ) -> None:
        self.heads, self.adapters, self.weights = heads, adapters, weights
        heads.recompute = recompute
        self.target = heads.target
        self.recomputed = recomputed_layers(self.target.model) if recompute else []
        self.module: nn.Module = nn.ModuleDict({"heads": heads.module, "adapters": adapters.to(self.target.device)})
        self._original = TargetFeatures(self.target, ())

    def features(self, batch: TrainBatch) -> TrainBatch:
        """The batch with the original target's logits."""
        with self.adapters.off():
            return self._original(batch)

    def terms(self, batch: TrainBatch, objective: Objective) -> list[Term]:
        """The base term at all supervised tokens, and one term for each head."""
        adapted = self._adapted(batch)
        assert adapted.logits is not None
        said = self.heads.laws_at(adapted, batch.drafts(1))
        law = Objective().term(1, said, self.heads.laws(batch, 1), weight=self.weights.base)
        base = replace(law, name=BASE, alpha=None, hits=None, depth=0)
        # The first head weighs `decay` already, as published.
        weight = self.weights.of_heads(batch.row_numbers[0]) * objective.decay
        heads = self.heads.terms(replace(adapted, logits=adapted.logits.detach()), objective)
        return [base, *(replace(term, weight=term.weight * weight) for term in heads)]

    def _adapted(self, batch: TrainBatch) -> TrainBatch:
        """The batch with what the adapted target computes, with gradient."""
        last = self.target.num_layers
        with self._recomputing():
            output = self.target.call(
                (last,), input_ids=batch.ids, position_ids=batch.positions, attention_mask=None, use_cache=False
            )
        return replace(batch, taps=output.taps, logits=output.logits)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Layers are recomputed in training mode only, in which they would not use a cache when decoding."""
        for layer in self.recomputed:
            layer.training = True
        try:
            yield
        finally:
            for layer in self.recomputed:
                layer.training = False

    def drafter(self) -> Drafter:
        """Drafts with the heads as they are now, for the target with its adapters as they are now."""
        return self.heads.drafter()

    def save(self, path: Path) -> None:
        """Write the heads as a drafter directory that fits the adapted target alone, and the adapters in it."""
        self.heads.save(path)
        described = read_drafter_json(path)
        write_drafter_json(path, replace(described, target={**described.target, ADAPTED: self.adapters.mark()}))
        self.adapters.save(path / "adapter")
