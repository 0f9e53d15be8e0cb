"""The emitter: turns target logits into emitted tokens, one at a time, exactly as plain `generate` does.

It owns what plain `generate` owns between two forwards: the ids so far, the logits processors, the choice
of the token, the stopping criteria and the recorded scores. The acceptance rules call it lazily, for the
nodes that are really reached and once for each emitted token, so that processors and criteria with state
see the same calls in the same order as without speculation, and a seed gives the same tokens.

Rows that must be processed together (see `sampling.is_row_wise`) advance *in step*: one call for the whole
batch per token, and the slowest row's path limits all. Otherwise every row goes its own way. Rows also advance
in step where they end together: without an end-of-text criterion plain `generate` pads no row, but goes on with
all of them until the last one has met a criterion.

Dimensions: B sequences, G rows of one group, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import stopping_criteria as sc

from specdec.errors import SpecdecError
from specdec.sampling import Chooser, SamplingParams, for_row, ignores_history, is_row_wise

_ROW_WISE_CRITERIA = (sc.MaxLengthCriteria, sc.EosTokenCriteria, sc.StopStringCriteria)

UNLIMITED = 1 << 30
"""Room when no criterion limits the length."""


class Emitter:
    """Ids, processors, choice and stopping of one generation.

    Args:
        input_ids: prompt ids [B, S].
        processors: the target's logits processors, warpers included.
        criteria: stopping criteria.
        params: sampling parameters.
        pad_token: fills rows that have finished; None when there is no end-of-text criterion.
        keep_scores: record processed scores of every emitted token.
        keep_logits: record raw logits of every emitted token.
        in_step: force all rows to advance together, also when nothing requires it.
        chooser: source of the choices; by default one that draws from `params.generator`.
        dtype: of scores. Plain `generate` has float32 whatever the model's dtype; None keeps float64, which
            exact tests use.

    Raises:
        SpecdecError: rows may end early and there is no pad token to fill them with.
    """

    def __init__(
        self,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        params: SamplingParams,
        *,
        pad_token: int | None = None,
        keep_scores: bool = False,
        keep_logits: bool = False,
        in_step: bool = False,
        chooser: Chooser | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.params = params
        self.chooser = chooser or Chooser(params.generator)
        self.processors = processors
        self.pad_token = pad_token
        self._dtype = dtype
        self.prompt_length = input_ids.shape[1]
        self.batch_size = input_ids.shape[0]
        self.lengths = [self.prompt_length] * self.batch_size
        self.finished = [False] * self.batch_size
        self._stopped = [False] * self.batch_size
        self._ends_row_by_row = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        if self._ends_row_by_row and pad_token is None:
            raise SpecdecError("an end-of-text criterion needs pad_token_id, to fill the rows that end first.")
        self.one_call_per_token = not all(map(is_row_wise, processors))
        self.in_step = self.batch_size > 1 and (
            in_step or self.one_call_per_token or not all(map(self._is_row_wise_criterion, criteria))
        )
        self._processors_of = [for_row(processors, row) for row in range(self.batch_size)]
        self.scores: list[list[Tensor]] | None = [[] for _ in self.lengths] if keep_scores else None
        self.logits: list[list[Tensor]] | None = [[] for _ in self.lengths] if keep_logits else None
        columns = max(64, 2 * self.prompt_length)
        self._ids = torch.zeros(self.batch_size, columns, dtype=torch.long, device=input_ids.device)
        self._ids[:, : self.prompt_length] = input_ids
        self._last = input_ids[:, -1].tolist()
        self._read_criteria(criteria)

    def _is_row_wise_criterion(self, criterion: sc.StoppingCriteria) -> bool:
        if type(criterion) is sc.MaxLengthCriteria:  # met by all rows at one length
            return True
        known = type(criterion) in _ROW_WISE_CRITERIA or bool(getattr(criterion, "row_wise", False))
        return known and self._ends_row_by_row

    def _read_criteria(self, criteria: StoppingCriteriaList) -> None:
        """Length and end-of-text limits become integers on the host; the rest is called as it is."""
        limits = [math.ceil(c.max_length) for c in criteria if type(c) is sc.MaxLengthCriteria]
        self.max_length = min(limits, default=None)
        self.eos_tokens = {t for c in criteria if type(c) is sc.EosTokenCriteria for t in c.eos_token_id.tolist()}
        self._other_criteria = StoppingCriteriaList(
            c for c in criteria if type(c) not in (sc.MaxLengthCriteria, sc.EosTokenCriteria)
        )

    @property
    def takes_argmax(self) -> bool:
        """The choice is the argmax of raw logits: greedy without processors."""
        return not self.params.do_sample and not self.processors

    def scores_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of scores from logits of this dtype."""
        return self._dtype or (torch.float64 if dtype == torch.float64 else torch.float32)

    @property
    def processes_nodes_at_once(self) -> bool:
        """Processing needs no history, so all nodes of a tree can go through it in one call."""
        return all(map(ignores_history, self.processors))

    @property
    def running(self) -> list[int]:
        """Rows that have not finished."""
        return [row for row, finished in enumerate(self.finished) if not finished]

    def room(self) -> int:
        """The deepest tree node that can still be followed by a token, over all running rows."""
        if self.max_length is None:
            return UNLIMITED
        return max((self.max_length - self.lengths[row] - 1 for row in self.running), default=0)

    def ids(self, row: int) -> Tensor:
        """Prompt and emitted ids of a row, [T]."""
        return self._ids[row, : self.lengths[row]]

    def last_token(self, row: int) -> int:
        """The last emitted (or prompt) id of a row."""
        return self._last[row]

    def _history(self, rows: list[int]) -> Tensor:
        """Ids [G, T] of one row, or of the whole batch in step; views, no copies."""
        length = self.lengths[rows[0]]
        if len(rows) == 1:
            return self._ids[rows[0] : rows[0] + 1, :length]
        assert len(rows) == self.batch_size, "a group is one row or the whole batch"
        return self._ids[:, :length]

    def process(self, rows: list[int], logits: Tensor) -> Tensor:
        """Scores [G, V] in float32 from raw logits [G, V], given each row's ids so far; rows of equal length."""
        scores = logits.to(copy=True, dtype=self.scores_dtype(logits.dtype), device=self._ids.device)
        processors = self.processors if len(rows) == self.batch_size else self._processors_of[rows[0]]
        return apply(processors, self._history(rows), scores)

    def process_node(self, row: int, path_tokens: list[int], logits: Tensor) -> Tensor:
        """Scores [V] at a tree node, whose history is the row's ids and the node's own path. Emits nothing."""
        ids = self.ids(row)[None]
        if path_tokens:
            ids = torch.cat([ids, ids.new_tensor([path_tokens])], 1)
        scores = logits[None].to(copy=True, dtype=self.scores_dtype(logits.dtype), device=ids.device)
        return apply(self._processors_of[row], ids, scores)[0]

    def choose(self, rows: list[int], logits: Tensor) -> list[int]:
        """Process, choose and emit one token for each of `rows` from logits [G, V]."""
        scores = self.process(rows, logits)
        tokens = self.chooser.draw(scores.softmax(-1)) if self.params.do_sample else scores.argmax(-1)
        chosen = tokens.tolist()
        for index, row in enumerate(rows):
            if self.finished[row]:
                assert self.pad_token is not None
                chosen[index] = self.pad_token
        self.emit(rows, chosen, scores, logits)
        return chosen

    def emit(self, rows: list[int], tokens: list[int], scores: Tensor | None, logits: Tensor) -> None:
        """Append one token to each row and run the stopping criteria.

        `scores` [G, V] may be None for "the same as logits" (greedy without processors).
        """
        self._reserve(max(self.lengths[row] for row in rows) + 1)
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            self._ids[row, self.lengths[row]] = token
            self._last[row] = token
            self.lengths[row] += 1
            if self.logits is not None:
                self.logits[row].append(logits[index].to(copy=True, dtype=self.scores_dtype(logits.dtype)))
            if self.scores is not None:
                score = logits if scores is None else scores
                self.scores[row].append(score[index].to(copy=True, dtype=self.scores_dtype(logits.dtype)))
        self._stop(rows, tokens)

    def _stop(self, rows: list[int], tokens: list[int]) -> None:
        for row, token in zip(rows, tokens, strict=True):
            at_limit = self.max_length is not None and self.lengths[row] >= self.max_length
            if at_limit or token in self.eos_tokens:
                self._stopped[row] = True
        if self._other_criteria:
            criteria = cast(Callable[..., Tensor], self._other_criteria)
            stops = criteria(self._history(rows), self._scores_so_far(rows))
            for row, stop in zip(rows, stops.tolist(), strict=True):
                self._stopped[row] |= stop
        if not self.in_step or self._ends_row_by_row:
            self.finished = list(self._stopped)
        elif all(self._stopped):
            self.finished = [True] * self.batch_size

    def _scores_so_far(self, rows: list[int]) -> tuple[Tensor, ...] | None:
        """What plain `generate` hands to criteria: the scores of all steps, when they are kept."""
        if self.scores is None:
            return None
        return tuple(torch.stack(step) for step in zip(*(self.scores[row] for row in rows), strict=True))

    def _reserve(self, length: int) -> None:
        if length > self._ids.shape[1]:
            larger = self._ids.new_zeros(self.batch_size, 2 * length)
            larger[:, : self._ids.shape[1]] = self._ids
            self._ids = larger

    def sequences(self) -> Tensor:
        """All rows [B, longest], padded on the right with the pad token."""
        longest = max(self.lengths)
        rows = self._ids[:, :longest].clone()
        for row, length in enumerate(self.lengths):
            if length < longest:
                rows[row, length:] = 0 if self.pad_token is None else self.pad_token
        return rows


def apply(processors: LogitsProcessorList, ids: Tensor, logits: Tensor) -> Tensor:
    """Processed scores [G, V]; transformers annotates ids as a legacy tensor type, hence the cast."""
    return cast(Callable[..., Tensor], processors)(ids, logits)
