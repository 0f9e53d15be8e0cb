"""The replay buffer: passages that wait to be learned from, and older ones that keep the draft from forgetting."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Literal, get_args

from specdec.errors import BadRecipe
from specdec.train.order import derived_seed
from specdec.train.passage import Passage

Keep = Literal["newest", "reservoir"]


class ReplayBuffer:
    """Passages of at most `max_tokens` tokens together: one half for those that wait, one for those learned from.

    Where a half is full, the oldest leave; with "reservoir", of those learned from random ones, so that every passage
    that ever came (of the same length) has the same chance to be there.

    Args:
        max_tokens: bound; `nbytes` says what the passages in it take.
        keep: what stays.
        seed: of the reservoir.

    Raises:
        BadRecipe: an unknown word, or no room at all.
    """

    def __init__(self, max_tokens: int, keep: Keep = "newest", seed: int = 0) -> None:
        if keep not in get_args(Keep):
            raise BadRecipe(f"a replay buffer keeps {' or '.join(get_args(Keep))}, got {keep!r}")
        if max_tokens < 1:
            raise BadRecipe(f"a replay buffer holds at least one token, got {max_tokens}")
        self.max_tokens, self.keep, self.seed = max_tokens, keep, seed
        self.waiting: deque[Passage] = deque()
        self.learned: list[Passage] = []
        self.added = 0
        self._keys: dict[int, float] = {}

    @property
    def tokens(self) -> int:
        """Of all passages, context included."""
        return sum(map(len, self.waiting)) + sum(map(len, self.learned))

    @property
    def nbytes(self) -> int:
        """Of all passages' tensors."""
        return sum(passage.nbytes for passage in (*self.waiting, *self.learned))

    @property
    def waiting_laws(self) -> int:
        """Positions that nothing was learned from yet."""
        return sum(len(passage.laws) for passage in self.waiting)

    def add(self, passage: Passage) -> None:
        """Let a passage wait."""
        self.waiting.append(passage)
        self._keys[id(passage)] = random.Random(derived_seed(self.seed, "reservoir", self.added)).random()
        self.added += 1
        self._evict()

    def _evict(self) -> None:
        """Until both halves fit."""
        excess = sum(map(len, self.waiting)) - self.max_tokens // 2
        while excess > 0:
            excess -= self._forget(self.waiting.popleft())
        excess = sum(map(len, self.learned)) - self.max_tokens // 2
        while excess > 0:
            # Those with the largest of independent uniform keys are a uniform sample of all that ever came.
            keys = [0.0] if self.keep == "newest" else [self._keys[id(passage)] for passage in self.learned]
            excess -= self._forget(self.learned.pop(keys.index(min(keys))))

    def _forget(self, passage: Passage) -> int:
        del self._keys[id(passage)]
        return len(passage)

    def key_of(self, passage: Passage) -> float:
        """What the reservoir decides by; uniform in [0, 1)."""
        return self._keys[id(passage)]

    def put_back(self, passages: list[Passage], keys: list[float], *, waiting: int, added: int) -> None:
        """The content of another buffer, in place of this one's: the last `waiting` of these wait."""
        learned = len(passages) - waiting
        self.learned, self.waiting = passages[:learned], deque(passages[learned:])
        self._keys = {id(passage): key for passage, key in zip(passages, keys, strict=True)}
        self.added = added
        self._evict()

    def plan(self, *, steps: int, rows: int, share: float, seed: int) -> list[list[Passage]]:
        """Passages for each step of an update; those that wait count as learned from now on.

        Each waiting passage comes at least once. There are at least `steps` steps, and more when that takes more.

        Args:
            steps: at least so many.
            rows: passages in a step.
            share: of a step's rows that come from what was learned from before, where there is enough.
            seed: of the order; the same seed and buffer give the same plan.
        """
        fresh, generator = list(self.waiting), random.Random(seed)
        generator.shuffle(fresh)
        old = list(self.learned)
        replayed = min(round(rows * share), rows - 1, len(old))
        of_fresh = min(rows - replayed, len(fresh))
        self.learned += self.waiting
        self.waiting.clear()
        self._evict()
        if not fresh:
            return []
        count = max(steps, math.ceil(len(fresh) / of_fresh))
        return [
            [fresh[(step * of_fresh + row) % len(fresh)] for row in range(of_fresh)] + generator.sample(old, replayed)
            for step in range(count)
        ]
