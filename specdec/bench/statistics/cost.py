"""What a verification costs by its width, as the run itself met it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from specdec.bench.statistics.sample import Sample

FEWEST = 5
"""A width met less often than this is left out: its median would be an accident."""


def verify_cost(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Width -> median seconds of a verification and how many there were; batches of one row only.

    The width is the root and its drafted tokens. Widths come with the contexts and prompts they were met at: a curve
    from a sweep at one context is cleaner.
    """
    by_width: dict[int, list[float]] = {}
    for sample in samples:
        if sample.record["batch"]["size"] == 1:
            for count, seconds in zip(sample.steps("drafted"), sample.steps("verify"), strict=False):
                by_width.setdefault(1 + count, []).append(seconds)
    return {
        str(width): {"seconds": float(np.median(seconds)), "steps": len(seconds)}
        for width, seconds in sorted(by_width.items())
        if len(seconds) >= FEWEST
    }
