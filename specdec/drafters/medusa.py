"""Medusa heads propose a tree of their best guesses at each depth (arXiv 2401.10774).

The heads see one state: that of the last committed token. So they run once in a step, only for that node, and only
as many of them as the tree is deep. Guesses at one depth are the same below every node of the depth before.

Dimensions: B rows, K heads, D hidden size, V vocabulary, V' tokens that the heads guess.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed
from specdec.errors import UnknownDrafter
from specdec.fit import require_fit
from specdec.grow.accuracy import shape_by_accuracy
from specdec.grow.shape import Shape
from specdec.heads.medusa import MedusaHead
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Target
from specdec.tree import TokenTree


class MedusaDrafter:
    """Proposes with Medusa heads.

    Args:
        target: the probed target.
        head: the heads, on the target's device and in its dtype.
        depth: levels of the tree; at most as many as there are heads.
        budget: proposed nodes.
        shape: overrides depth and budget; what lies deeper than there are heads is cut off.

    Raises:
        DrafterMismatch: the heads were made for another target.
    """

    def __init__(
        self, target: Target, head: MedusaHead, *, depth: int = 4, budget: int = 15, shape: Shape | None = None
    ) -> None:
        config = head.config
        require_fit("these Medusa heads", target, hidden_size=config.hidden_size,
                    vocab_size=None if config.token_map else config.vocab_size)  # fmt: skip
        if depth < 1 or budget < 1:
            raise UnknownDrafter(f"medusa needs depth >= 1 and budget >= 1, got depth={depth}, budget={budget}")
        self.target, self.head = target, head.eval()
        shape = shape or shape_by_accuracy(budget, min(depth, config.num_heads))
        self.shape = shape.up_to(config.num_heads, config.vocab_size)
        self.taps: tuple[int, ...] = (target.num_layers,)
        self._hidden: Tensor | None = None

    def reset(self, batch_size: int, context: Context) -> None:
        """Forget the last state."""
        self._hidden = None

    def observe(self, committed: Committed) -> None:
        """Keep each row's state at its last committed token."""
        states = committed.taps[self.taps[0]]
        if committed.nodes is None:
            self._hidden = states[:, -1].clone()  # a left-padded prompt ends in its last column
            return
        assert self._hidden is not None, "the prompt is observed first"
        rows = [row for row, nodes in enumerate(committed.nodes) if nodes]
        last = [committed.nodes[row][-1] for row in rows]
        self._hidden[rows] = states[rows, last]

    @torch.no_grad()
    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """The shape, filled with each head's best guesses."""
        shape = self.shape.up_to(room, self.shape.width)
        best = self.logits(shape.depth).topk(shape.width, dim=-1).indices
        guesses = self.head.to_token_ids(best).to(root.device)
        heads = [depth - 1 for depth in shape.topology.depths[1:]]
        ranks = [child.rank for child in shape.children]
        tokens = torch.cat([root[:, None], guesses[:, heads, ranks]], 1)
        return TokenTree(tokens, (shape.topology,) * root.shape[0])

    def logits(self, num_heads: int) -> Tensor:
        """Logits [B, K, V'] of the first heads after the last committed tokens."""
        assert self._hidden is not None, "reset and observe come first"
        return self.head(self._hidden, self.target.lm_head, num_heads)

    def select(self, rows: list[int]) -> None:
        """Keep only these rows' states."""
        if self._hidden is not None:
            self._hidden = self._hidden[rows]
