"""What a run would do and need, before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from specdec.train.batch import Documents, order_of
from specdec.train.logits import ELEMENTS_AT_ONCE
from specdec.train.recipe import Recipe
from specdec.train.shards import gathered_apart
from specdec.train.trainable import Trainable

FP32, MOMENTS = 4, 2
LOGITS_ALIVE = 6
"""[M, V] tensors in fp32 that are alive at once for each depth, about: both logits and log-laws, and gradients."""


@dataclass(frozen=True)
class Plan:
    """Numbers of a run.

    Attributes:
        parameters, learning: of the drafter, and those of them that learn.
        documents, tokens, rows: of one epoch.
        tokens_per_step: at most, padding included.
        steps_per_epoch, epochs: of the whole run.
        target_bytes, drafter_bytes: in memory of each process; the drafter's with gradients and moments.
        activation_bytes: a rough estimate for the rows of one forward: the target's and the draft's logits.
        checkpoint_bytes: of one checkpoint.
        checkpoints: that may lie on the disk at the same time.
    """

    parameters: int
    learning: int
    documents: int
    tokens: int
    rows: int
    tokens_per_step: int
    steps_per_epoch: float
    epochs: float
    target_bytes: int
    drafter_bytes: int
    activation_bytes: int
    checkpoint_bytes: int
    checkpoints: int

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return dict(vars(self))


def plan_run(
    recipe: Recipe, training: Trainable, documents: Documents, processes: int = 1, *, recompute: bool = False
) -> Plan:
    """Count what this recipe needs on these documents, in each of so many processes.

    `recompute` says that logits are made again in the backward pass instead of being kept.
    """
    settings, data = recipe.loop, recipe.data
    order = order_of(documents, data.row_length, settings.seed, packed=data.packed)
    rows = len(order.rows_of(0))
    target: Any = cast(Any, training).target
    sizes = [parameter.numel() for parameter in training.module.parameters()]
    learning = sum(p.numel() for p in training.module.parameters() if p.requires_grad)
    positions = settings.rows_at_once * data.row_length
    return Plan(
        parameters=sum(sizes),
        learning=learning,
        documents=len(documents.lengths),
        tokens=sum(documents.lengths),
        rows=rows,
        tokens_per_step=settings.rows_per_step * data.row_length,
        steps_per_epoch=rows / settings.rows_per_step,
        epochs=settings.steps * settings.rows_per_step / rows,
        target_bytes=target_bytes(training),
        drafter_bytes=drafter_bytes(training, processes if settings.fsdp else 1),
        activation_bytes=law_bytes(positions * target.vocab_size, target.dtype.itemsize, recompute=recompute),
        checkpoint_bytes=checkpoint_bytes(training),
        checkpoints=settings.keep + 2,
    )


def law_bytes(elements: int, itemsize: int, *, recompute: bool) -> int:
    """Of so many logits of the target and as many of the draft; made again, those of the target alone stay whole."""
    if not recompute:
        return FP32 * LOGITS_ALIVE * elements
    return itemsize * elements + FP32 * LOGITS_ALIVE * min(elements, ELEMENTS_AT_ONCE)


def drafter_bytes(training: Trainable, shards: int) -> int:
    """Weights, gradients and moments that one process keeps, and the weights that it gathers at the same time."""
    module = training.module
    sizes = {id(p): p.numel() for p in module.parameters()}
    kept = sum(sizes.values()) + (1 + MOMENTS) * sum(p.numel() for p in module.parameters() if p.requires_grad)
    if shards == 1:
        return FP32 * kept
    layers = [sum(p.numel() for p in layer.parameters()) for layer in gathered_apart(module)]
    gathered = sum(sizes.values()) - sum(layers) + 2 * max(layers, default=0)  # the next layer comes in ahead
    return FP32 * (kept // shards + gathered)


def target_bytes(training: Trainable) -> int:
    """Bytes of the target's weights, in memory and in a file; what learns inside it counts as the drafter's."""
    model: Any = cast(Any, training).target.model
    learning = {id(parameter) for parameter in training.module.parameters()}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in learning)


def checkpoint_bytes(trainable: Trainable) -> int:
    """Bytes of one checkpoint: the drafter for use, the same in fp32, and two moments of what learns."""
    stored = sum(value.numel() for value in trainable.module.state_dict().values())
    learning = sum(p.numel() for p in trainable.module.parameters() if p.requires_grad)
    target: Any = getattr(trainable, "target", None)
    width = target.dtype.itemsize if target is not None else FP32
    return stored * (width + FP32) + MOMENTS * FP32 * learning
