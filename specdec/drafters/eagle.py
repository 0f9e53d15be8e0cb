"""EAGLE heads propose: a small decoder that goes on from the target's own hidden states.

EAGLE-1 (arXiv 2401.15077), with EAGLE-2's dynamic trees (2406.16858) as `grow=eagle2`, EAGLE-3 (2503.01840), and
Dovetail's gated variant (2412.18934). The head keeps keys and values of the committed text, made from the target's
states alone. What it makes for drafted nodes comes from its own guesses of those states and is dropped with the tree,
also for nodes that are accepted: their true states arrive with the commit and are run at the next proposal. Published
code does the same (SafeAILab's `stable_kv` is what the forward over accepted tokens left; vLLM writes over the drafted
slots); keeping them would save one token pass in a step and let the head's own errors pile up in its past.

Dimensions: B rows, Q pairs, F nodes of a frontier, C columns, D hidden size of the head, K taps, T hidden size of the
target, V vocabulary, N tokens that the head can guess.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache

from specdec.context import Context, Mask
from specdec.drafter import Committed
from specdec.errors import DrafterMismatch
from specdec.fit import require_fit
from specdec.grow.fixed import FixedGrowth
from specdec.grow.levels import Children
from specdec.grow.named import growth_named
from specdec.grow.policy import Columns, Frontier, GrowthPolicy
from specdec.grow.shape import Shape
from specdec.heads.eagle import EagleHead
from specdec.heads.eagle3 import Eagle3Head, standard_taps
from specdec.sampling import Chooser, SamplingParams
from specdec.target import BEFORE_NORM, Form, Target, TargetOutput
from specdec.tree import TokenTree

DIGESTED_AT_ONCE = 1024
"""Pairs of a prompt in one forward of the head; bounds the mask of a long prompt."""


def beside_features(tokens: list[int], root: int) -> list[int]:
    """The tokens that go with the features of `tokens`: feature t goes with token t + 1.

    The text is 5 6 7 8; the target has run 5 6 7 and chosen 8, which is the root. Its features f0 f1 f2 go with 6 7 8.
    What the head makes of the last pair, (f2, 8), stands for f3 and guesses what follows 8: the root's children. For a
    child 9 the next pair is (that guess of f3, 9). When 8 9 is committed and the next root is 4, the features f3 f4 go
    with 9 4.
    """
    return [*tokens[1:], root]


class EagleDrafter:
    """Proposes with an EAGLE-1 or EAGLE-3 head.

    Args:
        target: the probed target.
        head: on the target's device and in its dtype.
        depth: levels of the tree, one forward of the head for each.
        budget: proposed nodes; None for a chain where the shape is fixed, for 24 elsewhere.
        children: "chosen" or "drawn", see DraftModelDrafter.
        min_confidence: when to stop growing, see DraftModelDrafter.
        grow: how the tree takes its shape, a word of `specdec.grow.named`; or a policy of your own, which overrides
            all options here.
        width: most children of a node.
        threshold: when `opt-tree`, `dyspec` and `calibrated` stop.
        table: JSON file with what was measured, see `specdec.grow.named`.
        shape: a fixed shape, in place of depth, budget and the like.

    Raises:
        DrafterMismatch: the head was made for another target.
        UnknownDrafter: an option out of range.
    """

    def __init__(
        self,
        target: Target,
        head: EagleHead | Eagle3Head,
        *,
        depth: int = 5,
        budget: int | None = 20,
        children: str = "chosen",
        min_confidence: float = 0.0,
        grow: str | GrowthPolicy = "fixed",
        width: int | None = None,
        threshold: float | None = None,
        table: str | None = None,
        shape: Shape | None = None,
    ) -> None:
        self._features_of = features_of(head, target)
        self.taps: tuple[int, ...] = tuple(dict.fromkeys(self._features_of))
        self.target, self.head = target, head.eval()
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
        self._runner = _HeadRunner(head, target)
        self.reset(0, None)

    def reset(self, batch_size: int, context: Context | None) -> None:
        """Begin with an empty cache."""
        self._context = Context(self._runner)
        self._context.begin([0] * batch_size, 0)
        self._tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self._features: list[list[Tensor]] = [[] for _ in range(batch_size)]
        self._after_root: Tensor | None = None

    @torch.inference_mode()
    def observe(self, committed: Committed) -> None:
        """Keep the target's states of the committed tokens for the next proposal."""
        if committed.tree is not None and committed.nodes is not None:
            self.policy.observe(self._in_own_ids(committed.tree), committed.nodes)
        features = torch.cat([committed.taps[tap] for tap in self._features_of], -1)
        for row, tokens in enumerate(committed.tokens):
            if committed.nodes is None:  # a left-padded prompt, or its end when the beginning was cached already
                ours = features[row, max(features.shape[1] - len(tokens), 0) :]
            else:
                ours = features[row, committed.nodes[row]]
            self._features[row].append(ours)
            self._tokens[row] += tokens[len(tokens) - ours.shape[0] :]

    @torch.inference_mode()
    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """Digest what was observed, then grow trees level by level.

        Growth sees the head's own N tokens, whose logits need no spreading over the V of the target; the grown tree
        is translated once.
        """
        states = self._digest(root.tolist())[:, None]
        columns = Columns(root.shape[0])

        def expand(frontier: Frontier) -> Tensor:
            nonlocal states
            sees = columns.append(frontier)
            if columns.count == 1:
                return self.head.logits(states, self.target.logits_of)
            new = self._run(frontier, states, sees)
            states = torch.cat([states, new], 1)
            return self.head.logits(new, self.target.logits_of)

        grown = self.policy.grow(root, params, chooser, room, expand, self.head.guessed)
        return self._in_target_ids(grown.tree)

    def _digest(self, roots: list[int]) -> Tensor:
        """Run and commit the pairs that are new, the one of the root last; returns the states [B, D] after it."""
        self._context.keep([[] for _ in roots])  # what was drafted came from guessed states
        pairs = [beside_features(tokens, root) if tokens else []
                 for tokens, root in zip(self._tokens, roots, strict=True)]  # fmt: skip
        counts = [len(row) for row in pairs]
        if not any(counts):
            assert self._after_root is not None, "observe comes first"
            return self._after_root
        features = pad_sequence([torch.cat(parts) for parts in self._features], batch_first=True)
        states = self.head.encode(features.to(self._runner.device))
        tokens = torch.tensor([[*row, *[0] * (states.shape[1] - len(row))] for row in pairs])
        self._tokens, self._features = [[] for _ in roots], [[] for _ in roots]
        self._after_root = self._extend(self._inputs(tokens, states), counts)
        return self._after_root

    def _extend(self, inputs: Tensor, counts: list[int]) -> Tensor:
        """Commit right-padded pairs [B, Q, 2 D]; returns the head's states [B, D] after each row's last one."""
        last = self._after_root if self._after_root is not None else inputs.new_zeros(len(counts), inputs.shape[2] // 2)
        for start in range(0, max(counts), DIGESTED_AT_ONCE):
            part = inputs[:, start : start + DIGESTED_AT_ONCE]
            ends = [min(max(count - start, 0), part.shape[1]) for count in counts]
            hidden = self._context.extend(part, ends).hidden
            assert hidden is not None
            if min(ends) == part.shape[1]:  # as with one row, in every step
                last = hidden[:, -1]
            else:
                rows = [row for row, end in enumerate(ends) if end]
                last = last.clone()
                last[rows] = hidden[rows, [ends[row] - 1 for row in rows]]
        return last

    def _run(self, frontier: Frontier, states: Tensor, sees: Tensor) -> Tensor:
        """Append drafted nodes, each beside its parent's state among those of all columns; returns theirs [B, F, D]."""
        parents = frontier.parents.clamp(min=0).to(states.device)
        parent_states = states.gather(1, parents[:, :, None].expand(-1, -1, states.shape[2]))
        inputs = self._inputs(self._ids(frontier.tokens), parent_states)
        # The root's pair is committed already, so that column 1 is the first of the tree and level 1 at depth 0.
        hidden = self._context.run(inputs, (frontier.depths - 1).clamp(min=0), sees[:, :, 1:]).hidden
        assert hidden is not None
        return hidden

    def _inputs(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Embeddings of tokens [B, Q] beside states [B, Q, D]: [B, Q, 2 D]."""
        embedding = self.target.embedding if self.head.embed_tokens is None else self.head.embed_tokens
        return torch.cat([embedding(tokens.to(states.device)).to(states.dtype), states], -1)

    def _ids(self, guesses: Tensor) -> Tensor:
        """The target's ids of guesses; padding may hold anything and gets a valid one."""
        return self.head.to_token_ids(guesses.clamp(max=self.head.guessed - 1).to(self._runner.device))

    def _in_target_ids(self, tree: TokenTree) -> TokenTree:
        """The tree in the target's vocabulary; tokens that the head cannot guess have no mass."""
        if self.head.guessed == self.target.vocab_size:
            return tree
        tokens = torch.cat([tree.tokens[:, :1], self._ids(tree.tokens[:, 1:]).to(tree.tokens)], 1)
        log_q = tree.log_q
        if log_q is not None:
            ids = self.head.to_token_ids(torch.arange(self.head.guessed, device=log_q.device))
            whole = log_q.new_full((*log_q.shape[:2], self.target.vocab_size), -torch.inf)
            whole[:, :, ids] = log_q
            log_q = whole
        return TokenTree(tokens, tree.shapes, log_q)

    def _in_own_ids(self, tree: TokenTree) -> TokenTree:
        """A scored tree as growth made it; tokens that the head cannot guess become -1."""
        if self.head.guessed == self.target.vocab_size:
            return tree
        places = torch.full((self.target.vocab_size,), -1, device=tree.tokens.device)
        ids = self.head.to_token_ids(torch.arange(self.head.guessed, device=self._runner.device))
        places[ids.to(places.device)] = torch.arange(self.head.guessed, device=places.device)
        return replace(tree, tokens=torch.cat([tree.tokens[:, :1], places[tree.tokens[:, 1:]]], 1))

    @torch.inference_mode()
    def select(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self._tokens = [self._tokens[row] for row in rows]
        self._features = [self._features[row] for row in rows]
        if self._after_root is not None:
            self._after_root = self._after_root[rows]
        self._context.select(rows)


def features_of(head: EagleHead | Eagle3Head, target: Target) -> tuple[int, ...]:
    """The taps whose states, in this order, are the head's features on this target.

    Raises:
        DrafterMismatch: the head was made for another target.
    """
    config = head.config
    if isinstance(head, EagleHead):
        taps = (target.num_layers,)
        require_fit("this EAGLE head", target, hidden_size=config.layer.hidden_size, vocab_size=config.vocab_size)
        return taps
    config = head.config
    taps = standard_taps(target.num_layers) if config.taps is None else config.taps
    if any(tap < 0 for tap in taps):
        raise DrafterMismatch(f"an EAGLE-3 head reads the states after 0 or more layers, got {taps}")
    require_fit(
        "this EAGLE-3 head", target, hidden_size=config.feature_size, vocab_size=config.vocab_size, taps=taps
    )  # fmt: skip
    # Servers count layers and take the state before the norm after the last; transformers' last index is normed.
    return tuple(BEFORE_NORM if tap == target.num_layers else tap for tap in taps)


class _HeadRunner:
    """What a Context asks of a model, for a head: it runs pairs of embedding and state, [B, Q, 2 D]."""

    form: Form = "tree"
    chunk: int | None = None

    def __init__(self, head: EagleHead | Eagle3Head, target: Target) -> None:
        self.head = head
        self._part: Any = cast(Any, head.layers[0]).self_attn.o_proj
        self.num_layers = head.config.num_layers
        self.window: int | None = head.config.sliding_window if isinstance(head, Eagle3Head) else None
        self.kinds: tuple[str, ...] = ("full_attention" if self.window is None else "sliding_attention",)

    @property
    def device(self) -> torch.device:
        """Where the head's weights are."""
        return self._part.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the head's weights."""
        return self._part.weight.dtype

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
        """The head's states [B, Q, D] as `hidden`; logits are made elsewhere, for the few nodes that need them."""
        embeddings, states = input_ids.chunk(2, -1)
        hidden = self.head(embeddings, states, positions, cast(Tensor | None, mask), cache)
        return TargetOutput(hidden[:, :, :0], hidden=hidden)
