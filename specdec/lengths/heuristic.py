"""transformers' schedule: two levels more after a tree that was accepted to its end, one less otherwise."""

from __future__ import annotations

from specdec.errors import UnknownDrafter
from specdec.lengths.policy import LengthPolicy, Step

MORE, LESS = 2, 1


class HeuristicLength(LengthPolicy):
    """For each row n + 2 if all drafted levels were accepted, else max(1, n - 1).

    transformers' `num_assistant_tokens_schedule="heuristic_transient"`; with `carry_over` its "heuristic". One sequence
    is decoded there; here every row has its own n, which never exceeds what the drafter can draft, so that it comes
    down as soon as a token is rejected.

    Args:
        start: n at first; transformers' `num_assistant_tokens`. 0 for all that the drafter has.
        carry_over: keep n from one generation to the next.

    Raises:
        UnknownDrafter: a negative start.
    """

    def __init__(self, *, start: int = 0, carry_over: bool = False) -> None:
        super().__init__(carry_over=carry_over)
        if start < 0:
            raise UnknownDrafter(f"length=heuristic takes start >= 0, got {start}")
        self.start = start
        self.lengths: list[int | None] = []
        self._kept: int | None = start or None
        self._most = 1

    def begin(self, batch_size: int) -> None:
        """Every row begins with the start, or with where the last generation's first row ended."""
        super().begin(batch_size)
        self.lengths = [self._kept] * batch_size

    def forget(self) -> None:
        """Back to the start."""
        self._kept = self.start or None

    def limits(self, rows: int, most: int) -> list[int]:
        """Each row's own."""
        self._most = max(self._most, most)
        return [most if length is None else min(length, most) for length in self.lengths]

    def observe(self, step: Step) -> None:
        """The schedule; a row without a proposal stays as it is."""
        for index, row in enumerate(step.rows):
            if row is None or not row.drafted:
                continue
            length = self.lengths[index]
            length = step.limit if length is None else length
            grown = min(length + MORE, self._most) if row.accepted == row.drafted else max(1, length - LESS)
            self.lengths[index] = grown
        if self.lengths:
            self._kept = self.lengths[0]

    def select(self, rows: list[int]) -> None:
        """Keep these rows' lengths."""
        self.lengths = [self.lengths[row] for row in rows]
