"""Quantiles of Student's t law for whole degrees of freedom, without SciPy."""

from __future__ import annotations

import math


def t_cdf(value: float, freedom: int) -> float:
    """P(T <= value), by the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(value / math.sqrt(freedom))
    cosine = math.cos(theta)
    if freedom % 2:
        term, inside = cosine, 0.0
        for k in range(3, freedom + 1, 2):
            inside += term
            term *= cosine * cosine * (k - 1) / k
        between = 2 / math.pi * (theta + math.sin(theta) * inside)
    else:
        term, inside = 1.0, 0.0
        for k in range(2, freedom + 1, 2):
            inside += term
            term *= cosine * cosine * (k - 1) / k
        between = math.sin(theta) * inside
    return 0.5 + between / 2


def t_quantile(probability: float, freedom: int) -> float:
    """The value that T stays below with this probability, by bisection to 1e-12.

    Args:
        probability: between 0.5 and 1.
        freedom: degrees of freedom, at least 1.
    """
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return high
