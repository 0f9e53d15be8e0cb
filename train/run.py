"""From a kind, a target and data to a trained drafter directory: what `specdec train` calls."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from specdec import formats
from specdec.drafters.directory import drafter_in, fingerprint
from specdec.drafters.head import head_for
from specdec.drafters.load import HEAD_DRAFTERS, NOT_OPTIONS
from specdec.environment import weights_sample
from specdec.errors import BadCheckpoint, BadRecipe, SpecdecError
from specdec.heads.layer import MLP, Attention
from specdec.probe import target_of
from specdec.target import Target
from specdec.train.batch import Documents, TrainBatch, order_of
from specdec.train.evaluate import Evaluator
from specdec.train.feature_cache import CachedData
from specdec.train.features import TargetFeatures, check_packing
from specdec.train.generated import TwoStages, written_source
from specdec.train.kinds.dflash import DFlashTraining
from specdec.train.kinds.eagle import Eagle3Training, EagleTraining
from specdec.train.kinds.head import HeadTraining
from specdec.train.kinds.kangaroo import KangarooTraining
from specdec.train.kinds.medusa import MedusaTraining
from specdec.train.kinds.sequential import CloverTraining, HydraTraining, MLPSpeculatorTraining
from specdec.train.loop import Loop
from specdec.train.on_policy import Writing
from specdec.train.order import Piece
from specdec.train.processes import accelerator_for
from specdec.train.recipe import Recipe
from specdec.train.recipe_loop import run_loop
from specdec.train.report import Score, StepReport

HEADS: dict[str, Callable[..., HeadTraining]] = {
    "medusa": MedusaTraining,
    "hydra": HydraTraining,
    "hydra++": lambda target, **options: HydraTraining(target, prefix=True, **options),
    "clover": CloverTraining,
    "mlp-speculator": MLPSpeculatorTraining,
    "dflash": DFlashTraining,
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
    begin_from: Path | None = None,
    recompute: bool = False,
    report: Report = lambda _report: None,
    restored: Callable[[Loop], None] = lambda _loop: None,
    resume: bool = True,
    accelerator: Accelerator | None = None,
) -> Loop:
    """Train a draft head and leave checkpoints in `out`; `out/drafter` leads to the one to use.

    Args:
        recipe: settings, see `recipe_for`.
        model: the target; frozen.
        documents: prepared texts.
        out: directory of the run.
        prompts: held-out prompts to decode for validation; none means no validation.
        data_identity: says which data this is; a resumed run must agree.
        begin_from: a draft head of this kind whose weights the first step begins with, or a run that has one.
        recompute: logits, and what happens inside the head's decoder layers, are made again in the backward pass
            instead of being kept.
        report: hears of every step and validation.
        restored: called once everything fits and the newest checkpoint is taken up, before the first step.
        resume: go on from the newest checkpoint in `out`.
        accelerator: of the process, when there are several.

    Returns:
        the loop, finished or stopped by a signal.

    Raises:
        SpecdecError: settings, data or checkpoints that do not fit; says which.
    """
    accelerator = accelerator or accelerator_for(bf16=recipe.loop.bf16)
    target = target_of(model)
    recipe = recipe.fitted(accelerator.num_processes, target.max_positions, target.hidden_size)
    if recipe.data.packed:
        check_packing(target)
    torch.manual_seed(recipe.loop.seed)  # fresh weights are the same in every process and on every resume
    training = make_training(recipe, target, begin_from)
    if isinstance(training, Eagle3Training) and begin_from is None:
        training.choose_vocabulary(supervised_tokens(documents))
    if recompute:
        keep_less(training)
    check_drafts(training)
    return run_loop(
        recipe,
        training,
        staged_source(training, documents, recipe),
        TargetFeatures(target, training.taps, needs_logits=training.needs_logits),
        out,
        identity={
            "target": {**fingerprint(model), "weights": weights_sample(model)},
            "head": recipe.head,
            "begin": None if begin_from is None else weights_sample(training.module),
            "data": {**_how_rows_are_made(recipe), **(data_identity or {})},
        },
        evaluate=evaluator(model, prompts, recipe),
        report=report,
        restored=restored,
        resume=resume,
        accelerator=accelerator,
    )


def make_training(recipe: Recipe, target: Target, begin_from: Path | None = None) -> HeadTraining:
    """The kind's Training object, with fresh weights or those of a draft head.

    Raises:
        BadRecipe: an option that the kind does not have, or that does not fit.
        BadCheckpoint, DrafterMismatch: no draft head of this kind for this target in `begin_from`.
    """
    make, options = HEADS[recipe.kind], dict(recipe.head)
    check_options(recipe.kind, options)
    if begin_from is not None:
        options = {name: value for name, value in options.items() if name in NOT_OF_THE_HEAD} | {
            "head": _begun(recipe, target, begin_from)
        }
    try:
        return make(target, **options)
    except SpecdecError:
        raise
    except ValueError as error:  # of a configuration object
        raise BadRecipe(f"[head] of {recipe.kind}: {error}") from error


NOT_OF_THE_HEAD = {"options", "steps", "noise", "feature_weight", "law_weight", "anchors", "weights"}
"""[head] settings of training; all others decide what the head is, which a head that is there has decided already."""


def _begun(recipe: Recipe, target: Target, path: Path) -> nn.Module:
    shaping = sorted(name.removeprefix("head.") for name in recipe.given if name.startswith("head."))
    if wrong := [name for name in shaping if name not in NOT_OF_THE_HEAD]:
        raise BadRecipe(f"[head] {wrong[0]} cannot be chosen for a head that is there already ({path}); leave it out")
    path = drafter_in(path)
    checkpoint = formats.read(path)
    wanted = "hydra" if recipe.kind == "hydra++" else recipe.kind
    if checkpoint.kind != wanted:
        raise BadCheckpoint(f"{path} holds a {checkpoint.kind} head, the run trains {recipe.kind}")
    _, head = head_for(path, target.model)
    if recipe.kind.startswith("hydra") and (recipe.kind == "hydra++") != (cast(Any, head).config.prefix is not None):
        other = "hydra" if recipe.kind == "hydra++" else "hydra++"
        raise BadCheckpoint(f"{path} holds a {other} head, the run trains {recipe.kind}")
    return copy.deepcopy(head).requires_grad_(True)


def check_options(kind: str, options: dict[str, Any]) -> None:
    """Hold [head] settings to the arguments of the kind's Training class.

    Raises:
        BadRecipe: an unknown one, or a value of another type.
    """
    made = HydraTraining if kind == "hydra++" else HEADS[kind]
    hints = get_type_hints(cast(Any, made).__init__)
    hidden = {"self", "target", "head", "return", *(("prefix",) if kind.startswith("hydra") else ())}
    known = {name: hint for name, hint in hints.items() if name not in hidden}
    for name, value in options.items():
        if name not in known:
            raise BadRecipe(f"[head] of {kind} has no option {name!r}; it has {', '.join(sorted(known))}")
        if not _is_a(value, known[name]):
            raise BadRecipe(f"[head] {name} is {_described(known[name])}, got {value!r}")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a JSON value suits an annotation: int, float, bool, str, dict, Literal, or several of them."""
    if get_origin(hint) in (Union, UnionType):
        return any(_is_a(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kind = get_origin(hint) or hint
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _described(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    return "of type " + getattr(hint, "__name__", str(hint)).replace("typing.", "")


def check_drafts(training: HeadTraining) -> None:
    """Make the validation's drafter once, so that a wrong option is found before the first step.

    Raises:
        BadRecipe: names the option.
    """
    made = HEAD_DRAFTERS[training.kind]
    known = [name for name in inspect.signature(made).parameters if name not in NOT_OPTIONS]
    if unknown := sorted(set(training.options) - set(known)):
        raise BadRecipe(
            f"[head] options: drafter {training.kind} has no option {unknown[0]!r}; it has {', '.join(known)}"
        )
    try:
        training.drafter()
    except (TypeError, ValueError) as error:
        raise BadRecipe(f"[head] options {training.options}: {error}") from error


def keep_less(training: HeadTraining) -> None:
    """Make logits, and what happens inside attention and MLPs, again in the backward pass."""
    training.recompute = True
    for part in training.module.modules():
        if isinstance(part, Attention | MLP):
            part.recomputed = True


def _how_rows_are_made(recipe: Recipe) -> dict[str, Any]:
    data = recipe.data
    written: list[Any] | None = None if data.written_from == 1 else [data.written_from, data.written_temperature]
    if written is not None and data.written_speculative:  # sampled text is another one then
        written.append("speculative")
    return {"rows": data.row_length, "packed": data.packed, "written": written}


def staged_source(training: HeadTraining, documents: Documents, recipe: Recipe) -> Callable[[list[int]], TrainBatch]:
    """Batches by row number; from `written_from` on the target writes them.

    Raises:
        BadRecipe: features come from a cache, which knows nothing of text that is not written yet.
    """
    fixed, data, loop = row_source(documents, recipe), recipe.data, recipe.loop
    if data.written_from == 1:
        return fixed
    if isinstance(documents, CachedData):
        raise BadRecipe("text that the target writes while training has no cached features; leave --features out")
    order = order_of(documents, data.row_length, loop.seed, packed=data.packed)
    writing = Writing(temperature=data.written_temperature, speculative=data.written_speculative)
    written = written_source(training, documents, order, writing)
    return TwoStages(fixed, written, round(data.written_from * loop.steps) * loop.rows_per_step)


def row_source(documents: Documents, recipe: Recipe) -> Callable[[list[int]], TrainBatch]:
    """Batches by row number."""
    settings, seed = recipe.data, recipe.loop.seed
    order = order_of(documents, settings.row_length, seed, packed=settings.packed)

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
