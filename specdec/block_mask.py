"""FlexAttention's block-sparse mask of a context's forwards.

One `mask_mod` serves every step: it reads row ends, windows and ancestors from tensors, so that the kernel compiled for
it is compiled once. Which blocks are empty, partial or full is worked out from row ends and the topology, never from a
dense mask: the cost is that of listing the blocks, a 128th of the past. What they must equal is `Visibility.dense`.

Dimensions: B sequences, Q query nodes, W tree columns, C columns handed out, N nodes, I blocks of queries, J blocks of
columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from specdec.tree import Topology, stacked
from specdec.visibility import Reach, Visibility

BLOCK = 128
"""Queries and columns of a block: FlexAttention's own default, which its kernels are tuned for."""

_NO_BACKWARD: dict[str, Any] = (
    {"compute_q_blocks": False} if "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters else {}
)
"""Lists of blocks for the backward pass are left out, where this version of torch lets us."""


@lru_cache(maxsize=64)
def ancestor_table(shape: Topology, device: torch.device) -> Tensor:
    """Bool [N, N] of a topology on its device, kept for the topologies in use."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        return shape.ancestors.to(device, copy=True)


@lru_cache(maxsize=64)
def seen_by_blocks(shape: Topology) -> Tensor:
    """Bool [I, N] on the host: which nodes any query of a block sees."""
    return _any_of_block(shape.ancestors[None], 1)[0]


class BlockedMask:
    """One layer kind's mask.

    Args:
        reach: how far back the layers attend.
        device: of the mask.
    """

    def __init__(self, reach: Reach, device: torch.device) -> None:
        self.reach, self.device = reach, device

    def forget(self) -> None:
        """Nothing is kept from step to step."""

    def of(self, visibility: Visibility) -> BlockMask:
        """The mask of [B, 1, Q, C]."""
        first = visibility.first_columns(self.reach, visibility.depths)
        beyond = visibility.tree_beyond(self.reach)
        partial, full = self._blocks(visibility, first, beyond)
        return BlockMask.from_kv_blocks(
            *self._listed(partial),
            *self._listed(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=sees_column(
                first.contiguous().to(self.device),
                torch.tensor(visibility.lengths, device=self.device),
                torch.tensor(visibility.base, device=self.device),
                self._table(visibility, beyond),
            ),
            seq_lengths=(visibility.num_queries, visibility.handed_out),
            **_NO_BACKWARD,
        )

    def _blocks(self, visibility: Visibility, first: Tensor, beyond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Bool [B, I, J] twice on the host: blocks of which something is seen, and those seen entirely.

        Committed columns of a row are an interval for each query; so its blocks follow from the ends. Blocks with tree
        columns never count as full.
        """
        begins = torch.arange(0, visibility.handed_out, BLOCK)  # [J]
        lengths = torch.tensor(visibility.lengths)[:, None, None]
        nearest, farthest = _of_block(first, torch.amax), _of_block(first, torch.amin)
        some = (begins < lengths) & (begins + BLOCK > farthest[:, :, None]) & (farthest[:, :, None] < lengths)
        full = (begins >= nearest[:, :, None]) & (begins + BLOCK <= lengths)
        if isinstance(visibility.sees, tuple) and beyond is None:
            seen = stacked([seen_by_blocks(shape) for shape in visibility.sees])
        else:
            table = visibility.ancestors()
            seen = _any_of_block(table if beyond is None else table & ~beyond, 1)
        block_of = (visibility.base + torch.arange(visibility.tree_width)) // BLOCK
        counts = torch.zeros(some.shape, dtype=torch.int32).index_add_(2, block_of, seen.int())
        return (some | (counts > 0)) & ~full, full

    def _listed(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Counts [B, 1, I] and numbers [B, 1, I, J], those that count first."""
        numbers = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        counts = blocks.sum(-1, dtype=torch.int32)
        return counts[:, None].to(self.device), numbers[:, None].to(torch.int32).to(self.device)

    def _table(self, visibility: Visibility, beyond: Tensor | None) -> Tensor:
        """Bool [B, Q, W] on the device: who sees which tree column."""
        if isinstance(visibility.sees, tuple) and beyond is None:
            return stacked([ancestor_table(shape, self.device) for shape in visibility.sees]).contiguous()
        table = visibility.ancestors()
        return (table if beyond is None else table & ~beyond).contiguous().to(self.device)


def sees_column(first: Tensor, lengths: Tensor, base: Tensor, table: Tensor) -> Callable[..., Tensor]:
    """The rule of one step, as FlexAttention calls it.

    Args:
        first: [B, Q] the first committed column that each query sees.
        lengths: [B] where each row's committed columns end.
        base: [] the first tree column.
        table: bool [B, Q, W], who sees which tree column.
    """

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, column: Tensor) -> Tensor:
        committed = (column >= first[b, q]) & (column < lengths[b])
        node = column - base
        inside = (node >= 0) & (node < table.shape[2])
        return committed | (inside & table[b, q, node.clamp(0, table.shape[2] - 1)])

    return mask_mod


def _of_block(per_query: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """[B, Q] -> [B, I]: the least or greatest of each block of queries."""
    return torch.stack([reduce(block, 1) for block in per_query.split(BLOCK, 1)], 1)


def _any_of_block(seen: Tensor, dim: int) -> Tensor:
    """Bool [B, Q, W] -> [B, I, W]: what any query of a block sees."""
    return torch.stack([block.any(dim) for block in seen.split(BLOCK, dim)], dim)
