"""A run that is killed goes on with the first missing record; no finished one is lost or counted twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from specdec.bench import BenchRun
from specdec.bench.question import Question
from specdec.bench.record import RECORDS_FILE, key_of, read_records
from tests.bench.runs import question_set, run

KILLS = 4
QUESTIONS = tuple(
    Question(number, "writing" if number % 2 else "qa", ("abc abc abc", "and again")[: 1 + number % 2])
    for number in range(6)
)


def whole_run(folder: Path) -> BenchRun:
    drafters = ("lookup", "suffix:remember=100")
    return run(folder, drafters, questions=question_set(QUESTIONS), settings={"temperature": 0.7})


def killed_after(folder: Path, seconds: float) -> None:
    """Run in a process of its own, which gets SIGKILL so many seconds after its manifest is there."""
    process = multiprocessing.get_context("fork").Process(target=whole_run, args=(folder,))
    process.start()
    while not (folder / "manifest.json").exists() and process.is_alive():
        time.sleep(0.001)
    process.join(seconds)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)


def contents(records: Any) -> dict[Any, Any]:
    return {key_of(r): (r["sequence"], r["token_ids"], r["text"], r["prompt"], r["seed"], r["finish"]) for r in records}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Any, Any], float]:
    """The records of a run that nobody killed, and how long it took."""
    started = time.perf_counter()
    done = whole_run(tmp_path_factory.mktemp("unbroken") / "run")
    assert len(done.records) == 4 * (3 * 1 + 3 * 2)
    return contents(done.records), time.perf_counter() - started


@pytest.mark.parametrize("kills", [KILLS, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_and_resumed_it_has_the_records_of_an_unbroken_run(tmp_path: Path, unbroken: Any, kills: int):
    expected, seconds = unbroken
    chance = random.Random(0)
    interrupted = 0
    for number in range(kills):
        folder = tmp_path / str(number)
        killed_after(folder, chance.uniform(0, seconds))
        file = folder / RECORDS_FILE
        before = read_records(folder) if file.exists() else []
        interrupted += 0 < len(before) < len(expected)
        done = whole_run(folder)
        assert done.records[: len(before)] == before, "what was recorded stays as it was"
        assert contents(done.records) == expected
        assert len(done.records) == len(expected)
        assert contents(read_records(folder)) == expected
        assert {verdict["verdict"] for verdict in done.verdicts} == {"exact"}
    assert interrupted >= kills // 4, "kills that never hit a run in the middle test nothing"


def test_killed_again_and_again_the_same_run_still_gets_done(tmp_path: Path, unbroken: Any):
    expected, seconds = unbroken
    folder, seen = tmp_path / "run", 0
    for _ in range(KILLS):
        killed_after(folder, seconds * 0.4)
        count = len(read_records(folder)) if (folder / RECORDS_FILE).exists() else 0
        assert count >= seen
        seen = count
    assert contents(whole_run(folder).records) == expected


def test_a_line_that_was_being_written_is_written_anew(tmp_path: Path, unbroken: Any):
    expected, _ = unbroken
    folder = tmp_path / "run"
    whole_run(folder)
    file = folder / RECORDS_FILE
    data = file.read_bytes()
    lines = data.splitlines(keepends=True)
    for cut in (len(data) - 1, len(data) - len(lines[-1]) // 2, len(b"".join(lines[:7])) + 1):
        file.write_bytes(file.read_bytes()[:cut])
        prompts = folder / "prompts.jsonl"
        prompts.write_bytes(prompts.read_bytes()[:-3])
        assert contents(whole_run(folder).records) == expected
