"""Kangaroo: the target's first layers and a small adapter draft; verification goes on above them (arXiv 2404.18911).

Every node passes the shallow layers once, into the target's own cache. The adapter, which has keys and values of its
own, turns the states of nodes with children into draft laws. Drafting stops where the adapter is unsure of its last
token, the second early exit. The paper drafts chains of the likeliest tokens; trees and drawn children are ours.

Dimensions: B rows, F nodes of a frontier, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from specdec.bottom import Bottom
from specdec.context import Context, Mask
from specdec.drafter import Committed
from specdec.errors import UnknownDrafter
from specdec.fit import require_fit
from specdec.grow.fixed import FixedGrowth
from specdec.grow.named import growth_named
from specdec.grow.policy import Columns, Frontier, Grown, GrowthPolicy
from specdec.heads.kangaroo import KangarooHead
from specdec.pending import PendingTaps
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Form, Target, TargetOutput
from specdec.tree import NO_NODE, TokenTree


class KangarooDrafter:
    """Proposes with the target's first layers and an adapter.

    Args:
        target: the probed target.
        head: the adapter, on the target's device and in its dtype.
        layer: E, layers that draft; None for the adapter's own.
        depth: levels of the tree; the paper's steps.
        confidence: go a level deeper only while the last token of some path has this draft probability; the paper's
            threshold. Fixed shapes only; 0 always grows the whole shape.
        budget, children, grow, width, threshold, table: see DraftModelDrafter.

    Raises:
        DrafterMismatch: the adapter was made for another target.
        UnknownDrafter: a layer out of range.
        UnsupportedModel: the target decodes chains only, or does not resume exactly from a layer's output.
    """

    def __init__(
        self,
        target: Target,
        head: KangarooHead,
        *,
        layer: int | None = None,
        depth: int = 6,
        confidence: float = 0.6,
        budget: int | None = None,
        children: str = "chosen",
        grow: str | GrowthPolicy = "fixed",
        width: int | None = None,
        threshold: float | None = None,
        table: str | None = None,
    ) -> None:
        require_fit("this Kangaroo adapter", target, hidden_size=head.config.hidden_size)
        self.target, self.head = target, head.eval()
        self.layer = head.config.exit_layer if layer is None else layer
        self._bottom = Bottom(target, self.layer, "kangaroo")
        if not 0 <= confidence < 1:
            raise UnknownDrafter(f"confidence is at least 0 and below 1, got {confidence}")
        if isinstance(grow, str):
            grow = growth_named(
                grow, depth=depth, budget=budget, width=width, threshold=threshold, table=table, children=children
            )
            if isinstance(grow, FixedGrowth):
                grow = FixedGrowth(grow.shape, grow.children, min_probability=confidence)
        self.policy: GrowthPolicy = grow
        self.taps: tuple[int, ...] = (self.layer,)
        self._pending = PendingTaps(self.taps)
        self._runner = _AdapterRunner(target, head)
        self._context = Context(self._runner)
        self._columns = Columns(0)
        self._grown: Grown | None = None

    def reset(self, batch_size: int, context: Context) -> None:
        """Draft into the target's own cache; the adapter's is empty."""
        self._bottom.reset(context)
        self._pending.reset(context)
        self._context = Context(self._runner)
        self._grown = None

    @torch.no_grad()
    def observe(self, committed: Committed) -> None:
        """Keep the adapter's columns of accepted nodes; shallow states of the others wait for the next proposal."""
        ran = None if self._grown is None else self._keep_run(committed)
        self._grown = None
        skipped = self._pending.observe(committed, ran)
        if skipped is not None:
            # Position 0 lies before the first column where the caller's cache held the text's beginning.
            self._context.begin([-count for count in skipped], 0)
        if committed.tree is not None and committed.nodes is not None:
            self.policy.observe(committed.tree, committed.nodes)

    def _keep_run(self, committed: Committed) -> list[int]:
        """Commit the adapter's columns; returns each row's number of accepted nodes that have one."""
        assert self._grown is not None
        assert committed.nodes is not None
        kept = []
        for nodes, columns in zip(committed.nodes, self._grown.columns, strict=True):
            ran = [columns[node] for node in nodes if columns[node] != NO_NODE]
            kept.append(ran)  # parents run before their children, so these are the path's first nodes
        self._context.keep(kept)
        return [len(ran) for ran in kept]

    @torch.no_grad()
    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """Digest what was observed, then grow: shallow layers for every node, the adapter for those with children."""
        self._digest()
        self._bottom.begin(root.shape[0])
        self._columns = Columns(root.shape[0])
        self._grown = self.policy.grow(root, params, chooser, room, self._expand, self.target.vocab_size)
        return self._bottom.finish(self._grown)

    def _expand(self, frontier: Frontier) -> Tensor:
        """Draft logits [B, F, V]."""
        shallow = self._bottom.run(frontier, keep_logits=None).hidden
        assert shallow is not None
        return self._context.run(shallow, frontier.depths, self._columns.append(frontier)).logits

    def _digest(self) -> None:
        """Committed states become keys and values of the adapter; they need no draft, so nothing else runs."""
        context = self._context
        for run in self._pending.take():
            ends = [length - start for length, start in zip(context.lengths, context.starts, strict=True)]
            positions = run.positions(ends).to(self.target.device)
            self.head.inject(run.states.to(self.target.device), positions, context.cache)
            context.keep(run.columns)

    @torch.no_grad()
    def select(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self._pending.select(rows)
        if self._context.batch_size:
            self._context.select(rows)


class _AdapterRunner:
    """An adapter as a Context runs it: shallow states in, draft logits out."""

    num_layers = 1
    form: Form = "tree"
    kinds: tuple[str, ...] = ("full_attention",)
    window = chunk = None

    def __init__(self, target: Target, head: KangarooHead) -> None:
        self.target, self.head = target, head

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def dtype(self) -> torch.dtype:
        return self.target.dtype

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
        states = self.head(input_ids, positions, cast(Tensor | None, mask), cast(Any, cache))
        return TargetOutput(self.target.logits_of(states[:, -keep_logits:]))
