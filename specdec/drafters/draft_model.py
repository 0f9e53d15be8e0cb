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
from specdec.grow.fixed import FixedGrowth
from specdec.grow.levels import Children
from specdec.grow.named import growth_named
from specdec.grow.policy import Columns, Frontier, Grown, GrowthPolicy
from specdec.grow.shape import Shape
from specdec.lean import lean
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Target
from specdec.tree import NO_NODE, TokenTree
from specdec.vocabulary import fit_logits


class DraftModelDrafter:
    """Proposes with a causal language model that shares the target's vocabulary.

    Its forwards run in inference mode, and lean where the model allows it (see `lean`): small models are mostly
    dispatch. Its tensors never reach the caller.

    Args:
        target: the draft model's adapter, probed.
        vocab_size: V of the target whose text is drafted, where it is not the draft model's own.
        depth: levels of the tree.
        budget: proposed nodes; None for a chain where the shape is fixed, for 24 elsewhere.
        children: "chosen" (top-k; with a seed the output equals plain sampling) or "drawn" (without
            replacement; more acceptance at high temperature).
        min_confidence: go one level deeper only while some path has this draft probability; 0 always grows
            the whole shape.
        grow: how the tree takes its shape, a word of `specdec.grow.named`; or a policy of your own, which overrides
            all options here.
        width: most children of a node.
        threshold: when `opt-tree`, `dyspec` and `calibrated` stop.
        table: JSON file with what was measured, see `specdec.grow.named`.
        shape: a fixed shape, in place of depth, budget and the like.
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
        grow: str | GrowthPolicy = "fixed",
        width: int | None = None,
        threshold: float | None = None,
        table: str | None = None,
        shape: Shape | None = None,
    ) -> None:
        self.model = target
        self.vocab_size = target.vocab_size if vocab_size is None else vocab_size
        self.policy: GrowthPolicy
        if isinstance(grow, str):
            self.policy = growth_named(
                grow, depth=depth, budget=budget, width=width, threshold=threshold, table=table, children=children,
                min_confidence=min_confidence,
            )  # fmt: skip
        else:
            self.policy = grow
        if shape is not None:
            self.policy = FixedGrowth(shape, cast(Children, children), min_confidence)
        if target.form == "chain" and not self.policy.is_chain:
            raise UnknownDrafter("this draft model can only draft chains; leave out budget and grow, or say width=1")
        self._pending: list[list[int]] = []
        self.runner = lean(target)
        self._context = Context(self.runner)
        self._grown: Grown | None = None
        self._columns = Columns(0)

    def reset(self, batch_size: int, context: Context) -> None:
        """Begin with an empty cache."""
        self._context = Context(self.runner)
        self._pending = [[] for _ in range(batch_size)]
        self._grown = None

    @torch.inference_mode()
    def observe(self, committed: Committed) -> None:
        """Keep the cache columns of accepted nodes; the rest waits for the next proposal."""
        if committed.tree is not None and committed.nodes is not None:
            self.policy.observe(committed.tree, committed.nodes)
        if self._grown is None:
            for pending, tokens in zip(self._pending, committed.tokens, strict=True):
                pending.extend(tokens)
            return
        kept = []
        for row, tokens in enumerate(committed.tokens):
            columns = self._columns_of(row, tokens[1:])  # the root is committed here since `propose`
            kept.append([column - 1 for column in columns])
            self._pending[row] = tokens[1 + len(columns) :]
        self._context.keep(kept)
        self._grown = None

    def _columns_of(self, row: int, path_tokens: list[int]) -> list[int]:
        """Columns of the longest prefix of a path that this model has run."""
        assert self._grown is not None
        tree, columns_of = self._grown.tree, self._grown.columns[row]
        shape, ids = tree.shapes[row], tree.ids[row]
        node, columns = 0, []
        for token in path_tokens:
            child = next((c for c in shape.children[node] if ids[c] == token), None)
            if child is None or columns_of[child] == NO_NODE:
                break
            node = child
            columns.append(columns_of[child])
        return columns

    @torch.inference_mode()
    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """Digest what was observed, then grow trees level by level, inside the draft model's own positions."""
        room = min(room, self._positions_left())
        if room < 1:
            return TokenTree.of_roots(root)
        after_root = self._digest(root.tolist())
        self._columns = Columns(root.shape[0])

        def expand(frontier: Frontier) -> Tensor:
            logits = self._run(frontier) if self._columns.count else after_root
            if not self._columns.count:
                self._columns.append(frontier)
            return fit_logits(logits, self.vocab_size)

        most_children = min(self.vocab_size, self.model.vocab_size)
        self._grown = self.policy.grow(root, params, chooser, room, expand, most_children)
        return self._grown.tree

    def _positions_left(self) -> int:
        """Levels that this model can draft before a row leaves the positions it was made for."""
        if self.model.max_positions is None:
            return self.policy.depth
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

    def _run(self, frontier: Frontier) -> Tensor:
        """Append these nodes to this model's tree columns; returns logits [B, F, V]."""
        # The root is committed already, so that column 1 is the first of the tree and level 1 at depth 0 here.
        sees = self._columns.append(frontier)[:, :, 1:]
        return self._context.run(frontier.tokens, (frontier.depths - 1).clamp(min=0), sees).logits

    @torch.inference_mode()
    def select(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self._pending = [self._pending[row] for row in rows]
        if self._context.batch_size:
            self._context.select(rows)
