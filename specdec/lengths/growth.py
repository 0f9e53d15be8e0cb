"""A growth policy inside a length policy: the tree of the one, as deep as the other allows."""

from __future__ import annotations

from torch import Tensor

from specdec.grow.drawn import DrawnGrowth
from specdec.grow.fixed import FixedGrowth
from specdec.grow.levels import Children
from specdec.grow.policy import Expand, Grown, GrowthPolicy
from specdec.grow.stopping import Level, Watch, grow_watched, law_of_tokens
from specdec.lengths.policy import LengthPolicy
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree


class LimitedGrowth:
    """Grows what `growth` grows, within the limits of the step, and stops where the length policy says so.

    Args:
        growth: decides which nodes a tree has.
        length: decides how deep it goes.
    """

    def __init__(self, growth: GrowthPolicy, length: LengthPolicy) -> None:
        self.growth, self.length = growth, length
        self.limits: list[int] = []
        """Levels of each row in the next tree; whoever asks for a tree sets them."""
        self.tokens: Level | None = None
        """What growth knew of the nodes of the last tree, for policies that watch tokens."""

    @property
    def depth(self) -> int:
        """Of the growth policy."""
        return self.growth.depth

    @property
    def is_chain(self) -> bool:
        """Of the growth policy."""
        return self.growth.is_chain

    def grow(
        self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int, expand: Expand, most_children: int
    ) -> Grown:
        """At most as deep as each row's limit."""

        def grow(expand: Expand) -> Grown:
            return self.growth.grow(root, params, chooser, room, expand, most_children)

        self.tokens = None
        if not self.length.stops:
            return grow(expand).up_to_depths(self.limits)
        law = law_of_tokens(children_of(self.growth), params)
        watch = Watch(expand, self.length, law, root.shape[0], self.length.at_least)
        grown = grow_watched(grow, watch, root).up_to_depths(self.limits)
        if self.length.watches_tokens:
            self.tokens = watch.tokens_of(grown)
        return grown

    def observe(self, tree: TokenTree, nodes: list[list[int]]) -> None:
        """The growth policy may learn; the length policy is told by the drafter around."""
        self.growth.observe(tree, nodes)


def children_of(growth: GrowthPolicy) -> Children:
    """How a policy comes by children when sampling."""
    if isinstance(growth, DrawnGrowth):
        return "drawn"
    return getattr(growth, "children", "chosen")


def nodes_within(growth: GrowthPolicy, levels: int) -> int:
    """Nodes that a policy proposes within so many levels: exact for fixed shapes and chains, else the most."""
    if isinstance(growth, FixedGrowth):
        return growth.shape.up_to(levels, max(growth.shape.width, 1)).num_nodes - 1
    if growth.is_chain:
        return min(levels, growth.depth)
    budget, width = getattr(growth, "budget", levels), getattr(growth, "width", 1)
    nodes = level_nodes = 0
    for _ in range(min(levels, growth.depth)):
        level_nodes = width if not level_nodes else level_nodes * width
        nodes = min(nodes + level_nodes, budget)
        if nodes == budget:
            break
    return nodes
