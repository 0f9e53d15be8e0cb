"""`specdec train`: from a target and data to a drafter that is measured while it learns."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from specdec.api import target_of
from specdec.cli.console import INTERRUPTED, note, out
from specdec.cli.model import load_model, load_tokenizer, locate
from specdec.cli.options import Device, Dtype, DtypeOption, Threads, within
from specdec.cli.train_display import display
from specdec.cli.train_process import dtype_of, run_here
from specdec.errors import BadRecipe, SpecdecError
from specdec.train.data_of_run import is_prepared, prepared_for
from specdec.train.job import FINISHED, Job, training_of
from specdec.train.plan import Plan, plan_run
from specdec.train.prepare import open_prepared
from specdec.train.prepared import check_tokenizer
from specdec.train.processes import check_processes, launch
from specdec.train.publish import check_push, push_to_hub
from specdec.train.recipe import DEFAULTS, Recipe, merged, parsed_settings, recipe_for
from specdec.train.tracking import check_trackers

FLAGS = {
    "steps": "loop.steps",
    "lr": "loop.learning_rate",
    "batch_rows": "loop.rows_per_step",
    "rows_at_once": "loop.rows_at_once",
    "row_length": "data.row_length",
    "seed": "loop.seed",
    "bf16": "loop.bf16",
    "fsdp": "loop.fsdp",
    "save_every": "loop.save_every",
    "evaluate_every": "loop.evaluate_every",
    "temperature": "data.validation_temperature",
}
"""Settings of a recipe that have an option of their own."""


def train(
    kind: Annotated[str, typer.Argument(help=f"What to train: {', '.join(DEFAULTS)}.", show_default=False)],
    target: Annotated[
        str, typer.Argument(help="The model: a directory, a hub id, or the word [bold]demo[/bold].", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Argument(
            help="What [bold]specdec data prepare[/bold] made; or text, JSON lines, Parquet, a folder or a data set, "
            "which are prepared into OUT/data.",
            show_default=False,
        ),
    ],
    out_folder: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Directory of the run; an unfinished run in it is gone on with.", show_default=False
        ),
    ],
    recipe: Annotated[
        Path | None, typer.Option(help="Settings in TOML, over the kind's defaults.", show_default=False)
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any setting, as in [bold]--set objective.divergence=jsd:0.5[/bold].", show_default=False
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Highest learning rate.", show_default=False)] = None,
    batch_rows: Annotated[int | None, typer.Option(help="Rows of one step, all processes.", show_default=False)] = None,
    rows_at_once: Annotated[
        int | None, typer.Option(help="Rows of one forward; the rest of a step is accumulated.", show_default=False)
    ] = None,
    row_length: Annotated[int | None, typer.Option(help="Tokens of a row.", show_default=False)] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of fresh weights, data order and noise.", show_default=False)
    ] = None,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="Autocast; weights stay in float32.", show_default=False)
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.", show_default=False)] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between validations.", show_default=False)] = None,
    temperature: Annotated[float | None, typer.Option(help="Of validation; 0 is greedy.", show_default=False)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Held-out prompts: JSON lines, or text with one a line.", show_default=False),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(help="The target's states from [bold]specdec data features[/bold].", show_default=False),
    ] = None,
    begin_from: Annotated[
        Path | None,
        typer.Option("--from", help="Begin with the weights of this drafter.", show_default=False),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Refuse an --out that holds checkpoints.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute layers again instead of keeping their states.")
    ] = False,
    processes: Annotated[int, typer.Option(callback=within(1), help="Processes on this machine.")] = 1,
    fsdp: Annotated[
        bool | None,
        typer.Option(
            "--fsdp/--no-fsdp", help="Share weights, gradients and moments among processes.", show_default=False
        ),
    ] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="Also report to tensorboard, wandb or trackio.", show_default=False)
    ] = None,
    hub: Annotated[
        str | None, typer.Option("--push-to-hub", help="Upload the best drafter as OWNER/NAME.", show_default=False)
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done and needed, and do nothing.")] = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each report on stdout.")] = False,
) -> None:
    """Train a drafter for a target and measure it on held-out prompts while it learns.

    Every kind has defaults. After Ctrl-C, SIGTERM or a crash the same command goes on where it stopped, with the same
    result as without the interruption. OUT/drafter leads to the best drafter.

    Example: specdec train medusa demo texts/ --out runs/medusa --steps 500
    """
    given = {name: value for name, value in locals().items() if name in FLAGS and value is not None}
    chosen = _usage(lambda: _recipe(kind, recipe, assignments or [], given))
    _usage(lambda: check_trackers(report_to or []))
    if hub:
        _usage(lambda: check_push(hub))
    check_processes(processes, _device_type(device), torch.cuda.device_count())
    sharing = _sharing(processes)
    _usage(lambda: chosen.fitted(sharing))
    locate(target)
    job = Job(
        recipe=chosen, target=target, data=Path(data), out=out_folder, features=features, prompts=prompts,
        begin_from=begin_from, fresh=fresh, recompute=gradient_checkpointing, report_to=tuple(report_to or ()),
        dtype=dtype.value, device=device, threads=threads, command=tuple(sys.argv),
    )  # fmt: skip
    if plan:
        with tempfile.TemporaryDirectory() as folder:
            _print_plan(_prepared(job, data, Path(folder)), sharing, as_json)
        return
    job = _prepared(job, data, out_folder)
    finished = _run(job, processes, as_json)
    if not _is_main():
        return
    if finished is None:
        note("stopped before the first step; nothing was changed")
        raise typer.Exit(INTERRUPTED)
    _conclude(finished, target, out_folder, as_json)
    if hub and not finished["stopped"]:
        note(f"pushed to {push_to_hub(Path(finished['drafter']), hub)}")


def _is_main() -> bool:
    """Whether this process speaks: started by torchrun, every process runs the whole command."""
    return os.environ.get("RANK", "0") == "0"


def _sharing(processes: int) -> int:
    """How many processes share the work: those that we start, or those of the torchrun that started us."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if min(started, processes) > 1:
        raise typer.BadParameter("torchrun has started this command; it starts all processes", param_hint="--processes")
    return max(started, processes)


def _usage(call: Callable[[], Any]) -> Any:
    """What is wrong with the command line alone is wrong usage."""
    try:
        return call()
    except BadRecipe as error:
        raise typer.BadParameter(str(error)) from error


def _recipe(kind: str, file: Path | None, assignments: list[str], given: dict[str, Any]) -> Recipe:
    sections = parsed_settings(assignments)
    for name, value in given.items():
        section, field = FLAGS[name].split(".")
        if field in sections.get(section, {}):
            raise BadRecipe(f"{FLAGS[name]} is given twice, by --set and by --{name.replace('_', '-')}")
        sections = merged(sections, {section: {field: value}})
    return recipe_for(kind, file, **sections)


def _device_type(device: str) -> str:
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _prepared(job: Job, data: str, folder: Path) -> Job:
    """With prepared data: as it is, or made on the way in a folder."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not is_prepared(Path(data).expanduser()):
        raise BadRecipe(
            f"{data} is not prepared; several processes would prepare it at once: `specdec data prepare` first"
        )
    tokenizer = load_tokenizer(job.target)
    return replace(job, data=prepared_for(data, tokenizer, str(locate(job.target)), folder / "data", tell=note))


def _run(job: Job, processes: int, as_json: bool) -> dict[str, Any] | None:
    """Train; returns the last event, None when the run was stopped before it had begun."""
    last: dict[str, Any] = {}
    with display(job.recipe.loop.steps, as_json=as_json) as show:

        def hear(event: dict[str, Any]) -> None:
            last.clear()
            last.update(event)
            if event["event"] != FINISHED:
                show(event)

        if processes == 1:
            run_here(job, hear)
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "job.json"
                file.write_text(job.to_json())
                launch(["specdec.cli.train_process", str(file)], processes, hear, threads=job.threads)
    return last if last.get("event") == FINISHED else None


def _conclude(finished: dict[str, Any], target: str, folder: Path, as_json: bool) -> None:
    """Say where the best drafter lies, what it is worth, and how to use it."""
    if as_json:
        print(json.dumps(finished), flush=True)
    if finished["stopped"]:
        note(f"stopped and saved after step {finished['step']} of {finished['steps']}; the same command goes on")
    if finished["drafter"] is None:
        raise SpecdecError(f"{folder} holds no drafter")
    if as_json:
        return
    worth = f"tau {finished['tau']:.2f}" if finished["tau"] is not None else "not measured"
    best = "best" if finished["measured"] else "newest"
    out.print(f"{best} drafter: {finished['drafter']} (step {finished['drafter_step']}, {worth})", soft_wrap=True)
    out.print(f"use it: specdec generate {target} --drafter {folder}", soft_wrap=True)


def _print_plan(job: Job, processes: int, as_json: bool) -> None:
    model = load_model(job.target, dtype_of(job.target, job.dtype), job.device)
    recipe = job.recipe.fitted(processes, target_of(model).max_positions)
    data = open_prepared(job.data)
    check_tokenizer(data.manifest, model)
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_run(recipe, training_of(job, recipe, model, data, Path(folder)), data, processes)
    if as_json:
        print(json.dumps({"recipe": recipe.resolved(), **plan.to_json()}))
        return
    table = Table.grid(padding=(0, 2))
    for section, settings in recipe.resolved().items():
        if isinstance(settings, dict):
            table.add_row(f"[bold]{section}", "")
            for name, value in settings.items():
                table.add_row(f"  {name}", str(value))
    table.add_row("[bold]run", "")
    for name, value in _plan_rows(plan, processes):
        table.add_row(f"  {name}", value)
    out.print(table)


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
