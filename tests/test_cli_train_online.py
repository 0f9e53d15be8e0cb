"""`specdec train --online`: a stream of prompts, broken off and gone on with, and what a user can do wrong."""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from specdec.drafters.load import load_drafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.train.learner import Learner
from tests.test_cli_train import failed, finished, run, save
from tests.tiny import make_target, perturbed

torch.set_num_threads(1)
FAST = ("--learn-every", 10, "--lr", 2e-3, "--row-length", 64, "-n", 12, "--save-every", 3,
        "--device", "cpu")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target and a poor draft model with their tokenizers, prompts of two topics, and a finished run."""
    path = tmp_path_factory.mktemp("online")
    save(make_target(), path / "target")
    save(perturbed(make_target(), 0.05), path / "draft")
    (path / "calls.jsonl").write_text("".join(f'{{"prompt": "def f{n % 2}(a"}}\n' for n in range(5)))
    (path / "words.txt").write_text("return a\n\nreturn b\nreturn a\n")
    (path / "named.jsonl").write_text(
        '{"prompt": "a", "topic": "one"}\n{"text": "b", "topic": "two"}\n{"ids": [5, 6]}\n'
    )
    finished(online(path, path / "whole", "--static"))
    return path


def online(folder: Path, out: Path, *more: object, prompts: tuple[str, ...] = ("calls.jsonl", "words.txt"),
           kind: str = "draft-model", begin: object = None) -> Any:  # fmt: skip
    sources = [folder / name for name in prompts]
    begin = folder / "draft" if begin is None else begin
    return run("train", kind, folder / "target", *sources, "--online", "--from", begin, "--out", out, *FAST, *more)


def rows(out: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if "seconds" not in name}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "latest" / "training.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def after(monkeypatch: pytest.MonkeyPatch, request: int, act: Callable[[], None]) -> None:
    """Let something happen when a request has been reported."""

    @contextmanager
    def display(*, as_json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
        yield lambda event: act() if event.get("number") == request else None

    monkeypatch.setattr(importlib.import_module("specdec.cli.train_online"), "online_display", display)


# --- A whole stream ------------------------------------------------------------------------------------


def test_a_stream_is_replayed_in_order_and_every_request_has_a_line(folder: Path) -> None:
    learning, static = rows(folder / "whole"), rows(folder / "whole", "static.jsonl")
    assert [row["number"] for row in learning] == [row["number"] for row in static] == list(range(8))
    assert [row["topic"] for row in learning] == ["calls"] * 5 + ["words"] * 3
    assert {"tau", "alpha", "steps", "new_tokens", "seconds", "updates"} <= learning[0].keys()
    assert learning[0]["tau"] == static[0]["tau"]
    assert {row["updates"] for row in static} == {0}
    assert learning[-1]["updates"] == 7
    # What the same prompt was worth before and after it was learned from: the prompts of calls.jsonl come in turns.
    assert learning[4]["tau"] > learning[0]["tau"] + 0.5
    assert static[4]["tau"] == static[0]["tau"]


def test_what_was_learned_drafts_by_the_run_s_name(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "target")
    learned: Any = load_drafter(folder / "whole", model)
    state = learned.model.model.state_dict()
    masters = weights(folder / "whole")
    assert all(torch.equal(state[name], masters[name]) for name in masters)
    first = load_file(folder / "draft" / "model.safetensors")
    assert any(not torch.equal(first[name], masters[name]) for name in masters)
    used = run("generate", folder / "target", "--drafter", folder / "whole", "-p", "def f0(a", "-n", 8, "--json")
    ours = json.loads(finished(used).stdout)["statistics"]["tau"]
    before = run("generate", folder / "target", "--drafter", folder / "draft", "-p", "def f0(a", "-n", 8, "--json")
    assert ours > json.loads(finished(before).stdout)["statistics"]["tau"]


def test_the_end_is_a_table_by_topic_and_how_to_use_it(folder: Path) -> None:
    result = finished(online(folder, folder / "whole", "--static"))
    assert "going on after request 8 of 8" in result.stderr
    lines = result.stdout.splitlines()
    assert sum(line.startswith(("calls ", "words ")) for line in lines) == 2
    assert lines[-2] == f"learned drafter: {folder / 'whole' / 'drafter'} (8 updates)"
    assert lines[-1] == f"use it: specdec generate {folder / 'target'} --drafter {folder / 'whole'}"


def test_json_is_an_object_for_each_request_and_one_for_the_end(folder: Path, tmp_path: Path) -> None:
    result = finished(online(folder, tmp_path / "run", "--json"))
    assert result.stderr == ""
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert [event["event"] for event in events] == ["request"] * 8 + ["finished"]
    last, learning = events[-1], rows(tmp_path / "run")
    assert not last["stopped"]
    assert last["drafter"] == str(tmp_path / "run" / "drafter")
    calls = last["topics"][0]
    assert (calls["topic"], calls["requests"], calls["static"]) == ("calls", 5, None)
    assert calls["learning"]["first_third"]["tau"] == pytest.approx(learning[0]["tau"])
    assert calls["learning"]["last_third"]["alpha"] == pytest.approx(learning[4]["alpha"])
    emitted, steps = (sum(row[name] for row in learning) for name in ("emitted", "steps"))
    assert last["learning"]["tau"] == pytest.approx(emitted / steps, abs=1e-4)


def test_a_comparison_that_is_asked_for_later_is_made_up_for(folder: Path, tmp_path: Path) -> None:
    finished(online(folder, tmp_path / "run"))
    assert same(folder / "whole", tmp_path / "run")
    assert not (tmp_path / "run" / "static.jsonl").exists()
    finished(online(folder, tmp_path / "run", "--static"))
    ours, whole = (rows(path, "static.jsonl") for path in (tmp_path / "run", folder / "whole"))
    assert [*map(without_times, ours)] == [*map(without_times, whole)]
    assert same(folder / "whole", tmp_path / "run")


def test_a_head_learns_and_is_saved_as_one(folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"def f{n}(a):\n    return a\n"}) + "\n" for n in range(12)))
    finished(run("train", "medusa", folder / "target", texts, "--out", tmp_path / "head", "--steps", 1,
                 "--row-length", 64, "--set", "data.validation_prompts=0", "--device", "cpu"))  # fmt: skip
    result = online(folder, tmp_path / "run", kind="medusa", begin=tmp_path / "head", prompts=("calls.jsonl",))
    assert "5 updates" in finished(result).stdout or "4 updates" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(folder / "target")
    assert isinstance(load_drafter(tmp_path / "run", model), MedusaDrafter)
    before = load_file(tmp_path / "head" / "latest" / "training.safetensors")
    assert any(not torch.equal(before[name], value) for name, value in weights(tmp_path / "run").items())


def test_rows_name_their_topic_and_may_be_texts_or_ids(folder: Path, tmp_path: Path) -> None:
    finished(online(folder, tmp_path / "run", prompts=("named.jsonl",)))
    assert [row["topic"] for row in rows(tmp_path / "run")] == ["one", "two", "named"]


def test_a_plan_counts_requests_and_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    result = finished(online(folder, tmp_path / "run", "--plan"))
    assert "8: calls 5, words 3" in result.stdout
    assert "learn_every" in result.stdout
    assert not (tmp_path / "run").exists()
    plan = json.loads(finished(online(folder, tmp_path / "run", "--plan", "--json", "--top-k", 0)).stdout)
    assert plan["recipe"]["online"]["top_k"] is None
    assert plan["recipe"]["online"]["max_age"] is None
    assert plan["recipe"]["online"]["learning"]["rate"] == 2e-3
    assert (plan["requests"], plan["new_tokens"]) == (8, 96)


def test_settings_of_a_file_lie_under_options(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[online]\nsteps = 2\nkeep = "reservoir"\n[online.learning]\nclip = 0.5\nrate = 1.0\n[stream]\nsave_every = 9\n'
    )
    plan = json.loads(finished(online(folder, tmp_path / "run", "--recipe", recipe, "--plan", "--json")).stdout)
    ours = plan["recipe"]
    assert (ours["online"]["steps"], ours["online"]["keep"], ours["stream"]["save_every"]) == (2, "reservoir", 3)
    assert ours["online"]["learning"] | {"clip": 0.5, "rate": 2e-3} == ours["online"]["learning"]


# --- Going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_saves_and_the_same_command_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    with monkeypatch.context() as patch:
        after(patch, 3, lambda: os.kill(os.getpid(), number))
        stopped = finished(online(folder, tmp_path / "run"))
    assert "stopped and saved after request 4 of 8; the same command goes on" in stopped.stderr
    assert "learned drafter" in stopped.stdout
    rest = finished(online(folder, tmp_path / "run"))
    assert "going on after request 4 of 8" in rest.stderr
    assert [*map(without_times, rows(tmp_path / "run"))] == [*map(without_times, rows(folder / "whole"))]
    assert same(folder / "whole", tmp_path / "run")
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [start["after_request"] for start in starts] == [0, 4]


def test_after_a_crash_requests_behind_the_checkpoint_are_decoded_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise RuntimeError("lightning")

    with monkeypatch.context() as patch:
        after(patch, 4, crash)
        failed(online(folder, tmp_path / "run"), 1, "lightning")
    assert len(rows(tmp_path / "run")) == 5
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"number": 5, "tau')  # a kill may leave half a line
    rest = finished(online(folder, tmp_path / "run"))
    assert "going on after request 3 of 8" in rest.stderr
    assert [*map(without_times, rows(tmp_path / "run"))] == [*map(without_times, rows(folder / "whole"))]
    assert same(folder / "whole", tmp_path / "run")


def test_a_stream_that_grew_is_gone_on_with(folder: Path, tmp_path: Path) -> None:
    finished(online(folder, tmp_path / "run", prompts=("calls.jsonl",)))
    finished(online(folder, tmp_path / "run"))
    assert [row["topic"] for row in rows(tmp_path / "run")] == ["calls"] * 5 + ["words"] * 3


@pytest.mark.parametrize(
    ("more", "prompts", "words"),
    [
        (("--set", "online.steps=1"), ("calls.jsonl", "words.txt"), "online.steps 1 (checkpoint: 4)"),
        (("--fresh",), ("calls.jsonl", "words.txt"), "holds checkpoints already"),
        ((), ("words.txt", "calls.jsonl"), "request 0 in"),
        ((), ("calls.jsonl",), "holds 8 requests, the stream has 5"),
    ],
)
def test_another_run_s_directory_is_refused_and_stays(
    folder: Path, more: tuple[object, ...], prompts: tuple[str, ...], words: str
) -> None:
    before = {file: file.read_bytes() for file in (folder / "whole").rglob("*") if file.is_file()}
    failed(online(folder, folder / "whole", *more, prompts=prompts), 1, words)
    assert {file: file.read_bytes() for file in (folder / "whole").rglob("*") if file.is_file()} == before


@pytest.mark.slow
def test_learning_in_the_background_ends_saved(folder: Path, tmp_path: Path) -> None:
    finished(online(folder, tmp_path / "run", "--background"))
    state = json.loads((tmp_path / "run" / "latest" / "state.json").read_text())
    assert state["requests"] == 8
    assert state["updates"] >= 1


def test_what_goes_wrong_in_the_background_is_not_told_as_a_full_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(_learner: Learner, _plan: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Learner, "update", update)
    result = online(folder, tmp_path / "run", "--background", "--save-every", 1)
    assert result.exit_code == 1
    assert "CUDA error" in f"{result.exception}{result.output}"
    assert "Make room" not in f"{result.exception}{result.output}"


# --- What a user can do wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--features", "x"), "--features does nothing with --online"),
        (("--from-scratch",), "--from-scratch does nothing with --online"),
        (("--processes", 2), "--processes does nothing with --online"),
        (("--set", "loop.steps=3"), "no section 'loop'"),
        (("--set", "online.learn=3"), "no setting 'learn'"),
        (("--set", "online.learn_every=3"), "given twice, by --set and by --learn-every"),
        (("--set", "online.keep=oldest"), "keeps newest or reservoir"),
        (("--divergence", "klx"), "no divergence 'klx'"),
        (("--replay-share", 2), "replay_share is at least 0 and below 1"),
        (("--push-to-hub", "drafter"), "OWNER/NAME, got 'drafter'"),
        (("--push-to-hub", "nobody/nothing"), "pushing to the hub needs a token"),
    ],
)
def test_a_wrong_command_line_is_wrong_usage(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[object, ...], words: str
) -> None:
    monkeypatch.setattr("specdec.train.publish.get_token", lambda: None)
    failed(online(folder, tmp_path / "run", *more), 2, words)
    assert not (tmp_path / "run").exists()


def test_options_of_a_stream_and_several_files_belong_to_online(folder: Path, tmp_path: Path) -> None:
    command = ("train", "draft-model", folder / "target", folder / "calls.jsonl", "--out", tmp_path / "run")
    failed(run(*command, "--learn-every", 3), 2, "--learn-every belongs to --online")
    failed(run(*command, "--online"), 2, "say --from DRAFTER")
    failed(run(*command[:4], folder / "words.txt", *command[4:]), 2, "several DATA belong to --online")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "there is not a single prompt in"),
        ('{"prompt": "a"}\n{"colour": "blue"}\n', "prompts.jsonl:2: expected a prompt"),
        ('{"prompt": "a"}\n{"prompt"', "prompts.jsonl:2: not JSON"),
        ('{"prompt": "a", "topic": 3}\n', "prompts.jsonl:1: topic is text, got 3"),
        ('{"prompt": ""}\n', "prompts.jsonl:1: the prompt is empty"),
        ('{"ids": [5, 7000]}\n', "prompts.jsonl:1: ids is a list of the target's token ids"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "needs a chat template"),
        (json.dumps({"prompt": "x" * 2040}), "prompts.jsonl:1: the prompt's 2040 tokens and 12 new ones are more than"),
    ],
)
def test_prompts_that_cannot_be_used_are_found_before_the_first_request(
    folder: Path, tmp_path: Path, line: str, words: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text(line)
    failed(online(folder, tmp_path / "run", prompts=(str(tmp_path / "prompts.jsonl"),)), 1, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "begin", "words"),
    [
        ("medusa", None, "is a draft-model, the command trains medusa"),
        ("draft-model", "suffix", "no weights of its own"),
        ("draft-model", "nowhere", "no drafter 'nowhere'"),
    ],
)
def test_a_drafter_that_cannot_learn_is_refused(
    folder: Path, tmp_path: Path, kind: str, begin: str | None, words: str
) -> None:
    failed(online(folder, tmp_path / "run", kind=kind, begin=begin), 1, words)
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_not_online_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    step = tmp_path / "run" / "step-000001"
    step.mkdir(parents=True)
    (step / "state.json").write_text('{"step": 1}')
    failed(online(folder, tmp_path / "run"), 1, "a run that was not --online")
