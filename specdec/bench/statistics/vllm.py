"""The keys that `vllm bench serve` writes, so that its readers can read ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specdec.bench.statistics.latency import latency
from specdec.bench.statistics.sample import Sample

_NAMES = {"ttft": "ttft", "tpot": "tpot", "itl": "gap", "e2el": "request"}


def vllm_keys(samples: Sequence[Sample], failed: int, fates: Mapping[str, Any]) -> dict[str, Any]:
    """One method's run under vLLM's names and by its formulas; durations in milliseconds.

    The acceptance length is 1 + accepted / drafts, and a rate by position is accepted at it / drafts: both over the
    steps that drafted, unlike tau and our marginal acceptance, which run over all steps. ITL is the gap between
    arrivals, one a step.

    Args:
        samples: of one method.
        failed: records that ended in an error.
        fates: from `acceptance`.
    """
    seconds = sum(sample.time for sample in samples)
    read = sum(sample.record["prompt"]["tokens"] for sample in samples)
    written = sum(sample.tokens for sample in samples)
    keys: dict[str, Any] = {
        "duration": seconds,
        "completed": len(samples),
        "failed": failed,
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": len(samples) / seconds if seconds else None,
        "output_throughput": written / seconds if seconds else None,
        "total_token_throughput": (read + written) / seconds if seconds else None,
    }
    measured = latency(samples)
    for theirs, ours in _NAMES.items():
        for statistic, key in (("mean", "mean"), ("p50", "median"), ("std", "std"), ("p99", "p99")):
            value = (measured[ours] or {}).get(statistic)
            keys[f"{key}_{theirs}_ms"] = None if value is None else 1000 * value
    return keys | _speculation(fates)


def _speculation(fates: Mapping[str, Any]) -> dict[str, Any]:
    drafts = fates.get("drafting_steps")
    if not drafts:
        return {}
    return {
        "spec_decode_acceptance_rate": 100 * fates["acceptance_rate"],
        "spec_decode_acceptance_length": 1 + fates["accepted"] / drafts,
        "spec_decode_num_drafts": drafts,
        "spec_decode_draft_tokens": fates["drafted"],
        "spec_decode_accepted_tokens": fates["accepted"],
        "spec_decode_per_position_acceptance_rates": [count / drafts for count in fates["accepted_at_depth"]],
    }
