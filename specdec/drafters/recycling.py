"""Token recycling: the target's own runner-up tokens, kept per token, drafted as a tree.

Luo et al., "Turning Trash into Treasure" (arXiv 2408.08696). Every scored node, rejected ones too, tells what
the target finds likely after its token; a table of the last such top-k per token is unrolled into a fixed shape.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed
from specdec.errors import UnknownDrafter
from specdec.grow.shape import best_shape
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree

UNKNOWN = -1


class RecyclingDrafter:
    """Trees unrolled from a table of likely successors, shared by all rows.

    Args:
        vocab_size: V of the target.
        successors: entries kept per token.
        budget: most nodes to propose.
        depth: levels of the tree.
        remember: keep the table from one generation to the next.
    """

    taps: tuple[int, ...] = ()

    def __init__(
        self, vocab_size: int, *, successors: int = 8, budget: int = 15, depth: int = 5, remember: bool = False
    ) -> None:
        if successors < 1:
            raise UnknownDrafter(f"recycling needs successors >= 1, got {successors}")
        self.vocab_size = vocab_size
        self.successors = min(successors, vocab_size)
        self.shape = best_shape(budget, depth).up_to(depth, self.successors)
        self.remember = remember
        self._table = torch.full((vocab_size, self.successors), UNKNOWN)

    def reset(self, batch_size: int, context: Context) -> None:
        """Empty the table unless it is to be remembered."""
        if not self.remember:
            self._table.fill_(UNKNOWN)

    def observe(self, committed: Committed) -> None:
        """Store the target's top-k at every scored node; from the prompt, what followed each token."""
        if committed.tree is None or committed.logits is None:
            self._learn_bigrams(committed.tokens)
            return
        best = committed.logits.topk(self.successors, dim=-1).indices.to(self._table.device)
        ids = committed.tree.tokens.to(self._table.device)
        for row, shape in enumerate(committed.tree.shapes):
            alive = [node for node in range(ids.shape[1]) if node == 0 or shape.parents[node] >= 0]
            self._table[ids[row, alive]] = best[row, alive]

    def _learn_bigrams(self, rows: list[list[int]]) -> None:
        """Move each prompt token's follower to the front of its entries."""
        for row in rows:
            for token, follower in pairwise(row):
                entries = [e for e in self._table[token].tolist() if e != follower]
                self._table[token] = torch.tensor([follower, *entries][: self.successors])

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """Unroll the table below each root; unknown successors leave their place empty."""
        shape = self.shape.up_to(room, self.successors)
        rows = []
        for token in root.tolist():
            ids, index, nodes = [token], {0: 0}, []
            successors: dict[int, list[int]] = {}
            for node, child in enumerate(shape.children, 1):
                ids.append(UNKNOWN)
                if child.parent not in index:
                    continue
                parent_token = ids[child.parent]
                if parent_token not in successors:
                    successors[parent_token] = self._table[parent_token].tolist()
                ids[node] = successors[parent_token][child.rank]
                if ids[node] != UNKNOWN:
                    nodes.append((index[child.parent], ids[node]))
                    index[node] = len(nodes)
            rows.append(nodes)
        return TokenTree.of_nodes(root, rows)

    def select(self, rows: list[int]) -> None:
        """Nothing per row."""
