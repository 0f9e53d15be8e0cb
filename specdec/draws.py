"""Draws without replacement from several laws.

Dimensions: M laws, K draws of each, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_right, insort

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RACES = 512
"""Up to so many tokens, noise for each of them is cheaper than anything cleverer on a CPU as well."""

LEAST_LEFT = 2**-20
"""Share of a law that must be left for further draws from it: with less, rounding of the drawn part would show."""


def drawn_without_replacement(log_q: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Token ids [..., K] drawn successively without replacement from log-laws [..., V], in draw order.

    Where fewer than `count` tokens have mass, the surplus ids are arbitrary and have `log_q` of minus infinity.
    """
    if log_q.device.type != "cpu" or log_q.shape[-1] <= RACES:
        return drawn_by_race(log_q, count, generator)
    return drawn_on_a_line(log_q.reshape(-1, log_q.shape[-1]), count, generator).reshape(*log_q.shape[:-1], -1)


def drawn_by_race(log_q: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draws without replacement [..., K] by one pass of noise over the vocabulary, without host syncs.

    Adding independent Gumbel noise and taking the largest yields exactly the successive draws, in order
    (Efraimidis and Spirakis 2006; Kool et al., arXiv 1903.06059).
    """
    noise = torch.empty_like(log_q).exponential_(generator=generator)
    return (log_q - noise.log()).topk(min(count, log_q.shape[-1]), dim=-1).indices


def drawn_on_a_line(log_q: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """The same law [M, K] on a CPU, where noise for a whole vocabulary costs ten times what a law does.

    Each law is laid out as intervals of a line; a uniform point picks one, and is moved over the gaps of those drawn
    before. When little is left of a law, it is taken anew without them.
    """
    laws, size = log_q.shape
    count = min(count, size)
    drawn: list[list[int]] = [[] for _ in range(laws)]
    left, rows = log_q, list(range(laws))
    while rows:
        ends = left.softmax(-1).cumsum(-1, dtype=torch.float64).numpy()
        points = torch.rand(len(rows), count, dtype=torch.float64, generator=generator).tolist()
        for number, row in enumerate(rows):
            drawn[row] += _on_line(ends[number], points[number][: count - len(drawn[row])])
        lacking = [number for number, row in enumerate(rows) if len(drawn[row]) < count]
        rows = [rows[number] for number in lacking]
        if rows:
            left = log_q[rows]
            for number, row in enumerate(rows):
                left[number, drawn[row]] = -torch.inf
            exhausted = (left.amax(-1) == -torch.inf).tolist()
            for number, row in enumerate(rows):
                if exhausted[number]:
                    drawn[row] = _with_surplus(drawn[row], count, size)
            left, rows = left[[not e for e in exhausted]], [r for r, e in zip(rows, exhausted, strict=True) if not e]
    return torch.tensor(drawn, dtype=torch.long).view(laws, count)


def _on_line(ends: NDArray[np.float64], points: list[float]) -> list[int]:
    """Tokens of a law whose intervals end at `ends` [V]: one for each point in [0, 1), none twice.

    Fewer when little is left of the law.
    """
    gaps: list[tuple[float, float]] = []  # start and width of what was drawn, by start
    tokens: list[int] = []
    gone, total = 0.0, float(ends[-1])
    for point in points:
        if total - gone < LEAST_LEFT * total:
            break
        at = point * (total - gone)
        for start, width in gaps:
            if at < start:
                break
            at += width
        token = bisect_right(ends, at)
        if token == len(ends) or token in tokens:  # rounding at an edge: drawn anew
            break
        start = float(ends[token - 1]) if token else 0.0
        width = float(ends[token]) - start
        insort(gaps, (start, width))
        gone += width
        tokens.append(token)
    return tokens


def _with_surplus(drawn: list[int], count: int, size: int) -> list[int]:
    """All tokens that have mass, and then any others."""
    known = set(drawn)
    return drawn + [token for token in range(size) if token not in known][: count - len(drawn)]
