"""`specdec train --plan`: every setting, and what the run would do and need."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from specdec.api import target_of
from specdec.cli.console import note, out
from specdec.cli.model import dtype_of, load_model
from specdec.train.job import NOTE, Job, training_of
from specdec.train.plan import Plan, plan_run
from specdec.train.prepare import open_prepared
from specdec.train.prepared import check_tokenizer
from specdec.train.staged_job import data_of_stages, is_staged, stage_recipe, training_of_stages


def print_plan(job: Job, processes: int, as_json: bool) -> None:
    """Load the target, make the drafter, and do nothing else.

    Raises:
        SpecdecError, OSError: whatever would stop the run before its first step.
    """
    model = load_model(job.target, dtype_of(job.target, job.dtype), job.device)
    target = target_of(model)
    fit = (processes, target.max_positions, target.hidden_size)
    runs = {"": job}
    if is_staged(job.recipe):
        runs = {name: replace(job, recipe=stage_recipe(job.recipe, name), data=path)
                for name, path in data_of_stages(job).items()}  # fmt: skip
    data = {name: open_prepared(run.data) for name, run in runs.items()}
    for each in data.values():
        check_tokenizer(each.manifest, model)
    recipes = {name: run.recipe.fitted(*fit) for name, run in runs.items()}
    last = list(runs)[-1]
    with tempfile.TemporaryDirectory() as folder:
        if is_staged(job.recipe):
            training = training_of_stages(job, model, Path(folder), lambda event: None if as_json else _tell(event))
            first = next(iter(runs))
            recipes[first] = recipes[first].for_width(training.module.config.hidden_size)
        else:
            training = training_of(job, recipes[last], model, data[last], Path(folder))
        plans = {name: plan_run(recipes[name], training, data[name], processes) for name in runs}
    recipe = job.recipe.fitted(*fit)
    if as_json:
        stages = {name: {**plan.to_json(), "learning_rate": recipes[name].loop.learning_rate}
                  for name, plan in plans.items()}  # fmt: skip
        shown = {"stages": stages} if len(runs) > 1 else {}
        print(json.dumps({"recipe": recipe.resolved(), **plans[last].to_json(), **shown}))
        return
    table = Table.grid(padding=(0, 2))
    for section, settings in recipe.resolved().items():
        if isinstance(settings, dict):
            table.add_row(f"[bold]{section}", "")
            for name, value in settings.items():
                table.add_row(f"  {name}", escape(str(value)))
    for name, plan in plans.items():
        table.add_row(f"[bold]{f'stage {name}' if name else 'run'}", "")
        if name:
            table.add_row("  learning rate", f"{recipes[name].loop.learning_rate:g}")
        for what, value in _stage_rows(plan, recipes[name].loop.steps) if name != last else _plan_rows(plan, processes):
            table.add_row(f"  {what}", value)
    out.print(table)


def _tell(event: dict[str, Any]) -> None:
    if event["event"] == NOTE:
        note(event["text"])


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
