"""Spec-Bench's files and its number."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

from specdec.bench.question import MT_BENCH_CATEGORIES, Question
from specdec.bench.record import Record, Seconds, Steps
from specdec.bench.spec_bench import answers_of, file_name, spec_bench_speedup, tokens_without_end
from tests.bench.runs import question_set, record, run
from tests.tiny import tokenizer

RAW = [*MT_BENCH_CATEGORIES, "translation", "summarization", "qa", "math_reasoning", "rag"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def recomputed(
    method: list[dict[str, Any]], base: list[dict[str, Any]], task: str, tokenize: Any
) -> tuple[float, float]:
    """(speed-up, mean accepted tokens), written down anew from what Spec-Bench's scripts are known to compute."""

    def belongs(entry: dict[str, Any]) -> bool:
        if task == "overall":
            return True
        folded = "mt_bench" if entry["category"] in MT_BENCH_CATEGORIES else entry["category"]
        return folded == task

    ours, theirs, accepted = [], [], []
    for entry in filter(belongs, method):
        choice = entry["choices"][0]
        tokens, seconds = 0, 0.0
        for turn in range(len(choice["wall_time"])):
            tokens += choice["new_tokens"][turn]
            seconds += choice["wall_time"][turn]
        ours.append(tokens / seconds)
        accepted.extend(choice["accept_lengths"])
    for entry in filter(belongs, base):
        choice = entry["choices"][0]
        tokens = sum(len(tokenize(answer)) - 1 for answer in choice["turns"])
        theirs.append(tokens / sum(choice["wall_time"]))
    return fmean(ours) / fmean(theirs), fmean(accepted)


def test_the_answer_files_give_the_same_number_when_it_is_computed_anew(tmp_path: Path):
    questions = tuple(
        Question(81 + number, category, (f"say {category}", "and more")[: 1 + (category in MT_BENCH_CATEGORIES)])
        for number, category in enumerate(RAW)
    )
    done = run(tmp_path / "run", ("lookup", "recycling"), questions=question_set(questions))
    plain = lines(done.path / "answers" / "plain.jsonl")
    stored = json.loads((done.path / "spec_bench.json").read_text())
    assert set(stored) == {"none", "lookup", "recycling"}
    for name, tasks in stored.items():
        own = lines(done.path / "answers" / f"{name}.jsonl")
        assert [a["question_id"] for a in own] == [a["question_id"] for a in plain] == list(range(81, 94))
        assert list(tasks) == ["mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag", "overall"]
        for task, numbers in tasks.items():
            speedup, accepted = recomputed(own, plain, task, lambda text: tokenizer()(text)["input_ids"])
            assert numbers["speedup"] == pytest.approx(speedup, rel=1e-9)
            assert numbers["mean_accepted_tokens"] == pytest.approx(accepted, rel=1e-9)
        assert tasks["mt_bench"]["questions"] == 8
    assert stored["none"]["overall"]["mean_accepted_tokens"] == 1.0


def test_an_answer_has_the_fields_and_types_that_its_scripts_read(tmp_path: Path):
    done = run(tmp_path / "run", settings={"repeats": 2})
    for name in ("plain", "none", "lookup"):
        for entry in lines(done.path / "answers" / f"{name}.jsonl"):
            assert list(entry) == ["question_id", "category", "answer_id", "model_id", "choices", "tstamp"]
            assert [choice["index"] for choice in entry["choices"]] == [0, 1]
            for choice in entry["choices"]:
                turns = 2 if entry["question_id"] == "first" else 1
                for field, kind in (("turns", str), ("decoding_steps", int), ("new_tokens", int), ("wall_time", float)):
                    assert [type(value) for value in choice[field]] == [kind] * turns
                assert all(type(count) is int for count in choice["accept_lengths"])
                assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
                assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"]) - turns


def test_new_tokens_are_without_the_end_of_text_and_not_beyond_the_cap():
    ended = record(token_ids=[5, 6, 2], finish="eos")
    assert tokens_without_end(ended, {2}) == 2
    assert tokens_without_end(record(token_ids=[5, 6, 2], finish="length"), {2}) == 3
    assert tokens_without_end(record(token_ids=[5] * 9, max_new_tokens=8), set()) == 8
    assert tokens_without_end(record(token_ids=[2], finish="eos"), {2}) == 0
    beyond = record(token_ids=[5] * 8 + [2], finish="eos", max_new_tokens=8)
    assert tokens_without_end(beyond, {2}) == 8


def made_up(chance: random.Random, category: str, number: int) -> Record:
    words = [chance.choice("abc") for _ in range(chance.randint(2, 20))]
    emitted = [chance.randint(1, 4) for _ in words]
    seconds = Seconds(total=chance.random(), prefill=None, draft=None, verify=None, accept=None, other=None, ttft=0.0)
    steps = Steps(
        drafted=None, accepted=None, emitted=emitted, tried=None, draft=None, verify=None, accept=None, total=[]
    )
    return record(
        question_id=number, category=category, text=" ".join(words), token_ids=[5] * sum(emitted),
        seconds=seconds, steps=steps, max_new_tokens=100,
    )  # fmt: skip


def test_many_random_answers_give_the_number_computed_anew():
    chance = random.Random(0)

    def tokenize(text: str) -> list[str]:
        return ["<bos>", *text.split()]

    for _ in range(50):
        sets = [
            answers_of([made_up(chance, category, n) for n, category in enumerate([*RAW, "other"])], "m", set(), 0.0)
            for _ in range(2)
        ]
        found = spec_bench_speedup(sets[0], sets[1], lambda text: SimpleNamespace(input_ids=tokenize(text)))
        for task, numbers in found.items():
            speedup, accepted = recomputed(sets[0], sets[1], task, tokenize)
            assert numbers["speedup"] == pytest.approx(speedup, rel=1e-12)
            assert numbers["mean_accepted_tokens"] == pytest.approx(accepted, rel=1e-12)
        assert found["overall"]["questions"] == 14


def test_the_number_is_a_ratio_of_means_and_has_its_bias():
    """Two questions, 10 and 1 tokens/s against 5 and 5: 5.5 / 5, where a mean of ratios would be 1.1 and times 0.55."""

    def entry(category: str, tokens: int, seconds: float) -> dict[str, Any]:
        turns, accepted = [" ".join("a" * tokens)], [1, 3]
        choice = {"turns": turns, "new_tokens": [tokens], "wall_time": [seconds], "accept_lengths": accepted}
        return {"category": category, "choices": [choice]}

    method = [entry("qa", 10, 1.0), entry("qa", 1, 1.0)]
    base = [entry("qa", 10, 2.0), entry("qa", 10, 2.0)]
    bos = spec_bench_speedup(method, base, lambda text: SimpleNamespace(input_ids=[0, *text.split()]))
    assert bos["qa"] == bos["overall"]
    assert bos["qa"]["speedup"] == pytest.approx(5.5 / 5)
    assert bos["qa"]["mean_accepted_tokens"] == 2.0
    none = spec_bench_speedup(method, base, lambda text: SimpleNamespace(input_ids=text.split()))
    assert none["qa"]["speedup"] == pytest.approx(5.5 / 4.5), "without a BOS its baseline is slower than it was"
    assert set(none) == {"qa", "overall"}


def test_names_of_methods_become_names_of_files_that_differ():
    names = ["plain", "suffix:budget=4", "suffix_budget=4", "../up", "a/b", "a_b", "x" * 300, "x" * 301 + "/"]
    files = [file_name(name) for name in names]
    assert files[0] == "plain"
    assert len(set(files)) == len(names)
    assert all("/" not in name and not name.startswith(".") for name in files)
