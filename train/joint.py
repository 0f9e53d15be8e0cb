"""From a recipe to Medusa-2: heads and an adapted target that belong together (arXiv 2401.10774, section 2.2.2).

OUT/heads/    the first stage: the heads alone on the frozen target, a whole run whose drafter fits the original target
OUT/step-*/   checkpoints of the second stage: drafter/ has the heads, drafter/adapter/ the adapters as peft writes them
OUT/target/   the adapted target of the best checkpoint, an ordinary model, written when the run ends

[head]                  # JointSettings
frozen_steps = 1000     # of the first stage
head_weight = 0.2
[head.lora]             # adapters.LoRASettings
rank = 32
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.directory import ADAPTED, CONFIG_MARK, fingerprint, read_drafter_json
from specdec.environment import weights_sample
from specdec.errors import BadRecipe
from specdec.probe import target_of
from specdec.target import Target
from specdec.train.adapters import Adapters, LoRASettings, require_peft
from specdec.train.batch import Documents
from specdec.train.drift import Drift
from specdec.train.features import check_packing
from specdec.train.kinds.draft_model import save_model
from specdec.train.kinds.medusa import MedusaTraining
from specdec.train.kinds.medusa2 import JointWeights, Medusa2Training
from specdec.train.loop import Loop
from specdec.train.prepared import unfinished_folder
from specdec.train.recipe import DEFAULTS, MEDUSA_2, Recipe, laid_over
from specdec.train.recipe_loop import run_loop
from specdec.train.report import Score, StepReport
from specdec.train.run import check_drafts, evaluator, make_training, row_source, train_head
from specdec.train.tokenizer_files import copy_tokenizer
from specdec.train.trainable import Trainable

HEADS, JOINT = "heads", "joint"
"""The stages; the first one's run lies in a folder of its name."""

TARGET = "target"
"""Folder in OUT of the adapted target."""

OF_THE_HEADS = ("num_heads", "num_layers", "output")

Report = Callable[[StepReport | Score], None]
Restored = Callable[[Loop], None]


@dataclass(frozen=True)
class JointSettings:
    """What the `[head]` section of a Medusa-2 recipe says.

    Attributes:
        num_heads, num_layers, output: see `MedusaTraining`.
        frozen_steps: of the first stage, in which the heads learn on the frozen target; 0 leaves it out.
        frozen_rate: highest learning rate there. In the second stage `loop.learning_rate` is that of the adapters.
        head_rate: the heads' learning rate in the second stage, as a multiple of the adapters'.
        head_weight, head_schedule, base_weight: of the joint loss, see `JointWeights`.
        lora: see `LoRASettings`.
        options: of the drafter that validation decodes with.
    """

    num_heads: int = 4
    num_layers: int = 1
    output: str = "target"
    frozen_steps: int = 1000
    frozen_rate: float = DEFAULTS[MedusaTraining.kind].loop.learning_rate
    head_rate: float = 4.0
    head_weight: float = 0.2
    head_schedule: str = "constant"
    base_weight: float = 1.0
    lora: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(recipe: Recipe) -> JointSettings:
        """The settings of a recipe, checked.

        Raises:
            BadRecipe: names the setting.
        """
        settings = laid_over(JointSettings(), recipe.head, "head")
        _ = settings.sizes, settings.weights(recipe)
        if settings.frozen_steps < 0 or not settings.frozen_rate > 0 or not settings.head_rate > 0:
            raise BadRecipe(
                "[head] frozen_steps is not negative, frozen_rate and head_rate are positive, got "
                f"{settings.frozen_steps}, {settings.frozen_rate:g} and {settings.head_rate:g}"
            )
        if recipe.loop.fsdp:
            raise BadRecipe("medusa2 learns inside its target, which FSDP does not divide; leave --fsdp out")
        if recipe.data.written_from < 1:
            raise BadRecipe(
                "medusa2 learns from text that is there; leave data.written_from out, and let the target answer "
                "beforehand with `specdec data regenerate`"
            )
        return settings

    @property
    def sizes(self) -> LoRASettings:
        """Of the adapters."""
        return laid_over(LoRASettings(), self.lora, "head.lora")

    def weights(self, recipe: Recipe) -> JointWeights:
        """Of the joint loss."""
        loop = recipe.loop
        return JointWeights(
            self.base_weight, self.head_weight, self.head_schedule, max(loop.steps, 1), max(loop.rows_per_step, 1)
        )


def train_medusa2(
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
    restored: Restored = lambda _loop: None,
    report_heads: Report = lambda _report: None,
    restored_heads: Restored = lambda _loop: None,
    resume: bool = True,
    accelerator: Accelerator | None = None,
) -> Loop:
    """Train Medusa heads on a frozen target, then both together; `out/target` and `out/drafter` are the pair to use.

    Args:
        recipe: settings; its `head` section is JointSettings.
        model: the target. At the end it is the adapted one, as in `out/target`; after a run that was broken off, the
            original.
        documents: prepared texts, best the target's own.
        out: directory of the run.
        prompts: held-out prompts to decode for validation; none means no validation.
        data_identity: says which data this is; a resumed run must agree.
        begin_from: Medusa heads of this target to begin with; the first stage is left out then, unless its steps are
            among what the recipe was given.
        recompute: logits, and in the second stage the target's layers, are made again in the backward pass instead of
            being kept.
        report: hears of every step and validation of the second stage.
        restored: called before its first step.
        report_heads, restored_heads: the same of the first stage.
        resume: go on from the newest checkpoint in `out`.
        accelerator: of the process, when there are several.

    Returns:
        the second stage's loop, finished or stopped by a signal; the first one's when the signal came so early.

    Raises:
        SpecdecError: settings, data or checkpoints that do not fit; says which.
    """
    require_peft()
    recipe = beginning_with(recipe, begin_from)
    JointSettings.of(recipe)  # what this kind cannot have is said before what does not fit the run
    target, processes = target_of(model), 1 if accelerator is None else accelerator.num_processes
    recipe = recipe.fitted(processes, target.max_positions, target.hidden_size)
    settings = JointSettings.of(recipe)
    common: dict[str, Any] = {
        "prompts": prompts, "data_identity": data_identity, "resume": resume, "accelerator": accelerator,
    }  # fmt: skip
    learned: dict[str, Tensor] | None = None
    if settings.frozen_steps:
        loop = train_head(
            head_recipe(recipe), model, documents, out / HEADS, begin_from=begin_from, recompute=recompute,
            report=report_heads, restored=restored_heads, **common,
        )  # fmt: skip
        if loop.step < loop.settings.steps or loop.stopped:
            return loop
        learned = loop.checkpoints.weights()
        loop.accelerator.free_memory()  # it would keep the first stage's moments
        del loop
    training = joint_training(recipe, target, begin_from, recompute=recompute, learned=learned)
    try:
        loop = train_together(training, recipe, documents, out, report=report, restored=restored, **common)
        finished = loop.step == loop.settings.steps
        if finished:
            finish(training, loop, out)
    except BaseException:
        training.adapters.remove()
        raise
    if not finished:
        training.adapters.remove()
    return loop


def beginning_with(recipe: Recipe, heads: Path | None) -> Recipe:
    """The recipe of a run that begins with heads: they leave the first stage out, unless its steps were chosen."""
    if heads is None or "head.frozen_steps" in recipe.given:
        return recipe
    return recipe.changed({"head": {"frozen_steps": 0}})


def head_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the heads alone: a fitted Medusa-2 recipe's first stage; any other one as it is."""
    if recipe.kind != MEDUSA_2:
        return recipe
    settings = JointSettings.of(recipe)
    head = {name: getattr(settings, name) for name in (*OF_THE_HEADS, "options")}
    given = frozenset(
        name for name in recipe.given if not name.startswith("head.") or name.removeprefix("head.") in OF_THE_HEADS
    ) | {"loop.learning_rate"}  # frozen_rate was chosen, or fitted with the rest
    steps = max(settings.frozen_steps, 1)
    return Recipe(
        MedusaTraining.kind,
        replace(recipe.loop, steps=steps, learning_rate=settings.frozen_rate),
        recipe.objective,
        recipe.data,
        head,
        given,
    )


def joint_training(
    recipe: Recipe,
    target: Target,
    begin_from: Path | None = None,
    *,
    recompute: bool = False,
    learned: dict[str, Tensor] | None = None,
) -> Medusa2Training:
    """The second stage's Training object; adapters are put into the target.

    Args:
        recipe: Medusa-2's.
        target: probed.
        begin_from: a directory with heads to begin with.
        recompute: gradient checkpointing.
        learned: weights of the first stage.

    Raises:
        BadRecipe: settings that do not fit the target.
    """
    settings = JointSettings.of(recipe)
    torch.manual_seed(recipe.loop.seed)  # fresh weights are the same in every process and on every resume
    heads = cast(MedusaTraining, make_training(head_recipe(recipe), target, begin_from))
    check_drafts(heads)
    if learned is not None:
        heads.module.load_state_dict(learned)
    torch.manual_seed(recipe.loop.seed)
    return Medusa2Training(heads, Adapters(target, settings.sizes), settings.weights(recipe), recompute=recompute)


def train_together(
    training: Medusa2Training,
    recipe: Recipe,
    documents: Documents,
    out: Path,
    *,
    prompts: list[list[int]] | None,
    data_identity: dict[str, Any] | None,
    report: Report,
    restored: Restored,
    resume: bool,
    accelerator: Accelerator | None,
) -> Loop:
    """The second stage; arguments as of `train_medusa2`."""
    target, settings = training.target, JointSettings.of(recipe)
    if recipe.data.packed:
        check_packing(target)
    return run_loop(
        replace(recipe, head=asdict(settings)),
        training,
        row_source(documents, recipe),
        training.features,
        out,
        identity={
            "target": {**fingerprint(target.model), "weights": training.adapters.original},
            "head": asdict(settings),
            "begin": weights_sample(training.heads.module),
            "data": {"rows": recipe.data.row_length, "packed": recipe.data.packed, **(data_identity or {})},
        },
        rates={"heads": settings.head_rate},
        evaluate=adapted_evaluator(training, prompts, recipe),
        report=report,
        restored=restored,
        resume=resume,
        accelerator=accelerator,
    )


def adapted_evaluator(
    training: Medusa2Training, prompts: list[list[int]] | None, recipe: Recipe
) -> Callable[[Trainable], Score] | None:
    """Validation with the adapted target, which is also compared with the original one; None without prompts."""
    inner = evaluator(training.target.model, prompts, recipe)
    if inner is None:
        return None
    drift: list[Drift] = []

    def evaluate(trainable: Trainable) -> Score:
        if not drift:
            off = training.adapters.off()
            drift.append(Drift(training.target, off, inner.prompts, recipe.data.validation_tokens))
        with training.adapters.merged():
            score = inner(trainable)
            return Score(score.value, {**score.details, **drift[0].measure()})

    return evaluate


def finish(training: Medusa2Training, loop: Loop, out: Path) -> None:
    """Fold the adapters of the drafter to use into the model, and write it where it does not lie already.

    Raises:
        OSError: it cannot be written; the checkpoints are whole, and the same command tries again.
    """
    checkpoint = loop.checkpoints.best() or loop.checkpoints.latest()
    assert checkpoint is not None, "a finished run has saved"
    training.module.load_state_dict(loop.checkpoints.weights())
    mark = training.adapters.mark()
    model: Any = training.adapters.fold()
    setattr(model.config, CONFIG_MARK, mark)
    assert read_drafter_json(checkpoint / "drafter").target[ADAPTED] == mark, "heads and adapters belong together"
    if loop.accelerator.is_main_process and mark_in(out / TARGET) != mark:
        try:
            write_target(model, out / TARGET)
        except Exception as error:  # of the file system and safetensors
            reason = " ".join(str(error).split())[:160]
            raise OSError(
                f"the adapted target cannot be written to {out / TARGET} ({reason}); checkpoints are whole. "
                "Make room and run the same command again"
            ) from error
    loop.accelerator.wait_for_everyone()


def write_target(model: PreTrainedModel, path: Path) -> None:
    """A model directory with the tokenizer; it appears whole, in place of what was there."""
    if path.exists():
        shutil.rmtree(path)
    with unfinished_folder(path) as folder:
        save_model(model, folder)
        copy_tokenizer(model, folder)


def mark_in(path: Path) -> str | None:
    """The mark of the adapted target in a directory; None where there is none."""
    try:
        return json.loads((path / "config.json").read_text()).get(CONFIG_MARK)
    except (OSError, ValueError, AttributeError):
        return None
