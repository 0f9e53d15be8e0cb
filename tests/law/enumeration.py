"""All decision paths of an algorithm with their exact probabilities, and laws as dictionaries.

Every random decision of drafting and verification goes through a `Chooser`. The one here replays the algorithm
once for each path through its decisions, so that the law of the very code that runs is summed, not sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from specdec.sampling import Chooser

Law = dict[tuple[int, ...], float]
"""Probability of each token sequence."""

Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)


class EnumeratingChooser(Chooser):
    """Takes the decisions of a script, and beyond its end the first possible option of each decision."""

    def __init__(self, script: list[int]) -> None:
        super().__init__()
        self.probability = 1.0
        self._script = script
        self._taken: list[int] = []
        self._alternatives: list[list[int]] = []

    def accept(self, probability: Tensor) -> Tensor:
        answers = [bool(self._decide([1.0 - p, p])) for p in probability.double().flatten().clamp(max=1.0).tolist()]
        return torch.tensor(answers, dtype=torch.bool).reshape(probability.shape)

    def draw(self, p: Tensor) -> Tensor:
        return torch.tensor([self._decide(row) for row in p.double().tolist()])

    def draw_without_replacement(self, log_q: Tensor, count: int) -> Tensor:
        rows = log_q.double().reshape(-1, log_q.shape[-1]).tolist()
        drawn = [self._draw_successively(row, min(count, len(row))) for row in rows]
        return torch.tensor(drawn).reshape(*log_q.shape[:-1], -1)

    def _draw_successively(self, log_law: list[float], count: int) -> list[int]:
        """Ids in draw order; where fewer tokens have mass the surplus ids are arbitrary, as in the real chooser."""
        remaining, drawn = list(log_law), []
        for _ in range(count):
            highest = max(remaining)
            if highest == -math.inf:
                drawn += [token for token in range(len(log_law)) if token not in drawn][: count - len(drawn)]
                break
            drawn.append(self._decide([math.exp(value - highest) for value in remaining]))
            remaining[drawn[-1]] = -math.inf
        return drawn

    def _decide(self, weights: list[float]) -> int:
        """An option of positive weight; the law is the weights, normalised."""
        possible = [option for option, weight in enumerate(weights) if weight > 0]
        assert possible, f"a decision without any possible option: {weights}"
        at = len(self._taken)
        option = self._script[at] if at < len(self._script) else possible[0]
        self.probability *= weights[option] / math.fsum(weights)
        self._taken.append(option)
        self._alternatives.append(possible)
        return option

    def next_script(self) -> list[int] | None:
        """The script of the next path in lexicographic order; None after the last."""
        for at in reversed(range(len(self._taken))):
            later = [option for option in self._alternatives[at] if option > self._taken[at]]
            if later:
                return [*self._taken[:at], later[0]]
        return None


def every_path(algorithm: Callable[[Chooser], Result]) -> Iterator[tuple[Result, float]]:
    """What the algorithm returns on each path through its decisions, and that path's probability.

    The algorithm must take all randomness from the chooser and behave the same on every replay.
    """
    script: list[int] | None = []
    while script is not None:
        chooser = EnumeratingChooser(script)
        result = algorithm(chooser)
        yield result, chooser.probability
        script = chooser.next_script()


def law_of(algorithm: Callable[[Chooser], Key]) -> dict[Key, float]:
    """The exact law of what the algorithm returns."""
    law: dict[Key, float] = {}
    for result, probability in every_path(algorithm):
        law[result] = law.get(result, 0.0) + probability
    return law


def total_variation(one: Mapping[Any, float], other: Mapping[Any, float]) -> float:
    """Half the sum of absolute differences; also sees missing mass."""
    return 0.5 * math.fsum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in {*one, *other})


def successive_law(log_law: Tensor, count: int) -> Law:
    """The law of `count` draws in order, each from what the earlier ones left."""
    law: Law = {(): 1.0}
    for _ in range(count):
        longer: Law = {}
        for drawn, probability in law.items():
            left = log_law.double().index_fill(0, torch.tensor(drawn, dtype=torch.long), -torch.inf).softmax(-1)
            longer |= {(*drawn, token): probability * float(q) for token, q in enumerate(left) if q > 0}
        law = longer
    return law
