"""Acceptance by depth, from the latest steps."""

from __future__ import annotations

from specdec.lengths.policy import Row


class AcceptanceByDepth:
    """Trials and hits of each depth: a level counts as tried when its parent was accepted and had children.

    Over rows of different acceptance the product of the rates is still the share of trees that reach a depth.

    Args:
        memory: trials of a depth after which its counts are halved, so that the text's changes show.
    """

    def __init__(self, memory: float = 200.0) -> None:
        self.memory = memory
        self.hits: list[float] = []
        self.misses: list[float] = []

    def learn(self, row: Row) -> None:
        """Count one row of one step."""
        missing = row.tried - len(self.hits)
        self.hits += [0.0] * missing
        self.misses += [0.0] * missing
        for level in range(row.tried):
            if level < row.accepted:
                self.hits[level] += 1
            else:
                self.misses[level] += 1
            if self.hits[level] + self.misses[level] > self.memory:
                self.hits[level] /= 2
                self.misses[level] /= 2

    def at(self, level: int) -> tuple[float, float]:
        """Hits and misses of a level, 0 for the first."""
        return (self.hits[level], self.misses[level]) if level < len(self.hits) else (0.0, 0.0)

    def rate(self, level: int, belief: float = 4.0) -> float:
        """Expected acceptance; `belief` trials are taken to be like those of the level above, of the first like 0.7."""
        rate = 0.7
        for shallower in range(level + 1):
            hits, misses = self.at(shallower)
            rate = (hits + belief * rate) / (hits + misses + belief)
        return rate


def expected_tokens(rates: list[float]) -> list[float]:
    """Tokens of a step that drafts 0, 1, ... levels with these rates of acceptance: 1 + a_1 + a_1 a_2 + ..."""
    expected, reach = [1.0], 1.0
    for rate in rates:
        reach *= rate
        expected.append(expected[-1] + reach)
    return expected
