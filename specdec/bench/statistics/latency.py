"""What a reader waits for: the first token, the next arrival, and each token's part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from specdec.bench.statistics.sample import Sample

DEFINITIONS = {
    "ttft": "time to first token: from the call to the first token was there",
    "token": "per-token latency: a step's seconds divided by the tokens it emitted, once for each of these tokens",
    "gap": "arrival gap: a step's seconds, once for each step; the tokens of one step arrive together (vLLM's ITL)",
    "tpot": "time per output token of a request: (end to end - ttft) / (tokens - 1), one value a request (vLLM's TPOT)",
    "request": "end-to-end latency of a request (vLLM's E2EL)",
}


def latency(samples: Sequence[Sample]) -> dict[str, Any]:
    """Distributions in seconds by the names of DEFINITIONS; None for what the method cannot know."""
    first = [sample.first_token for sample in samples if sample.first_token is not None]
    steps = [sample for sample in samples if sample.steps("emitted") and sample.steps("total")]
    gaps = [float(seconds) for sample in steps for seconds in sample.steps("total")]
    return {
        "ttft": distribution(first),
        "token": distribution([part for sample in steps for part in _token_latencies(sample)]),
        "gap": distribution(gaps),
        "tpot": distribution([value for sample in samples if (value := _per_output_token(sample)) is not None]),
        "request": distribution([sample.latency for sample in samples]),
    }


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, standard deviation, median and upper percentiles (linear interpolation); None of nothing."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "p50": p50, "p90": p90, "p99": p99}


def _token_latencies(sample: Sample) -> list[float]:
    steps = zip(sample.steps("total"), sample.steps("emitted"), strict=True)
    return [seconds / emitted for seconds, emitted in steps for _ in range(emitted)]


def _per_output_token(sample: Sample) -> float | None:
    first = sample.first_token
    if first is None or sample.tokens < 2:
        return None
    return max(sample.latency - first, 0.0) / (sample.tokens - 1)
