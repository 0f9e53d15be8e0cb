"""Thompson sampling: draft as deep as would be best if one draw from what is believed of acceptance were true.

Each depth's acceptance has a Beta posterior, from a uniform prior and the counts of past steps. In every step one rate
is drawn for each depth, and the number of levels is the one of most expected tokens by cost,

    k = argmax (1 + a_1 + a_1 a_2 + ... + a_1 ... a_k) / (1 + draft_cost * k),    a_d ~ Beta(1 + hits_d, 1 + misses_d)

so that depths about which little is known are tried now and then. The draft length as a bandit: BanditSpec, arXiv
2505.15141, there by confidence bounds; the rule is Thompson's of 1933. It draws from a generator of its own.
"""

from __future__ import annotations

import random

from specdec.errors import UnknownDrafter
from specdec.lengths.policy import LengthPolicy, Step
from specdec.lengths.survival import AcceptanceByDepth, expected_tokens


class ThompsonLength(LengthPolicy):
    """One draw and one length for all rows of a step.

    Args:
        draft_cost: seconds of one drafted level, over those of one verification.
        memory: trials of a depth after which its counts are halved.
        seed: of its generator.
        carry_over: keep the counts from one generation to the next, and go on with the generator.

    Raises:
        UnknownDrafter: a negative cost, or no memory.
    """

    def __init__(self, *, draft_cost: float = 0.1, memory: int = 200, seed: int = 0, carry_over: bool = False) -> None:
        super().__init__(carry_over=carry_over)
        if draft_cost < 0 or memory < 1:
            raise UnknownDrafter(
                f"length=thompson takes draft_cost >= 0 and memory >= 1, got draft_cost={draft_cost}, memory={memory}"
            )
        self.draft_cost, self.memory, self.seed = draft_cost, memory, seed
        self.forget()

    def forget(self) -> None:
        """Uniform beliefs, and the generator at its seed."""
        self.acceptance = AcceptanceByDepth(self.memory)
        self._random = random.Random(self.seed)

    def limits(self, rows: int, most: int) -> list[int]:
        """By a fresh draw; 0 where even the first level does not seem to pay."""
        believed = [self.acceptance.at(level) for level in range(most)]
        rates = [self._random.betavariate(1 + hits, 1 + misses) for hits, misses in believed]
        values = [tokens / (1 + self.draft_cost * k) for k, tokens in enumerate(expected_tokens(rates))]
        return [values.index(max(values))] * rows

    def observe(self, step: Step) -> None:
        """Every row counts."""
        for row in step.rows:
            if row is not None:
                self.acceptance.learn(row)
