"""Hidden states of committed tokens that a draft head has been shown and has not digested yet.

Heads with a past of their own take the target's taps at their next proposal, however many steps went by without one.
Taps come by prompt column or by tree node; here they become runs of each row's own tokens.

Dimensions: B rows, Q columns, T taps, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed


@dataclass(frozen=True)
class TapRun:
    """States of tokens that follow each other in their rows.

    Attributes:
        states: [B, Q, T * D], the taps side by side.
        columns: per row, the columns of its tokens, in order; the others hold nothing of that row.
    """

    states: Tensor
    columns: list[list[int]]

    def positions(self, ends: list[int]) -> Tensor:
        """[B, Q] on the host: logical positions of the columns when row b's first one is at `ends[b]`; else 0."""
        positions = torch.zeros(self.states.shape[:2], dtype=torch.long)
        for row, (columns, end) in enumerate(zip(self.columns, ends, strict=True)):
            positions[row, columns] = torch.arange(end, end + len(columns))
        return positions


class PendingTaps:
    """A queue of what was observed.

    Args:
        taps: hidden states by index, in the order in which they are put side by side.
    """

    def __init__(self, taps: tuple[int, ...]) -> None:
        self.taps = taps
        self._runs: list[TapRun] = []
        self._lengths: list[int] = []

    def reset(self, context: Context) -> None:
        """Begin a generation; `context` is the target's, which holds the prompt."""
        self._runs = []
        self._lengths = [length - start for length, start in zip(context.lengths, context.starts, strict=True)]

    def observe(self, committed: Committed, skip: list[int] | None = None) -> list[int] | None:
        """Queue the taps of tokens that are now final.

        Args:
            committed: prompt or tree.
            skip: of a tree, each row's number of first tokens that the head has digested already.

        Returns:
            for the prompt, each row's number of tokens before the first tap: more than 0 only where the caller's
            cache held them. None for a tree.
        """
        if committed.nodes is None:
            return self._observe_prompt(committed)
        nodes = [row[count:] for row, count in zip(committed.nodes, skip or [0] * len(committed.nodes), strict=True)]
        width = max(map(len, nodes))
        if width:
            taps = self._taps_of(committed)
            index = torch.tensor([[*row, *[0] * (width - len(row))] for row in nodes], device=taps[0].device)
            states = torch.cat([tap.gather(1, index[:, :, None].expand(-1, -1, tap.shape[2])) for tap in taps], -1)
            self._runs.append(TapRun(states, [list(range(len(row))) for row in nodes]))
        return None

    def _observe_prompt(self, committed: Committed) -> list[int]:
        """Left-padded columns; a row's tokens are the last ones."""
        states = torch.cat(self._taps_of(committed), -1)
        width = states.shape[1]
        counts = [min(len(tokens), width) for tokens in committed.tokens]
        self._runs.append(TapRun(states, [list(range(width - count, width)) for count in counts]))
        return [length - count for length, count in zip(self._lengths, counts, strict=True)]

    def _taps_of(self, committed: Committed) -> list[Tensor]:
        """The taps on one device; a target may be spread over several."""
        taps = [committed.taps[tap] for tap in self.taps]
        return [tap.to(taps[0].device) for tap in taps]

    def take(self) -> Iterator[TapRun]:
        """Everything that waits, oldest first; it waits no longer."""
        while self._runs:
            yield self._runs.pop(0)

    def select(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self._runs = [TapRun(run.states[rows], [run.columns[row] for row in rows]) for run in self._runs]
