"""Tiny runs for the tests of this folder: three questions, one of them of two turns, on the random target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdec.bench import BenchRun, QuestionSet, Settings, run_bench
from specdec.bench.question import Question
from specdec.bench.record import Batch, Record, Seconds, Sent, Steps
from tests.tiny import shared_target, tokenizer

QUESTIONS = (
    Question("first", "writing", ("abc abc abc", "and again abc")),
    Question("second", "qa", ("what is this",)),
    Question("third", "qa", ("hello hello",)),
)
NEW_TOKENS = 12


def question_set(questions: tuple[Question, ...] = QUESTIONS) -> QuestionSet:
    return QuestionSet("tiny", "turns", "0" * 64, "here", questions)


def run(out: Path, drafters: Any = ("lookup",), *, model: Any = None, settings: Any = None, **more: Any) -> BenchRun:
    values = {"max_new_tokens": NEW_TOKENS, **(settings or {})}
    questions = more.pop("questions", question_set())
    target = shared_target() if model is None else model
    return run_bench(target, tokenizer(), questions, drafters, out=out, settings=Settings(**values), **more)


def record(method: str = "plain", question_id: str | int = 1, **changed: Any) -> Record:
    """A made-up record of three tokens in 0.5 s."""
    values = Record(
        method=method, question_id=question_id, category="writing", column="Multi-turn Conversation",
        turn=0, repeat=0, sequence=0, batch=Batch(size=1, row=0, id=0),
        prompt=Sent(tokens=2, sha256="p", history="own"), max_new_tokens=8,
        token_ids=[5, 6, 7], text="é b", finish="length", error=None,
        seconds=Seconds(total=0.5, prefill=0.1, draft=0.1, verify=0.2, accept=0.05, other=0.05, ttft=0.1),
        steps=Steps(drafted=[1], accepted=[1], emitted=[2], tried=[1], draft=[0.1], verify=[0.2], accept=[0.05],
                    total=[0.4]),
        children="chosen", chain=True, target_calls=2, peak_memory_bytes=1000, lossy=None, seed=None,
    )  # fmt: skip
    values.update(changed)  # type: ignore[typeddict-item]
    return values
