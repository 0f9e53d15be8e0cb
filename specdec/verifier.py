"""The verifier: owns the target's cache, scores a whole tree in one forward, commits what was accepted."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from specdec.block_mask import BLOCK
from specdec.cache import KVCache
from specdec.column_order import ColumnOrder
from specdec.context import Context
from specdec.packed import is_packed
from specdec.target import FLEX, Target, TargetOutput
from specdec.tree import TokenTree

ORDERED_FROM = 2 * BLOCK
"""Trees of up to so many nodes have no empty block that another order would not have (docs/decisions.md)."""


class Verifier:
    """Scores trees with the target for B rows at once.

    Args:
        target: the adapted model.
        taps: hidden states that the drafter wants, by `hidden_states` index.
        capacity: cache columns to allocate up front (prompt, new tokens and one tree).
        park: keep the cache of finished rows aside, for `whole_cache`.
    """

    def __init__(self, target: Target, taps: tuple[int, ...] = (), capacity: int = 0, *, park: bool = False) -> None:
        self.target = target
        self.taps = taps
        self.context = Context(target, capacity)
        self._capacity = capacity
        self._park = park
        self._avoids_narrow = (
            target.device.type == "cpu" and target.dtype == torch.float32 and not is_packed(target.model)
        )
        self._block_sparse = target.attention == FLEX
        self._order: ColumnOrder | None = None
        self._rows: list[int] = []
        self._parked: dict[int, KVCache] = {}

    def prefill(
        self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> TargetOutput:
        """Run the prompt the way plain `generate` does and keep it in our cache.

        Args:
            input_ids: [B, S], left-padded.
            generation_config: as prepared by `generate`.
            model_kwargs: as prepared by `generate`: attention_mask (None without padding), position_ids,
                possibly a filled past_key_values and inputs of the first forward only.

        Returns:
            logits [B, 1, V] of the last position, and the taps of every position that ran.
        """
        kwargs = dict(model_kwargs)
        past: Cache | None = kwargs.pop("past_key_values", None)
        past_length = past.get_seq_length() if past is not None else 0
        if past is not None and past_length:
            self.context.cache = KVCache.copy_of(
                past, self.target.num_layers, self._capacity, whole_buffers=self.context.cache.whole_buffers
            )
        kwargs["past_key_values"] = self.context.cache
        inputs = cast(Any, self.target.model).prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=_uncached_length(input_ids, past_length, generation_config, kwargs),
            is_first_iteration=True,
            **kwargs,
        )
        output = self.target.call(self.taps, **inputs)
        padding_mask = model_kwargs.get("attention_mask")
        length = self.context.cache.get_seq_length()
        self.context.begin(_padding_counts(padding_mask, input_ids.shape[0]), length)
        self._rows = list(range(input_ids.shape[0]))
        return TargetOutput(output.logits[:, -1:], output.taps)

    def score(self, tree: TokenTree) -> TargetOutput:
        """Logits [B, N, V] and taps of every node; the cache now holds the whole tree until `commit`.

        N may be larger than the tree's: at widths that are slow here, padding nodes are appended.
        """
        tree = tree.padded_to(self._good_width(tree.num_nodes))
        self._order = None
        if tree.resume is not None:
            return self.context.finish(tree.resume.layer, tree.resume.hidden, tree.tokens, tree.shapes, taps=self.taps)
        if self._block_sparse and tree.num_nodes > ORDERED_FROM and not tree.is_chain:
            self._order = ColumnOrder(tree)
            tree = self._order.tree
        output = self.context.run(tree.tokens, tree.depths(), tree.shapes, taps=self.taps)
        return output if self._order is None else self._order.by_node(output)

    def _good_width(self, num_nodes: int) -> int:
        """Nodes per row to run. On a CPU the default fp32 product takes two and three rows one by one, and
        four in the time of two (docs/benchmarks); packed weights have no such cliff. Compiled attention takes one
        query for a case of its own, and is compiled once more for it.
        """
        if self._block_sparse:
            return max(num_nodes, 2)
        batch_size = self.context.batch_size
        if self._avoids_narrow and 1 < batch_size * num_nodes < 4:
            return -(-4 // batch_size)
        return num_nodes

    def commit(self, paths: list[list[int]]) -> None:
        """Keep root and path of each row, drop the tree's other columns."""
        nodes = [[0, *path] for path in paths]
        self.context.keep(nodes if self._order is None else self._order.columns(nodes))

    def select(self, rows: list[int]) -> None:
        """Keep only these rows; finished ones stop costing target work."""
        if self._park:
            for index, row in enumerate(self._rows):
                if index not in rows:
                    self._parked[row] = self.context.cache.row(index, self.context.lengths[index])
        self._rows = [self._rows[index] for index in rows]
        self.context.select(rows)

    def whole_cache(self) -> KVCache:
        """The cache of all rows of the generation; columns beyond a shorter row's end are zero."""
        if not self._parked:
            return self.context.cache
        rows = dict(self._parked)
        for index, row in enumerate(self._rows):
            rows[row] = self.context.cache.row(index, self.context.lengths[index])
        return KVCache.of_rows([rows[row] for row in sorted(rows)])


def _uncached_length(
    input_ids: Tensor, past_length: int, generation_config: GenerationConfig, kwargs: dict[str, Any]
) -> int | None:
    """How many trailing prompt tokens a filled cache lacks; None when `input_ids` are just those.

    The rule is transformers' own: ids as long as the mask are the whole sequence, shorter ones the rest.
    """
    if kwargs.get("inputs_embeds") is not None:
        return kwargs["inputs_embeds"].shape[1] - past_length
    mask = kwargs.get("attention_mask")
    mask_length = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", -1)
    return input_ids.shape[1] - past_length if mask_length == input_ids.shape[1] else None


def _padding_counts(padding_mask: Tensor | None, batch_size: int) -> list[int]:
    """Left-padding columns of each row."""
    if padding_mask is None:
        return [0] * batch_size
    return (padding_mask != 0).to(torch.uint8).argmax(-1).tolist()
