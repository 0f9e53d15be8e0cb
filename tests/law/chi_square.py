"""Pearson's chi-square test of observed token sequences against an exact law."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tests.law.enumeration import Law

LEAST_EXPECTED = 5.0
"""Cells expected less often than this are pooled; the chi-square approximation needs some counts in each."""

SIGNIFICANCE = 1e-6
"""A correct implementation fails one test of this kind in a million seeds; the seeds here are fixed."""


@dataclass(frozen=True)
class ChiSquare:
    """The statistic, its degrees of freedom, and the probability of at least this statistic under the law."""

    statistic: float
    freedom: int
    p_value: float


def chi_square(samples: Iterable[tuple[int, ...]], law: Law) -> ChiSquare:
    """Compare samples with their supposed law; a sample that the law excludes has p-value 0."""
    counts = dict.fromkeys(law, 0)
    total = 0
    for sample in samples:
        if not law.get(sample):
            return ChiSquare(float("inf"), 0, 0.0)
        counts[sample] += 1
        total += 1
    cells: list[tuple[float, float]] = []
    pooled = [0.0, 0.0]
    for sequence, probability in law.items():
        expected = probability * total
        if expected >= LEAST_EXPECTED:
            cells.append((counts[sequence], expected))
        else:
            pooled = [pooled[0] + counts[sequence], pooled[1] + expected]
    if pooled[1] >= LEAST_EXPECTED:
        cells.append((pooled[0], pooled[1]))
    assert len(cells) > 1, "too few samples for a test"
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    freedom = len(cells) - 1
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return ChiSquare(statistic, freedom, float(torch.special.gammaincc(half[0], half[1])))
