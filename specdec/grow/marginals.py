"""Trees from independent marginals: one law for each depth, the same at all nodes of that depth (Medusa, DFlash).

DDTree (arXiv 2604.12989): the tree with the most probable paths is found by a heap that starts with the first depth's
best token; taking a node opens its next sibling and its best child.

Dimensions: B rows, K depths, V vocabulary.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from specdec.grow.chosen import ChosenGrowth
from specdec.grow.policy import Frontier, GrowthPolicy
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree


def grow_on_marginals(
    policy: GrowthPolicy, root: Tensor, logits: Tensor, params: SamplingParams, chooser: Chooser, room: int
) -> TokenTree:
    """The tree of any policy on logits [B, K, V], of which entry k is the law of depth k + 1.

    The best-first policy is DDTree here, and needs no level-by-level search.
    """
    room = min(room, logits.shape[1])
    if isinstance(policy, ChosenGrowth) and policy.is_best_first:
        return ddtree(root, logits[:, :room], policy.budget, policy.depth, policy.width)

    def expand(frontier: Frontier) -> Tensor:
        depths = frontier.depths.to(logits.device)
        return logits.gather(1, depths[:, :, None].expand(-1, -1, logits.shape[2]))

    return policy.grow(root, params, chooser, room, expand, logits.shape[2]).tree


def ddtree(root: Tensor, logits: Tensor, budget: int, depth: int, width: int) -> TokenTree:
    """The `budget` nodes of most probable paths under independent laws; children are chosen.

    Args:
        root: [B].
        logits: [B, K, V].
        budget: most proposed nodes.
        depth: most levels; K when that is less.
        width: most children of a node.
    """
    levels = min(depth, logits.shape[1])
    wide = logits[:, :levels]
    wide = wide if wide.dtype == torch.float64 else wide.float()
    best = wide.topk(min(width, budget, wide.shape[2]), dim=-1)
    log_q = (best.values - wide.logsumexp(-1, keepdim=True)).tolist()
    tokens = best.indices.tolist()
    return TokenTree.of_nodes(root, [_heap(q, ids, budget) for q, ids in zip(log_q, tokens, strict=True)])


def _heap(log_q: list[list[float]], tokens: list[list[int]], budget: int) -> list[tuple[int, int]]:
    """One row's nodes as (parent, token), by falling log-probability."""
    if not log_q:
        return []
    open_slots = [(-log_q[0][0], 0, 0, 0.0, 0)]  # (-value, level, rank, parent's value, parent)
    nodes: list[tuple[int, int]] = []
    while open_slots and len(nodes) < budget:
        negative, level, rank, above, parent = heapq.heappop(open_slots)
        if negative == float("inf"):  # no mass here, nor in what is left
            break
        nodes.append((parent, tokens[level][rank]))
        if rank + 1 < len(log_q[level]):
            heapq.heappush(open_slots, (-(above + log_q[level][rank + 1]), level, rank + 1, above, parent))
        if level + 1 < len(log_q):
            heapq.heappush(open_slots, (negative - log_q[level + 1][0], level + 1, 0, -negative, len(nodes)))
    return nodes
