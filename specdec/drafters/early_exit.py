"""Early-exit self-draft: the target's first E layers with its own norm and head.

LayerSkip (arXiv 2404.16710). The states and keys of those layers are exact for the target, so verification takes
them over and starts at layer E: no layer runs twice for a token.

Dimensions: B rows, N nodes, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.context import Context
from specdec.drafter import Committed
from specdec.errors import UnknownDrafter, UnsupportedModel
from specdec.grow.levels import Children, grow_levels
from specdec.grow.shape import Shape, best_shape
from specdec.probe import tolerance
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Target
from specdec.tree import Resume, TokenTree


class EarlyExitDrafter:
    """Proposes with the bottom of the target itself.

    Args:
        target: the probed target.
        layer: E, layers that draft; 1 to L - 1.
        depth: levels of the tree.
        budget: proposed nodes; at most `depth` for a chain.
        children: "chosen" or "drawn", see DraftModelDrafter.
        min_confidence: when to stop growing, see DraftModelDrafter.

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
    ) -> None:
        if not 1 <= layer < target.num_layers:
            raise UnknownDrafter(f"early-exit needs 1 <= layer < {target.num_layers} on this target, got {layer}")
        if children not in ("chosen", "drawn"):
            raise UnknownDrafter(f'children is "chosen" or "drawn", got {children!r}')
        self.target, self.layer = target, layer
        if not 0 <= min_confidence < 1:
            raise UnknownDrafter(f"min_confidence is at least 0 and below 1, got {min_confidence}")
        self.children: Children = cast(Children, children)
        self.min_confidence = min_confidence
        self.shape = best_shape(depth if budget is None else budget, depth)
        if target.form != "tree":
            raise UnsupportedModel("early-exit needs a target that takes tree masks; this one decodes chains only")
        check_resume(target, layer)
        self._context: Context | None = None

    def reset(self, batch_size: int, context: Context) -> None:
        """Draft into the target's own cache."""
        self._context = context

    def observe(self, committed: Committed) -> None:
        """Nothing to do: the target's commit already kept the accepted columns of every layer."""

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """Grow the shape level by level; every node, leaves too, passes layers 0..E once."""
        assert self._context is not None, "reset comes first"
        shape = self.shape.up_to(room, self.target.vocab_size)
        hidden: list[Tensor] = []

        def expand(parents: list[int], tokens: Tensor) -> Tensor:
            level = shape.levels[shape.topology.depths[parents[0]]]
            logits = self._run(shape, level, tokens, hidden)
            return logits[:, [level.index(node) for node in parents]]

        tree = grow_levels(shape, root, self.children, params, chooser, expand, min_confidence=self.min_confidence)
        self._run(shape, shape.levels[len(hidden)], tree.tokens, hidden, keep_logits=1)
        return TokenTree(tree.tokens, tree.shapes, tree.log_q, Resume(self.layer, torch.cat(hidden, 1)))

    def _run(
        self, shape: Shape, level: tuple[int, ...], tokens: Tensor, hidden: list[Tensor], keep_logits: int = 0
    ) -> Tensor:
        """Run one level through the bottom layers, into the target's cache; returns logits."""
        assert self._context is not None
        nodes = list(level)
        rows = tokens.shape[0]
        depths = torch.tensor([[shape.topology.depths[node] for node in nodes]]).expand(rows, -1)
        sees = shape.topology.ancestors[nodes][:, : nodes[-1] + 1].expand(rows, -1, -1)
        output = self._context.run(tokens[:, nodes], depths, sees, keep_logits=keep_logits, num_layers=self.layer)
        assert output.hidden is not None
        hidden.append(output.hidden)
        return output.logits

    def select(self, rows: list[int]) -> None:
        """Nothing of its own to select."""


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
