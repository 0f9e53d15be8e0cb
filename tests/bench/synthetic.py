"""Records that look like a run's, by hand or at random."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from specdec.bench.question import SPEC_BENCH_COLUMNS
from specdec.bench.record import Record

MANIFEST: dict[str, Any] = {
    "command": ["specdec", "bench", "demo", "--drafter", "lookup"],
    "target": {"name": "demo", "dtype": "float32"},
    "questions": {"name": "synthetic", "sha256": "00"},
    "settings": {"temperature": 0.0, "max_new_tokens": 64, "repeats": 1},
    "hardware": {"cpu": "a small machine", "threads": 2},
    "versions": {"specdec": "0.1.0", "torch": "2.13.0"},
}


def record(
    method: str = "plain",
    question: str | int = 1,
    *,
    tokens: int = 4,
    total: float = 4.0,
    category: str = "qa",
    turn: int = 0,
    repeat: int = 0,
    batch: tuple[int, int, int] | None = None,
    steps: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float | None] | None = None,
    error: str | None = None,
    **fields: Any,
) -> Record:
    """One record; `batch` is (size, row, id), by default a batch of one with the question's id."""
    size, row, identity = batch or (1, 0, abs(hash(question)) % 10**9)
    unknown = dict.fromkeys(("prefill", "draft", "verify", "accept", "other", "ttft"))
    lists = dict.fromkeys(("drafted", "accepted", "tried", "draft", "verify", "accept"))
    made = {
        "method": method,
        "question_id": question,
        "category": category,
        "column": SPEC_BENCH_COLUMNS.get(category, category),
        "turn": turn,
        "repeat": repeat,
        "sequence": 0,
        "batch": {"size": size, "row": row, "id": identity},
        "prompt": {"tokens": 10, "sha256": f"{question}/{turn}", "history": "own"},
        "max_new_tokens": 64,
        "token_ids": list(range(tokens)),
        "text": "words",
        "finish": "error" if error else "length",
        "error": error,
        "seconds": {"total": total, **unknown, **(seconds or {})},
        "steps": {**lists, "emitted": [], "total": [], **(steps or {})},
        "children": None,
        "chain": True,
        "target_calls": None,
        "peak_memory_bytes": None,
        "lossy": None,
        "seed": None,
        **fields,
    }
    return cast(Record, made)


def chain_steps(drafted: Sequence[int], accepted: Sequence[int], **more: Any) -> dict[str, Any]:
    """Per-step lists of chains: one next_token a step, and a deeper child tried wherever the draft went on."""
    tried = [min(took + 1, drew) for drew, took in zip(drafted, accepted, strict=True)]
    emitted = [took + 1 for took in accepted]
    total = [1.0] * len(emitted)
    return {
        "drafted": list(drafted),
        "accepted": list(accepted),
        "emitted": emitted,
        "tried": tried,
        "total": total,
        **more,
    }


def verdict(of: Record, kind: str = "exact", **fields: Any) -> dict[str, Any]:
    """A line of exactness.jsonl."""
    return {
        "method": of["method"],
        "question_id": of["question_id"],
        "turn": of["turn"],
        "repeat": of["repeat"],
        "verdict": kind,
        "position": None,
        "gap": None,
        "reason": None,
        **fields,
    }


def write_run(
    path: Path,
    records: Sequence[Record],
    verdicts: Sequence[Mapping[str, Any]] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """A run's directory; every record that ran is exact unless verdicts are given."""
    path.mkdir(parents=True, exist_ok=True)
    judged = [verdict(entry) for entry in records if not entry["error"]] if verdicts is None else verdicts
    (path / "manifest.json").write_text(json.dumps(MANIFEST | dict(manifest or {})))
    (path / "records.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in records))
    (path / "exactness.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in judged))
    return path


def random_run(
    seed: int,
    methods: Mapping[str, tuple[float, int]],
    *,
    categories: Sequence[str] = ("qa",),
    questions: int = 10,
    repeats: int = 1,
    tokens: int = 48,
    noise: float = 0.06,
    lossy: Sequence[str] = (),
) -> list[Record]:
    """A run of a made-up machine where a target call takes 10 ms plus a little for each node.

    Every call is slower by log-normal noise of its own, by noise that its prompt shares among methods, and now and then
    by an interruption, as on a shared machine.

    Args:
        seed: of all chance.
        methods: name -> (probability that a drafted token is accepted, tokens drafted a step); (0, 0) is plain.
        categories: raw ones; each gets `questions`.
        questions: of each category.
        repeats: of everything.
        tokens: of each answer.
        noise: standard deviation of a call's log time.
        lossy: methods with a lossy rule.
    """
    chance = np.random.default_rng(seed)
    records = []
    for place, category in enumerate(categories):
        for question in range(place * questions, (place + 1) * questions):
            ease, weight = chance.uniform(0.6, 1.0), float(np.exp(chance.normal(0, 0.2)))
            for repeat in range(repeats):
                for name, (alpha, depth) in methods.items():
                    slow = weight * float(np.exp(chance.normal(0, noise))) * (1.3 if chance.random() < 0.02 else 1.0)
                    made = _random_record(chance, name, alpha * ease, depth, tokens, slow)
                    records.append(
                        record(
                            name, question, category=category, repeat=repeat, **made,
                            lossy="typical" if name in lossy else None, peak_memory_bytes=300_000_000 + depth * 10**6,
                        )
                    )  # fmt: skip
    return records


def _random_record(chance: Any, name: str, alpha: float, depth: int, tokens: int, slow: float) -> dict[str, Any]:
    drafted, accepted, left = [], [], tokens - 1
    while left > 0:
        drew = min(depth, left - 1)
        took = next((i for i in range(drew) if chance.random() > alpha * 0.97**i), drew)
        drafted.append(drew)
        accepted.append(took)
        left -= took + 1
    draft = [0.002 * slow * drew for drew in drafted]
    verify = [(0.010 + 0.0004 * drew) * slow * float(np.exp(chance.normal(0, 0.05))) for drew in drafted]
    accept, other = [0.0004 * slow] * len(drafted), 0.0003 * slow * len(drafted)
    prefill = 0.03 * slow
    whole = [sum(parts) + 0.0003 * slow for parts in zip(draft, verify, accept, strict=True)]
    total = prefill + sum(draft) + sum(verify) + sum(accept) + other
    if name == "plain":
        return {
            "tokens": tokens, "total": total, "seconds": {"ttft": prefill}, "chain": None,
            "steps": {"emitted": [1] * len(drafted), "total": whole},
        }  # fmt: skip
    seconds = {"prefill": prefill, "draft": sum(draft), "verify": sum(verify), "accept": sum(accept)}
    steps = chain_steps(drafted, accepted, draft=draft, verify=verify, accept=accept, total=whole)
    return {"tokens": tokens, "total": total, "seconds": {**seconds, "ttft": prefill, "other": other}, "steps": steps}
