"""A drafter that counts which children of another drafter's trees are accepted."""

from __future__ import annotations

from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed, Drafter
from specdec.grow.accuracy import AcceptanceCounts
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree


class MeasuredDrafter:
    """Proposes what `drafter` proposes, and keeps counts over all generations.

    Args:
        drafter: what is measured; its trees should hold all lower-ranked siblings of each child.
        depth: levels to tell apart; deeper ones are not counted.
        width: ranks to count.
    """

    def __init__(self, drafter: Drafter, depth: int = 4, width: int = 16) -> None:
        self.drafter = drafter
        self.taps = drafter.taps
        self.counts = AcceptanceCounts(depth, width)

    def reset(self, batch_size: int, context: Context) -> None:
        """A new generation; the counts go on."""
        self.drafter.reset(batch_size, context)

    def observe(self, committed: Committed) -> None:
        """Count what was accepted of the last trees."""
        if committed.tree is not None and committed.nodes is not None:
            self.counts.observe(committed.tree, committed.nodes)
        self.drafter.observe(committed)

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """The other drafter's trees."""
        return self.drafter.propose(root, params, chooser, room)

    def select(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self.drafter.select(rows)
