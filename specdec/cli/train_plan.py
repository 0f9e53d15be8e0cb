"""`specdec train --plan`: every setting, and what the run would do and need."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel

from specdec.api import target_of
from specdec.cli.console import note, out
from specdec.cli.model import dtype_of, load_model
from specdec.train.job import NOTE, Hear, Job, training_of
from specdec.train.plan import Plan, plan_run
from specdec.train.prepare import open_prepared
from specdec.train.prepared import check_tokenizer
from specdec.train.recipe import Recipe
from specdec.train.staged_job import data_of_stages, is_staged, stage_recipe, training_of_stages


def print_plan(job: Job, processes: int, as_json: bool) -> None:
    """Load the target, make the drafter, and do nothing else.

    Raises:
        SpecdecError, OSError: whatever would stop the run before its first step.
    """
    model = load_model(job.target, dtype_of(job.target, job.dtype), job.device)
    target = target_of(model)
    fit = (processes, target.max_positions, target.hidden_size)
    recipes, plans = _plans(job, model, fit, tell=_silent if as_json else _tell)
    recipe = job.recipe.fitted(*fit).resolved()
    if as_json:
        print(json.dumps(_report(recipe, recipes, plans)))
    else:
        out.print(_table(recipe, recipes, plans, processes))


def _runs(job: Job) -> dict[str, Job]:
    """The stages by name, each as a run; a run that has none is called by the empty string."""
    if not is_staged(job.recipe):
        return {"": job}
    return {name: replace(job, recipe=stage_recipe(job.recipe, name), data=path)
            for name, path in data_of_stages(job).items()}  # fmt: skip


def _plans(
    job: Job, model: PreTrainedModel, fit: tuple[int, int | None, int], *, tell: Hear
) -> tuple[dict[str, Recipe], dict[str, Plan]]:
    """Recipe and plan of every run, with the drafter made and thrown away."""
    runs = _runs(job)
    data = {name: open_prepared(run.data) for name, run in runs.items()}
    for each in data.values():
        check_tokenizer(each.manifest, model)
    recipes = {name: run.recipe.fitted(*fit) for name, run in runs.items()}
    first, last = next(iter(runs)), list(runs)[-1]
    with tempfile.TemporaryDirectory() as folder:
        if is_staged(job.recipe):
            training = training_of_stages(job, model, Path(folder), tell)
            recipes[first] = recipes[first].for_width(training.module.config.hidden_size)
        else:
            training = training_of(job, recipes[last], model, data[last], Path(folder))
        return recipes, {
            name: plan_run(recipes[name], training, data[name], fit[0], recompute=job.recompute) for name in runs
        }


def _report(recipe: dict[str, Any], recipes: dict[str, Recipe], plans: dict[str, Plan]) -> dict[str, Any]:
    stages = {name: {**plan.to_json(), "learning_rate": recipes[name].loop.learning_rate}
              for name, plan in plans.items()}  # fmt: skip
    shown = {"stages": stages} if len(plans) > 1 else {}
    return {"recipe": recipe, **plans[list(plans)[-1]].to_json(), **shown}


def _table(recipe: dict[str, Any], recipes: dict[str, Recipe], plans: dict[str, Plan], processes: int) -> Table:
    table, last = settings_table(recipe), list(plans)[-1]
    for name, plan in plans.items():
        table.add_row(f"[bold]{f'stage {name}' if name else 'run'}", "")
        if name:
            table.add_row("  learning rate", f"{recipes[name].loop.learning_rate:g}")
        for what, value in _stage_rows(plan, recipes[name].loop.steps) if name != last else _plan_rows(plan, processes):
            table.add_row(f"  {what}", value)
    return table


def settings_table(recipe: dict[str, Any]) -> Table:
    """Every setting of a recipe by sections, with room for more rows of two cells.

    Args:
        recipe: as `resolved` writes it.
    """
    table = Table.grid(padding=(0, 2))
    for section, settings in recipe.items():
        if isinstance(settings, dict):
            table.add_row(f"[bold]{section}", "")
            for name, value in settings.items():
                table.add_row(f"  {name}", escape(str(value)))
    return table


def _tell(event: dict[str, Any]) -> None:
    if event["event"] == NOTE:
        note(event["text"])


def _silent(event: dict[str, Any]) -> None:
    """Notes would stand between lines of JSON."""


def _stage_rows(plan: Plan, steps: int) -> list[tuple[str, str]]:
    return [
        ("data", f"{plan.documents:,} documents, {plan.tokens:,} tokens, {plan.rows:,} rows"),
        ("steps", f"{steps:,}, {plan.epochs:.2f} epochs"),
    ]


def _plan_rows(plan: Plan, processes: int) -> list[tuple[str, str]]:
    together = plan.target_bytes + plan.drafter_bytes + plan.activation_bytes
    return [
        ("parameters", f"{plan.parameters:,}, {plan.learning:,} of them learn"),
        ("data", f"{plan.documents:,} documents, {plan.tokens:,} tokens, {plan.rows:,} rows"),
        ("tokens per step", f"{plan.tokens_per_step:,} at most"),
        ("steps per epoch", f"{plan.steps_per_epoch:.1f}; the run has {plan.epochs:.2f} epochs"),
        ("memory", f"about {_size(together)} in each of {processes} processes: target {_size(plan.target_bytes)}, "
                   f"drafter with gradients and moments {_size(plan.drafter_bytes)}, "
                   f"laws {_size(plan.activation_bytes)} (a rough estimate)"),
        ("checkpoint", f"{_size(plan.checkpoint_bytes)} each, {plan.checkpoints} at the same time at most"),
    ]  # fmt: skip


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
