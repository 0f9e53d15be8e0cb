"""From a kind, a target and data to a trained drafter directory: what `specdec train` calls."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from specdec.drafters.directory import fingerprint
from specdec.errors import BadRecipe
from specdec.probe import target_of
from specdec.target import Target
from specdec.train.batch import Documents, TrainBatch
from specdec.train.evaluate import Evaluator
from specdec.train.feature_cache import CachedData
from specdec.train.features import TargetFeatures, check_packing
from specdec.train.kinds.eagle import Eagle3Training, EagleTraining
from specdec.train.kinds.head import HeadTraining
from specdec.train.kinds.kangaroo import KangarooTraining
from specdec.train.kinds.medusa import MedusaTraining
from specdec.train.kinds.sequential import CloverTraining, HydraTraining, MLPSpeculatorTraining
from specdec.train.loop import Loop, Score, StepReport
from specdec.train.order import Order, Piece
from specdec.train.recipe import Recipe

HEADS: dict[str, Callable[..., HeadTraining]] = {
    "medusa": MedusaTraining,
    "hydra": HydraTraining,
    "hydra++": lambda target, **options: HydraTraining(target, prefix=True, **options),
    "clover": CloverTraining,
    "mlp-speculator": MLPSpeculatorTraining,
    "eagle": EagleTraining,
    "eagle3": Eagle3Training,
    "kangaroo": KangarooTraining,
}

Report = Callable[[StepReport | Score], None]


def train_head(
    recipe: Recipe,
    model: PreTrainedModel,
    documents: Documents,
    out: Path,
    *,
    prompts: list[list[int]] | None = None,
    data_identity: dict[str, Any] | None = None,
    report: Report = lambda _report: None,
    resume: bool = True,
    accelerator: Accelerator | None = None,
) -> Loop:
    """Train a draft head and leave checkpoints in `out`; `out/best/drafter` is the one to use.

    Args:
        recipe: settings, see `recipe_for`.
        model: the target; frozen.
        documents: prepared texts.
        out: directory of the run.
        prompts: held-out prompts to decode for validation; none means no validation.
        data_identity: says which data this is; a resumed run must agree.
        report: hears of every step and validation.
        resume: go on from the newest checkpoint in `out`.
        accelerator: of the process, when there are several.

    Returns:
        the loop, finished or stopped by a signal.

    Raises:
        SpecdecError: settings, data or checkpoints that do not fit; says which.
    """
    accelerator = accelerator or Accelerator(mixed_precision="bf16" if recipe.loop.bf16 else "no")
    target = target_of(model)
    if recipe.data.packed:
        check_packing(target)
    torch.manual_seed(recipe.loop.seed)  # fresh weights are the same in every process and on every resume
    training = make_training(recipe, target)
    if isinstance(training, Eagle3Training):
        training.choose_vocabulary(supervised_tokens(documents))
    loop = Loop(
        training,
        row_source(documents, recipe),
        TargetFeatures(target, training.taps, needs_logits=training.needs_logits),
        recipe.objective,
        recipe.loop,
        out,
        identity={
            "target": fingerprint(model),
            "head": recipe.head,
            "data": {"rows": recipe.data.row_length, "packed": recipe.data.packed, **(data_identity or {})},
        },
        evaluate=evaluator(model, prompts, recipe),
        report=report,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.json").write_text(json.dumps(recipe.resolved(), indent=2) + "\n")
    loop.run(resume=resume)
    return loop


def make_training(recipe: Recipe, target: Target) -> HeadTraining:
    """The kind's Training object.

    Raises:
        BadRecipe: an option that the kind does not have.
    """
    make = HEADS[recipe.kind]
    known = _options_of(recipe.kind)
    unknown = sorted(set(recipe.head) - known)
    if unknown:
        raise BadRecipe(f"[head] of {recipe.kind} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return make(target, **recipe.head)


def _options_of(kind: str) -> set[str]:
    made = HydraTraining if kind == "hydra++" else HEADS[kind]
    hidden = {"target", "head", *(("prefix",) if kind.startswith("hydra") else ())}
    return set(inspect.signature(made).parameters) - hidden


def row_source(documents: Documents, recipe: Recipe) -> Callable[[list[int]], TrainBatch]:
    """Batches by row number."""
    settings, seed = recipe.data, recipe.loop.seed
    order = Order(documents.lengths, settings.row_length, seed, packed=settings.packed)

    def source(numbers: list[int]) -> TrainBatch:
        rows = [order.row(number) for number in numbers]
        return TrainBatch.of_rows(documents, rows, numbers, settings.row_length, seed)

    return source


def supervised_tokens(documents: Documents) -> Counter[int]:
    """How often each token is supervised."""
    counts: Counter[int] = Counter()
    texts = documents.texts if isinstance(documents, CachedData) else documents  # no reading of taps for ids
    for number, length in enumerate(texts.lengths):
        document = texts.piece(Piece(number, 0, length))
        counts.update(document.ids[document.supervised].tolist())
    return counts


def evaluator(model: PreTrainedModel, prompts: list[list[int]] | None, recipe: Recipe) -> Evaluator | None:
    """Validation by decoding the first prompts, or None without any."""
    chosen = (prompts or [])[: recipe.data.validation_prompts]
    if not chosen:
        return None
    return Evaluator(
        model,
        chosen,
        max_new_tokens=recipe.data.validation_tokens,
        temperature=recipe.data.validation_temperature,
    )
