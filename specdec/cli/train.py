"""`specdec train`: from a target and data to a drafter that is measured while it learns."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from specdec.cli import train_options as option
from specdec.cli.console import INTERRUPTED, note, out
from specdec.cli.model import load_tokenizer, locate
from specdec.cli.options import Device, Dtype, DtypeOption, TargetName, Threads
from specdec.cli.train_display import display
from specdec.cli.train_job import job_of, online_job_of
from specdec.cli.train_online import replay_online
from specdec.cli.train_plan import print_plan
from specdec.cli.train_process import run_here
from specdec.cli.train_settings import given_among
from specdec.errors import BadRecipe, SpecdecError
from specdec.train.data_of_run import is_prepared, prepared_for
from specdec.train.job import FINISHED, Job
from specdec.train.processes import launch
from specdec.train.publish import push_to_hub


def train(
    kind: option.Kind,
    target: TargetName,
    data: option.Data,
    out_folder: option.OutFolder,
    recipe: option.RecipeFile = None,
    assignments: option.Assignments = None,
    steps: option.Steps = None,
    lr: option.LearningRate = None,
    batch_rows: option.BatchRows = None,
    rows_at_once: option.RowsAtOnce = None,
    row_length: option.RowLength = None,
    seed: option.Seed = None,
    bf16: option.Bf16 = None,
    save_every: option.SaveEvery = None,
    evaluate_every: option.EvaluateEvery = None,
    temperature: option.Temperature = None,
    divergence: option.Divergence = None,
    prompts: option.Prompts = None,
    features: option.Features = None,
    begin_from: option.BeginFrom = None,
    fresh: option.Fresh = False,
    gradient_checkpointing: option.GradientCheckpointing = False,
    processes: option.Processes = 1,
    fsdp: option.Fsdp = None,
    report_to: option.ReportTo = None,
    hub: option.Hub = None,
    text: option.Text = None,
    keep_share: option.KeepShare = None,
    cut_from: option.CutFrom = None,
    from_scratch: option.FromScratch = False,
    share: option.Share = None,
    layers: option.Layers = None,
    width: option.Width = None,
    pretrain: option.Pretrain = None,
    continue_on: option.ContinueOn = None,
    online: option.Online = False,
    static: option.Static = False,
    max_new_tokens: option.MaxNewTokens = None,
    chat: option.Chat = None,
    learn_every: option.LearnEvery = None,
    max_age: option.MaxAge = None,
    background: option.Background = False,
    replay_share: option.ReplayShare = None,
    top_k: option.TopK = None,
    plan: option.Plan = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    threads: Threads = None,
    as_json: option.JsonReports = False,
) -> None:
    """Train a drafter for a target and measure it on held-out prompts while it learns.

    Every kind has defaults. After Ctrl-C, SIGTERM or a crash the same command goes on where it stopped, with the same
    result as without the interruption. OUT/drafter leads to the best drafter.

    Example: specdec train medusa demo texts/ --out runs/medusa --steps 500

    Example: specdec train draft-model demo prompts.jsonl --online --from demo-draft --out runs/online
    """
    given = given_among(locals())
    if online:
        job = online_job_of(given)
        replay_online(job, dtype=dtype.value, device=device, threads=threads, hub=hub, plan=plan, as_json=as_json)
        return
    job, sharing = job_of(given)
    if plan:
        with tempfile.TemporaryDirectory() as folder:
            print_plan(_prepared(job, Path(folder)), sharing, as_json)
        return
    finished = _run(_prepared(job, out_folder), processes, as_json)
    if _is_main():
        _conclude(finished, out_folder, hub, as_json)


def _is_main() -> bool:
    """Whether this process speaks: started by torchrun, every process runs the whole command."""
    return os.environ.get("RANK", "0") == "0"


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


def _conclude(finished: dict[str, Any] | None, folder: Path, hub: str | None, as_json: bool) -> None:
    """Say what came of the run, and push a drafter that is done.

    Args:
        finished: the last event; None when the run was stopped before it had begun.
        folder: of the run.
        hub: where the drafter is uploaded.
        as_json: whether the event is printed as it is.
    """
    if finished is None:
        note("stopped before the first step; nothing was changed")
        raise typer.Exit(INTERRUPTED)
    _print_finished(finished, folder, as_json)
    if hub and not finished["stopped"]:
        note(f"pushed to {push_to_hub(Path(finished['drafter']), hub)}")


def _print_finished(finished: dict[str, Any], folder: Path, as_json: bool) -> None:
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
