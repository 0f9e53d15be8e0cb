"""Logits that nobody keeps: made some rows at a time, for the loss and once more for its backward pass.

With a vocabulary of a hundred thousand tokens they are the largest tensors of a step: of the 20 GB that four Medusa
heads on an 8B target keep for a row of 2048 tokens, 18 are logits and laws. A state has D numbers, a row of logits V.

Dimensions: M positions, D hidden size, V vocabulary, N tokens that are compared, V or fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ELEMENTS_AT_ONCE = 1 << 26
"""Of [rows, V] that are made together: 512 rows of a vocabulary of 131,072 tokens. About 20 bytes of each are alive."""


@dataclass(frozen=True)
class Logits:
    """Logits [M, N] to be made, indexed as if they were there: `logits[rows]` and `logits[:, columns]`.

    Attributes:
        states: [M, ...], what each row is made from; gradients reach them.
        make: [m, ...] -> [m, N], row by row.
        vocab_size: V, how wide a row is while it is made.
    """

    states: Tensor
    make: Callable[[Tensor], Tensor]
    vocab_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """M and V."""
        return len(self.states), self.vocab_size

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, key: Any) -> Logits:
        """The same for fewer rows, by bool [M] or indices; or for fewer tokens, by `[:, columns]`."""
        if not isinstance(key, tuple):
            return replace(self, states=self.states[key])
        rows, columns = key
        make = self.make
        return replace(self, states=self.states[rows], make=lambda states: make(states)[:, columns])

    @torch.no_grad()
    def each(self, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """What `compute` gives of the logits, [m, N] -> [m], without gradient; [M]."""
        return torch.cat([compute(self.make(self.states[rows])) for rows in self.slices()])

    def argmax(self, dim: int) -> Tensor:
        """The most probable token of each row [M]; `dim` is the last."""
        assert dim == -1
        return self.each(lambda logits: logits.argmax(-1))

    def slices(self) -> Iterator[slice]:
        """Rows that are made together; one empty slice where there are none."""
        step = max(1, ELEMENTS_AT_ONCE // self.vocab_size)
        return (slice(start, start + step) for start in range(0, max(len(self), 1), step))


def compared(
    compare: Callable[[Tensor, Tensor], tuple[Tensor, ...]], draft: Logits, target: Logits
) -> Iterator[tuple[Tensor, ...]]:
    """`compare` on rows of both, a part at a time; what happens inside is computed again in the backward pass."""

    def part(drafted: Tensor, wanted: Tensor) -> tuple[Tensor, ...]:
        return compare(draft.make(drafted), target.make(wanted))

    for rows in draft.slices():
        made = checkpoint(part, draft.states[rows], target.states[rows], use_reentrant=False, preserve_rng_state=False)
        yield cast(tuple[Tensor, ...], made)
