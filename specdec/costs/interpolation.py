"""Piecewise linear curves through measured points."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import product


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float:
    """The value at x of the line through points (x, y), sorted by x.

    Nothing is smoothed and the curve need not rise: two or three rows can cost more than four. Left of the first point
    the curve is flat; right of the last one it goes on as between the last two, but never falls.
    """
    if len(points) == 1 or x <= points[0][0]:
        return points[0][1]
    at = min(bisect_right(points, x, key=lambda point: point[0]), len(points) - 1)
    (left, low), (right, high) = points[at - 1], points[at]
    slope = (high - low) / (right - left)
    if x > right:
        return high + max(slope, 0.0) * (x - right)
    return low + slope * (x - left)


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> tuple[float, ...]:
    """Coefficients >= 0 that minimise the summed relative squared error of `rows @ coefficients` against values > 0.

    Few columns only: every choice of those that are not 0 is tried, which is exact.
    """
    weighted = [[entry / value for entry in row] for row, value in zip(rows, values, strict=True)]
    columns = range(len(rows[0]))
    best, best_error = tuple(0.0 for _ in columns), float(len(values))
    for used in _subsets(columns):
        found = _solved(weighted, used)
        if found is None or min(found) < 0:
            continue
        coefficients = tuple(found[used.index(column)] if column in used else 0.0 for column in columns)
        error = sum((sum(c * e for c, e in zip(coefficients, row, strict=True)) - 1) ** 2 for row in weighted)
        if error < best_error - 1e-12:
            best, best_error = coefficients, error
    return best


def _subsets(columns: Iterable[int]) -> list[list[int]]:
    """All non-empty choices of columns, small ones first: of equally good fits the simplest one wins."""
    columns = list(columns)
    chosen = [
        [c for c, take in zip(columns, taken, strict=True) if take] for taken in product((0, 1), repeat=len(columns))
    ]
    return sorted((choice for choice in chosen if choice), key=len)


def _solved(rows: Sequence[Sequence[float]], used: Sequence[int]) -> list[float] | None:
    """Normal equations of `rows[:, used] @ c = 1` by elimination; None where they have no single solution."""
    size = len(used)
    matrix = [[sum(row[i] * row[j] for row in rows) for j in used] + [sum(row[i] for row in rows)] for i in used]
    for at in range(size):
        pivot = max(range(at, size), key=lambda line: abs(matrix[line][at]))
        if (
            abs(matrix[pivot][at]) < 1e-12 * max(abs(matrix[line][line]) for line in range(size))
            or not matrix[pivot][at]
        ):
            return None
        matrix[at], matrix[pivot] = matrix[pivot], matrix[at]
        for line in range(size):
            if line != at:
                factor = matrix[line][at] / matrix[at][at]
                matrix[line] = [a - factor * b for a, b in zip(matrix[line], matrix[at], strict=True)]
    return [matrix[at][size] / matrix[at][at] for at in range(size)]


def median_of(values: Iterable[float]) -> tuple[float, float]:
    """Median and interquartile range; the range of fewer than four values is that from the least to the largest."""
    ordered = sorted(values)
    middle = _quantile(ordered, 0.5)
    if len(ordered) < 4:
        return middle, ordered[-1] - ordered[0]
    return middle, _quantile(ordered, 0.75) - _quantile(ordered, 0.25)


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


Clock = Callable[[], float]
"""Seconds from any start, such as `time.perf_counter`."""
