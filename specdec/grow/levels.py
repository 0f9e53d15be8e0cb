"""Growing a fixed shape level by level with a model: one forward for each level, children from its logits.

Dimensions: B rows, N nodes, F nodes with children on one level, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from specdec.grow.shape import Shape
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE, TokenTree, topology

Children = Literal["chosen", "drawn"]
Expand = Callable[[list[int], Tensor], Tensor | None]
"""(nodes of one level that have children, tokens [B, N] so far) -> draft logits [B, F, V] at those nodes.

None ends growth above those nodes' children; not at the root.
"""


def grow_levels(
    shape: Shape,
    root: Tensor,
    children: Children,
    params: SamplingParams,
    chooser: Chooser,
    expand: Expand,
) -> TokenTree:
    """The tree of this shape whose tokens come from a draft law.

    Args:
        shape: which ranks are tried where.
        root: [B].
        children: "chosen" takes the top-k tokens; "drawn" draws them successively without replacement, when
            sampling (at temperature 0 the two are the same).
        params: the draft law is warped with the same values as the target's.
        chooser: source of the draws.
        expand: runs the draft model.
    """
    drawn = children == "drawn" and params.do_sample
    tokens = root.new_zeros(root.shape[0], shape.num_nodes)
    tokens[:, 0] = root
    has_mass = torch.ones(tokens.shape, dtype=torch.bool)
    log_q: Tensor | None = None
    ranks = [0, *(child.rank for child in shape.children)]
    for depth, level in enumerate(shape.levels[:-1], 1):
        parents = _with_children(shape, level)
        logits = expand(parents, tokens)
        if logits is None:
            shape = shape.up_to(depth - 1, shape.width)
            break
        law = params.warp(logits) if drawn else logits
        width = max(ranks[child] + 1 for node in parents for child in shape.topology.children[node])
        if drawn:
            if log_q is None:
                log_q = law.new_zeros(*tokens.shape, law.shape[-1])
            log_q[:, parents] = law
            picked = chooser.draw_without_replacement(law, width)
            mass = law.gather(-1, picked).isfinite().cpu()
        else:
            picked, mass = logits.topk(width, dim=-1).indices, None
        nodes = [node for parent in parents for node in shape.topology.children[parent]]
        index = [i for i, parent in enumerate(parents) for _ in shape.topology.children[parent]]
        tried = [ranks[node] for node in nodes]
        tokens[:, nodes] = picked.to(tokens.device)[:, index, tried]
        if mass is not None:
            has_mass[:, nodes] = mass[:, index, tried]
    num_nodes = shape.num_nodes
    shapes = (shape.topology,) * tokens.shape[0]
    if drawn and not bool(has_mass[:, :num_nodes].all()):
        shapes = tuple(topology(_without_massless(shape, row)) for row in has_mass.tolist())
    return TokenTree(tokens[:, :num_nodes], shapes, None if log_q is None else log_q[:, :num_nodes])


def _with_children(shape: Shape, level: tuple[int, ...]) -> list[int]:
    return [node for node in level if shape.topology.children[node]]


def _without_massless(shape: Shape, has_mass: list[bool]) -> tuple[int, ...]:
    """Parents with padding in place of draws that the law could not make (and whatever hangs below)."""
    alive = [True]
    parents = [NO_NODE]
    for node, child in enumerate(shape.children, 1):
        alive.append(has_mass[node] and alive[child.parent])
        parents.append(child.parent if alive[-1] else NO_NODE)
    return tuple(parents)
