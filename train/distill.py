"""From a target, a draft model and data to a trained drafter directory: `specdec train draft-model`.

[head]                 # DraftSettings
draft = "path/to/small-model"
keep_share = 0.4       # AdaSPEC's filter; a reference draft is distilled first
[head.text]            # on_policy.TextShares
fixed = 0.5
draft = 0.5
[head.writing]         # on_policy.Writing
temperature = 1.0
[head.cut]             # prune.Sizes
num_layers = 4
"""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.directory import drafter_in, fingerprint
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.load import NOT_OPTIONS, load_model
from specdec.environment import weights_sample
from specdec.errors import BadCheckpoint, BadRecipe
from specdec.grow.named import growth_named
from specdec.probe import target_of
from specdec.target import Target
from specdec.train.batch import Documents, TrainBatch, order_of
from specdec.train.checkpoint import Checkpoints
from specdec.train.features import TargetFeatures, check_packing
from specdec.train.importance import calibration_rows, cut_by_importance
from specdec.train.kinds.draft_model import DraftModelTraining, save_model
from specdec.train.loop import Loop
from specdec.train.on_policy import MixedSource, TextShares, Writing
from specdec.train.prepared import unfinished_folder
from specdec.train.prune import Sizes
from specdec.train.recipe import DEFAULTS, DRAFT_MODEL, Recipe, laid_over
from specdec.train.recipe_loop import run_loop
from specdec.train.report import Score, StepReport
from specdec.train.run import evaluator, row_source

TARGET, SCRATCH = "target", "scratch"
"""`draft` that means the target itself, which is then cut; and one that begins with fresh weights, see `fast_draft`."""

REFERENCE = "reference"
"""Directory of a run in which AdaSPEC's reference draft is distilled."""

START, CUT = "start", "cut.json"
"""Directory of a run in which the model lies that was cut for it, and the file in it that says from what to what."""

CALIBRATION_ROWS = 16

DEFAULT_RECIPE = DEFAULTS[DRAFT_MODEL]
"""DistillSpec's learning rate, without its length."""

Report = Callable[[StepReport | Score], None]


@dataclass(frozen=True)
class Scratch:
    """How a fresh model's sizes are chosen.

    Attributes:
        share: of a step of the target that one of the draft may cost.
        num_layers, hidden_size: chosen beforehand; 0 leaves them to what is measured.

    Raises:
        BadRecipe: a number out of range.
    """

    share: float = 0.15
    num_layers: int = 0
    hidden_size: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or min(self.num_layers, self.hidden_size) < 0:
            raise BadRecipe(
                "the budget of a draft step is a share of a target step between 0 and 1, and sizes are 1 or more, or 0 "
                f"to measure, got {self.share:g}, {self.num_layers} and {self.hidden_size}"
            )


@dataclass(frozen=True)
class DraftSettings:
    """What the `[head]` section of a draft model's recipe says.

    Attributes:
        draft: directory of the model to begin with, or of a run that trained one; "target" for a model that is cut from
            the target, or "scratch" for a fresh one.
        learns: "law" or "tokens", see `DraftModelTraining`.
        keep_share: below 1, AdaSPEC's token filter.
        reference: directory of the filter's reference draft; without one it is distilled first, from the same start.
        dropout: see `DraftModelTraining`.
        text: who writes the text, see `TextShares`.
        writing: how, see `Writing`.
        cut: sizes that the model is cut to before it learns, see `Sizes`.
        scratch: how a fresh model's sizes are chosen, see `Scratch`.
        stages: by name of a fresh model's stage, sections of a recipe that hold in that one alone.
        options: of the drafter that validation decodes with.
    """

    draft: str = ""
    learns: str = "law"
    keep_share: float = 1.0
    reference: str = ""
    dropout: bool = False
    text: dict[str, Any] = field(default_factory=dict)
    writing: dict[str, Any] = field(default_factory=dict)
    cut: dict[str, Any] = field(default_factory=dict)
    scratch: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def shares(self) -> TextShares:
        """Who writes; whoever is not named writes nothing."""
        return laid_over(TextShares(), {"fixed": 0.0, **self.text} if self.text else {}, "head.text")

    @property
    def sizes(self) -> Sizes:
        """What the model is cut to."""
        return cast(Sizes, laid_over(Sizes(), self.cut, "head.cut"))

    @property
    def distils_reference(self) -> bool:
        """Whether the token filter's reference is distilled first."""
        return self.keep_share < 1 and not self.reference

    @property
    def fresh(self) -> Scratch:
        """How a fresh model's sizes are chosen."""
        return cast(Scratch, laid_over(Scratch(), self.scratch, "head.scratch"))

    @staticmethod
    def of(recipe: Recipe) -> DraftSettings:
        """The settings of a recipe, checked.

        Raises:
            BadRecipe: names the setting.
        """
        settings = laid_over(DraftSettings(), recipe.head, "head")
        _ = settings.shares, settings.sizes, settings.fresh, laid_over(Writing(), settings.writing, "head.writing")
        check_options(settings.options)
        if recipe.data.written_from < 1:
            raise BadRecipe("who writes a draft model's text is said by head.text; leave data.written_from out")
        if not 0 < settings.keep_share <= 1:
            raise BadRecipe(f"[head] keep_share is above 0 and at most 1, got {settings.keep_share}")
        if settings.learns != "law" and (settings.keep_share < 1 or settings.reference):
            raise BadRecipe('[head] the token filter compares laws; leave it out, or say learns = "law"')
        if settings.reference and settings.keep_share == 1:
            raise BadRecipe("[head] reference belongs to the token filter; say keep_share = 0.4, or leave it out")
        if settings.draft != SCRATCH and (settings.scratch or settings.stages):
            raise BadRecipe('[head] scratch and stages are of a fresh model; say draft = "scratch", or leave them out')
        if settings.draft == SCRATCH and settings.cut:
            raise BadRecipe("[head] a fresh model is not cut; leave out cut, or name a model to cut")
        return settings


def check_options(options: dict[str, Any]) -> None:
    """Refuse options that the validation's drafter does not have or cannot have; no model is needed to tell.

    Raises:
        BadRecipe: names the option.
    """
    parameters = inspect.signature(DraftModelDrafter).parameters
    known = {name: parameter.default for name, parameter in parameters.items() if name not in NOT_OPTIONS}
    if unknown := sorted(set(options) - set(known)):
        raise BadRecipe(
            f"[head] options: drafter {DRAFT_MODEL} has no option {unknown[0]!r}; it has {', '.join(known)}"
        )
    values = known | options
    try:
        growth_named(values.pop("grow"), **values)
    except (TypeError, ValueError) as error:
        raise BadRecipe(f"[head] options {options}: {error}") from error


def train_draft_model(
    recipe: Recipe,
    model: PreTrainedModel,
    documents: Documents,
    out: Path,
    *,
    draft: PreTrainedModel | None = None,
    begin_from: Path | None = None,
    recompute: bool = False,
    prompts: list[list[int]] | None = None,
    data_identity: dict[str, Any] | None = None,
    report: Report = lambda _report: None,
    report_reference: Report = lambda _report: None,
    restored: Callable[[Loop], None] = lambda _loop: None,
    restored_reference: Callable[[Loop], None] = lambda _loop: None,
    resume: bool = True,
    accelerator: Accelerator | None = None,
) -> Loop:
    """Distil a draft model and leave checkpoints in `out`; `out/drafter` leads to the one to use.

    With AdaSPEC's filter and no reference given, the reference is distilled first, in `out/reference`.

    Args:
        recipe: settings; its `head` section is DraftSettings.
        model: the target; frozen.
        documents: prepared texts.
        out: directory of the run.
        draft: what to begin with, in place of the recipe's; it learns in place.
        begin_from: the same as a directory.
        recompute: layers are run again in the backward pass instead of being remembered.
        prompts: held-out prompts to decode for validation; none means no validation.
        data_identity: says which data this is; a resumed run must agree.
        report: hears of every step and validation.
        report_reference: the same of the reference that is distilled first.
        restored: called once everything fits and the newest checkpoint is taken up, before the first step.
        restored_reference: the same of the reference.
        resume: go on from the newest checkpoint in `out`.
        accelerator: of the process, when there are several.

    Returns:
        the loop, finished or stopped by a signal; that of the reference when the signal came so early.

    Raises:
        SpecdecError: settings, data, models or checkpoints that do not fit; says which.
    """
    settings = DraftSettings.of(recipe)
    if begin_from is not None:
        settings = replace(settings, draft=str(begin_from))
    target = target_of(model)
    recipe = recipe.fitted(1 if accelerator is None else accelerator.num_processes, target.max_positions)
    begun = starting_draft(settings, model, documents, out, recipe, accelerator) if draft is None else draft
    common: dict[str, Any] = {
        "prompts": prompts, "data_identity": data_identity, "resume": resume, "accelerator": accelerator,
    }  # fmt: skip
    reference: PreTrainedModel | None = None
    if settings.reference:
        reference = _model_in(settings.reference, model, torch.float32)
    elif settings.distils_reference:
        reference = copy.deepcopy(begun)
        plain = replace(recipe, head={**recipe.head, "keep_share": 1.0, "reference": ""})
        loop = train_draft_model(
            plain, model, documents, out / REFERENCE, draft=reference, recompute=recompute, report=report_reference,
            restored=restored_reference, **common,
        )  # fmt: skip
        if loop.step < loop.settings.steps or loop.stopped:
            return loop
    training = DraftModelTraining(
        target, begun, learns=cast(Any, settings.learns), reference=reference, keep_share=settings.keep_share,
        dropout=settings.dropout, recompute=recompute, options=settings.options,
    )  # fmt: skip
    return run_training(training, recipe, documents, out, report=report, restored=restored, **common)


def run_training(
    training: DraftModelTraining,
    recipe: Recipe,
    documents: Documents,
    out: Path,
    *,
    prompts: list[list[int]] | None,
    data_identity: dict[str, Any] | None,
    report: Report,
    restored: Callable[[Loop], None],
    resume: bool,
    accelerator: Accelerator | None,
) -> Loop:
    """The loop around a draft model; arguments as of `train_draft_model`."""
    target = training.target
    if recipe.data.packed:
        check_packing(target)
        training.module.eval()
        check_packing(Target(training.module))
    training.drafter()  # an option that this very model cannot have is found now
    return run_loop(
        recipe,
        training,
        text_source(training, recipe, documents),
        TargetFeatures(target, training.taps, needs_logits=training.needs_logits),
        out,
        identity={
            "target": {**fingerprint(target.model), "weights": weights_sample(target.model)},
            "draft": {**fingerprint(training.module), "weights": weights_sample(training.module)},
            "reference": None if training.reference is None else weights_sample(training.reference),
            "head": {key: value for key, value in recipe.head.items() if key not in PLACES},
            "data": {"rows": recipe.data.row_length, "packed": recipe.data.packed, **(data_identity or {})},
        },
        evaluate=evaluator(target.model, prompts, recipe),
        report=report,
        restored=restored,
        resume=resume,
        accelerator=accelerator,
    )


PLACES = ("draft", "reference")
"""Settings that say where a model lies; the identity of a run has its weights instead."""


def text_source(
    training: DraftModelTraining, recipe: Recipe, documents: Documents
) -> Callable[[list[int]], TrainBatch]:
    """Batches by row number: the data's own text, or what models write."""
    settings = DraftSettings.of(recipe)
    if settings.shares == TextShares():
        return row_source(documents, recipe)
    order = order_of(documents, recipe.data.row_length, recipe.loop.seed, packed=recipe.data.packed)
    return MixedSource(documents, order, settings.shares, training, Writing(**settings.writing))


def starting_draft(
    settings: DraftSettings,
    model: PreTrainedModel,
    documents: Documents,
    out: Path,
    recipe: Recipe,
    accelerator: Accelerator | None = None,
) -> PreTrainedModel:
    """The model that the first step begins with, in fp32.

    One that has to be cut first is kept in `out/start`, so that a resumed run begins with the same. As long as no
    checkpoint rests on it, every start cuts anew: the one before may have had other settings.

    Raises:
        BadRecipe: no model is named, or the target shall be its own draft model.
        BadCheckpoint: checkpoints rest on another cut than the one that is asked for.
        UnknownDrafter: the directory holds no model.
    """
    if not settings.draft:
        raise BadRecipe(
            "a draft model begins with a model: say --from DIR, --cut-from target or --from-scratch (in a recipe, head "
            'draft = "path", "target" with a cut, or "scratch")'
        )
    if settings.draft == SCRATCH:
        raise BadRecipe("a fresh draft model is trained in stages: use `specdec train`, or fast_draft")
    if not settings.cut:
        if settings.draft == TARGET:
            raise BadRecipe(
                "the target itself cannot be its draft model; say what to cut, such as [head.cut] num_layers=4"
            )
        return _model_in(settings.draft, model, torch.float32)
    start = out / START
    if accelerator is None or accelerator.is_main_process:
        if start.exists() and any(Checkpoints(folder).all() for folder in (out, out / REFERENCE)):
            _check_start(start, settings, model)
        else:
            rows = calibration_rows(documents, recipe.data.row_length, CALIBRATION_ROWS)
            _write_start(start, settings, model, rows)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return load_model(start, model, torch.float32)


def _write_start(start: Path, settings: DraftSettings, model: PreTrainedModel, rows: list[Tensor]) -> None:
    """Cut, and leave the result with what it was made from, in place of what was there."""
    whole = _whole_model(settings, model)
    cut = cut_by_importance(whole, settings.sizes, rows)
    made = {"draft": settings.draft, "weights": weights_sample(whole), "cut": settings.cut}
    if start.exists():
        shutil.rmtree(start)
    with unfinished_folder(start) as folder:
        save_model(cast(Any, cut).float(), folder)
        (folder / CUT).write_text(json.dumps(made, indent=2) + "\n")


def _check_start(start: Path, settings: DraftSettings, model: PreTrainedModel) -> None:
    """Hold a cut that checkpoints rest on to the settings; one of an earlier specdec does not say how it was made."""
    if not (start / CUT).exists():
        return
    made = json.loads((start / CUT).read_text())
    same = made["draft"] == settings.draft or made["weights"] == weights_sample(_whole_model(settings, model))
    if not same or Sizes(**made["cut"]) != settings.sizes:
        raise BadCheckpoint(
            f"{start} was cut from {made['draft']} to {made['cut']}, this run asks for {settings.draft} and "
            f"{settings.cut}. Use another --out, or the settings of that run"
        )


def _whole_model(settings: DraftSettings, model: PreTrainedModel) -> PreTrainedModel:
    """What is cut."""
    return model if settings.draft == TARGET else _model_in(settings.draft, model)


def _model_in(path: str, target: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in a directory, or that of a training run; see `load_model`."""
    return load_model(drafter_in(Path(path).expanduser()), target, dtype)
