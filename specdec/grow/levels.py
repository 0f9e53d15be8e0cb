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
Expand = Callable[[list[int], Tensor], Tensor]
"""(nodes of one level that have children, tokens [B, N] so far) -> draft logits [B, F, V] at those nodes."""


def grow_levels(
    shape: Shape, root: Tensor, children: Children, params: SamplingParams, chooser: Chooser, expand: Expand
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
    for level in shape.levels[:-1]:
        parents = [node for node in level if shape.topology.children[node]]
        logits = expand(parents, tokens)
        width = max(len(shape.topology.children[node]) for node in parents)
        if drawn:
            law = params.warp(logits)
            if log_q is None:
                log_q = law.new_zeros(*tokens.shape, law.shape[-1])
            log_q[:, parents] = law
            picked = chooser.draw_without_replacement(law, width)
            mass = law.gather(-1, picked).isfinite().cpu()
        else:
            picked, mass = logits.topk(width, dim=-1).indices, None
        picked = picked.to(tokens.device)
        for index, parent in enumerate(parents):
            nodes = list(shape.topology.children[parent])
            tokens[:, nodes] = picked[:, index, : len(nodes)]
            if mass is not None:
                has_mass[:, nodes] = mass[:, index, : len(nodes)]
    if drawn and not bool(has_mass.all()):
        shapes = tuple(topology(_without_massless(shape, row)) for row in has_mass.tolist())
    else:
        shapes = (shape.topology,) * tokens.shape[0]
    return TokenTree(tokens, shapes, log_q)


def _without_massless(shape: Shape, has_mass: list[bool]) -> tuple[int, ...]:
    """Parents with padding in place of draws that the law could not make (and whatever hangs below)."""
    alive = [True]
    parents = [NO_NODE]
    for node, child in enumerate(shape.children, 1):
        alive.append(has_mass[node] and alive[child.parent])
        parents.append(child.parent if alive[-1] else NO_NODE)
    return tuple(parents)
