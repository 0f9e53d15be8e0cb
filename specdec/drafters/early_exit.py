"""Early-exit self-draft: the target's first E layers with its own norm and head.

LayerSkip (arXiv 2404.16710). The states and keys of those layers are exact for the target, so verification takes
them over and starts at layer E: no layer runs twice for a token.

Dimensions: B rows, N nodes, D hidden size, V vocabulary.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.context import Context
from specdec.drafter import Committed
from specdec.errors import UnknownDrafter, UnsupportedModel
from specdec.grow.named import growth_named
from specdec.grow.policy import Columns, Frontier, Grown, GrowthPolicy
from specdec.probe import tolerance
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Target
from specdec.tree import NO_NODE, Resume, TokenTree


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
        if not 1 <= layer < target.num_layers:
            raise UnknownDrafter(f"early-exit needs 1 <= layer < {target.num_layers} on this target, got {layer}")
        self.target, self.layer = target, layer
        if isinstance(grow, str):
            grow = growth_named(
                grow, depth=depth, budget=budget, width=width, threshold=threshold, table=table, children=children,
                min_confidence=min_confidence,
            )  # fmt: skip
        self.policy: GrowthPolicy = grow
        if target.form != "tree":
            raise UnsupportedModel("early-exit needs a target that takes tree masks; this one decodes chains only")
        check_resume(target, layer)
        self._context: Context | None = None

    def reset(self, batch_size: int, context: Context) -> None:
        """Draft into the target's own cache."""
        self._context = context

    def observe(self, committed: Committed) -> None:
        """The target's commit already kept the accepted columns of every layer; only the policy may learn."""
        if committed.tree is not None and committed.nodes is not None:
            self.policy.observe(committed.tree, committed.nodes)

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """Grow level by level; every node, leaves too, passes layers 0..E once."""
        assert self._context is not None, "reset comes first"
        columns = Columns(root.shape[0])
        hidden: list[Tensor] = []

        def expand(frontier: Frontier) -> Tensor:
            return self._run(frontier, columns, hidden)

        grown = self.policy.grow(root, params, chooser, room, expand, self.target.vocab_size)
        leaves, order = _leaves_and_order(grown, columns.count)
        if leaves is not None:
            self._run(leaves, columns, hidden, keep_logits=1)
        tree, states = grown.tree, torch.cat(hidden, 1)
        if order != [list(range(columns.count))] * len(order):
            self._context.reorder(order, tree.depths(), self.layer)
            at = torch.tensor(order, device=states.device)
            states = states.gather(1, at[:, :, None].expand(-1, -1, states.shape[2]))
        return TokenTree(tree.tokens, tree.shapes, tree.log_q, Resume(self.layer, states))

    def _run(self, frontier: Frontier, columns: Columns, hidden: list[Tensor], keep_logits: int = 0) -> Tensor:
        """Run nodes through the bottom layers, into the target's cache; returns logits."""
        assert self._context is not None
        sees = columns.append(frontier)
        output = self._context.run(
            frontier.tokens, frontier.depths, sees, keep_logits=keep_logits, num_layers=self.layer
        )
        assert output.hidden is not None
        hidden.append(output.hidden)
        return output.logits

    def select(self, rows: list[int]) -> None:
        """Nothing of its own to select."""


def _leaves_and_order(grown: Grown, num_columns: int) -> tuple[Frontier | None, list[list[int]]]:
    """The nodes that growth did not expand as one more frontier, and each row's columns in node order."""
    tree, order = grown.tree, [list(row) for row in grown.columns]
    leaves = []
    for shape, columns in zip(tree.shapes, order, strict=True):
        row = [n for n in range(1, tree.num_nodes) if shape.parents[n] != NO_NODE and columns[n] == NO_NODE]
        for place, node in enumerate(row):
            columns[node] = num_columns + place
        columns[:] = [max(column, 0) for column in columns]  # padding nodes repeat the root
        leaves.append(row)
    width = max(map(len, leaves))
    if width == 0:
        return None, order
    live = torch.tensor([[i < len(row) for i in range(width)] for row in leaves])
    nodes = torch.tensor([[*row, *[0] * (width - len(row))] for row in leaves])
    parents = [
        [columns[shape.parents[n]] for n in row] + [NO_NODE] * (width - len(row))
        for shape, columns, row in zip(tree.shapes, order, leaves, strict=True)
    ]
    tokens = tree.tokens.gather(1, nodes.to(tree.tokens.device))
    depths = tree.depths().gather(1, nodes).masked_fill(~live, 0)
    return Frontier(tokens, torch.tensor(parents), depths), order


_resumes: WeakKeyDictionary[PreTrainedModel, set[tuple[int, str, torch.dtype]]] = WeakKeyDictionary()
# What passed the check below, of each live model.


@torch.no_grad()
def check_resume(target: Target, layer: int) -> None:
    """Refuse a target whose upper layers do not continue exactly from a lower layer's output."""
    passed = _resumes.setdefault(target.model, set())
    circumstances = (layer, target.attention, target.dtype)
    if circumstances in passed:
        return
    ids = torch.arange(3, 9)[None] % target.vocab_size
    zeros, width = torch.arange(ids.shape[1])[None], ids.shape[1]
    sees = torch.ones(1, width, width, dtype=torch.bool).tril()
    whole, split = Context(target), Context(target)
    whole.begin([0], 0)
    split.begin([0], 0)
    expected = whole.run(ids, zeros, sees).logits.float()
    try:
        bottom = split.run(ids, zeros, sees, num_layers=layer)
        assert bottom.hidden is not None
        got = split.finish(layer, bottom.hidden, ids, sees).logits.float()
    except Exception as error:
        raise UnsupportedModel(
            f"{type(target.model).__name__} cannot run its layers in two parts "
            f"({type(error).__name__}); use another drafter than early-exit"
        ) from error
    difference = (expected - got).abs().max().item()
    if not difference <= tolerance(target.dtype, 0.0, expected.std().item()):
        raise UnsupportedModel(
            f"{type(target.model).__name__} does not continue exactly from layer {layer} "
            f"(difference {difference:.2g}); use another drafter than early-exit"
        )
    passed.add(circumstances)
