"""Sequoia's optimal shape by its dynamic programme (arXiv 2402.12374, section 3.1).

The j-th child of any node is the accepted one with probability `acceptance[j]`; the best shape has the most expected
accepted tokens. With F(m, b) the best value of a subtree of m nodes (its own root counted) whose root has b children,
at most l levels deep, and G(m) = max_b F(m, b) the same with any number of children:

    F_l(1, 0) = 1
    F_l(m, b) = max_y F_l(m - y, b - 1) + acceptance[b] * G_{l-1}(y)

For a non-increasing vector the greedy construction finds the same value faster; this also serves vectors that are
not, as measured ones are, without flattening them first.

Dimensions: M nodes with the root.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from specdec.errors import UnknownDrafter
from specdec.grow.shape import Shape, check_limits, greedy_shape, shape_of


@lru_cache(maxsize=64)
def sequoia_shape(budget: int, depth: int, acceptance: tuple[float, ...], width: int | None = None) -> Shape:
    """The shape of at most `budget` proposed nodes, `depth` levels and `width` children with the most expected tokens.

    Raises:
        UnknownDrafter: a limit out of range, or a vector that is no list of probabilities.
    """
    check_limits(budget, depth)
    if not acceptance or not all(0 <= rate <= 1 for rate in acceptance):
        raise UnknownDrafter("an acceptance vector holds numbers from 0 to 1, at least one")
    ranks = acceptance if width is None else acceptance[:width]
    if all(a >= b for a, b in pairwise(ranks)):
        return greedy_shape(budget, (ranks,) * min(depth, budget))
    return _backtracked(budget, min(depth, budget), ranks)


def expected_tokens(shape: Shape, acceptance: tuple[float, ...]) -> float:
    """Tokens for each target call, next_token included, if `acceptance` holds at every node."""
    values = [1.0]
    for child in shape.children:
        rate = acceptance[child.rank] if child.rank < len(acceptance) else 0.0
        values.append(values[child.parent] * rate)
    return sum(values)


def _backtracked(budget: int, depth: int, ranks: tuple[float, ...]) -> Shape:
    """Fill the tables bottom up, then read the best shape off the choices."""
    nodes = budget + 1
    below = torch.full((nodes + 1,), -torch.inf, dtype=torch.float64)  # G by m; entry 0 is no tree at all
    below[1] = 1.0
    num_children: list[Tensor] = [torch.zeros(nodes + 1, dtype=torch.long)]
    sizes: list[list[Tensor]] = [[]]
    for _ in range(depth):
        values = [torch.full_like(below, -torch.inf)]
        values[0][1] = 1.0
        chosen: list[Tensor] = []
        for rate in ranks:
            best, size = _max_plus(values[-1], torch.where(below > 0, rate * below, -torch.inf))
            values.append(best)
            chosen.append(size)
        whole = torch.stack(values)
        below, count = whole.max(0)
        num_children.append(count)
        sizes.append(chosen)
    paths: list[tuple[int, ...]] = []

    def visit(path: tuple[int, ...], levels: int, size: int) -> None:
        for rank in reversed(range(int(num_children[levels][size]))):
            inside = int(sizes[levels][rank][size])
            paths.append((*path, rank))
            visit((*path, rank), levels - 1, inside)
            size -= inside

    visit((), depth, int(below.argmax()))
    return shape_of(paths)


def _max_plus(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """max_y left[m - y] + right[y] over y >= 1, and the y that reaches it; all of length M + 1."""
    size = len(left)
    padded = torch.cat([torch.full_like(left, -torch.inf), left])
    m, y = torch.arange(size)[:, None], torch.arange(1, size)[None]
    best = (padded[m - y + size] + right[1:]).max(1)
    return best.values, best.indices + 1
