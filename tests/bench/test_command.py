"""`specdec bench`: what it prints and writes, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from specdec.bench.methods import Request, SpeculativeMethod, TransformersMethod
from specdec.bench.record import read_records
from specdec.cli import app
from tests.test_cli import failed, save_model

FILES = {"manifest.json", "records.jsonl", "prompts.jsonl", "exactness.jsonl", "summary.json", "spec_bench.json",
         "report.md", "report.html"}  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "target"
    save_model(folder, seed=1)
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"question_id": n, "category": "qa", "turns": [f"def push{n}(self):"]} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPECDEC_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def bench(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def short(target: Path, questions: Path, *more: object) -> list[object]:
    return [target, "-q", questions, "-n", 8, "-d", "lookup", "--out", "out", *more]


def test_it_writes_everything_and_prints_a_short_table(target: Path, questions: Path, tmp_path: Path):
    result = bench(*short(target, questions, "-d", "suffix:budget=4", "--prompt-lookup", 3))
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert set(rows) == {"method", "plain", "none", "lookup", "suffix:budget=4", "prompt-lookup", "report:"}
    assert rows["report:"] == "report: out/report.html"
    assert "the reference" in rows["plain"]
    assert all("3 of 3" in rows[name] for name in ("none", "lookup", "suffix:budget=4", "prompt-lookup"))
    assert {file.name for file in (tmp_path / "out").iterdir() if file.is_file()} == FILES
    assert len(list((tmp_path / "out" / "answers").iterdir())) == 5
    assert len(read_records(tmp_path / "out")) == 15
    assert "Traceback" not in result.stderr


def test_json_is_one_object_on_stdout(target: Path, questions: Path):
    result = bench(*short(target, questions, "--json", "--limit", 1))
    summary = json.loads(result.stdout)
    assert summary["path"] == "out"
    assert set(summary["methods"]) == {"plain", "none", "lookup"}
    assert summary["questions"] == 1


def test_a_report_is_rendered_anew_and_runs_are_compared(target: Path, questions: Path, tmp_path: Path):
    bench(*short(target, questions))
    bench(*short(target, questions, "--out", "second", "--seed", 1))
    (tmp_path / "out" / "report.html").unlink()
    again = bench("report", "out")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out" / "report.html").is_file()
    both = bench("report", "out", "second", "--out", "both")
    assert both.exit_code == 0, both.output
    assert {file.name for file in (tmp_path / "both").iterdir()} == {"report.md", "report.html"}
    failed(bench("report", "out", "second"), 2, "--out", "comparing several runs")
    failed(bench("report", "nowhere"), 1, "nowhere holds no run")


def make_lookup_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SpeculativeMethod.generate

    def generate(self: Any, request: Request) -> Any:
        generated = right(self, request)
        if self.name == "lookup":
            generated.token_ids[0][5] = (generated.token_ids[0][5] + 1) % 200 + 1
        return generated

    monkeypatch.setattr(SpeculativeMethod, "generate", generate)


def test_a_wrong_answer_ends_with_status_1_after_everything_was_written(
    target: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_lookup_wrong(monkeypatch)
    result = bench(*short(target, questions))
    assert result.exit_code == 1
    assert "3 WRONG" in result.stdout
    assert "3 wrong answers; the first: lookup, question 0, turn 1, new token 5" in result.stderr
    assert {file.name for file in (tmp_path / "out").iterdir() if file.is_file()} == FILES


def test_a_failing_method_ends_with_status_1_and_says_where(
    target: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
):
    right = SpeculativeMethod.generate
    calls = []

    def generate(self: Any, request: Request) -> Any:
        calls.append(self.name)
        if calls.count("lookup") == 5 and self.name == "lookup":  # the second question, after three runs of warm-up
            raise RuntimeError("out of luck")
        return right(self, request)

    monkeypatch.setattr(SpeculativeMethod, "generate", generate)
    result = bench(*short(target, questions))
    assert result.exit_code == 1
    assert "1 generations failed; the first: lookup, question 1, turn 1: RuntimeError: out of luck" in result.stderr


def test_ctrl_c_says_that_the_same_command_goes_on(
    target: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    right, calls = TransformersMethod.generate, []

    def generate(self: Any, request: Request) -> Any:
        calls.append(request)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return right(self, request)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersMethod, "generate", generate)
        result = bench(*short(target, questions))
    assert result.exit_code == 130
    assert "interrupted; every finished generation is kept, and the same command goes on from there" in result.stderr
    kept = len(read_records(tmp_path / "out"))
    assert 0 < kept < 9
    again = bench(*short(target, questions))
    assert again.exit_code == 0
    assert f"{kept} of 9 records were there already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, ["TARGET"]),
        (["TARGET", "-d", "nothing"], 1, ["no drafter 'nothing'"]),
        (["TARGET", "-d", "lookup:depth=3"], 1, ["no option 'depth'"]),
        (["TARGET", "-d", "plain"], 1, ["that is a baseline"]),
        (["TARGET", "-q", "no-such-set"], 1, ["no-such-set"]),
        (["TARGET", "--repeats", "0"], 2, ["got 0, expected 1 or more"]),
        (["TARGET", "--temperature", "-1"], 2, ["got -1, expected 0 or more"]),
        (["TARGET", "--prompt-lookup", "4", "--batch-size", "2"], 1, ["one row at a time"]),
        (["TARGET", "--category", "cooking"], 1, ["no category 'cooking'"]),
        (["TARGET", "--template", "no-such-file.jinja"], 1, ["no template file"]),
        (["nowhere/at/all"], 1, ["no model"]),
        (["TARGET", "--history", "mine"], 2, ["mine"]),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_before_anything_is_written(
    target: Path, questions: Path, tmp_path: Path, arguments: list[str], status: int, words: list[str]
):
    given = [str(target) if argument == "TARGET" else argument for argument in arguments]
    if given and "-q" not in given:
        given += ["-q", str(questions)]
    result = bench(*given, *(["-n", "8", "--out", "out"] if given else []))
    failed(result, status, *(words if given else ["target"]))
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_directory_is_refused_with_the_field(target: Path, questions: Path):
    bench(*short(target, questions))
    failed(bench(*short(target, questions, "--seed", 3)), 1, "settings.seed is 0 there and 3 here", "another --out")


@pytest.mark.slow
def test_a_killed_command_goes_on(target: Path, questions: Path, tmp_path: Path):
    """The real command in a process of its own, and SIGKILL once some records are there."""
    command = [sys.executable, "-m", "specdec", "bench", *map(str, short(target, questions, "--repeats", 20))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    records = tmp_path / "out" / "records.jsonl"
    while process.poll() is None and not (records.exists() and records.read_bytes().count(b"\n") >= 10):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = read_records(tmp_path / "out")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    after = read_records(tmp_path / "out")
    assert after[: len(before)] == before
    assert len(after) == 180
    assert f"{len(before)} of 180 records were there already" in done.stderr
