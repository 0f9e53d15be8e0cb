"""`specdec train`: from text to a drafter, broken off and gone on with, and everything that a user can do wrong."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

from specdec.cli import app
from specdec.drafters.directory import drafter_in
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.load import load_drafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.train.kinds.medusa import MedusaTraining
from specdec.train.run_log import read_log
from tests.tiny import VOCAB, make_target, perturbed, tokenizer

ROOT = Path(__file__).parents[1]
SMALL = ("--steps", 6, "--row-length", 64, "--batch-rows", 4, "--save-every", 2, "--evaluate-every", 3,
         "--set", "data.validation_tokens=8", "--set", "data.validation_prompts=2", "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets with their tokenizers, texts, and prepared data."""
    path = tmp_path_factory.mktemp("train")
    save(make_target(), path / "target")
    save(make_target(seed=1), path / "tuned")
    lines = [{"text": f"def f{n}(a, b):\n    return a + {n} * b\n" * (n % 4 + 1)} for n in range(40)]
    (path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "empty.jsonl").write_text("")
    (path / "unusable.jsonl").write_text('{"colour": "blue"}\n')
    (path / "prompts.txt").write_text("def f(a\nreturn a\n")
    finished(train(path, path / "whole", data="texts.jsonl"))
    return path


def save(model: Any, path: Path, words: tuple[str, ...] = ()) -> None:
    model.save_pretrained(path)
    saved = tokenizer()
    if words:
        saved = copy.deepcopy(saved)
        saved.add_tokens(list(words))
    saved.save_pretrained(path)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(
    folder: Path, out: Path, *more: object, kind: str = "medusa", target: str = "target", data: str = "whole/data"
) -> Any:
    return run("train", kind, folder / target, folder / data, "--out", out, *SMALL, *more)


def finished(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    return result


def failed(result: Any, status: int, *words: str) -> None:
    """Ended with this status and, as its last line on stderr, one that holds the words."""
    assert result.exit_code == status, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert line.startswith("specdec: ")
    for word in words:
        assert word in line, f"{word!r} is not in {line!r}"


def weights(run_folder: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(run_folder / f"step-{step:06d}" / "training.safetensors")


def same(one: Path, other: Path, step: int = 6) -> bool:
    a, b = weights(one, step), weights(other, step)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(run_folder: Path) -> dict[int, float]:
    events = [event for event in read_log(run_folder / "log.jsonl") if event["event"] == "step"]
    assert len({event["step"] for event in events}) == len(events), "a step is logged twice"
    return {event["step"]: event["loss"] for event in events}


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Let something happen when a step has been reported."""

    @contextmanager
    def display(steps: int, *, as_json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
        def hear(event: dict[str, Any]) -> None:
            if event["event"] == "step" and event["step"] == step:
                act()

        yield hear

    monkeypatch.setattr(importlib.import_module("specdec.cli.train"), "display", display)


# --- A whole run ---------------------------------------------------------------------------------------


def test_text_becomes_a_measured_drafter_that_can_be_used_by_the_run_s_name(folder: Path):
    out = folder / "whole"
    assert sorted(losses(out)) == [1, 2, 3, 4, 5, 6]
    validations = [event for event in read_log(out / "log.jsonl") if event["event"] == "validation"]
    assert [event["step"] for event in validations] == [3, 6]
    model = AutoModelForCausalLM.from_pretrained(folder / "target")
    for name in ("", "drafter", "best/drafter", "latest/drafter"):
        assert isinstance(load_drafter(out / name, model), MedusaDrafter)
    best = max(validations, key=lambda event: event["value"])["step"]
    assert (out / "drafter").resolve() == (out / f"step-{best:06d}" / "drafter").resolve()
    generated = run("generate", folder / "target", "--drafter", out, "-p", "def f(a", "-n", 6, "--json")
    assert json.loads(finished(generated).stdout)["statistics"]["new_tokens"] == 6


def test_settings_command_versions_and_hardware_lie_beside_the_checkpoints(folder: Path):
    recipe = json.loads((folder / "whole" / "recipe.json").read_text())
    assert recipe["kind"] == "medusa"
    assert (recipe["loop"]["steps"], recipe["data"]["row_length"]) == (6, 64)
    assert {"learning_rate", "beta2", "schedule"} <= recipe["loop"].keys()
    (start,) = json.loads((folder / "whole" / "run.json").read_text())["starts"]
    assert start["after_step"] == 0
    assert {"specdec", "torch", "transformers", "accelerate"} <= start["versions"].keys()
    assert start["hardware"]["cpu"]
    assert start["command"]


def test_the_last_lines_say_where_the_drafter_is_and_how_to_use_it(folder: Path, tmp_path: Path):
    result = finished(train(folder, tmp_path / "run"))
    first, second = result.stdout.splitlines()
    assert first.startswith(f"best drafter: {tmp_path / 'run' / 'drafter'} (step ")
    assert "tau " in first
    assert second == f"use it: specdec generate {folder / 'target'} --drafter {tmp_path / 'run'}"
    assert "step 6 of 6: loss " in result.stderr
    assert "held-out tau" in result.stderr


def test_json_is_one_object_for_each_report(folder: Path, tmp_path: Path):
    result = finished(train(folder, tmp_path / "run", "--json"))
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds == ["step"] * 3 + ["validation"] + ["step"] * 3 + ["validation", "finished"]
    assert events[-1]["drafter"] == str(tmp_path / "run" / "drafter")
    assert not events[-1]["stopped"]
    assert result.stderr == ""
    assert [event for event in read_log(tmp_path / "run" / "log.jsonl")] == events[:-1]


def test_the_same_command_gives_the_same_bytes(folder: Path, tmp_path: Path):
    finished(train(folder, tmp_path / "again"))
    assert same(folder / "whole", tmp_path / "again")
    finished(train(folder, tmp_path / "other", "--seed", 1))
    assert not same(folder / "whole", tmp_path / "other")


@pytest.mark.parametrize("kind", ["hydra", "dflash", "eagle3", "kangaroo", "mlp-speculator"])
def test_other_kinds_need_no_flag_either(folder: Path, tmp_path: Path, kind: str):
    finished(train(folder, tmp_path / "run", "--steps", 2, kind=kind))
    model = AutoModelForCausalLM.from_pretrained(folder / "target")
    assert load_drafter(tmp_path / "run", model) is not None


def test_a_draft_model_is_distilled_by_the_same_command(folder: Path, tmp_path: Path):
    save(perturbed(make_target(), 0.05), tmp_path / "draft")
    begin = ("--from", tmp_path / "draft")
    assert "4,096" not in finished(train(folder, tmp_path / "run", *begin, "--plan", kind="draft-model")).stdout
    assert not (tmp_path / "run").exists()
    finished(train(folder, tmp_path / "run", *begin, kind="draft-model"))
    model = AutoModelForCausalLM.from_pretrained(folder / "target")
    assert isinstance(load_drafter(tmp_path / "run", model), DraftModelDrafter)
    failed(train(folder, tmp_path / "none", kind="draft-model"), 1, "draft")
    result = train(folder, tmp_path / "none", *begin, "--features", tmp_path, kind="draft-model")
    failed(result, 2, "leave --features out")


def test_prompts_of_a_file_are_decoded_instead_of_held_out_ones(folder: Path, tmp_path: Path):
    result = finished(train(folder, tmp_path / "run", "--prompts", folder / "prompts.txt", "--temperature", 0.5))
    assert "held-out tau" in result.stderr
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert recipe["data"]["validation_temperature"] == 0.5


def test_without_prompts_the_newest_drafter_is_offered_and_said_to_be_unmeasured(folder: Path, tmp_path: Path):
    data = tmp_path / "alone" / "train"
    shutil.copytree(folder / "whole" / "data" / "train", data)
    result = finished(run("train", "medusa", folder / "target", data, "--out", tmp_path / "run", *SMALL))
    assert "give --prompts FILE" in result.stderr
    assert result.stdout.startswith("newest drafter:")
    assert "not measured" in result.stdout
    assert (tmp_path / "run" / "drafter").resolve() == tmp_path / "run" / "step-000006" / "drafter"


def test_the_rate_of_a_narrow_target_is_the_same_in_plan_recipe_and_run(folder: Path, tmp_path: Path):
    planned = json.loads(finished(train(folder, tmp_path / "run", "--plan", "--json")).stdout)["recipe"]
    kept = json.loads((folder / "whole" / "recipe.json").read_text())
    assert planned["loop"]["learning_rate"] == kept["loop"]["learning_rate"] == pytest.approx(4e-3)
    steps = [event for event in read_log(folder / "whole" / "log.jsonl") if event["event"] == "step"]
    assert max(event["learning_rate"] for event in steps) == pytest.approx(4e-3)


def test_a_plan_says_what_is_needed_and_leaves_nothing_behind(folder: Path, tmp_path: Path):
    result = finished(train(folder, tmp_path / "run", "--plan", data="texts.jsonl"))
    for words in ("steps per epoch", "tokens per step", "256 at most", "checkpoint", "learning_rate"):
        assert words in result.stdout
    assert not (tmp_path / "run").exists()
    plan = json.loads(finished(train(folder, tmp_path / "run", "--plan", "--json")).stdout)
    assert plan["recipe"]["loop"]["rows_at_once"] == 4
    stored = folder / "whole" / "step-000006"
    real = sum(file.stat().st_size for file in stored.rglob("*") if file.is_file())
    assert plan["checkpoint_bytes"] == pytest.approx(real, rel=0.5)  # headers weigh much on so small a head


# --- Going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_the_same_command_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
):
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        stopped = finished(train(folder, tmp_path / "run", "--evaluate-every", 0))
    assert "stopped and saved after step 3 of 6; the same command goes on" in stopped.stderr
    assert (tmp_path / "run" / "latest").resolve().name == "step-000003"
    rest = finished(train(folder, tmp_path / "run", "--evaluate-every", 0))
    assert "going on after step 3 of 6" in rest.stderr
    assert same(folder / "whole", tmp_path / "run")
    assert losses(tmp_path / "run") == losses(folder / "whole")
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [start["after_step"] for start in starts] == [0, 3]


def test_steps_after_the_checkpoint_are_logged_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def crash() -> None:
        raise RuntimeError("lightning")

    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        failed(train(folder, tmp_path / "run"), 1, "lightning")
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text() + '{"event": "step", "st')  # a kill may leave half a line
    assert (tmp_path / "run" / "latest").resolve().name == "step-000004"
    finished(train(folder, tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(folder / "whole")
    assert len(log.read_text().splitlines()) == 8


def test_a_finished_run_is_told_again(folder: Path):
    before = (folder / "whole" / "log.jsonl").read_text()
    result = finished(train(folder, folder / "whole", data="texts.jsonl"))
    assert "best drafter" in result.stdout
    assert (folder / "whole" / "log.jsonl").read_text() == before


def test_weights_of_another_drafter_can_be_the_beginning(folder: Path, tmp_path: Path):
    finished(train(folder, tmp_path / "run", "--from", folder / "whole" / "latest" / "drafter",
                   "--steps", 1, "--lr", 1e-12))  # fmt: skip
    before, after = weights(folder / "whole"), weights(tmp_path / "run", 1)
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-6
    finished(train(folder, tmp_path / "fresh", "--steps", 1, "--lr", 1e-12))
    unlike = weights(tmp_path / "fresh", 1)
    assert max(float((before[name] - unlike[name]).abs().max()) for name in before) > 1e-4


@pytest.mark.parametrize("place", [".", "best", "latest", "step-000006"])
def test_a_run_can_be_the_beginning_of_another(folder: Path, tmp_path: Path, place: str):
    finished(train(folder, tmp_path / "run", "--from", folder / "whole" / place, "--steps", 1, "--lr", 1e-12))
    drafter = folder / "whole" / ("best" if place == "." else place) / "drafter"
    finished(train(folder, tmp_path / "same", "--from", drafter, "--steps", 1, "--lr", 1e-12))
    assert same(tmp_path / "run", tmp_path / "same", 1)


def test_a_run_that_was_killed_has_its_newest_drafter(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "whole" / "step-000006", tmp_path / "killed" / "step-000006")
    (tmp_path / "killed" / "latest").symlink_to("step-000006")
    assert drafter_in(tmp_path / "killed") == tmp_path / "killed" / "latest" / "drafter"
    finished(train(folder, tmp_path / "run", "--from", tmp_path / "killed", "--steps", 1))


def test_a_draft_model_begins_with_that_of_a_run(folder: Path, tmp_path: Path):
    save(perturbed(make_target(), 0.05), tmp_path / "draft")
    short = ("--steps", 2, "--evaluate-every", 0)
    finished(train(folder, tmp_path / "run", "--from", tmp_path / "draft", *short, kind="draft-model"))
    finished(train(folder, tmp_path / "more", "--from", tmp_path / "run", *short, kind="draft-model"))
    assert not same(tmp_path / "run", tmp_path / "more", 2)


@pytest.mark.parametrize("kind", ["eagle3", "medusa"])
def test_logits_and_layers_that_are_made_again_learn_the_same(folder: Path, tmp_path: Path, kind: str):
    for name, more in (("kept", ()), ("recomputed", ("--gradient-checkpointing",))):
        finished(train(folder, tmp_path / name, "--steps", 3, *more, kind=kind))
    kept, again = losses(tmp_path / "kept"), losses(tmp_path / "recomputed")
    assert kept == pytest.approx(again, rel=1e-6)


def test_cached_states_of_the_target_give_the_same_losses(folder: Path, tmp_path: Path):
    cache = tmp_path / "features"
    made = run("data", "features", folder / "whole" / "data", "--target", folder / "target", "--kind", "medusa",
               "--row-length", 64, "--out", cache, "--yes")  # fmt: skip
    assert made.exit_code == 0, made.stderr
    finished(train(folder, tmp_path / "run", "--features", cache))
    assert losses(tmp_path / "run") == pytest.approx(losses(folder / "whole"), rel=1e-4)


# --- Several processes ---------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "specdec", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "more"), [("medusa", ()), ("dflash", ()), ("medusa", ("--gradient-checkpointing",))])
def test_two_processes_agree_with_one_stop_together_and_go_on(
    folder: Path, tmp_path: Path, kind: str, more: tuple[str, ...]
):
    arguments = ("train", kind, folder / "target", folder / "whole/data", "--out", tmp_path / "run", *SMALL)
    arguments = (*arguments, "--processes", 2, "--json", "--threads", 1, "--steps", 30, "--evaluate-every", 0, *more)
    process = start(*arguments)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("step") == 2:
            interrupt_within_a_step(process)
            break
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    last = json.loads(output.splitlines()[-1])
    assert last["stopped"]
    assert 2 <= last["step"] < 30
    assert errors == f"specdec: stopped and saved after step {last['step']} of 30; the same command goes on\n"
    output, errors = start(*arguments).communicate(timeout=240)
    assert json.loads(output.splitlines()[-1])["step"] == 30, errors
    one = finished(train(folder, tmp_path / "one", "--steps", 30, "--evaluate-every", 0, kind=kind))
    assert one.exit_code == 0
    alone, together = losses(tmp_path / "one"), losses(tmp_path / "run")
    assert alone == pytest.approx(together, rel=1e-4)
    result = train(folder, tmp_path / "run", "--steps", 30, "--evaluate-every", 0, kind=kind)
    failed(result, 1, "processes 1 (checkpoint: 2)")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--gradient-checkpointing",)])
def test_a_draft_model_in_shards_learns_what_it_learns_whole_and_goes_on(
    folder: Path, tmp_path: Path, more: tuple[str, ...]
):
    save(perturbed(make_target(num_hidden_layers=3, tie_word_embeddings=True, seed=4), 0.05), tmp_path / "draft")
    arguments = ("--from", tmp_path / "draft", "--rows-at-once", 1, "--steps", 40, "--evaluate-every", 20)
    finished(train(folder, tmp_path / "one", *arguments, kind="draft-model"))
    command = ("train", "draft-model", folder / "target", folder / "whole/data", "--out", tmp_path / "shards", *SMALL,
               *arguments, "--processes", 2, "--fsdp", "--threads", 1, "--json", *more)  # fmt: skip
    process = start(*command)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line).get("step") == 5:
            kill_one_of(process)
            break
    process.communicate(timeout=240)
    assert process.returncode == 1
    _, errors = start(*command).communicate(timeout=240)
    first, again = json.loads((tmp_path / "shards" / "run.json").read_text())["starts"]
    assert (first["after_step"], again["after_step"] >= 4) == (0, True), errors
    assert losses(tmp_path / "shards") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    whole, shards = weights(tmp_path / "one", 40), weights(tmp_path / "shards", 40)
    assert whole.keys() == shards.keys()
    assert max(float((whole[name] - shards[name]).abs().max()) for name in whole) < 1e-4
    assert isinstance(load_drafter(str(tmp_path / "shards"), make_target()), DraftModelDrafter)
    failed(train(folder, tmp_path / "shards", *arguments, kind="draft-model"), 1, "fsdp False (checkpoint: True)")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "more", "words"), [
    ("target", ("--prompts", "nowhere.txt"), "no prompts at nowhere.txt"),
])  # fmt: skip
def test_what_fails_in_every_process_is_one_line(
    folder: Path, tmp_path: Path, target: str, more: tuple[object, ...], words: str
):
    process = start("train", "medusa", folder / target, folder / "whole/data", "--out", tmp_path / "run", *SMALL,
                    "--processes", 2, "--threads", 1, *more)  # fmt: skip
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors
    assert output == ""
    assert words in errors.splitlines()[-1]
    assert sum("step 1 of" not in line and "held-out" not in line for line in errors.splitlines()) == 1, errors


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_in_one_line(folder: Path, tmp_path: Path):
    process = start("train", "medusa", folder / "target", folder / "whole/data", "--out", tmp_path / "run", *SMALL,
                    "--processes", 2, "--threads", 1, "--steps", 4000)  # fmt: skip
    kill_a_worker(process)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors
    assert "a training process ended by signal 9" in errors.splitlines()[-1]
    assert "Traceback" not in errors


def kill_a_worker(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the first process of the run, once it has said anything."""
    assert process.stderr is not None
    process.stderr.readline()
    kill_one_of(process)


def kill_one_of(process: subprocess.Popen[str]) -> None:
    """SIGKILL to one process of the run."""
    os.kill(one_of(process), signal.SIGKILL)


def one_of(process: subprocess.Popen[str]) -> int:
    """The id of one process of the run, not of the agent that starts them."""
    command = ["pgrep", "-a", "-f", "train_process"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    workers = [int(line.split()[0]) for line in found if "torch.distributed.run" not in line]
    return next(pid for pid in workers if descends(pid, process.pid))


def interrupt_within_a_step(process: subprocess.Popen[str]) -> None:
    """Ctrl-C that reaches the processes before they finish another step: one of them stands still until it is there.

    A process takes the signals that wait for it by number: SIGTERM (15) overtakes a SIGSTOP (19) where a busy machine
    lets it run between neither. It has to stand before it is sent any other, or that one is never seen to wait.
    """
    worker = one_of(process)
    os.kill(worker, signal.SIGSTOP)
    try:
        wait_until(lambda: stands_still(worker), "the process stands still")
        process.send_signal(signal.SIGINT)
        wait_until(lambda: is_pending(worker, signal.SIGTERM), "the command passes the signal on")
    finally:
        os.kill(worker, signal.SIGCONT)


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        time.sleep(0.01)


def stands_still(pid: int) -> bool:
    """Whether every thread of a process has stopped."""
    try:
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:  # a thread that has just ended
        return False
    return {stat.rpartition(")")[2].split()[0] for stat in stats} == {"T"}


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a process that stands still."""
    pending = re.search(r"^ShdPnd:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return pending is not None and bool(int(pending[1], 16) >> (number - 1) & 1)


def descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


# --- What a user can do wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "loop.step=3"), "no setting 'step'"),
        (("--set", "steps"), "expected section.name=value"),
        (("--set", "loop.steps=3"), "given twice, by --set and by --steps"),
        (("--set", "objective.divergence=klx"), "no divergence 'klx'"),
        (("--batch-rows", 7, "--processes", 2), "cannot be shared by 2 processes"),
        (("--report-to", "paper"), "no tracker 'paper'"),
        (("--report-to", "wandb"), "needs the package wandb: pip install wandb"),
        (("--push-to-hub", "drafter"), "OWNER/NAME, got 'drafter'"),
        (("--fsdp",), "fsdp shares weights among processes, got 1; choose --processes 2 or more"),
    ],
)
def test_a_wrong_command_line_is_wrong_usage(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], words: str
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    failed(train(folder, tmp_path / "run", *arguments), 2, words)
    assert not (tmp_path / "run").exists()


def test_an_unknown_kind_is_answered_with_those_there_are(folder: Path, tmp_path: Path):
    failed(train(folder, tmp_path / "run", kind="medusa9"), 2, "no kind 'medusa9' to train; there are medusa, hydra")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "head.heads=3"), "has no option 'heads'"),
        (("--set", "head.num_heads=many"), "num_heads is of type int, got 'many'"),
        (("--set", "head.num_heads=0"), "[head] of medusa"),
        (("--set", "head.options.budgets=3"), "has no option 'budgets'"),
        (("--set", "head.options.budget=many"), "[head] options"),
        (("--prompts", "nowhere.txt"), "no prompts at nowhere.txt"),
        (("--from", "nowhere"), "nowhere"),
        (("--features", "nowhere"), "nowhere"),
        (("--device", "mars"), "device 'mars'"),
    ],
)
def test_settings_that_the_target_or_kind_cannot_have_are_refused_before_the_first_step(
    folder: Path, tmp_path: Path, arguments: tuple[object, ...], words: str
):
    failed(train(folder, tmp_path / "run", *arguments), 1, words)
    assert not (tmp_path / "run" / "recipe.json").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("empty.jsonl", "the data is empty: there is not a single row"),
        ("nothing", "there is no such file or folder"),
        ("unusable.jsonl", "unusable.jsonl:1"),
    ],
)
def test_data_that_teaches_nothing_is_refused(folder: Path, tmp_path: Path, data: str, words: str):
    failed(train(folder, tmp_path / "run", data=data), 1, words)
    assert not (tmp_path / "run").exists()


def test_data_of_another_tokenizer_is_refused(folder: Path, tmp_path: Path):
    save(make_target(vocab_size=VOCAB + 2), tmp_path / "other", ("<one>", "<two>"))
    result = run("train", "medusa", tmp_path / "other", folder / "whole/data", "--out", tmp_path / "run", *SMALL)
    failed(result, 1, "was prepared with the tokenizer of", "has another one")


def test_data_prepared_on_the_way_is_not_mixed_up(folder: Path, tmp_path: Path):
    other = tmp_path / "other.jsonl"
    other.write_text((folder / "texts.jsonl").read_text())
    result = run("train", "medusa", folder / "target", other, "--out", folder / "whole", *SMALL)
    failed(result, 1, "was prepared from", "choose another --out")


def test_a_target_that_cannot_be_verified_is_refused(folder: Path, tmp_path: Path):
    sizes: Any = {"vocab_size": VOCAB, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    save(MambaForCausalLM(MambaConfig(**sizes)), tmp_path / "mamba")
    result = run("train", "medusa", tmp_path / "mamba", folder / "whole/data", "--out", tmp_path / "run", *SMALL)
    failed(result, 1, "Mamba")


def test_prompts_longer_than_the_target_takes_are_refused(folder: Path, tmp_path: Path):
    (tmp_path / "long.txt").write_text("x" * 2045)
    result = train(folder, tmp_path / "run", "--prompts", tmp_path / "long.txt")
    failed(result, 1, "none of 1 held-out prompts leaves room for 8 new tokens")


def test_no_target_there(folder: Path, tmp_path: Path):
    failed(train(folder, tmp_path / "run", target="nowhere"), 1, "no model at")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lr", 0.5), "settings.learning_rate 0.5 (checkpoint: 0.004)"),
        (("--steps", 7), "settings.steps 7 (checkpoint: 6)"),
        (("--fresh",), "holds checkpoints already"),
        (("--set", "head.num_heads=2"), "head.num_heads 2 (checkpoint: None)"),
    ],
)
def test_checkpoints_of_another_run_are_refused_and_stay(folder: Path, arguments: tuple[object, ...], words: str):
    before = {file: file.read_bytes() for file in (folder / "whole").rglob("*") if file.is_file()}
    failed(train(folder, folder / "whole", *arguments, data="texts.jsonl"), 1, words)
    assert {file: file.read_bytes() for file in (folder / "whole").rglob("*") if file.is_file()} == before


def test_a_fine_tuned_copy_of_the_target_is_another_target(folder: Path):
    failed(train(folder, folder / "whole", data="texts.jsonl", target="tuned"), 1, "belongs to another run", "weights")


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("hydra", (), "holds a medusa head, the run trains hydra"),
        ("medusa", ("--set", "head.num_heads=2"), "cannot be chosen for a head that is there already"),
    ],
)
def test_beginning_with_a_head_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, kind: str, arguments: tuple[object, ...], words: str
):
    head = folder / "whole" / "latest" / "drafter"
    failed(train(folder, tmp_path / "run", "--from", head, *arguments, kind=kind), 1, words)


def test_a_loss_that_is_no_number_ends_the_run_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    healthy, batches = MedusaTraining.terms, []

    def terms(self: MedusaTraining, batch: Any, objective: Any) -> Any:
        batches.append(batch)
        found = healthy(self, batch, objective)
        if len(batches) == 4:
            found[0].losses = found[0].losses * torch.nan
        return found

    monkeypatch.setattr(MedusaTraining, "terms", terms)
    words = ("the loss of step 4 is nan; nothing was saved after step 3", "Lower the learning rate")
    failed(train(folder, tmp_path / "run"), 1, *words)
    assert all(value.isfinite().all() for value in weights(tmp_path / "run", 3).values())


def test_a_full_disk_loses_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard)))
        try:
            result = train(folder, tmp_path / "run", "--evaluate-every", 0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    failed(
        result, 1, "the checkpoint of step 4 cannot be written", "step-000002 is whole", "run the same command again"
    )
    assert not list((tmp_path / "run").glob(".unfinished*"))
    finished(train(folder, tmp_path / "run", "--evaluate-every", 0))
    assert same(folder / "whole", tmp_path / "run")


def test_too_little_room_is_said_before_the_first_step(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("specdec.train.job.checkpoint_bytes", lambda trainable: 1 << 60)
    failed(train(folder, tmp_path / "run"), 1, "MB free, one checkpoint takes")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_push_that_fails_keeps_the_drafter(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "nobody's")
    result = train(folder, tmp_path / "run", "--push-to-hub", "nobody/nothing")
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert "is finished but could not be pushed to nobody/nothing" in line
    assert (tmp_path / "run" / "drafter" / "drafter.json").is_file()


def test_help_has_an_example():
    result = run("train", "--help")
    assert "Example: specdec train medusa demo" in " ".join(result.stdout.split())
