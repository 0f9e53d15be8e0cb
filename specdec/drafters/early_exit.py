"""Early-exit self-draft: the target's first E layers with its own norm and head.

LayerSkip (arXiv 2404.16710). The states and keys of those layers are exact for the target, so verification takes
them over and starts at layer E: no layer runs twice for a token.

Dimensions: B rows, N nodes, D hidden size, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from specdec.bottom import Bottom
from specdec.context import Context
from specdec.drafter import Committed
from specdec.grow.named import growth_named
from specdec.grow.policy import Frontier, GrowthPolicy
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Target
from specdec.tree import TokenTree


class EarlyExitDrafter:
    """Proposes with the bottom of the target itself.

    Args:
        target: the probed target.
        layer: E, layers that draft; 1 to L - 1.
        depth: levels of the tree.
        budget, children, min_confidence, grow, width, threshold, table: see DraftModelDrafter.

    Raises:
        UnknownDrafter: a layer outside 1..L-1.
        UnsupportedModel: the target decodes chains only, or does not resume exactly from a layer's output.
    """

    taps: tuple[int, ...] = ()

    def __init__(
        self,
        target: Target,
        *,
        layer: int = 2,
        depth: int = 3,
        budget: int | None = None,
        children: str = "chosen",
        min_confidence: float = 0.0,
        grow: str | GrowthPolicy = "fixed",
        width: int | None = None,
        threshold: float | None = None,
        table: str | None = None,
    ) -> None:
        self.target, self.layer = target, layer
        self._bottom = Bottom(target, layer, "early-exit")
        if isinstance(grow, str):
            grow = growth_named(
                grow, depth=depth, budget=budget, width=width, threshold=threshold, table=table, children=children,
                min_confidence=min_confidence,
            )  # fmt: skip
        self.policy: GrowthPolicy = grow

    def reset(self, batch_size: int, context: Context) -> None:
        """Draft into the target's own cache."""
        self._bottom.reset(context)

    def observe(self, committed: Committed) -> None:
        """The target's commit already kept the accepted columns of every layer; only the policy may learn."""
        if committed.tree is not None and committed.nodes is not None:
            self.policy.observe(committed.tree, committed.nodes)

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """Grow level by level; every node, leaves too, passes layers 0..E once."""
        self._bottom.begin(root.shape[0])

        def expand(frontier: Frontier) -> Tensor:
            return self._bottom.run(frontier).logits

        return self._bottom.finish(self.policy.grow(root, params, chooser, room, expand, self.target.vocab_size))

    def select(self, rows: list[int]) -> None:
        """Nothing of its own to select."""
