"""The policy that grows the same shape in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.errors import UnknownDrafter
from specdec.grow.levels import Children, grow_levels
from specdec.grow.policy import Expand, Frontier, Grown
from specdec.grow.shape import Shape
from specdec.grow.stopping import ConfidenceRule, Watch, grow_watched, law_of_tokens
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE, TokenTree


class FixedGrowth:
    """A fixed shape, filled with the draft law's best tokens or with draws from it.

    Args:
        shape: which ranks are tried where.
        children: "chosen" or "drawn".
        min_confidence: go below a level only in rows in which some path has this draft probability; see `stopping`.
        min_probability: the same by the last token's own draft probability instead of its whole path's.

    Raises:
        UnknownDrafter: drawn children where the shape leaves out a rank; a draw cannot be left out.
    """

    def __init__(
        self, shape: Shape, children: Children = "chosen", min_confidence: float = 0.0, min_probability: float = 0.0
    ) -> None:
        if children == "drawn" and shape.has_gaps:
            raise UnknownDrafter(
                "this tree leaves out some ranks, which only chosen children can do; add the lower-ranked siblings "
                "or use children=chosen"
            )
        self.shape, self.min_confidence, self.min_probability = shape, min_confidence, min_probability
        self._rule = ConfidenceRule(min_confidence, min_probability)
        self.children: Children = children

    @property
    def depth(self) -> int:
        """Levels of the shape."""
        return self.shape.depth

    @property
    def is_chain(self) -> bool:
        """Whether the shape is one."""
        return self.shape.topology.is_chain

    def grow(
        self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int, expand: Expand, most_children: int
    ) -> Grown:
        """Level by level; the same for all rows, but for those that stop earlier."""
        shape = self.shape.up_to(room, most_children)
        if not (self.min_confidence or self.min_probability):
            return self._filled(shape, root, params, chooser, expand)
        watch = Watch(expand, self._rule, law_of_tokens(self.children, params), root.shape[0])
        return grow_watched(lambda watched: self._filled(shape, root, params, chooser, watched), watch, root)

    def _filled(self, shape: Shape, root: Tensor, params: SamplingParams, chooser: Chooser, expand: Expand) -> Grown:
        columns: dict[int, int] = {}

        def expand_nodes(nodes: list[int], tokens: Tensor) -> Tensor | None:
            parents = [columns.get(shape.topology.parents[node], NO_NODE) for node in nodes]
            depths = [shape.topology.depths[node] for node in nodes]
            rows = tokens.shape[0]
            logits = expand(Frontier(tokens[:, nodes], _for_rows(parents, rows), _for_rows(depths, rows)))
            if logits is not None:
                columns.update({node: len(columns) + i for i, node in enumerate(nodes)})
            return logits

        tree = grow_levels(shape, root, self.children, params, chooser, expand_nodes)
        row = [columns.get(node, NO_NODE) for node in range(tree.num_nodes)]
        return Grown(tree, [row] * tree.tokens.shape[0])

    def observe(self, tree: TokenTree, nodes: list[list[int]]) -> None:
        """A fixed shape learns nothing."""


def _for_rows(values: list[int], rows: int) -> Tensor:
    return torch.tensor([values]).expand(rows, -1)
