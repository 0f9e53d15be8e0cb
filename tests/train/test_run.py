"""Runs as jobs: what is kept of them, what they would need, and the pieces that serve several processes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker

from specdec.errors import BadData, BadRecipe, SpecdecError
from specdec.probe import target_of
from specdec.train.checkpoint import Checkpoints, write_whole
from specdec.train.job import Job, StageReporter, event_of
from specdec.train.plan import checkpoint_bytes, plan_run
from specdec.train.prepared import MemoryData
from specdec.train.processes import accelerator_for, check_processes, launch
from specdec.train.recipe import parsed_settings, recipe_for
from specdec.train.report import Score, StepReport
from specdec.train.run import check_options, make_training
from specdec.train.run_log import RunLog, read_log
from specdec.train.tracking import begin_tracking, end_tracking, flat, track
from specdec.train.validation_prompts import fitting, read_prompts
from tests.tiny import VOCAB, shared_target, tokenizer

# --- Log and links -------------------------------------------------------------------------------------


def test_a_log_is_cut_before_the_step_that_is_run_again(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    first = RunLog(path)
    for step in range(1, 6):
        first.write({"event": "step", "step": step, "life": 1})
    with path.open("a") as file:
        file.write('{"event": "step", "st')
    again = RunLog(path)
    assert path.read_text().count("\n") == 5  # nothing is cut before something is written
    for step in (4, 5, 6):
        again.write({"event": "step", "step": step, "life": 2})
    assert [(event["step"], event["life"]) for event in read_log(path)] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2),
    ]  # fmt: skip


def test_a_validation_of_the_last_kept_step_stays(tmp_path: Path):
    log = RunLog(tmp_path / "log.jsonl")
    log.write({"event": "step", "step": 3})
    log.write({"event": "validation", "step": 3})
    RunLog(tmp_path / "log.jsonl").write({"event": "step", "step": 4})
    assert [event["event"] for event in read_log(tmp_path / "log.jsonl")] == ["step", "validation", "step"]


def test_the_offered_drafter_is_the_newest_until_one_is_the_best(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.offer() is None

    def write(folder: Path) -> None:
        (folder / "drafter").mkdir()
        (folder / "drafter" / "name").write_text(folder.name)

    first = checkpoints.save(1, write, {})
    checkpoints.offer()
    assert (tmp_path / "drafter").resolve() == first / "drafter"
    checkpoints.link("best", first)
    checkpoints.offer()
    second = checkpoints.save(2, write, {})
    assert (tmp_path / "drafter").resolve() == first / "drafter"
    checkpoints.link("best", second)  # the link goes through `best` and follows
    assert (tmp_path / "drafter").resolve() == second / "drafter"


def test_a_file_is_replaced_whole(tmp_path: Path):
    file = tmp_path / "a" / "recipe.json"
    write_whole(file, "one")
    write_whole(file, "two")
    assert file.read_text() == "two"
    assert [path.name for path in file.parent.iterdir()] == ["recipe.json"]


def test_events_are_json_and_keep_the_loss_as_it_is():
    step = event_of(StepReport(3, 1 / 3, 10, alpha=[0.123456], seconds=0.5, tokens=20), 3)
    assert json.loads(json.dumps(step))["loss"] == 1 / 3
    assert (step["alpha"], step["tokens_per_second"], step["step"]) == ([0.1235], 40.0, 3)
    validation = event_of(Score(2.5, {"tau": 2.5}), 7)
    assert (validation["event"], validation["step"], validation["value"]) == ("validation", 7, 2.5)


# --- Plans and options ---------------------------------------------------------------------------------


def data(count: int = 12, length: int = 30) -> MemoryData:
    return MemoryData([(torch.arange(length) % VOCAB, torch.ones(length, dtype=torch.bool))] * count)


def test_a_plan_counts_rows_steps_and_parameters():
    recipe = recipe_for(
        "medusa",
        None,
        **parsed_settings(["data.row_length=60", "loop.steps=9", "loop.rows_per_step=2", "loop.rows_at_once=1"]),
    )
    training = make_training(recipe, target_of(shared_target()))
    plan = plan_run(recipe, training, data())
    assert (plan.rows, plan.tokens, plan.tokens_per_step) == (6, 360, 120)
    assert (plan.steps_per_epoch, plan.epochs) == (3.0, 3.0)
    assert plan.parameters == plan.learning == sum(p.numel() for p in training.module.parameters())
    assert plan.activation_bytes == 6 * 4 * 60 * VOCAB  # a row at once
    again = plan_run(recipe, training, data(), recompute=True)
    assert again.activation_bytes == (4 + 6 * 4) * 60 * VOCAB  # so few that they are made together
    assert plan.checkpoint_bytes == checkpoint_bytes(training) == plan.parameters * (4 + 4 + 8)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("medusa", {"output": "mine"}, "output is one of own, one, target"),
        ("medusa", {"num_heads": True}, "num_heads is of type int"),
        ("hydra", {"prefix": True}, "no option 'prefix'"),
        ("medusa", {"target": "demo"}, "no option 'target'"),
        ("dflash", {"weights": "confidence"}, "weights is one of decay, d-pace, equal"),
        ("dflash", {"anchors": 0.5}, "anchors is of type int"),
        ("eagle3", {"draft_vocab_size": "many"}, "draft_vocab_size"),
        ("eagle", {"noise": "loud"}, "noise is of type float"),
        ("kangaroo", {"options": 3}, "options is of type"),
    ],
)
def test_options_of_a_kind_are_held_to_its_arguments(kind: str, options: dict[str, Any], words: str):
    with pytest.raises(BadRecipe, match=words):
        check_options(kind, options)


def test_options_of_the_right_type_pass():
    check_options("medusa", {"output": "own", "num_heads": 2, "options": {"budget": 3}})
    check_options("eagle3", {"draft_vocab_size": 50, "own_lm_head": False})
    check_options("eagle", {"noise": 1})


# --- Prompts -------------------------------------------------------------------------------------------


def test_prompts_are_lines_of_text_or_of_json(tmp_path: Path):
    (tmp_path / "a.txt").write_text("ab\n\ncd\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "ab"}\n{"text": "cd"}\n{"ids": [5, 6]}\n')
    ids = [list(tokenizer()(text)["input_ids"]) for text in ("ab", "cd")]
    assert read_prompts(tmp_path / "a.txt", tokenizer(), VOCAB) == ids
    assert read_prompts(tmp_path / "a.jsonl", tokenizer(), VOCAB) == [*ids, [5, 6]]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "\n\n", "holds no prompt"),
        ("a.jsonl", '{"colour": "blue"}\n', r"a.jsonl:1: no prompt; expected one of the columns ids, prompt, text"),
        ("a.jsonl", '{"ids": [5, "x"]}\n', "ids is a list of token ids"),
        ("a.jsonl", '{"prompt": 3}\n', "prompt is text"),
        ("a.jsonl", '{"ids": [5, 100]}\n', "holds the token id 100, the target has 100 tokens"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(tmp_path: Path, name: str, text: str, words: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadData, match=words):
        read_prompts(tmp_path / name, tokenizer(), VOCAB)


def test_prompts_leave_room_for_what_is_generated():
    assert fitting([[1] * 5, [1] * 6], 4, 9) == [[1] * 5]
    assert len(fitting([[1] * 5, [1] * 6], 4, None)) == 2


# --- Trackers ------------------------------------------------------------------------------------------


class Notebook(GeneralTracker):
    """A tracker that remembers."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.logged: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> Notebook:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.logged.append((step, values))


def test_trackers_get_settings_and_numbers_under_flat_names(tmp_path: Path):
    accelerator, notebook = accelerator_for(cpu=True), Notebook()
    accelerator.log_with = [notebook]  # type: ignore[list-item]
    begin_tracking(accelerator, {"loop": {"steps": 3}, "head": {"options": {"budget": 5}}}, tmp_path)
    assert notebook.config == {"loop.steps": 3, "head.options.budget": 5}
    track(accelerator, {"event": "step", "step": 2, "loss": 1.5, "alpha": [0.5, 0.25], "time": "now"})
    assert notebook.logged == [(2, {"step/loss": 1.5, "step/alpha.1": 0.5, "step/alpha.2": 0.25})]


def test_trackers_hear_of_the_last_stage_alone(tmp_path: Path):
    accelerator, notebook, heard = accelerator_for(cpu=True), Notebook(), []
    accelerator.log_with = [notebook]  # type: ignore[list-item]
    begin_tracking(accelerator, {}, tmp_path)
    job = Job(recipe_for("medusa2"), "target", tmp_path, tmp_path)
    for name, step in (("heads", 1), ("joint", 2)):
        StageReporter(job, name, ("heads", "joint"), accelerator, heard.append)(StepReport(step, 1.5, 3))
    assert [(event["stage"], event["step"]) for event in heard] == [("heads", 1), ("joint", 2)]
    assert [step for step, _ in notebook.logged] == [2]


class Talker(Notebook):
    """A tracker that greets, as trackio does, and whose network is down."""

    name = "talker"

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        print("* Project initialized")

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        raise RuntimeError("no\nroute")


def test_a_tracker_speaks_on_stderr_and_fails_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    accelerator = accelerator_for(cpu=True)
    accelerator.log_with = [Talker()]  # type: ignore[list-item]
    begin_tracking(accelerator, {}, tmp_path)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "* Project initialized\n")
    with pytest.raises(SpecdecError, match=r"^reporting to talker failed: no route\. Checkpoints are whole"):
        track(accelerator, {"event": "step", "step": 2, "loss": 1.5})


def settings_and_numbers(name: str, folder: Path) -> None:
    """A short run as a tracker of this name sees it."""
    accelerator = accelerator_for(cpu=True, trackers=(name,), folder=folder)
    begin_tracking(accelerator, {"loop": {"steps": 3}}, folder)
    track(accelerator, {"event": "step", "step": 1, "loss": 1.5, "alpha": [0.5]})
    track(accelerator, {"event": "validation", "step": 1, "tau": 2.5})
    track(accelerator, {"event": "step", "step": 2, "loss": 1.25, "alpha": [0.75]})
    end_tracking(accelerator)


def test_tensorboard_keeps_what_it_was_told(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import]

    settings_and_numbers("tensorboard", tmp_path)
    kept = EventAccumulator(str(tmp_path / "specdec")).Reload()
    assert {tag: [(e.step, e.value) for e in kept.Scalars(tag)] for tag in kept.Tags()["scalars"]} == {
        "step/loss": [(1, 1.5), (2, 1.25)], "step/alpha.1": [(1, 0.5), (2, 0.75)], "validation/tau": [(1, 2.5)],
    }  # fmt: skip


def test_wandb_offline_keeps_its_run_in_the_run_s_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "run").mkdir()
    settings_and_numbers("wandb", tmp_path / "run")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_trackio_keeps_what_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    settings_and_numbers("trackio", tmp_path / "night")
    assert importlib.import_module("trackio.context_vars").current_run.get() is None  # nothing is left for exit
    run = trackio.Api().runs("specdec")[0]
    assert run.name == "night"
    assert run.config["loop.steps"] == 3
    logs = importlib.import_module("trackio.sqlite_storage").SQLiteStorage.get_logs("specdec", "night")
    assert [(log["step"], log.get("step/loss"), log.get("validation/tau")) for log in logs if log["step"]] == [
        (1, 1.5, None), (1, None, 2.5), (2, 1.25, None),
    ]  # fmt: skip


def test_flat_names_count_lists_from_one():
    assert flat({"a": {"b": [7, 8]}, "c": None}) == {"a.b.1": 7, "a.b.2": 8, "c": "None"}


# --- Processes -----------------------------------------------------------------------------------------


def test_a_second_training_in_this_process_may_want_another_precision():
    assert accelerator_for(bf16=True, cpu=True).mixed_precision == "bf16"
    assert accelerator_for(cpu=True).mixed_precision == "no"


def test_more_processes_than_gpus_are_refused():
    check_processes(4, "cpu", 0)
    with pytest.raises(BadRecipe, match="4 processes need as many GPUs, there are 1"):
        check_processes(4, "cuda", 1)


PROCESS = """
import json, os, signal, sys, time
def tell(**event): print(json.dumps(event), flush=True)
tell(event="process", pid=os.getpid())
mode, rank = sys.argv[1], os.environ["RANK"]
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
if mode == "error":
    if rank == "1":
        tell(event="error", message="the boat has a hole")
        sys.exit(1)
    time.sleep(1)
    tell(event="error", message="unexpected RuntimeError: gloo: peer closed", unexpected=True)
    sys.exit(1)
if rank == "0":
    print("noise of a library", flush=True)
    tell(event="step", step=1)
while mode == "wait" and not stopped:
    time.sleep(0.02)
if rank == "0":
    tell(event="finished")
"""


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that stands for a worker."""
    (tmp_path / "stand_in.py").write_text(PROCESS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stand_in"


@pytest.mark.slow
def test_reports_of_processes_are_heard_and_noise_is_not(process: str):
    heard: list[dict[str, Any]] = []
    launch([process, "pass"], 2, heard.append, threads=1)
    assert heard == [{"event": "step", "step": 1}, {"event": "finished"}]


@pytest.mark.slow
def test_the_error_that_caused_the_others_is_the_one_that_is_told(process: str):
    with pytest.raises(SpecdecError, match=r"^the boat has a hole$"):
        launch([process, "error"], 2, lambda _event: None, threads=1)


@pytest.mark.slow
def test_a_signal_is_passed_on_once(process: str):
    heard: list[dict[str, Any]] = []

    def hear(event: dict[str, Any]) -> None:
        heard.append(event)
        if event["event"] == "step":
            threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    started = time.monotonic()
    launch([process, "wait"], 2, hear, threads=1)
    assert heard[-1] == {"event": "finished"}
    assert time.monotonic() - started < 120
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_a_process_that_cannot_begin_says_why():
    with pytest.raises(SpecdecError, match="a training process ended"):
        launch(["no_such_module_at_all"], 2, lambda _event: None, threads=1)
