"""A separate, smaller model proposes chains or trees.

Leviathan et al. (arXiv 2211.17192), Chen et al. (2302.01318); trees as in SpecInfer (2305.09781) and
Sequoia (2402.12374). Rows of a batch advance unequally here as in the target.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed
from specdec.errors import UnknownDrafter
from specdec.grow.levels import Children, grow_levels
from specdec.grow.shape import Shape, best_shape
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Target
from specdec.tree import TokenTree
from specdec.vocabulary import fit_logits


class DraftModelDrafter:
    """Proposes with a causal language model that shares the target's vocabulary.

    Its forwards run in inference mode, an eighth faster for small models; its tensors never reach the caller.

    Args:
        target: the draft model's adapter, probed.
        vocab_size: V of the target whose text is drafted, where it is not the draft model's own.
        depth: levels of the tree.
        budget: proposed nodes; at most `depth` for a chain.
        children: "chosen" (top-k; with a seed the output equals plain sampling) or "drawn" (without
            replacement; more acceptance at high temperature).
        min_confidence: go one level deeper only while some path has this draft probability; 0 always grows
            the whole shape.
        shape: overrides depth and budget.
    """

    taps: tuple[int, ...] = ()

    def __init__(
        self,
        target: Target,
        *,
        vocab_size: int | None = None,
        depth: int = 4,
        budget: int | None = None,
        children: str = "chosen",
        min_confidence: float = 0.0,
        shape: Shape | None = None,
    ) -> None:
        if children not in ("chosen", "drawn"):
            raise UnknownDrafter(f'children is "chosen" or "drawn", got {children!r}')
        self.model = target
        self.vocab_size = target.vocab_size if vocab_size is None else vocab_size
        if not 0 <= min_confidence < 1:
            raise UnknownDrafter(f"min_confidence is at least 0 and below 1, got {min_confidence}")
        self.children: Children = cast(Children, children)
        self.min_confidence = min_confidence
        self.shape = shape or best_shape(depth if budget is None else budget, depth)
        if target.form == "chain" and not self.shape.topology.is_chain:
            raise UnknownDrafter("this draft model can only draft chains; leave out budget")
        self._pending: list[list[int]] = []
        self._context = Context(target)
        self._tree: TokenTree | None = None
        self._columns: dict[int, int] = {}

    def reset(self, batch_size: int, context: Context) -> None:
        """Begin with an empty cache."""
        self._context = Context(self.model)
        self._pending = [[] for _ in range(batch_size)]
        self._tree = None

    @torch.inference_mode()
    def observe(self, committed: Committed) -> None:
        """Keep the cache columns of accepted nodes; the rest waits for the next proposal."""
        if self._tree is None:
            for pending, tokens in zip(self._pending, committed.tokens, strict=True):
                pending.extend(tokens)
            return
        kept = []
        for row, tokens in enumerate(committed.tokens):
            columns = self._columns_of(row, tokens[1:])  # the root is committed here since `propose`
            kept.append(columns)
            self._pending[row] = tokens[1 + len(columns) :]
        self._context.keep(kept)
        self._tree = None

    def _columns_of(self, row: int, path_tokens: list[int]) -> list[int]:
        """Tree columns of the longest prefix of a path that this model has run."""
        assert self._tree is not None
        shape, ids = self._tree.shapes[row], self._tree.tokens[row].tolist()
        node, columns = 0, []
        for token in path_tokens:
            child = next((c for c in shape.children[node] if ids[c] == token), None)
            if child is None or child not in self._columns:
                break
            node = child
            columns.append(self._columns[child])
        return columns

    @torch.inference_mode()
    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """Digest what was observed, then grow the shape level by level, inside the draft model's own positions."""
        room = min(room, self._positions_left())
        if room < 1:
            return TokenTree.of_roots(root)
        shape = self.shape.up_to(room, min(self.vocab_size, self.model.vocab_size))
        first = self._digest(root.tolist())
        self._columns = {}

        def expand(nodes: list[int], tokens: Tensor) -> Tensor:
            logits = first if nodes == [0] else self._run(shape, nodes, tokens)
            return fit_logits(logits, self.vocab_size)

        self._tree = grow_levels(
            shape, root, self.children, params, chooser, expand, min_confidence=self.min_confidence
        )
        return self._tree

    def _positions_left(self) -> int:
        """Levels that this model can draft before a row leaves the positions it was made for."""
        if self.model.max_positions is None:
            return self.shape.depth
        context = self._context
        spans = zip(context.lengths, context.starts, strict=True) if context.lengths else [(0, 0)] * len(self._pending)
        texts = [n - start + len(pending) for (n, start), pending in zip(spans, self._pending, strict=True)]
        return self.model.max_positions - max(texts)  # the root takes a position, the last level takes none

    def _digest(self, roots: list[int]) -> Tensor:
        """Run and commit pending tokens and root; returns logits [B, 1, V] after the root."""
        last = self.model.vocab_size - 1  # a wider target may emit ids that this model lacks
        rows = [[min(t, last) for t in (*p, root)] for p, root in zip(self._pending, roots, strict=True)]
        self._pending = [[] for _ in rows]
        if not self._context.batch_size:
            return self._context.prefill(rows).logits
        counts = [len(row) for row in rows]
        width = max(counts)
        padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        if min(counts) == width:
            return self._context.extend(padded, counts, keep_logits=1).logits
        logits = self._context.extend(padded, counts).logits
        return logits[range(len(counts)), [count - 1 for count in counts]][:, None]

    def _run(self, shape: Shape, nodes: list[int], tokens: Tensor) -> Tensor:
        """Append these nodes to this model's tree columns; returns logits [B, F, V]."""
        start = self._context.tree_width
        self._columns.update({node: start + i for i, node in enumerate(nodes)})
        # The root is committed already, so the tree's first level is at depth 0 here.
        depths = torch.tensor([[shape.topology.depths[node] - 1 for node in nodes]])
        rows = tokens.shape[0]
        sees = shape.topology.ancestors[nodes][:, list(self._columns)]
        return self._context.run(tokens[:, nodes], depths.expand(rows, -1), sees.expand(rows, -1, -1)).logits

    @torch.inference_mode()
    def select(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self._pending = [self._pending[row] for row in rows]
        if self._context.batch_size:
            self._context.select(rows)
