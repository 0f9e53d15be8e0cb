"""Slow and obvious ways to the trees that specdec.grow finds faster."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from specdec.sampling import Chooser

Law = Callable[[tuple[int, ...]], list[float]]
"""Probabilities of the next token after a path."""


class ScriptedChooser(Chooser):
    """Draws depend on the law alone, and a token's noise on its own logit, so that any order of asking, all at once or
    with drawn tokens masked, gives the same draws at the same node.
    """

    def draw_without_replacement(self, log_q: Tensor, count: int) -> Tensor:
        rows = log_q.double()
        index = torch.arange(rows.shape[-1], dtype=torch.float64)
        u = ((rows.clamp(min=-1e3) * 1e6 + 78.233 * index).sin() * 43758.5453).frac().abs()
        noise = u.clamp(1e-9, 1 - 1e-9).log().neg().log()
        return (rows - noise).topk(min(count, rows.shape[-1]), dim=-1).indices


def dyspec_heap(law: Law, draws: Callable[[tuple[int, ...]], list[int]], budget: int, depth: int, width: int) -> list:
    """DySpec, Algorithm 1, with residuals renormalised after each draw: paths in the order of taking, and the keys."""
    counter = itertools.count()
    heap: list = [(-1.0, next(counter), (), list(law(())), 0)]
    taken = []
    while heap and len(taken) < budget:
        negative, _, node, residual, drawn = heapq.heappop(heap)
        value = -negative
        token = draws(node)[drawn]
        share = residual[token]
        taken.append(((*node, token), value))
        rest = list(residual)
        rest[token] = 0.0
        left = sum(rest)
        if left > 1e-12 and drawn + 1 < min(width, len(residual)):
            rest = [r / left for r in rest]
            heapq.heappush(heap, (-value * (1 - share), next(counter), node, rest, drawn + 1))
        if len(node) + 1 < depth:
            child = (*node, token)
            heapq.heappush(heap, (-value * share, next(counter), child, list(law(child)), 0))
    return taken


def dyspec_threshold(
    law: Law, draws: Callable[[tuple[int, ...]], list[int]], threshold: float, depth: int, width: int
) -> set[tuple[int, ...]]:
    """DySpec, Algorithm 2, with its comparison the right way round: layer by layer, every slot that is worth it."""
    layer, found = {(): 1.0}, set()
    for _ in range(depth):
        following = {}
        for node, reach in layer.items():
            residual, value = list(law(node)), reach
            for token in draws(node)[:width]:
                if value < threshold:
                    break
                share = residual[token]
                following[(*node, token)] = value * share
                value *= 1 - share
                residual[token] = 0.0
                left = sum(residual)
                if left <= 1e-12:
                    break
                residual = [r / left for r in residual]
        found |= set(following)
        layer = following
    return found


def best_paths(law: Law, budget: int, depth: int, width: int, vocab: int) -> set[tuple[int, ...]]:
    """The most probable paths of all that there are."""
    values: dict[tuple[int, ...], float] = {(): 1.0}
    layer: list[tuple[int, ...]] = [()]
    for _ in range(depth):
        layer = [
            (*node, token)
            for node in layer
            for token in sorted(range(vocab), key=lambda t, node=node: -law(node)[t])[:width]
        ]
        for path in layer:
            values[path] = values[path[:-1]] * law(path[:-1])[path[-1]]
    del values[()]
    return set(sorted(values, key=lambda path: -values[path])[:budget])


def eagle2_paths(law: Law, budget: int, depth: int, width: int, vocab: int) -> set[tuple[int, ...]]:
    """Expand the `width` best of each level, `width` children each; then the best of all."""
    values: dict[tuple[int, ...], float] = {}
    frontier: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(depth):
        level = {}
        for node, value in frontier.items():
            q = law(node)
            for token in sorted(range(vocab), key=lambda t, q=q: -q[t])[:width]:
                level[(*node, token)] = value * q[token]
        values |= level
        frontier = dict(sorted(level.items(), key=lambda item: -item[1])[:width])
    return set(sorted(values, key=lambda path: -values[path])[:budget])


def every_shape(budget: int, depth: int, width: int) -> list[frozenset[tuple[int, ...]]]:
    """All trees of at most `budget` nodes whose children have the lowest ranks, as sets of paths."""

    @cache
    def below(nodes: int, levels: int) -> list[tuple[tuple[int, ...], ...]]:
        """All ways to spend exactly `nodes` below one node."""
        if nodes == 0:
            return [()]
        return forests(nodes, levels, 0) if levels else []

    @cache
    def forests(nodes: int, levels: int, rank: int) -> list[tuple[tuple[int, ...], ...]]:
        if nodes == 0:
            return [()]
        if rank == width:
            return []
        found = []
        for inside in range(nodes):
            for sub in below(inside, levels - 1):
                here = ((rank,), *((rank, *path) for path in sub))
                found += [(*here, *rest) for rest in forests(nodes - 1 - inside, levels, rank + 1)]
        return found

    return [frozenset(paths) for nodes in range(budget + 1) for paths in below(nodes, depth)]


def shape_value(paths: Sequence[tuple[int, ...]] | frozenset[tuple[int, ...]], acceptance: Sequence[float]) -> float:
    """Expected accepted tokens when the child of each rank is the accepted one with this rate."""
    total = 0.0
    for path in paths:
        value = 1.0
        for rank in path:
            value *= acceptance[rank]
        total += value
    return total
