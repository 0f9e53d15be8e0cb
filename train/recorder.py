"""Takes down what verification computed while it decodes, one passage for each row of a generation.

Nothing is computed twice and nothing waits for the device: laws are cut to their top tokens where they are and fetched
when the row ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.drafter import Committed
from specdec.train.passage import Passage
from specdec.train.stored_laws import StoredLaws


@dataclass
class _Row:
    """A row that is still running; invariant: len(ids) = start + number of laws."""

    ids: list[int]
    first_position: int
    start: int
    taps: dict[int, list[Tensor]]
    laws: list[StoredLaws] = field(default_factory=list)
    rejected: list[bool] = field(default_factory=list)


class Recorder:
    """Observes as a drafter does and hands out passages.

    Args:
        taps: hidden states to keep, by index; () for a draft model.
        top_k: tokens kept of each law; None for all.
        row_length: most tokens of a passage. A longer text becomes several, each with the text before it as context.
    """

    def __init__(self, taps: tuple[int, ...], top_k: int | None, row_length: int) -> None:
        self.taps, self.top_k, self.row_length = taps, top_k, row_length
        self._rows: list[_Row] = []
        self._ends: list[int] = []
        self._topic: str | None = None

    def begin(self, ends: list[int], topic: str | None = None) -> None:
        """A generation begins; row b's prompt ends before position `ends[b]`."""
        self._rows, self._ends, self._topic = [], ends, topic

    @torch.inference_mode(False)
    @torch.no_grad()
    def observe(self, committed: Committed) -> None:
        """Keep ids, taps and laws of committed tokens. Outside of inference mode, since gradients pass them later."""
        if committed.nodes is None or committed.tree is None or committed.logits is None:
            self._rows = [self._prompt(row, tokens, committed) for row, tokens in enumerate(committed.tokens)]
            return
        if not self._rows:
            return  # closed in the middle of a generation
        at_rows = [row for row, nodes in enumerate(committed.nodes) for _ in nodes]
        at_nodes = [node for nodes in committed.nodes for node in nodes]
        laws = StoredLaws.of(committed.logits[at_rows, at_nodes], self.top_k)
        done = 0
        for number, (row, nodes) in enumerate(zip(self._rows, committed.nodes, strict=True)):
            row.ids += committed.tokens[number]
            row.laws.append(laws.select(slice(done, done + len(nodes))))
            done += len(nodes)
            children = committed.tree.shapes[number].children[nodes[-1]]
            row.rejected += [False] * (len(nodes) - 1) + [bool(children)]
            for tap in self.taps:
                row.taps[tap].append(committed.taps[tap][number, nodes])

    def _prompt(self, row: int, tokens: list[int], committed: Committed) -> _Row:
        """The end of a prompt: as much as a passage can hold, and not more than there are taps of."""
        count = min(len(tokens), self.row_length, *(committed.taps[tap].shape[1] for tap in self.taps))
        taps = {tap: [committed.taps[tap][row, committed.taps[tap].shape[1] - count :].clone()] for tap in self.taps}
        return _Row(tokens[len(tokens) - count :], self._ends[row] - count, count, taps)

    def select(self, rows: list[int]) -> list[Passage]:
        """Keep only these rows; returns the passages of the others."""
        if not self._rows:
            return []
        ended = [row for number, row in enumerate(self._rows) if number not in rows]
        self._rows = [self._rows[row] for row in rows]
        return self._passages(ended)

    def close(self) -> list[Passage]:
        """The generation is over; returns the passages of all rows.

        What is still to come of a generation that goes on is not taken down.
        """
        return self.select([])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _passages(self, rows: list[_Row]) -> list[Passage]:
        return [passage for row in rows if row.laws for passage in self._cut(row)]

    def _cut(self, row: _Row) -> list[Passage]:
        """One passage, or several with half of their length as context."""
        laws = StoredLaws.joined(row.laws).to("cpu")
        # What the last law is of was emitted but never came back as a root. No one reads it but as the token to be
        # predicted, and that by its law, so the most probable one stands in.
        ids = torch.tensor([*row.ids, laws.best(-1)], dtype=torch.int32)
        taps = {tap: torch.cat(parts).cpu() for tap, parts in row.taps.items()}
        rejected = torch.tensor(row.rejected)
        step = len(laws) if len(ids) <= self.row_length else self.row_length // 2
        passages = []
        for first in range(0, len(laws), step):
            last = min(first + step, len(laws))
            end = row.start + last + 1
            begin = max(end - self.row_length, 0)
            passages.append(
                Passage(
                    ids[begin:end].clone(),
                    row.first_position + begin,
                    row.start + first - begin,
                    laws.select(slice(first, last)).copy(),
                    rejected[first:last].clone(),
                    {tap: states[begin : end - 1].clone() for tap, states in taps.items()},
                    self._topic,
                )
            )
        return passages
