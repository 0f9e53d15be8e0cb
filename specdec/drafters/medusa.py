"""Medusa heads propose a tree of their best guesses at each depth (arXiv 2401.10774).

The heads see one state: that of the last committed token. So they run once in a step, for that node alone, and only
as many of them as the tree is deep. Guesses at one depth are the same below every node of the depth before.

Dimensions: B rows, K heads, D hidden size, V vocabulary, V' tokens that the heads guess.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed
from specdec.errors import DrafterMismatch
from specdec.fit import require_fit
from specdec.grow.fixed import FixedGrowth
from specdec.grow.levels import Children
from specdec.grow.marginals import grow_on_marginals
from specdec.grow.named import growth_named
from specdec.grow.policy import GrowthPolicy
from specdec.grow.shape import Shape, check_limits, greedy_shape
from specdec.heads.medusa import MedusaHead
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Target
from specdec.tree import TokenTree

ACCURACY = (
    (0.56, 0.10, 0.055, 0.037, 0.028, 0.02, 0.016, 0.013, 0.011, 0.01),
    (0.32, 0.10, 0.06, 0.045, 0.035, 0.028, 0.023, 0.02, 0.017, 0.015),
    (0.20, 0.09, 0.055, 0.042, 0.033, 0.027, 0.023, 0.02, 0.018, 0.016),
    (0.15, 0.07, 0.05, 0.04, 0.03, 0.026, 0.022, 0.02, 0.018, 0.016),
    (0.12, 0.065, 0.045, 0.038, 0.032, 0.027, 0.023, 0.02, 0.018, 0.016),
)
"""How often the guess of each rank is right, by depth; deeper ones are as the last. First entries and sums of five are
those published for Medusa-1 on a 7B target; how the rest is spread over the ranks is a guess that only orders nodes."""


class MedusaDrafter:
    """Proposes with Medusa heads.

    Args:
        target: the probed target.
        head: the heads, on the target's device and in its dtype.
        depth: levels of the tree; at most as many as there are heads.
        budget: proposed nodes.
        children: "chosen" (with a seed the output equals plain sampling) or "drawn" without replacement.
        min_confidence: stop below a level on which no path has this draft probability; fixed shapes only.
        grow: how the tree takes its shape, a word of `specdec.grow.named` ("best-first" is DDTree here), or a policy
            of your own. "fixed" is Medusa's construction: from `table`, or from the published accuracies.
        width: most children of a node.
        threshold: when `opt-tree`, `dyspec` and `calibrated` stop.
        table: JSON file with what was measured, see `specdec.grow.named`.
        shape: a fixed shape, in place of depth, budget and the like; what lies deeper than there are heads is cut off.

    Raises:
        DrafterMismatch: the heads were made for another target.
        UnknownDrafter: an option out of range.
    """

    def __init__(
        self,
        target: Target,
        head: MedusaHead,
        *,
        depth: int = 4,
        budget: int = 15,
        children: str = "chosen",
        min_confidence: float = 0.0,
        grow: str | GrowthPolicy = "fixed",
        width: int | None = None,
        threshold: float | None = None,
        table: str | None = None,
        shape: Shape | None = None,
    ) -> None:
        config = head.config
        require_fit("this set of Medusa heads", target, hidden_size=config.hidden_size,
                    vocab_size=None if config.token_map else config.vocab_size)  # fmt: skip
        if head.token_map is not None and int(head.token_map.max()) >= target.vocab_size:
            raise DrafterMismatch(
                f"these Medusa heads guess token {int(head.token_map.max())}, the target's vocabulary has "
                f"{target.vocab_size}; use them with their own target"
            )
        self._num_tokens = target.vocab_size if config.vocab_size is None else config.vocab_size
        check_limits(budget, depth)
        depth = min(depth, config.num_heads)
        self.target, self.head = target, head
        self.taps: tuple[int, ...] = (target.num_layers,)
        self.policy: GrowthPolicy
        if isinstance(grow, str):
            self.policy = growth_named(
                grow, depth=depth, budget=budget, width=width, threshold=threshold, table=table, children=children,
                min_confidence=min_confidence,
            )  # fmt: skip
        else:
            self.policy = grow
        if shape is None and grow == "fixed" and table is None:
            shape = greedy_shape(budget, tuple(ACCURACY[min(k, len(ACCURACY) - 1)][:width] for k in range(depth)))
        if shape is not None:
            shape = shape.up_to(config.num_heads, self._num_tokens)
            self.policy = FixedGrowth(shape, cast(Children, children), min_confidence)
        self._hidden: Tensor | None = None

    def reset(self, batch_size: int, context: Context) -> None:
        """Forget the last states."""
        self._hidden = None

    def observe(self, committed: Committed) -> None:
        """Keep each row's state at its last committed token."""
        states = committed.taps[self.taps[0]]
        if committed.nodes is None or committed.tree is None:
            self._hidden = states[:, -1].clone()  # a left-padded prompt ends in its last column
            return
        self.policy.observe(committed.tree, committed.nodes)
        assert self._hidden is not None, "the prompt is observed first"
        rows = [row for row, nodes in enumerate(committed.nodes) if nodes]
        last = [committed.nodes[row][-1] for row in rows]
        self._hidden[rows] = states[rows, last]

    @torch.no_grad()
    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """The tree of the policy, on each head's law for its depth."""
        policy, depth = self.policy, min(room, self.policy.depth, self.head.config.num_heads)
        if isinstance(policy, FixedGrowth) and policy.children == "chosen" and policy.min_confidence == 0:
            return self._filled(policy.shape.up_to(depth, self._num_tokens), root)
        return grow_on_marginals(policy, root, self.logits(depth), params, chooser, room)

    def _filled(self, shape: Shape, root: Tensor) -> TokenTree:
        """A fixed shape with the heads' best guesses, without waiting for the device."""
        best = self._guess(shape.depth).topk(shape.width, dim=-1).indices
        guesses = self.head.to_token_ids(best).to(root.device)
        heads = [depth - 1 for depth in shape.topology.depths[1:]]
        ranks = [child.rank for child in shape.children]
        tokens = torch.cat([root[:, None], guesses[:, heads, ranks]], 1)
        return TokenTree(tokens, (shape.topology,) * root.shape[0])

    def logits(self, num_heads: int) -> Tensor:
        """Logits [B, K, V] of the first heads after the last committed tokens, -inf for tokens they cannot guess."""
        guessed = self._guess(num_heads)
        if self.head.token_map is None:
            return guessed
        whole = guessed.new_full((*guessed.shape[:-1], self.target.vocab_size), -torch.inf)
        return whole.index_copy_(-1, self.head.token_map, guessed)

    def _guess(self, num_heads: int) -> Tensor:
        """Logits [B, K, V'] of the first heads."""
        assert self._hidden is not None, "reset and observe come first"
        place = self.head.blocks[0][0].linear.weight  # type: ignore[index, union-attr]
        return self.head(self._hidden.to(place.device, place.dtype), self.target.logits_of, num_heads)

    def select(self, rows: list[int]) -> None:
        """Keep only these rows' states."""
        if self._hidden is not None:
            self._hidden = self._hidden[rows]
