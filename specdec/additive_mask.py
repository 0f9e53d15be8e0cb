"""The additive mask of a context's forwards, kept in a buffer and written only where something changed.

Between two steps a row gains a few committed columns, and a window moves by as many: those columns are written, and the
tree's own, whose block is built once for each topology. `whole_mask` is the plain construction that the buffer must
equal. Masks are 0 and the dtype's minimum: eager attention adds a boolean mask to the scores without a word.

Dimensions: B sequences, Q query nodes, R rows of the buffer, W tree columns, C columns, A columns of a range, N nodes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from specdec.tree import Topology, stacked
from specdec.visibility import Reach, Visibility

MOST_ROWS = 512
"""Wider forwards, such as a prompt's, get a mask of their own; a buffer as wide would stay."""
ROW_STEP = 16
COLUMN_STEP = 16
"""Strides that are multiples of this spare CUDA's memory-efficient attention a copy of the mask."""
SPARE_COLUMNS = 128


def whole_mask(visibility: Visibility, reach: Reach, dtype: torch.dtype) -> Tensor:
    """Additive [B, 1, Q, C] on the host, built anew: the reference."""
    return additive(visibility.dense(reach), dtype)[:, None]


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `visible`, the dtype's minimum elsewhere; of the same shape."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)


@lru_cache(maxsize=64)
def ancestor_block(shape: Topology, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive [N, N] of a topology on its device, kept for the topologies in use."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        return additive(shape.ancestors, dtype).to(device)


class AdditiveMask:
    """One layer kind's mask.

    Args:
        reach: how far back the layers attend.
        dtype, device: of the mask.
    """

    def __init__(self, reach: Reach, dtype: torch.dtype, device: torch.device) -> None:
        self.reach, self.dtype, self.device = reach, dtype, device
        self._buffer: Tensor | None = None  # [B, 1, R, C]; the last column takes what nobody reads
        self._starts: list[int] = []
        self._lengths: list[int] = []
        self._fringe: tuple[list[int], list[int]] = ([], [])
        # Per row, the committed columns that some depth sees and another does not.

    def forget(self) -> None:
        """Rows were replaced; begin anew."""
        self._buffer = None

    def of(self, visibility: Visibility) -> Tensor:
        """Additive [B, 1, Q, C]; a view of the buffer, good until the next call."""
        if visibility.num_queries > MOST_ROWS:
            return whole_mask(visibility, self.reach, self.dtype).to(self.device)
        if self._continues(visibility):
            self._advance(visibility)
        else:
            self._begin(visibility)
        assert self._buffer is not None
        mask = self._buffer[:, :, : visibility.num_queries, : visibility.width]
        mask[..., visibility.base :] = self._tree_block(visibility)[:, None]
        self._starts, self._lengths = list(visibility.starts), list(visibility.lengths)
        return mask

    def _continues(self, visibility: Visibility) -> bool:
        """The buffer has room, and its rows are the same ones, none of them shorter than before."""
        buffer = self._buffer
        return (
            buffer is not None
            and visibility.num_queries <= buffer.shape[2]
            and visibility.width < buffer.shape[3]
            and visibility.starts == self._starts
            and all(new >= old for new, old in zip(visibility.lengths, self._lengths, strict=True))
        )

    def _begin(self, visibility: Visibility) -> None:
        """Allocate for half as much again, and write every committed column."""
        rows = _rounded(visibility.num_queries, ROW_STEP)
        columns = _rounded(visibility.width + max(visibility.width // 2, SPARE_COLUMNS), COLUMN_STEP)
        batch = len(visibility.lengths)
        with torch.inference_mode(False):  # written to in either mode
            self._buffer = torch.empty(batch, 1, rows, columns, dtype=self.dtype, device=self.device)
        first = self._first_columns(visibility)
        self._fringe = _span(first)
        self._write([0] * batch, [visibility.base] * batch, visibility, first)

    def _advance(self, visibility: Visibility) -> None:
        """Write the columns whose visibility may have changed since the last call."""
        old_base, base = max(self._lengths), visibility.base
        self._fill(self._lengths, visibility.lengths, 0.0)
        if base > old_base:  # old tree columns beyond a shorter row's end are dead now
            dead_from = [max(old_base, length) for length in visibility.lengths]
            self._fill(dead_from, [base] * len(dead_from), torch.finfo(self.dtype).min)
        if self.reach.is_limited:
            first = self._first_columns(visibility)
            fringe = _span(first)
            begins = list(map(min, self._fringe[0], fringe[0]))
            ends = list(map(min, map(max, self._fringe[1], fringe[1]), visibility.lengths))
            self._write([max(begin, 0) for begin in begins], ends, visibility, first)
            self._fringe = fringe

    def _first_columns(self, visibility: Visibility) -> Tensor:
        """[B, R] (R = 1 for full attention): the first column that each row of the buffer sees; a row without a query
        counts as depth 0.
        """
        if not self.reach.is_limited:
            return torch.tensor(visibility.starts)[:, None]
        assert self._buffer is not None
        unused = self._buffer.shape[2] - visibility.num_queries
        return visibility.first_columns(self.reach, torch.nn.functional.pad(visibility.depths, (0, unused)))

    def _fill(self, begins: list[int], ends: list[int], value: float) -> None:
        """Columns [begins[b], ends[b]) of sequence b become `value` in every row of the buffer."""
        if begins == ends:
            return
        assert self._buffer is not None
        if _are_equal(begins) and _are_equal(ends):
            self._buffer[..., begins[0] : ends[0]] = value
            return
        columns = self._columns(begins, ends)
        self._buffer.scatter_(3, columns.expand(*self._buffer.shape[:3], columns.shape[3]), value)

    def _write(self, begins: list[int], ends: list[int], visibility: Visibility, first: Tensor) -> None:
        """Columns [begins[b], ends[b]) of sequence b, all before the tree, become what each row of the buffer sees."""
        most = max(end - begin for begin, end in zip(begins, ends, strict=True))
        if most <= 0:
            return
        assert self._buffer is not None
        columns = torch.tensor(begins)[:, None] + torch.arange(most)  # [B, A]
        live = columns < torch.tensor(visibility.lengths)[:, None]
        seen = live[:, None] & (columns[:, None] >= first[:, :, None])
        values = additive(seen, self.dtype)[:, None].to(self.device)  # [B, 1, R or 1, A]
        if _are_equal(begins) and _are_equal(ends):
            self._buffer[..., begins[0] : ends[0]] = values
            return
        shape = (*self._buffer.shape[:3], most)
        self._buffer.scatter_(3, self._columns(begins, ends).expand(shape), values.expand(shape))

    def _columns(self, begins: list[int], ends: list[int]) -> Tensor:
        """[B, 1, 1, A]: the columns of each sequence's range, filled up with the buffer's last, which nobody reads."""
        assert self._buffer is not None
        most = max(end - begin for begin, end in zip(begins, ends, strict=True))
        columns = torch.tensor(begins)[:, None] + torch.arange(max(most, 0))
        columns = torch.where(columns < torch.tensor(ends)[:, None], columns, self._buffer.shape[3] - 1)
        return columns[:, None, None].to(self.device)

    def _tree_block(self, visibility: Visibility) -> Tensor:
        """Additive [B or 1, Q, W]: who sees which tree column."""
        beyond = visibility.tree_beyond(self.reach)
        if beyond is not None:
            return additive(visibility.ancestors() & ~beyond, self.dtype).to(self.device)
        if isinstance(visibility.sees, Tensor):
            return additive(visibility.sees, self.dtype).to(self.device)
        return stacked([ancestor_block(shape, self.dtype, self.device) for shape in visibility.sees])


def _span(first: Tensor) -> tuple[list[int], list[int]]:
    """Lowest and highest entry of each row."""
    return first.amin(1).tolist(), first.amax(1).tolist()


def _are_equal(numbers: list[int]) -> bool:
    return all(number == numbers[0] for number in numbers)


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step
