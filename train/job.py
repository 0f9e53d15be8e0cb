"""One training run as the command gives it: what to train on what, where to, and what is kept of it.

OUT/recipe.json    every setting
OUT/run.json       command, versions, commit and hardware of every start
OUT/log.jsonl      every step and validation
OUT/step-000123/   checkpoints; `latest` and `best` lead to two of them
OUT/drafter        leads to the best drafter
OUT/target         the target that it belongs to, where both were trained together
OUT/data           data that was prepared on the way
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.environment import now
from specdec.errors import BadData, BadRecipe
from specdec.probe import target_of
from specdec.train.batch import Documents
from specdec.train.checkpoint import read_state
from specdec.train.distill import REFERENCE, DraftSettings, starting_draft, train_draft_model
from specdec.train.drift import AGREEMENT, KL
from specdec.train.feature_cache import CachedData
from specdec.train.joint import (
    HEADS,
    JOINT,
    TARGET,
    JointSettings,
    beginning_with,
    head_recipe,
    joint_training,
    train_medusa2,
)
from specdec.train.kinds.draft_model import DraftModelTraining
from specdec.train.loop import Loop
from specdec.train.plan import checkpoint_bytes, target_bytes
from specdec.train.prepare import held_out_prompts, open_prepared
from specdec.train.prepared import PreparedData, check_tokenizer
from specdec.train.recipe import DRAFT_MODEL, MEDUSA_2, Recipe
from specdec.train.report import Score, StepReport
from specdec.train.run import make_training, train_head
from specdec.train.run_log import RunLog
from specdec.train.run_starts import RUN, add_start, circumstances
from specdec.train.tracking import begin_tracking, end_tracking, track
from specdec.train.validation_prompts import fitting, read_prompts
from specdec.vocabulary import vocab_size

STEP, VALIDATION, FINISHED, NOTE, STAGE = "step", "validation", "finished", "note", "stage"
"""Events that a run reports, as JSON objects: {"event": "step", "step": 1, "loss": ...}."""

Hear = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """What `specdec train` was told, as far as every process has to know it.

    Attributes:
        recipe: all settings.
        target: name of the target, as on the command line.
        data: prepared data.
        out: directory of the run.
        features: a cache of the target's states on this data.
        prompts: held-out prompts; None for those of the data.
        begin_from: a draft head to begin with.
        fresh: refuse a directory with checkpoints.
        recompute: gradient checkpointing.
        report_to: trackers.
        stages: prepared data of a fresh draft model's stages before the last, by name.
        dtype, device, threads: of the target.
        command: arguments of the command line, for the record.
    """

    recipe: Recipe
    target: str
    data: Path
    out: Path
    features: Path | None = None
    prompts: Path | None = None
    begin_from: Path | None = None
    fresh: bool = False
    recompute: bool = False
    report_to: tuple[str, ...] = ()
    stages: dict[str, Path] = field(default_factory=dict)
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    command: tuple[str, ...] = ()

    def to_json(self) -> str:
        """For other processes; `of_json` reads it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        values["stages"] = {name: str(path) for name, path in self.stages.items()}
        return json.dumps({**values, "recipe": self.recipe.resolved(), "given": sorted(self.recipe.given)})

    @staticmethod
    def of_json(text: str) -> Job:
        """The job that `to_json` described."""
        values = json.loads(text)
        recipe, given = Recipe.of_resolved(values.pop("recipe")), frozenset(values.pop("given"))
        for name in ("data", "out", "features", "prompts", "begin_from"):
            values[name] = None if values[name] is None else Path(values[name])
        values["report_to"], values["command"] = tuple(values["report_to"]), tuple(values["command"])
        values["stages"] = {name: Path(path) for name, path in values["stages"].items()}
        return Job(recipe=recipe.as_given(given), **values)


def run_job(
    job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator, hear: Hear
) -> None:
    """Train, in this process or in this one of several.

    Args:
        job: what to do.
        model: the target.
        tokenizer: the target's, for prompts.
        accelerator: of this process.
        hear: on the main process, hears of every event.

    Raises:
        SpecdecError: settings, data or checkpoints that do not fit; says which.
        OSError: something cannot be written.
    """
    target = target_of(model)
    recipe = job.recipe.fitted(accelerator.num_processes, target.max_positions, target.hidden_size)
    data = open_prepared(job.data)
    check_tokenizer(data.manifest, model)
    names = stages_of(recipe, job.begin_from)
    reporter, first = Reporter(job, accelerator, hear), None
    more: dict[str, Any] = {}
    if names is not None:
        reporter = StageReporter(job, names[1], names, accelerator, hear)
        first = StageReporter(replace(job, out=job.out / names[0]), names[0], names, accelerator, hear)
        more = {f"report_{names[0]}": first, f"restored_{names[0]}": first.begin}
    loop = trainer_of(recipe.kind)(
        recipe,
        model,
        documents_of(job, data, model, recipe),
        job.out,
        prompts=prompts_of(job, model, tokenizer, recipe, reporter),
        data_identity={"sha256": data.manifest["sha256"]},
        begin_from=job.begin_from,
        recompute=job.recompute,
        report=reporter,
        restored=reporter.begin,
        resume=not job.fresh,
        accelerator=accelerator,
        **more,
    )
    if first is not None and loop.checkpoints.folder == first.job.out:
        first.finish(loop, stopped=True)
    else:
        reporter.finish(loop)


def stages_of(recipe: Recipe, begin_from: Path | None) -> tuple[str, str] | None:
    """What a run is in turn when something is trained first, in a folder of that name; None where nothing is."""
    if recipe.kind == DRAFT_MODEL and DraftSettings.of(recipe).distils_reference:
        return REFERENCE, "draft"
    if recipe.kind == MEDUSA_2 and JointSettings.of(beginning_with(recipe, begin_from)).frozen_steps:
        return HEADS, JOINT
    return None


def trainer_of(kind: str) -> Callable[..., Loop]:
    """What trains a kind; all take the same arguments, and reports of what `stages_of` names first."""
    return {DRAFT_MODEL: train_draft_model, MEDUSA_2: train_medusa2}.get(kind, train_head)


def training_of(job: Job, recipe: Recipe, model: PreTrainedModel, documents: Documents, folder: Path) -> Any:
    """The kind's Training object with the weights of the first step; a draft that has to be cut lies in `folder`.

    Raises:
        SpecdecError: settings or files that do not fit; says which.
    """
    target = target_of(model)
    if recipe.kind == MEDUSA_2:
        return joint_training(recipe, target, job.begin_from)
    if recipe.kind != DRAFT_MODEL:
        return make_training(recipe, target, job.begin_from)
    settings = DraftSettings.of(recipe)
    if job.begin_from is not None:
        settings = replace(settings, draft=str(job.begin_from))
    return DraftModelTraining(target, starting_draft(settings, model, documents, folder, recipe))


def documents_of(job: Job, data: PreparedData, model: PreTrainedModel, recipe: Recipe) -> Documents:
    """The prepared data, with the target's states from a cache where there is one."""
    if job.features is None:
        return data
    if recipe.kind == DRAFT_MODEL:
        raise BadRecipe("a draft model reads no hidden states of the target; leave --features out")
    target = target_of(model)
    training = make_training(head_recipe(recipe), target, job.begin_from)
    return CachedData(
        data,
        job.features,
        target,
        training.taps,
        row_length=recipe.data.row_length,
        needs_logits=training.needs_logits,
    )


def prompts_of(
    job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, reporter: Reporter
) -> list[list[int]]:
    """Held-out prompts that fit the target; none are announced, since nothing is measured then."""
    if not recipe.data.validation_prompts:
        return []
    found = read_prompts(job.prompts, tokenizer, vocab_size(model)) if job.prompts else held_out_prompts(job.data)
    fit = fitting(found, recipe.data.validation_tokens, target_of(model).max_positions)
    if found and not fit:
        raise BadData(
            f"none of {len(found)} held-out prompts leaves room for {recipe.data.validation_tokens} new tokens in the "
            "target's positions; choose fewer with --set data.validation_tokens, or other --prompts"
        )
    if not fit:
        reporter.note("nothing was held out for validation, so no drafter is measured; give --prompts FILE")
    return fit


class Reporter:
    """Turns what the loop reports into events, and keeps them.

    Args:
        job: whose run it is.
        accelerator: of this process; only the main one reports.
        hear: gets every event.
    """

    tracked = True
    """Whether trackers hear of it."""

    def __init__(self, job: Job, accelerator: Accelerator, hear: Hear) -> None:
        self.job, self.accelerator, self.hear = job, accelerator, hear
        self.log = RunLog(job.out / "log.jsonl")
        self.step = 0

    def begin(self, loop: Loop) -> None:
        """Everything fits: write down under which circumstances the run starts, and see that there is room."""
        self.step = loop.step
        if not self.accelerator.is_main_process:
            return
        check_room(loop)
        record_start(self.job, loop)
        if self.tracked:
            begin_tracking(self.accelerator, loop.identity | {"recipe": self.job.recipe.resolved()}, self.job.out)
        if loop.step:
            self.note(f"going on after step {loop.step} of {loop.settings.steps}")

    def note(self, text: str) -> None:
        """Say something to the user that is no number."""
        if self.accelerator.is_main_process:
            self.hear({"event": NOTE, "text": text})

    def __call__(self, report: StepReport | Score) -> None:
        """Log and pass on a report of the loop; main process only."""
        if isinstance(report, StepReport):
            self.step = report.step
        event = event_of(report, self.step)
        self.log.write(event)
        if self.tracked:
            track(self.accelerator, event)
        self.hear(event)

    def finish(self, loop: Loop, *, stopped: bool = False) -> None:
        """Let OUT/drafter lead to the best drafter, and say which it is; `stopped` where more was to follow."""
        if not self.accelerator.is_main_process:
            return
        end_tracking(self.accelerator)
        event = finished_event(loop, self.job)
        self.hear({**event, "stopped": event["stopped"] or stopped})


class StageReporter(Reporter):
    """Reports one of several runs of a command as a run of its own, and says whose events they are.

    Trackers hear of the last alone: they count steps once.

    Args:
        job: of this one.
        name: of this one.
        names: of all, in order.
        accelerator, hear: see Reporter.
    """

    def __init__(self, job: Job, name: str, names: Sequence[str], accelerator: Accelerator, hear: Hear) -> None:
        super().__init__(job, accelerator, lambda event: hear({**event, "stage": name}))
        self.name, self.names = name, names
        self.tracked = name == names[-1]

    def begin(self, loop: Loop) -> None:
        """As of a run; one that is over is passed over silently."""
        self.step = loop.step
        if loop.step == loop.settings.steps:
            return
        if self.accelerator.is_main_process:
            place, steps = self.names.index(self.name) + 1, loop.settings.steps
            text = f"stage {place} of {len(self.names)}, {self.name}: {steps} steps on {self.job.data}"
            self.hear({"event": STAGE, "text": text, "steps": steps})
        super().begin(loop)


def event_of(report: StepReport | Score, step: int) -> dict[str, Any]:
    """A report as a JSON object; times and rates are rounded, losses are not."""
    if isinstance(report, Score):
        return {"event": VALIDATION, "step": step, "value": report.value, **report.details}
    values = asdict(report)
    rounded = {name: [round(number, 4) for number in values[name]] for name in ("alpha", "agreement")}
    speed = report.tokens / report.seconds if report.seconds else 0.0
    return {
        "event": STEP, **values, **rounded,
        "seconds": round(report.seconds, 4), "tokens_per_second": round(speed, 1), "time": now(),
    }  # fmt: skip


def finished_event(loop: Loop, job: Job) -> dict[str, Any]:
    """Where the run stands, and which drafter is the one to use, for which target; None where that is to come."""
    checkpoints = loop.checkpoints
    drafter = checkpoints.offer()
    state = read_state(drafter.resolve().parent) if drafter else {}
    details = (state.get("score") or {}).get("details", {})
    return {
        "event": FINISHED,
        "step": loop.step,
        "steps": loop.settings.steps,
        "stopped": loop.step < loop.settings.steps,
        "drafter": str(drafter) if drafter else None,
        "drafter_step": state.get("step"),
        "target": target_of_pair(loop, job.out) if loop.trainable.kind == MEDUSA_2 else job.target,
        "measured": checkpoints.best() is not None,
        **{name: details.get(name) for name in ("tau", "alpha", "expected_speedup")},
        **{name: details[name] for name in (KL, AGREEMENT) if name in details},
    }


def target_of_pair(loop: Loop, out: Path) -> str | None:
    """The target that was trained with the drafter; None where it will only be written when the run ends."""
    return None if loop.step < loop.settings.steps else str(out / TARGET)


def record_start(job: Job, loop: Loop) -> None:
    """Add this start to OUT/run.json."""
    add_start(
        job.out / RUN,
        {"target": job.target, "data": str(job.data)},
        {"after_step": loop.step, **circumstances(job.command, loop.accelerator.device),
         "processes": loop.accelerator.num_processes},
    )  # fmt: skip


def check_room(loop: Loop) -> None:
    """Refuse to begin where not even one checkpoint would fit.

    Raises:
        OSError: says how much is needed.
    """
    folder: Path = loop.checkpoints.folder
    needed, free = checkpoint_bytes(loop.trainable), shutil.disk_usage(folder).free
    what = "one checkpoint"
    if loop.trainable.kind == MEDUSA_2 and not (folder / TARGET).exists():
        needed, what = needed + target_bytes(loop.trainable), "one checkpoint with the adapted target"
    if free < needed:
        raise OSError(
            f"{folder} has {free / 1e6:.0f} MB free, {what} takes {needed / 1e6:.0f} MB and "
            f"{loop.checkpoints.keep + 2} checkpoints may lie there at the same time; make room or choose another --out"
        )
