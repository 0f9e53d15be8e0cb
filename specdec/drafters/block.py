"""DFlash: one pass over a block of mask tokens gives a law for every depth; a policy makes a tree of them.

DFlash (arXiv 2602.06036) drafts a chain of the likeliest tokens; DDTree (2604.12989) the best tree of a budget from the
same laws, `grow=best-first` here. The laws of a block are independent of each other, and so they are real laws to
draw from, too. The target's hidden states of committed tokens enter the head's own cache at the next proposal.

Dimensions: B rows, K depths, Q = block tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from specdec.context import Context, Mask
from specdec.drafter import Committed
from specdec.errors import DrafterMismatch, UnknownDrafter
from specdec.fit import require_fit
from specdec.grow.marginals import grow_on_marginals
from specdec.grow.named import growth_named
from specdec.grow.policy import GrowthPolicy
from specdec.heads.dflash import DFlashHead, block_ids, causal_in_block
from specdec.pending import PendingTaps
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Form, Target, TargetOutput
from specdec.tree import TokenTree


class BlockDrafter:
    """Proposes with a DFlash head.

    Args:
        target: the probed target.
        head: the head, on the target's device and in its dtype.
        depth: levels of the tree; the block is as long as they need. None for the block that the head was made for.
        budget, children, min_confidence, grow, width, threshold, table: see DraftModelDrafter.

    Raises:
        DrafterMismatch: the head was made for another target.
        UnknownDrafter: more levels than the head's block has slots.
    """

    def __init__(
        self,
        target: Target,
        head: DFlashHead,
        *,
        depth: int | None = None,
        budget: int | None = None,
        children: str = "chosen",
        min_confidence: float = 0.0,
        grow: str | GrowthPolicy = "fixed",
        width: int | None = None,
        threshold: float | None = None,
        table: str | None = None,
    ) -> None:
        config = head.config
        require_fit("this DFlash head", target, hidden_size=config.hidden_size, vocab_size=config.vocab_size,
                    taps=config.taps)  # fmt: skip
        require_embedding(target, config.hidden_size)
        depth = config.max_depth if depth is None else depth
        if depth > config.max_depth:
            raise UnknownDrafter(
                f"this DFlash head drafts {config.max_depth} tokens in its block of {config.block_size}; "
                f"depth is at most that, got {depth}"
            )
        if isinstance(grow, str):
            grow = growth_named(
                grow, depth=depth, budget=budget, width=width, threshold=threshold, table=table, children=children,
                min_confidence=min_confidence,
            )  # fmt: skip
        self.target, self.head = target, head.eval()
        self.policy: GrowthPolicy = grow
        self.depth = depth
        self.taps: tuple[int, ...] = tuple(dict.fromkeys(config.taps))
        self._pending = PendingTaps(config.taps)
        self._runner = _BlockRunner(target, head)
        self._context = Context(self._runner)

    def reset(self, batch_size: int, context: Context) -> None:
        """Begin with an empty cache."""
        self._pending.reset(context)
        self._context = Context(self._runner)

    def observe(self, committed: Committed) -> None:
        """Queue the taps of final tokens; the policy may learn."""
        skipped = self._pending.observe(committed)
        if skipped is not None:
            # Position 0 lies before the first column where the caller's cache held the text's beginning.
            self._context.begin([-count for count in skipped], 0)
        if committed.tree is not None and committed.nodes is not None:
            self.policy.observe(committed.tree, committed.nodes)

    @torch.inference_mode()
    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """Digest what was observed, run one block, and make a tree of its laws."""
        depth = min(self.depth, self.policy.depth, room)
        self._digest()
        return grow_on_marginals(self.policy, root, self.marginals(root, depth), params, chooser, depth)

    def _digest(self) -> None:
        """Features of new tokens become keys and values; they are never queries, so nothing else runs."""
        context = self._context
        for run in self._pending.take():
            ends = [length - start for length, start in zip(context.lengths, context.starts, strict=True)]
            positions = run.positions(ends).to(self.target.device)
            self.head.inject(self.head.features(run.states.to(self.target.device)), positions, context.cache)
            context.keep(run.columns)

    @torch.inference_mode()
    def marginals(self, root: Tensor, depth: int) -> Tensor:
        """Logits [B, K, V] of the K = `depth` tokens after the roots [B], each given the text alone."""
        rows, first = root.shape[0], self.head.config.first_slot
        width = first + depth
        block = block_ids(root, self.head.config, width)
        depths = torch.arange(width).expand(rows, -1)
        sees = torch.ones(rows, width, width, dtype=torch.bool)
        logits = self._context.run(block, depths, sees, keep_logits=depth).logits
        self._context.keep([[] for _ in range(rows)])
        return logits

    @torch.inference_mode()
    def select(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self._pending.select(rows)
        if self._context.batch_size:
            self._context.select(rows)


def require_embedding(target: Target, hidden_size: int) -> None:
    """Refuse a target whose raw embeddings, which the head reads, are of another width; some families have such.

    Raises:
        DrafterMismatch: says which width.
    """
    weight = getattr(target.embedding, "weight", None)
    if weight is None or weight.shape[1] != hidden_size:
        width = "none" if weight is None else str(weight.shape[1])
        raise DrafterMismatch(
            f"a DFlash head needs the target's embedding matrix in its hidden size {hidden_size}, got {width}; "
            "use another drafter on this target"
        )


class _BlockRunner:
    """A DFlash head as a Context runs it: ids of a block in, logits of its last slots out."""

    def __init__(self, target: Target, head: DFlashHead) -> None:
        self.target, self.head = target, head
        self.num_layers = head.config.num_layers
        self.form: Form = "tree"
        self.kinds = tuple(dict.fromkeys(head.config.layer_kinds))
        self.window, self.chunk = head.config.sliding_window, None

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
        embedded = self.head.embed(input_ids, cast(Tensor, self.target.embedding.weight))
        states = self.head(embedded, positions, self._masks(mask, input_ids.shape[1]), cast(Any, cache))
        return TargetOutput(self.head.logits(states[:, -keep_logits:], self.target.lm_head))

    def _masks(self, mask: Mask, length: int) -> dict[str, Tensor]:
        """Context's masks let block tokens see each other; causal kinds hide what comes later."""
        given = cast(dict[str, Tensor], mask if isinstance(mask, dict) else dict.fromkeys(self.kinds, mask))
        return {
            kind: causal_in_block(one, length) if self.head.config.is_causal(kind) else one
            for kind, one in given.items()
            if one is not None
        }
