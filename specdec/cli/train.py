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

from specdec.cli.console import INTERRUPTED, note, out
from specdec.cli.model import DEMO_MODELS, load_tokenizer, locate
from specdec.cli.options import Device, Dtype, DtypeOption, Threads, within
from specdec.cli.train_display import display
from specdec.cli.train_online import replay_online
from specdec.cli.train_options import (
    DRAFT_FLAGS,
    FLAGS,
    ONLINE_FLAGS,
    SIZES,
    Background,
    Chat,
    ContinueOn,
    CutFrom,
    Divergence,
    FromScratch,
    KeepShare,
    Layers,
    LearnEvery,
    MaxAge,
    MaxNewTokens,
    Online,
    Pretrain,
    ReplayShare,
    Share,
    Static,
    Text,
    TopK,
    Width,
    check_use,
    draft_values,
    sections_of,
)
from specdec.cli.train_plan import print_plan
from specdec.cli.train_process import run_here
from specdec.errors import BadRecipe, SpecdecError
from specdec.train.adapters import require_peft
from specdec.train.data_of_run import is_prepared, prepared_for
from specdec.train.distill import SCRATCH, TARGET, DraftSettings
from specdec.train.job import FINISHED, Job
from specdec.train.joint import JointSettings
from specdec.train.online_job import OnlineJob
from specdec.train.online_recipe import SECTIONS as ONLINE_SECTIONS
from specdec.train.online_recipe import online_recipe_for
from specdec.train.processes import check_processes, launch
from specdec.train.publish import check_push, push_to_hub
from specdec.train.recipe import DEFAULTS, DRAFT_MODEL, MEDUSA_2, SECTIONS, Recipe, recipe_for
from specdec.train.staged_job import CONTINUE, PRETRAIN, STAGES, is_staged, stage_recipe
from specdec.train.tracking import check_trackers

Given = dict[str, Any]

OFF = ("online", "static", "background", "from_scratch", "gradient_checkpointing")
"""Options that are off where nobody says otherwise."""


def train(
    kind: Annotated[str, typer.Argument(help=f"What to train: {', '.join(DEFAULTS)}.", show_default=False)],
    target: Annotated[
        str, typer.Argument(help="The model: a directory, a hub id, or the word [bold]demo[/bold].", show_default=False)
    ],
    data: Annotated[
        list[str],
        typer.Argument(
            help="What [bold]specdec data prepare[/bold] made; or text, JSON lines, Parquet, a folder or a data set, "
            "which are prepared into OUT/data. With --online, files of prompts, in order.",
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
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; of each update with --online.", show_default=False)
    ] = None,
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
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; requests with --online.", show_default=False)
    ] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between validations.", show_default=False)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of validation, or of the stream; 0 is greedy.", show_default=False)
    ] = None,
    divergence: Divergence = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Held-out prompts: JSON lines, or text with one a line.", show_default=False),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(help="The target's states from [bold]specdec data features[/bold].", show_default=False),
    ] = None,
    begin_from: Annotated[
        str | None,
        typer.Option("--from", help="Begin with the weights of this drafter, or run.", show_default=False),
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
    text: Text = None,
    keep_share: KeepShare = None,
    cut_from: CutFrom = None,
    from_scratch: FromScratch = False,
    share: Share = None,
    layers: Layers = None,
    width: Width = None,
    pretrain: Pretrain = None,
    continue_on: ContinueOn = None,
    online: Online = False,
    static: Static = False,
    max_new_tokens: MaxNewTokens = None,
    chat: Chat = None,
    learn_every: LearnEvery = None,
    max_age: MaxAge = None,
    background: Background = False,
    replay_share: ReplayShare = None,
    top_k: TopK = None,
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

    Example: specdec train draft-model demo prompts.jsonl --online --from demo-draft --out runs/online
    """
    given = {name: value for name, value in locals().items() if value not in (None, []) and (value or name not in OFF)}
    given |= {"from": begin_from} if begin_from else {}
    _usage(lambda: check_use(kind, given, online=online))
    if online:
        job = _usage(lambda: _online_job(given))
        locate(target)
        replay_online(job, dtype=dtype.value, device=device, threads=threads, hub=hub, plan=plan, as_json=as_json)
        return
    chosen = _usage(lambda: _recipe(given))
    _usage(lambda: check_trackers(report_to or []))
    if hub:
        _usage(lambda: check_push(hub))
    check_processes(processes, _device_type(device), torch.cuda.device_count())
    sharing = _sharing(processes)
    _usage(lambda: _check_fitted(chosen, sharing))
    locate(target)
    job = Job(
        recipe=chosen, target=target, data=Path(data[0]), out=out_folder, features=features, prompts=prompts,
        begin_from=None if begin_from is None else _model_path(begin_from), fresh=fresh,
        recompute=gradient_checkpointing, report_to=tuple(report_to or ()),
        stages={name: Path(source) for name, source in ((PRETRAIN, pretrain), (CONTINUE, continue_on)) if source},
        dtype=dtype.value, device=device, threads=threads, command=tuple(sys.argv),
    )  # fmt: skip
    if plan:
        with tempfile.TemporaryDirectory() as folder:
            print_plan(_prepared(job, Path(folder)), sharing, as_json)
        return
    job = _prepared(job, out_folder)
    finished = _run(job, processes, as_json)
    if not _is_main():
        return
    if finished is None:
        note("stopped before the first step; nothing was changed")
        raise typer.Exit(INTERRUPTED)
    _conclude(finished, out_folder, as_json)
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
        if settings.draft == SCRATCH and given.get("report_to"):
            raise BadRecipe("--report-to follows one run, and a draft from scratch is several; leave it out")
    if kind == MEDUSA_2:
        JointSettings.of(recipe)
        require_peft()
    return recipe


def _check_fitted(recipe: Recipe, processes: int) -> None:
    for each in [stage_recipe(recipe, name) for name in STAGES] if is_staged(recipe) else [recipe]:
        each.fitted(processes)


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


def _device_type(device: str) -> str:
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _prepared(job: Job, folder: Path) -> Job:
    """With prepared data: as it is, or made on the way in a folder."""
    tokenizer = load_tokenizer(job.target)

    def prepared(data: Path, into: Path) -> Path:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not is_prepared(data.expanduser()):
            raise BadRecipe(
                f"{data} is not prepared; several processes would prepare it at once: `specdec data prepare` first"
            )
        return prepared_for(str(data), tokenizer, str(locate(job.target)), into, tell=note)

    stages = {name: prepared(data, folder / name / "data") for name, data in job.stages.items()}
    return replace(job, data=prepared(job.data, folder / "data"), stages=stages)


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


def _conclude(finished: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Say where the best drafter lies, what it is worth, and how to use it."""
    if as_json:
        print(json.dumps(finished), flush=True)
    if finished["stopped"]:
        stage = f" of stage {finished['stage']}" if "stage" in finished else ""
        note(f"stopped and saved after step {finished['step']} of {finished['steps']}{stage}; the same command goes on")
    if finished["drafter"] is None:
        raise SpecdecError(f"{folder} holds no drafter")
    if finished["target"] is None:
        note("the target that the heads belong to is written when the run ends")
    if as_json:
        return
    worth = f"tau {finished['tau']:.2f}" if finished["tau"] is not None else "not measured"
    best = "best" if finished["measured"] else "newest"
    out.print(f"{best} drafter: {finished['drafter']} (step {finished['drafter_step']}, {worth})", soft_wrap=True)
    name = folder if finished["drafter"] == str(folder / "drafter") else finished["drafter"]
    if finished["target"] is not None:
        out.print(f"use it: specdec generate {finished['target']} --drafter {name}", soft_wrap=True)
