"""Spec-Bench: answer files that its scripts read, and its number, computed as it computes it.

Facts about its code are those of hemingkx/Spec-Bench at fd2c1cd (evaluation/eval.py, evaluation/speed.py).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from specdec.bench.question import MT_BENCH_CATEGORIES
from specdec.bench.record import Record, write_jsonl

ANSWERS = "answers"
MT_BENCH, OVERALL = "mt_bench", "overall"
TASKS = (MT_BENCH, "translation", "summarization", "qa", "math_reasoning", "rag", OVERALL)
"""In the order of its output; every other category counts in `overall` alone."""

Answer = dict[str, Any]


def all_answers(records: Sequence[Record], target: str, ends: set[int], stamp: float) -> dict[str, list[Answer]]:
    """The answers of every method, by its name.

    Args:
        records: of a whole run.
        target: its name, for `model_id`.
        ends: end-of-text tokens.
        stamp: Unix time for `tstamp`.

    A question that any method failed on is left out for all: its speed is an average over questions.
    """
    failed = {record["question_id"] for record in records if record["error"] is not None}
    by_method: dict[str, list[Record]] = {}
    for record in records:
        of_method = by_method.setdefault(record["method"], [])
        if record["question_id"] not in failed:
            of_method.append(record)
    return {method: answers_of(own, f"{target}-{method}", ends, stamp) for method, own in by_method.items()}


def write_answers(folder: Path, answers: Mapping[str, Sequence[Answer]]) -> None:
    """Write answers/METHOD.jsonl for every method, all with the same questions in the same order."""
    for method, own in answers.items():
        write_jsonl(folder / ANSWERS / f"{file_name(method)}.jsonl", own)


def file_name(method: str) -> str:
    """A method's name as part of a file's name; names that differ stay apart."""
    plain = re.sub(r"[^A-Za-z0-9._=,-]+", "_", method).strip("._")
    if plain == method:
        return plain
    digest = hashlib.sha256(method.encode(errors="backslashreplace")).hexdigest()
    return f"{plain[:80]}-{digest[:6]}"


def answers_of(records: Sequence[Record], model_id: str, ends: set[int], stamp: float) -> list[Answer]:
    """Spec-Bench's answer of each question to one method's records: a choice for each repeat.

    `new_tokens` is without the end-of-text token, which its baseline count lacks too. `accept_lengths` holds the
    tokens emitted at each verification, the target's own included; the prompt's token is verified by none. In a batch
    `wall_time` is that of the whole batch, which every row waits for.
    """
    by_question: dict[Any, list[Record]] = {}
    for record in records:
        by_question.setdefault(record["question_id"], []).append(record)
    return [_answer(of_one, model_id, ends, stamp) for of_one in by_question.values()]


def _answer(records: list[Record], model_id: str, ends: set[int], stamp: float) -> Answer:
    first = records[0]
    repeats = sorted({record["repeat"] for record in records})
    return {
        "question_id": first["question_id"],
        "category": first["category"],
        "answer_id": hashlib.sha256(f"{model_id} {first['question_id']}".encode()).hexdigest()[:22],
        "model_id": model_id,
        "choices": [_choice([r for r in records if r["repeat"] == repeat], repeat, ends) for repeat in repeats],
        "tstamp": stamp,
    }


def _choice(records: list[Record], index: int, ends: set[int]) -> dict[str, Any]:
    turns = sorted(records, key=lambda record: record["turn"])
    return {
        "index": index,
        "turns": [record["text"] for record in turns],
        "decoding_steps": [len(record["steps"]["emitted"]) for record in turns],
        "new_tokens": [tokens_without_end(record, ends) for record in turns],
        "wall_time": [record["seconds"]["total"] for record in turns],
        "accept_lengths": [count for record in turns for count in record["steps"]["emitted"]],
    }


def tokens_without_end(record: Record, ends: set[int]) -> int:
    """New tokens up to the cap, without the end-of-text token."""
    ids = record["token_ids"][: record["max_new_tokens"]]
    return len(ids) - (record["finish"] == "eos" and ids[-1:] != [] and ids[-1] in ends)


def spec_bench_speedup(
    method_answers: Sequence[Mapping[str, Any]],
    baseline_answers: Sequence[Mapping[str, Any]],
    tokenizer: Callable[[str], Any],
) -> dict[str, dict[str, float]]:
    """Spec-Bench's numbers by task, by its own formula with its own bias.

    A question's speed is tokens over seconds, summed over its turns. The method's tokens are those it reports, the
    baseline's those of its re-tokenised text less one for a BOS, whether the tokenizer adds one or not. A task's speed
    is the mean over its questions, its speed-up the ratio of the two means.

    Args:
        method_answers, baseline_answers: as in the answer files; only the first choice counts.
        tokenizer: the target's; called with a text it returns something with `input_ids`.

    Returns:
        For each task that has questions in both: `speedup`, `tokens_per_second`, `baseline_tokens_per_second`,
        `mean_accepted_tokens` (over verifications; 0 without any) and `questions`.
    """
    found = {}
    for task in TASKS:
        method = [answer["choices"][0] for answer in method_answers if _is_of(answer, task)]
        baseline = [answer["choices"][0] for answer in baseline_answers if _is_of(answer, task)]
        if not method or not baseline:
            continue
        speed = _mean([sum(choice["new_tokens"]) / sum(choice["wall_time"]) for choice in method])
        base = _mean([_retokenised(choice, tokenizer) / sum(choice["wall_time"]) for choice in baseline])
        found[task] = {
            "speedup": speed / base if base else float("nan"),
            "tokens_per_second": speed,
            "baseline_tokens_per_second": base,
            "mean_accepted_tokens": _mean([count for choice in method for count in choice["accept_lengths"]]),
            "questions": len(method),
        }
    return found


def _is_of(answer: Mapping[str, Any], task: str) -> bool:
    category = answer["category"]
    return task == OVERALL or category == task or (task == MT_BENCH and category in MT_BENCH_CATEGORIES)


def _retokenised(choice: Mapping[str, Any], tokenizer: Callable[[str], Any]) -> int:
    return sum(len(tokenizer(text).input_ids) - 1 for text in choice["turns"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
