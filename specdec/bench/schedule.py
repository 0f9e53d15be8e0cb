"""The order of a run: every method on every prompt, methods in random order within each prompt.

A pure function of questions, methods and seed, so that a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from specdec.bench.question import Question


@dataclass(frozen=True)
class Unit:
    """One generation: one method on one turn of a batch of questions.

    Attributes:
        sequence: its place in the order.
        method: name.
        batch: number of the batch; the same questions for every method, turn and repeat.
        questions: those of the batch that have this turn.
        turn, repeat: from 0.
    """

    sequence: int
    method: str
    batch: int
    questions: tuple[Question, ...]
    turn: int
    repeat: int


def schedule(
    questions: Sequence[Question], methods: Sequence[str], *, repeats: int, batch_size: int, seed: int
) -> list[Unit]:
    """All generations in order: repeats outside, then batches, turns, and methods shuffled anew for each turn."""
    chance = random.Random(f"{seed} order of methods")
    groups = batches(questions, batch_size)
    units: list[Unit] = []
    for repeat in range(repeats):
        for number, group in enumerate(groups):
            for turn in range(max(len(question.turns) for question in group)):
                rows = tuple(question for question in group if len(question.turns) > turn)
                for method in chance.sample(list(methods), len(methods)):
                    units.append(Unit(len(units), method, number, rows, turn, repeat))
    return units


def batches(questions: Sequence[Question], batch_size: int) -> list[tuple[Question, ...]]:
    """The questions in groups of one report column; the last group of a column may be smaller."""
    columns: dict[str, list[Question]] = {}
    for question in questions:
        columns.setdefault(question.column, []).append(question)
    if batch_size == 1:
        return [(question,) for question in questions]
    return [
        tuple(group[start : start + batch_size])
        for group in columns.values()
        for start in range(0, len(group), batch_size)
    ]


def seed_of(seed: int, unit: Unit) -> int:
    """Torch's seed for a unit: the same for every method, another one for every batch, turn and repeat."""
    text = f"{seed} {unit.questions[0].id} {unit.turn} {unit.repeat}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
