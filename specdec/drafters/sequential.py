"""Heads that go on from one state, token by token: Hydra, Hydra++, Clover-2 and the MLP speculator.

Which state of the target goes with which token is said, with an example, in `specdec.heads.sequential`. Heads with
attention over the text keep keys and values of their own for accepted tokens alone: what was committed since the last
proposal is run at the next one, so nothing is ever taken back.

Dimensions: B rows, Q new pairs, F nodes of a frontier, D hidden size, W width of a state, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from specdec.context import Context, Mask
from specdec.drafter import Committed
from specdec.errors import UnknownDrafter
from specdec.fit import require_fit
from specdec.grow.fixed import FixedGrowth
from specdec.grow.levels import Children
from specdec.grow.named import growth_named
from specdec.grow.policy import Expand, Frontier, GrowthPolicy
from specdec.grow.shape import Shape
from specdec.heads.sequential import SequentialHead, TargetEnds, TextLayers, pair_tokens
from specdec.sampling import Chooser, SamplingParams
from specdec.target import BEFORE_NORM, Form, Target, TargetOutput
from specdec.tree import TokenTree

PAIRS_AT_ONCE = 1024
"""Of a prompt; bounds the attention mask."""


class SequentialDrafter:
    """Proposes with a head whose state and next token give its next state and logits.

    Args:
        target: the probed target.
        head: the head, on the target's device and in its dtype.
        depth: levels of the tree; None for as many as the head was made for, which is also the most.
        budget: proposed nodes; None for a chain where the shape is fixed.
        children: "chosen" or "drawn", see DraftModelDrafter.
        min_confidence: go one level deeper only while some path has this draft probability.
        grow: how the tree takes its shape, a word of `specdec.grow.named`; or a policy of your own, which overrides
            the other options.
        width: most children of a node.
        threshold: what `grow` makes of it.
        table: JSON file with what was measured, see `specdec.grow.named`.
        shape: a fixed shape, in place of depth, budget and the like; what lies deeper than the head goes is cut off.

    Raises:
        DrafterMismatch: the head was made for another target.
        UnknownDrafter: deeper than the head goes, or another option out of range.
    """

    def __init__(
        self,
        target: Target,
        head: nn.Module,
        *,
        depth: int | None = None,
        budget: int | None = None,
        children: str = "chosen",
        min_confidence: float = 0.0,
        grow: str | GrowthPolicy = "fixed",
        width: int | None = None,
        threshold: float | None = None,
        table: str | None = None,
        shape: Shape | None = None,
    ) -> None:
        self.target, self.module = target, head.eval()
        self.head = cast(SequentialHead, head)
        name = f"this {type(head).__name__.removesuffix('Head')} head"
        require_fit(name, target, hidden_size=self.head.hidden_size, vocab_size=self.head.vocab_size)
        if depth is not None and depth > self.head.depth:
            raise UnknownDrafter(f"{name} was made for {self.head.depth} levels, got depth={depth}")
        if shape is not None:
            grow = FixedGrowth(shape.up_to(self.head.depth, shape.width), cast(Children, children), min_confidence)
        if isinstance(grow, str):
            grow = growth_named(
                grow, depth=self.head.depth if depth is None else depth, budget=budget, width=width,
                threshold=threshold, table=table, children=children, min_confidence=min_confidence,
            )  # fmt: skip
        self.policy: GrowthPolicy = grow
        self.taps: tuple[int, ...] = (BEFORE_NORM if self.head.before_norm else target.num_layers,)
        self._ends = TargetEnds(target.embedding, target.logits_of)
        self._unread: list[_Unread] = []
        self._context: Context | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.head.vocab_size

    def reset(self, batch_size: int, context: Context) -> None:
        """Forget all states."""
        self._unread = [_Unread() for _ in range(batch_size)]
        if self.head.text is not None:
            self._context = Context(_TextRunner(self.head.text, self.target))
            self._context.begin([0] * batch_size, 0)

    @torch.inference_mode()
    def observe(self, committed: Committed) -> None:
        """Keep the states of the committed tokens, or of each row's last where the head looks at no other."""
        if committed.tree is not None and committed.nodes is not None:
            self.policy.observe(committed.tree, committed.nodes)
        states = committed.taps[self.taps[0]]
        for row, (unread, tokens) in enumerate(zip(self._unread, committed.tokens, strict=True)):
            if committed.nodes is None:
                # A left-padded prompt; of one whose beginning was cached already, only the end has run.
                kept = states[row, max(states.shape[1] - len(tokens), 0) :]
                tokens = tokens[len(tokens) - kept.shape[0] :]
            else:
                kept = states[row, committed.nodes[row]]
            unread.add(kept, tokens)
            if self.head.text is None:
                unread.keep_last()

    @torch.inference_mode()
    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """Digest what was observed, then grow from the last state, one small forward for each level."""
        seed = self._digest(root.tolist())
        room = min(room, self.head.depth)
        return self.policy.grow(root, params, chooser, room, self._expand_from(seed), self.head.vocab_size).tree

    def _digest(self, roots: list[int]) -> Tensor:
        """What depth 0 reads, [B, 1, W], of the last pair of every row; all earlier pairs enter the text layers."""
        rows = [unread.pairs(root) for unread, root in zip(self._unread, roots, strict=True)]
        counts = [len(tokens) for _, tokens in rows]
        hidden = nn.utils.rnn.pad_sequence([states for states, _ in rows], batch_first=True)
        width = hidden.shape[1]
        tokens = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for _, tokens in rows], device=hidden.device)
        seed = self.head.pair(hidden, tokens, self._ends)
        if self._context is not None:
            seed = self._read(self._context, seed, counts)
        return seed[range(len(counts)), [count - 1 for count in counts]][:, None]

    def _read(self, context: Context, pairs: Tensor, counts: list[int]) -> Tensor:
        """Commit `counts[b]` of the right-padded pairs [B, Q, D] of row b to the text layers; returns their states."""
        read = []
        for start in range(0, pairs.shape[1], PAIRS_AT_ONCE):
            part = pairs[:, start : start + PAIRS_AT_ONCE]
            here = [min(max(count - start, 0), part.shape[1]) for count in counts]
            read.append(context.extend(part, here).logits)
        return torch.cat(read, 1)

    def _expand_from(self, seed: Tensor) -> Expand:
        """Runs frontiers, keeping the states of the level above."""
        above, first_column = seed, 0

        def expand(frontier: Frontier) -> Tensor:
            nonlocal above, first_column
            depth = int(frontier.depths.max())
            if depth == 0:
                state = above
            else:
                # Growth goes level by level, so parents are among the nodes that ran last; padding reads anything.
                places = (frontier.parents - first_column).clamp(min=0).to(above.device)
                state = above.gather(1, places[:, :, None].expand(-1, -1, above.shape[2]))
                first_column += above.shape[1]
            above, hidden = self.head.step(depth, state, frontier.tokens.to(state.device), self._ends)
            return self.head.logits(depth, hidden, self._ends)

        return expand

    @torch.inference_mode()
    def select(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self._unread = [self._unread[row] for row in rows]
        if self._context is not None:
            self._context.select(rows)


class _Unread:
    """Committed tokens of one row that no proposal has read yet, and the target's states of them [n, D]."""

    def __init__(self) -> None:
        self._states: list[Tensor] = []
        self._tokens: list[int] = []

    def add(self, states: Tensor, tokens: list[int]) -> None:
        self._states.append(states)
        self._tokens += tokens

    def keep_last(self) -> None:
        """Forget all but the last token."""
        whole = torch.cat(self._states)
        self._states, self._tokens = [whole[-1:].clone()], self._tokens[-1:]  # a view would hold the whole prompt

    def pairs(self, root: int) -> tuple[Tensor, list[int]]:
        """States and the tokens that go with them; the last ones go with the root."""
        assert self._tokens, "a proposal comes after a commit"
        states, tokens = torch.cat(self._states), pair_tokens(self._tokens, root)
        self._states, self._tokens = [], []
        return states, tokens


class _TextRunner:
    """A head's text layers as a Context runs them: states in, states out where a Target gives logits."""

    form: Form = "tree"
    kinds = ("full_attention",)
    window = None
    chunk = None

    def __init__(self, layers: TextLayers, target: Target) -> None:
        self._layers = layers
        self.num_layers = len(layers.layers)
        self.device, self.dtype = target.device, target.dtype

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
        """States [B, Q, D] as `input_ids`; returns them after the layers."""
        states = self._layers(input_ids, positions, cast(Tensor | None, mask), cache)
        return TargetOutput(states[:, -keep_logits:] if keep_logits else states)
