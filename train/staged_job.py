"""A draft model from scratch, as the command gives it: an architecture chosen here, then a run for each stage.

OUT/architecture.json    the choice, and what it rests on
OUT/pretrain/, OUT/continue/, OUT/align/
                         a run each, with the files of `train.job`
OUT/align/reference/     the run of the token filter's reference, a stage of its own
OUT/drafter              leads to the drafter of the last stage that has one
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.errors import BadRecipe
from specdec.probe import target_of
from specdec.train.architecture import Architecture, fresh_draft, sized
from specdec.train.distill import REFERENCE, SCRATCH, DraftSettings
from specdec.train.fast_draft import Stage, architecture_of, fast_draft
from specdec.train.job import FINISHED, NOTE, Hear, Job, StageReporter, documents_of, finished_event, prompts_of
from specdec.train.kinds.draft_model import DraftModelTraining
from specdec.train.loop import Loop
from specdec.train.prepare import open_prepared
from specdec.train.prepared import check_tokenizer
from specdec.train.recipe import DRAFT_MODEL, Recipe

PRETRAIN, CONTINUE, ALIGN = "pretrain", "continue", "align"
STAGES = (PRETRAIN, CONTINUE, ALIGN)
"""FastDraft's, in order; all but the last are left out where they have no data."""

OF_ALL_STAGES = ("dropout", "options")


def is_staged(recipe: Recipe) -> bool:
    """Whether a recipe begins with a fresh draft model."""
    return recipe.kind == DRAFT_MODEL and recipe.head.get("draft") == SCRATCH


def stage_recipe(recipe: Recipe, name: str) -> Recipe:
    """What one stage is trained with: the run's settings, under those that [head.stages] has for it.

    Before the last stage, text is learned as it is: whose text and which tokens are matters of that one.

    Raises:
        BadRecipe: a stage that does not exist, or settings that it cannot have.
    """
    stages = DraftSettings.of(recipe).stages
    if unknown := sorted(set(stages) - set(STAGES)):
        raise BadRecipe(f"[head.stages] has no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    head = {key: value for key, value in recipe.head.items() if key not in ("draft", "scratch", "stages")}
    if name != ALIGN:
        head = {"learns": "tokens", **{key: value for key, value in head.items() if key in OF_ALL_STAGES}}
    made = replace(recipe, head=head)
    if name in stages:
        if not isinstance(stages[name], dict):
            raise BadRecipe(f"[head.stages.{name}] is a section, got {stages[name]!r}")
        try:
            made = made.changed(stages[name])
        except BadRecipe as error:
            raise BadRecipe(f"[head.stages.{name}] {error}") from error
    DraftSettings.of(made)
    return made


def data_of_stages(job: Job) -> dict[str, Path]:
    """Prepared data of every stage of the run, in order."""
    return {**{name: job.stages[name] for name in STAGES if name in job.stages}, ALIGN: job.data}


def stages_in_turn(recipes: dict[str, Recipe]) -> list[str]:
    """Everything that trains, by its folder in OUT: the stages, each behind the reference that is distilled for it."""
    names: list[str] = []
    for name, recipe in recipes.items():
        names += [f"{name}/{REFERENCE}"] if DraftSettings.of(recipe).distils_reference else []
        names.append(name)
    return names


def chosen_architecture(
    job: Job, model: PreTrainedModel, out: Path, hear: Hear, accelerator: Accelerator | None = None
) -> Architecture:
    """As `architecture_of`, and said.

    Raises:
        BadRecipe, BadCheckpoint, UnsupportedModel: none fits, another one was chosen, or another family.
    """
    wanted = DraftSettings.of(job.recipe).fresh
    config = model.config.get_text_config(decoder=True)
    explicit = bool(wanted.num_layers or wanted.hidden_size)
    grid = sized(config, wanted.num_layers, wanted.hidden_size)
    known = (out / "architecture.json").exists()
    if not known and len(grid) > 1:
        hear({"event": NOTE, "text": f"timing a step of the target and of {len(grid)} draft architectures"})
    only = grid[0] if len(grid) == 1 else None
    made = architecture_of(model, out, wanted.share, only, accelerator=accelerator, grid=grid if explicit else None)
    if not known:
        hear({"event": NOTE, "text": said(made, out)})
    return made


def said(made: Architecture, out: Path) -> str:
    """One line about a choice."""
    kept = json.loads((out / "architecture.json").read_text())
    sizes = f"{made.num_layers} layer{'' if made.num_layers == 1 else 's'} of width {made.hidden_size}"
    seconds = [
        row["seconds"] for row in kept["measured"] if all(row[key] == value for key, value in vars(made).items())
    ]
    if not seconds:
        return f"draft of {sizes}"
    return f"draft of {sizes}: a step costs {seconds[0] / kept['target_seconds']:.2f} of the target's"


def training_of_stages(job: Job, model: PreTrainedModel, folder: Path, hear: Hear) -> DraftModelTraining:
    """The fresh draft as the first stage begins with it; the choice lies in `folder`.

    Raises:
        SpecdecError: as of `chosen_architecture`.
    """
    made = chosen_architecture(job, model, folder, hear)
    draft = fresh_draft(model, made, job.recipe.loop.seed)
    return DraftModelTraining(target_of(model), draft, options=DraftSettings.of(job.recipe).options)


def run_stages(
    job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, hear: Hear
) -> None:
    """Train through all stages, in this process or in this one of several; arguments and errors as of `run_job`."""
    data = {name: open_prepared(path) for name, path in data_of_stages(job).items()}
    limit, processes = target_of(model).max_positions, accelerator.num_processes
    recipes = {name: stage_recipe(job.recipe, name).fitted(processes, limit) for name in data}
    for prepared in data.values():
        check_tokenizer(prepared.manifest, model)
    jobs = {name: replace(job, recipe=recipes[name], out=job.out / name, data=path, stages={})
            for name, path in data_of_stages(job).items()}  # fmt: skip
    names = stages_in_turn(recipes)
    reporters = {name: StageReporter(own, name, names, accelerator, hear) for name, own in jobs.items()}
    references = {
        name: StageReporter(replace(own, out=own.out / REFERENCE), f"{name}/{REFERENCE}", names, accelerator, hear)
        for name, own in jobs.items()
    }
    prompts = prompts_of(job, model, tokenizer, recipes[ALIGN], reporters[ALIGN])
    stages = [
        Stage(name, documents_of(job, prepared, model, recipes[name]), recipes[name],
              {"sha256": prepared.manifest["sha256"]})
        for name, prepared in data.items()
    ]  # fmt: skip
    main = hear if accelerator.is_main_process else lambda _event: None
    made = chosen_architecture(job, model, job.out, main, accelerator)
    loop = fast_draft(
        model, stages, job.out, share=DraftSettings.of(job.recipe).fresh.share, architecture=made,
        recompute=job.recompute, prompts=prompts, report=lambda name: reporters[name],
        report_reference=lambda name: references[name], restored=lambda name: reporters[name].begin,
        restored_reference=lambda name: references[name].begin, resume=not job.fresh, accelerator=accelerator,
    )  # fmt: skip
    if accelerator.is_main_process:
        hear(_finished(loop, job))


def _finished(loop: Loop, job: Job) -> dict[str, Any]:
    """The end of the stage that was reached; OUT/drafter leads to its drafter, or to that of the stage before."""
    event, out = finished_event(loop, job), job.out
    name = loop.checkpoints.folder.relative_to(out).as_posix()
    if event["drafter"] is not None:
        fresh = out / ".unfinished-drafter"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(f"{name}/drafter")
        os.replace(fresh, out / "drafter")
        event["drafter"] = str(out / "drafter")
    return {**event, "event": FINISHED, "stage": name, "stopped": event["stopped"] or name != ALIGN}
