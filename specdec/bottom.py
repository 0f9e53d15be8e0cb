"""Drafting inside the target: its first layers run over a growing tree, into the target's own cache.

What those layers make is exact for the target, keys and values included; so verification begins above them, and no
layer runs twice for a token. That asks for two things: every node of the tree passes through them, leaves too, and in
the end the cache holds the nodes in node order.

Dimensions: B rows, F nodes of a frontier, N nodes, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.context import Context
from specdec.errors import UnknownDrafter, UnsupportedModel
from specdec.grow.policy import Columns, Frontier, Grown
from specdec.probe import tolerance
from specdec.target import Target, TargetOutput
from specdec.tree import NO_NODE, Resume, TokenTree


class Bottom:
    """The target's first `num_layers` layers, and the tree that grows in them.

    Args:
        target: the probed target.
        num_layers: E, 1 to L - 1.
        drafter: who drafts, for messages.

    Raises:
        UnknownDrafter: E out of range.
        UnsupportedModel: the target decodes chains only, or does not resume exactly from a layer's output.
    """

    def __init__(self, target: Target, num_layers: int, drafter: str) -> None:
        if not 1 <= num_layers < target.num_layers:
            raise UnknownDrafter(f"{drafter} needs 1 <= layer < {target.num_layers} on this target, got {num_layers}")
        if target.form != "tree":
            raise UnsupportedModel(f"{drafter} needs a target that takes tree masks; this one decodes chains only")
        check_resume(target, num_layers, drafter)
        self.target, self.num_layers = target, num_layers
        self._context: Context | None = None
        self._columns = Columns(0)
        self._hidden: list[Tensor] = []

    def reset(self, context: Context) -> None:
        """Draft into this context, the target's own."""
        self._context = context

    def begin(self, batch_size: int) -> None:
        """Begin new trees; the target's commit has dropped the columns of the old ones."""
        self._columns, self._hidden = Columns(batch_size), []

    def run(self, frontier: Frontier, *, keep_logits: int | None = 0) -> TargetOutput:
        """Append nodes and run them.

        Returns:
            `hidden` [B, F, D], the output of layer E - 1, and logits of the target's own norm and head on it; of the
            last `keep_logits` nodes, 0 for all and None for no logits.
        """
        assert self._context is not None, "reset comes first"
        sees = self._columns.append(frontier)
        output = self._context.run(
            frontier.tokens, frontier.depths, sees, keep_logits=keep_logits, num_layers=self.num_layers
        )
        assert output.hidden is not None
        self._hidden.append(output.hidden)
        return output

    def finish(self, grown: Grown) -> TokenTree:
        """Run the nodes that growth has not, put all in node order, and hand the states over to verification."""
        assert self._context is not None
        leaves, order = _leaves_and_order(grown, self._columns.count)
        if leaves is not None:
            self.run(leaves, keep_logits=None)
        hidden = torch.cat(self._hidden, 1)
        if order != [list(range(self._columns.count))] * len(order):
            self._context.reorder(order, grown.tree.depths(), self.num_layers)
            at = torch.tensor(order, device=hidden.device)
            hidden = hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[2]))
        return replace(grown.tree, resume=Resume(self.num_layers, hidden))


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
def check_resume(target: Target, layer: int, drafter: str) -> None:
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
        bottom = split.run(ids, zeros, sees, num_layers=layer, keep_logits=None)
        assert bottom.hidden is not None
        got = split.finish(layer, bottom.hidden, ids, sees).logits.float()
    except Exception as error:
        raise UnsupportedModel(
            f"{type(target.model).__name__} cannot run its layers in two parts "
            f"({type(error).__name__}); use another drafter than {drafter}"
        ) from error
    difference = (expected - got).abs().max().item()
    if not difference <= tolerance(target.dtype, 0.0, expected.std().item()):
        raise UnsupportedModel(
            f"{type(target.model).__name__} does not continue exactly from layer {layer} "
            f"(difference {difference:.2g}); use another drafter than {drafter}"
        )
    passed.add(circumstances)
