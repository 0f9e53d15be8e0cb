"""A model's cached past for B rows, and tree columns appended after it.

Verifier and draft model share this bookkeeping. Row b's committed columns are
`[starts[b], lengths[b])`: left padding before, dead columns after until the next commit. A tree's
columns begin at `base`, the longest row's length, for all rows alike; `keep` moves each row's kept
columns to its own end. So rows advance by different amounts without re-padding the past.

Dimensions: B sequences, S prompt length, Q query nodes, W tree columns, N nodes, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache

from specdec.additive_mask import AdditiveMask
from specdec.block_mask import BlockedMask
from specdec.cache import KVCache
from specdec.target import FLEX, Form, Mask, Target, TargetOutput
from specdec.visibility import Reach, Sees, Visibility


class Runner(Protocol):
    """What a Context asks of a model: a Target has it all, and so has a draft head with attention of its own."""

    @property
    def num_layers(self) -> int:
        """Layers that keep keys and values."""
        ...

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of additive masks."""
        ...

    @property
    def form(self) -> Form:
        """ "tree" when it takes additive 4-D masks."""
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """Layer kinds; ("full_attention",) for most."""
        ...

    @property
    def window(self) -> int | None:
        """Columns that a sliding-window layer sees."""
        ...

    @property
    def chunk(self) -> int | None:
        """Chunk length of chunked attention."""
        ...

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Mask,
        cache: Cache,
        *,
        taps: tuple[int, ...] = (),
        keep_logits: int = 0,
    ) -> TargetOutput:
        """Run on `input_ids`, ids [B, Q] or states [B, Q, D], appending Q columns to the cache."""
        ...


class Context:
    """Cache, row lengths and masks of one model.

    Args:
        target: the model; a draft head (see Runner) can do all but `prefill`, `finish` and `run(num_layers=)`.
        capacity: cache columns to allocate at once; the cache grows when they do not suffice.
    """

    def __init__(self, target: Target | Runner, capacity: int = 0) -> None:
        self.target = cast(Target, target)  # a head lacks only what it is never asked for
        self._blocked = isinstance(target, Target) and target.attention == FLEX
        self.cache = KVCache(target.num_layers, capacity, whole_buffers=self._blocked)
        self._masks: dict[str, AdditiveMask | BlockedMask] = {}
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self.position_limit: list[int] | None = None
        self._tree_depths = torch.zeros(0, 0, dtype=torch.long)

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def base(self) -> int:
        """The first tree column: the longest row's committed length."""
        return max(self.lengths, default=0)

    @property
    def tree_width(self) -> int:
        """W, tree columns appended since the last commit."""
        return self._tree_depths.shape[1]

    def begin(self, starts: list[int], length: int) -> None:
        """Declare columns [starts[b], length) of row b committed, as after a left-padded prefill."""
        self.starts, self.lengths = list(starts), [length] * len(starts)
        self._drop_tree()
        self._forget_masks()

    def prefill(self, rows: list[list[int]]) -> TargetOutput:
        """Run and commit the first tokens of an empty context, through the model's own causal masks.

        Returns logits [B, 1, V] of each row's last token.
        """
        assert not self.cache.get_seq_length(), "a context is prefilled once"
        ids, starts = left_padded(rows, self.target.device)
        column = torch.arange(ids.shape[1])
        live = column >= torch.tensor(starts)[:, None]
        positions = (column - torch.tensor(starts)[:, None]).clamp(min=0).to(ids.device)
        mask = live.long().to(ids.device) if any(starts) else None
        output = self.target.forward(ids, positions, mask, self.cache, keep_logits=1)
        self.begin(starts, ids.shape[1])
        return output

    def run(
        self,
        tokens: Tensor,
        depths: Tensor,
        sees: Sees,
        *,
        taps: tuple[int, ...] = (),
        keep_logits: int | None = 0,
        num_layers: int | None = None,
    ) -> TargetOutput:
        """Append nodes to the tree and run them.

        Args:
            tokens: [B, Q] ids of the new nodes.
            depths: [B, Q] distance from the first uncommitted position, on the host.
            sees: bool [B, Q, W + Q] on the host: which tree columns each new node sees; or, for a whole tree at once,
                the rows' topologies, whose blocks of the mask are kept.
            taps: hidden states to return.
            keep_logits: logits of the last so many nodes only; 0 for all, None for none.
            num_layers: run only so many layers from the bottom, with the model's own norm and head.
        """
        self._tree_depths = torch.cat([self._tree_depths, depths], 1)
        positions, mask = self._positions(depths), self._mask(depths, sees)
        tokens = tokens.to(self.target.device)
        if num_layers is None:
            return self.target.forward(tokens, positions, mask, self.cache, taps=taps, keep_logits=keep_logits)
        return self.target.forward_bottom(num_layers, tokens, positions, mask, self.cache, keep_logits=keep_logits)

    def finish(
        self, first_layer: int, hidden: Tensor, tokens: Tensor, sees: Sees, *, taps: tuple[int, ...] = ()
    ) -> TargetOutput:
        """Run the layers from `first_layer` on all W tree columns, whose states below are `hidden` [B, W, D]."""
        assert hidden.shape[1] == self.tree_width == tokens.shape[1], "states of every node, in column order"
        positions, mask = self._positions(self._tree_depths), self._mask(self._tree_depths, sees)
        return self.target.forward_top(first_layer, hidden, tokens, positions, mask, self.cache, taps=taps)

    def extend(self, tokens: Tensor, counts: list[int], *, keep_logits: int = 0) -> TargetOutput:
        """Append and commit `counts[b]` tokens of row b, from right-padded ids [B, Q]."""
        assert self.tree_width == 0, "commit or drop the tree first"
        width = tokens.shape[1]
        depths = torch.arange(width).expand(len(counts), -1)
        sees = torch.ones(width, width, dtype=torch.bool).tril().expand(len(counts), -1, -1)
        output = self.run(tokens, depths, sees, keep_logits=keep_logits)
        self.keep([list(range(count)) for count in counts])
        return output

    def reorder(self, columns: list[list[int]], depths: Tensor, num_layers: int) -> None:
        """Put the tree columns of the first layers in another order: row b's i-th becomes what `columns[b][i]` was.

        Columns may be left out or repeated. `depths` [B, columns] are those of the new columns.
        """
        base, width = self.base, len(columns[0])
        self.cache.reorder([[base + column for column in row] for row in columns], base, num_layers)
        assert depths.shape == (len(columns), width), "a depth for every column"
        self._tree_depths = depths

    def keep(self, nodes: list[list[int]]) -> None:
        """Commit: row b keeps its tree nodes `nodes[b]`, in path order; all other tree columns are dropped."""
        base, starts = self.base, self.lengths
        self.lengths = [length + len(row) for length, row in zip(starts, nodes, strict=True)]
        self.cache.keep([[base + node for node in row] for row in nodes], starts, self.base)
        self._drop_tree()

    def select(self, rows: list[int]) -> None:
        """Keep only these rows, in this order; copies the cache once."""
        self.starts = [self.starts[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        if self.position_limit is not None:
            self.position_limit = [self.position_limit[row] for row in rows]
        self.cache.batch_select_indices(torch.tensor(rows))
        self.cache.cut(self.base)
        self._drop_tree()
        self._forget_masks()

    def _drop_tree(self) -> None:
        self._tree_depths = torch.zeros(self.batch_size, 0, dtype=torch.long)

    def _positions(self, depths: Tensor) -> Tensor:
        """Logical positions [B, Q]: committed length, left padding not counted, plus depth."""
        ends = torch.tensor([length - start for length, start in zip(self.lengths, self.starts, strict=True)])
        positions = ends[:, None] + depths
        if self.position_limit is not None:
            # Nodes past a row's last useful position can never be emitted, but learned position
            # tables end somewhere.
            positions = positions.minimum(torch.tensor(self.position_limit)[:, None])
        return positions.to(self.target.device)

    def _mask(self, depths: Tensor, sees: Sees) -> Mask:
        """The mask in the form the target's layers eat; None when a plain decode step needs none."""
        if self.target.form == "chain":
            return self._padding_mask()
        single_step = depths.shape[1] == self.tree_width == 1
        if single_step and self.target.kinds == ("full_attention",) and self._is_rectangular and not self._blocked:
            return None
        handed_out = self.cache.columns_for(self.base + self.tree_width)
        visibility = Visibility(self.starts, self.lengths, self._tree_depths, depths, sees, handed_out)
        if not self._masks:
            self._masks = {kind: self._mask_of(kind) for kind in self.target.kinds}
        masks: dict[str, Tensor | BlockMask | None] = {kind: mask.of(visibility) for kind, mask in self._masks.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask_of(self, kind: str) -> AdditiveMask | BlockedMask:
        reach = reach_of(kind, self.target)
        if self._blocked:
            return BlockedMask(reach, self.target.device)
        return AdditiveMask(reach, self.target.dtype, self.target.device)

    @property
    def _is_rectangular(self) -> bool:
        """No row has padding or dead columns."""
        base = self.base
        return not any(self.starts) and all(length == base for length in self.lengths)

    def _padding_mask(self) -> Tensor | None:
        """2-D mask for chain-only targets, or None when nothing is padded."""
        if self._is_rectangular:
            return None
        column = torch.arange(self.base)
        live = (column >= torch.tensor(self.starts)[:, None]) & (column < torch.tensor(self.lengths)[:, None])
        return torch.cat([live, live.new_ones(self.batch_size, self.tree_width)], 1).long().to(self.target.device)

    def _forget_masks(self) -> None:
        for mask in self._masks.values():
            mask.forget()


def reach_of(kind: str, target: Target | Runner) -> Reach:
    """How far back layers of this kind attend."""
    if kind == "sliding_attention":
        assert target.window is not None
        return Reach(window=target.window)
    if kind == "chunked_attention":
        assert target.chunk is not None
        return Reach(chunk=target.chunk)
    return Reach()


def left_padded(rows: list[list[int]], device: Any) -> tuple[Tensor, list[int]]:
    """Ids [B, S] with zeros on the left, and each row's number of padding columns."""
    width = max(len(row) for row in rows)
    starts = [width - len(row) for row in rows]
    padded = [[*[0] * start, *row] for start, row in zip(starts, rows, strict=True)]
    return torch.tensor(padded, dtype=torch.long, device=device), starts
