"""NVIDIA's names for acceptance: the keys of `acceptance_rate.json` and a `speculation_profile.json` of schema 1.0.

There, a length is the number of tokens emitted in a step, next_token included, and the rates follow from the
histogram of lengths: joint at length n is P(length >= n), conditional is P(length >= n | length >= n - 1). Draft
position i belongs to length i + 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from specdec.bench.statistics.sample import Sample

TOLERANCE = 0.02
"""Of the profile's own check, as its readers apply it."""


def acceptance_rate(samples: Sequence[Sample], fates: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `acceptance_rate.json`; empty where the steps are not known.

    Args:
        samples: of one method.
        fates: from `acceptance`.
    """
    if not fates:
        return {}
    histogram = {int(length): count for length, count in fates["tokens_per_step"].items()}
    lengths = range(1, max(histogram) + 1)
    at_least = {n: sum(count for length, count in histogram.items() if length >= n) for n in (*lengths, 0)}
    of_request = [(sample, float(np.mean(sample.steps("emitted")))) for sample in samples if sample.steps("emitted")]
    categories = dict.fromkeys(sample.record["category"] for sample, _ in of_request)
    return {
        "Request_AL": {_request_name(sample): mean for sample, mean in of_request},
        "Category_AL": {
            category: float(np.mean([mean for sample, mean in of_request if sample.record["category"] == category]))
            for category in categories
        },
        "Average_AL": fates["tau_per_request"],
        "Acceptance_Length_Histogram": fates["tokens_per_step"],
        "Conditional_Acceptance_Rate": {str(n): at_least[n] / at_least[n - 1] for n in lengths},
        "Joint_Acceptance_Rate": {str(n): at_least[n] / at_least[0] for n in lengths},
    }


def speculation_profile(
    method: str, samples: Sequence[Sample], fates: Mapping[str, Any], manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """How good a drafter is, in the portable form; empty for a method that drafted nothing or does not say.

    Args:
        method: its name.
        samples: of this method.
        fates: from `acceptance`.
        manifest: of the run, for what was measured.
    """
    if not fates.get("drafted"):
        return {}
    rates, depth = acceptance_rate(samples, fates), len(fates["marginal"])
    joint, given = rates["Joint_Acceptance_Rate"], rates["Conditional_Acceptance_Rate"]
    marginal = [joint.get(str(position + 2), 0.0) for position in range(depth)]
    mean = fates["tau"]["value"]
    return {
        "schema_version": "1.0",
        "measured": True,
        "method": method,
        "draft_checkpoint": next((m for m in manifest.get("methods") or () if m.get("name") == method), None),
        "target_model": manifest.get("target"),
        "num_speculative_tokens": depth,
        "block_size": None,
        "max_supported_k": depth,
        "verification_method": "longest_prefix",
        "conditional_accept_rates": [given.get(str(position + 2), 0.0) for position in range(depth)],
        "marginal_accept_rates": marginal,
        "mean_accept_length": mean,
        "mean_accept_length_per_request": fates["tau_per_request"],
        "accept_length_model": "chain_analytic" if fates["chain"] else "measured_per_k",
        "accept_length_by_k": {str(depth): mean},
        "acceptance_length_histogram": fates["tokens_per_step"],
        "per_category": {category: {"mean_accept_length": al} for category, al in rates["Category_AL"].items()},
        "measurement_conditions": {key: manifest.get(key) for key in ("questions", "settings", "hardware", "versions")},
        "validation": _validation(mean, marginal),
    }


def _validation(mean: float, marginal: Sequence[float]) -> dict[str, Any]:
    implied = 1 + sum(marginal)
    rising = [
        {"position": position, "value": value, "previous": previous}
        for position, (previous, value) in enumerate(pairwise(marginal), 1)
        if value > previous + 1e-9
    ]
    return {
        "mean_consistency": {
            "implied_mean_accept_length": implied,
            "reported_mean_accept_length": mean,
            "abs_delta": abs(implied - mean),
            "tolerance": TOLERANCE,
            "passed": abs(implied - mean) <= TOLERANCE,
        },
        "marginal_monotonicity": {"passed": not rising, "violations": rising},
    }


def _request_name(sample: Sample) -> str:
    record = sample.record
    return f"{record['question_id']}/{record['turn']}/{record['repeat']}"
