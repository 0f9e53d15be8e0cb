"""Traces: how far a drafter's widest tree would have been accepted from every position of a text.

With chosen children the output does not depend on what is proposed: the text is known before. So the drafter is taken
along it token by token, by real decoding steps that accept nothing, and at each position its whole tree is compared
with what follows. From one trace the steps of *any* part of that tree follow exactly, by walking through the text.

Words: a rank path holds, from the root down, each accepted node's rank among its siblings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from specdec.drafter import Committed, Drafter
from specdec.errors import SpecdecError
from specdec.grow.accuracy import AcceptanceCounts
from specdec.grow.shape import Shape
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Target
from specdec.tree import TokenTree, Topology
from specdec.verifier import Verifier

RankPath = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One step of a generation.

    Attributes:
        context: committed tokens before it, the prompt's included.
        nodes: proposed.
        levels: of the tree.
        emitted: tokens, next_token included.
    """

    context: int
    nodes: float
    levels: float
    emitted: int


@dataclass(frozen=True)
class Trace:
    """One generated text.

    Attributes:
        prompt: tokens of the prompt.
        paths: for each generated token but the last, as a root: the accepted rank path, as far as the text goes.
        cap: most tokens of the text; no tree reaches beyond.
    """

    prompt: int
    paths: tuple[RankPath, ...]
    cap: int

    def steps(self, shape: Shape) -> Iterator[Step]:
        """The steps of decoding this text with a fixed shape, which is part of the measured one."""
        held, at = _rank_paths(shape), 0
        while at < len(self.paths):
            room = max(self.cap - at - 2, 0)
            cut, path = shape.up_to(room, max(shape.width, 1)), self.paths[at]
            accepted = next(n for n in range(min(len(path), room), -1, -1) if path[:n] in held)
            emitted = min(accepted + 1, len(self.paths) - at)
            yield Step(self.prompt + at, cut.num_nodes - 1, cut.depth, emitted)
            at += emitted


def _rank_paths(shape: Shape) -> set[RankPath]:
    paths: list[RankPath] = [()]
    for child in shape.children:
        paths.append((*paths[child.parent], child.rank))
    return set(paths)


@torch.no_grad()
def traced(
    target: Target,
    drafter: Drafter,
    prompt: Sequence[int],
    text: Sequence[int],
    cap: int,
    params: SamplingParams | None = None,
    counts: AcceptanceCounts | None = None,
    *,
    roots_only: bool = False,
) -> Trace:
    """Take the drafter along a text that the target generated.

    Args:
        target: the target, probed.
        drafter: with the widest trees of interest; its children must be chosen.
        prompt: ids.
        text: the generated ids.
        cap: most tokens that were asked for.
        params: of sampling, as the drafter would see them.
        counts: also counts here which child of which rank and depth was right.
        roots_only: score the root alone, all that a drafter needs that learns nothing from the logits of other nodes.

    Raises:
        SpecdecError: children were drawn.
    """
    params = params or SamplingParams()
    chooser = Chooser(params.generator)
    verifier = Verifier(target, drafter.taps, len(prompt) + len(text) + 64)
    ids = torch.tensor([list(prompt)], device=target.device)
    mask = torch.ones_like(ids)
    output = verifier.prefill(ids, target.model.generation_config, {"attention_mask": mask, "use_cache": True})
    drafter.reset(1, verifier.context)
    drafter.observe(Committed([list(prompt)], taps=output.taps))
    paths = []
    for at in range(len(text) - 1):
        root = torch.tensor([text[at]], device=target.device)
        tree = drafter.propose(root, params, chooser, len(text) - 1 - at)
        if tree.log_q is not None:
            raise SpecdecError("a trace needs chosen children; drawn ones depend on the draw, measure them by decoding")
        # A tree that the target's own first layers ran has to be finished.
        needed = TokenTree.of_roots(root) if roots_only and tree.resume is None else tree
        scored = verifier.score(needed)
        verifier.commit([[]])
        nodes = accepted_nodes(tree.shapes[0], tree.tokens[0].tolist(), text[at + 1 :])
        drafter.observe(Committed([[text[at]]], [[0]], needed, scored.logits, scored.taps))
        if counts is not None:
            counts.observe(tree, [[0, *nodes]])
        paths.append(_ranks(tree, nodes))
    return Trace(len(prompt), tuple(paths), cap)


def accepted_nodes(shape: Topology, tokens: Sequence[int], following: Sequence[int]) -> list[int]:
    """The nodes below the root that hold what follows, as far as the tree goes."""
    nodes, node = [], 0
    for token in following:
        child = next((c for c in shape.children[node] if tokens[c] == token), None)
        if child is None:
            break
        nodes.append(child)
        node = child
    return nodes


def _ranks(tree: TokenTree, nodes: Sequence[int]) -> RankPath:
    children = tree.shapes[0].children
    return tuple(children[parent].index(node) for parent, node in zip([0, *nodes], nodes, strict=False))
