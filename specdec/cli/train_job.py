"""The run that options of `specdec train` describe, with what can be refused before a model is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

from specdec.cli.model import DEMO_MODELS, locate
from specdec.cli.train_settings import (
    DRAFT_FLAGS,
    FLAGS,
    ONLINE_FLAGS,
    SIZES,
    Given,
    check_use,
    draft_values,
    sections_of,
)
from specdec.errors import BadRecipe
from specdec.train.adapters import require_peft
from specdec.train.distill import SCRATCH, TARGET, DraftSettings
from specdec.train.job import Job
from specdec.train.joint import JointSettings
from specdec.train.online_job import OnlineJob
from specdec.train.online_recipe import SECTIONS as ONLINE_SECTIONS
from specdec.train.online_recipe import online_recipe_for
from specdec.train.processes import check_processes
from specdec.train.publish import check_push
from specdec.train.recipe import DRAFT_MODEL, MEDUSA_2, SECTIONS, Recipe, recipe_for
from specdec.train.staged_job import CONTINUE, PRETRAIN, STAGES, is_staged, stage_recipe
from specdec.train.tracking import check_trackers


def job_of(given: Given) -> tuple[Job, int]:
    """The run that options describe, and how many processes share it.

    Raises:
        BadParameter: what the command line alone shows to be wrong.
        SpecdecError: what cannot be done on this machine, or a target that is not there.
    """
    _usage(lambda: check_use(given["kind"], given, online=False))
    recipe = _usage(lambda: _recipe(given))
    _usage(lambda: check_trackers(given.get("report_to", [])))
    _usage(lambda: _check_hub(given))
    check_processes(given["processes"], _device_type(given["device"]), torch.cuda.device_count())
    sharing = _sharing(given["processes"])
    _usage(lambda: _check_fitted(recipe, sharing))
    locate(given["target"])
    return _job(given, recipe), sharing


def _job(given: Given, recipe: Recipe) -> Job:
    begin_from, stages = given.get("begin_from"), {PRETRAIN: given.get("pretrain"), CONTINUE: given.get("continue_on")}
    return Job(
        recipe=recipe, target=given["target"], data=Path(given["data"][0]), out=given["out_folder"],
        features=given.get("features"), prompts=given.get("prompts"),
        begin_from=None if begin_from is None else _model_path(begin_from), fresh=given["fresh"],
        recompute="gradient_checkpointing" in given, report_to=tuple(given.get("report_to", ())),
        stages={name: Path(source) for name, source in stages.items() if source}, dtype=given["dtype"].value,
        device=given["device"], threads=given.get("threads"), command=tuple(sys.argv),
    )  # fmt: skip


def _recipe(given: Given) -> Recipe:
    if len(given["data"]) > 1:
        raise BadRecipe(
            f"several DATA belong to --online; `specdec data prepare {' '.join(given['data'])} ...` makes one of them"
        )
    kind, values = given["kind"], draft_values(given)
    sizes = "head.scratch." if "from_scratch" in given else "head.cut."
    flags = FLAGS | DRAFT_FLAGS | {name: sizes + field for name, field in SIZES.items()}
    if values.get("cut_from", TARGET) != TARGET:
        values["cut_from"] = str(_model_path(values["cut_from"]))
    recipe = recipe_for(kind, given.get("recipe"), **sections_of(given.get("assignments", []), values, flags, SECTIONS))
    if kind == DRAFT_MODEL:
        settings = DraftSettings.of(recipe)
        if "cut_from" in given and not settings.cut:
            raise BadRecipe(
                "--cut-from needs a size to cut to: --layers, --width, or --set head.cut.intermediate_size=N"
            )
        if settings.draft == SCRATCH and "from" in given:
            raise BadRecipe('--from and head.draft = "scratch" are two ways to begin; choose one')
        if settings.draft == SCRATCH and given.get("report_to"):
            raise BadRecipe("--report-to follows one run, and a draft from scratch is several; leave it out")
    if kind == MEDUSA_2:
        JointSettings.of(recipe)
        require_peft()
    return recipe


def _check_hub(given: Given) -> None:
    if "hub" in given:
        check_push(given["hub"])


def _check_fitted(recipe: Recipe, processes: int) -> None:
    for each in [stage_recipe(recipe, name) for name in STAGES] if is_staged(recipe) else [recipe]:
        each.fitted(processes)


def online_job_of(given: Given) -> OnlineJob:
    """The run that options with `--online` describe.

    Raises:
        BadParameter: what the command line alone shows to be wrong.
        SpecdecError: a target that is not there.
    """
    _usage(lambda: check_use(given["kind"], given, online=True))
    job = _usage(lambda: _online_job(given))
    _usage(lambda: _check_hub(given))
    locate(job.target)
    return job


def _online_job(given: Given) -> OnlineJob:
    kind = given["kind"]
    recipe = online_recipe_for(
        kind, given.get("recipe"), **sections_of(given.get("assignments", []), given, ONLINE_FLAGS, ONLINE_SECTIONS)
    )
    if "from" not in given:
        raise BadRecipe("--online begins with a drafter that is there: say --from DRAFTER")
    if given["processes"] > 1:
        raise BadRecipe("--processes does nothing with --online; leave it out")
    return OnlineJob(
        recipe=recipe, target=given["target"], sources=tuple(given["data"]), out=given["out_folder"],
        begin_from=given["from"], compare="static" in given, chat=given.get("chat"), fresh=given["fresh"],
        command=tuple(sys.argv),
    )  # fmt: skip


def _model_path(name: str) -> Path:
    """A directory of weights by its path, or by the word `demo-draft`."""
    return Path(locate(name)) if name in DEMO_MODELS else Path(name).expanduser()


def _sharing(processes: int) -> int:
    """How many processes share the work: those that we start, or those of the torchrun that started us."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if min(started, processes) > 1:
        raise typer.BadParameter("torchrun has started this command; it starts all processes", param_hint="--processes")
    return max(started, processes)


def _device_type(device: str) -> str:
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _usage(call: Callable[[], Any]) -> Any:
    """What is wrong with the command line alone is wrong usage."""
    try:
        return call()
    except BadRecipe as error:
        raise typer.BadParameter(str(error)) from error
