"""Where a step's time goes, and the speed-up that these costs predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specdec.bench.statistics.sample import PHASES, Sample


@dataclass(frozen=True)
class PlainStep:
    """One step of decoding without speculation.

    Attributes:
        seconds: of one step of the whole batch.
        tokens: tokens that it emits in the mean, 1 at batch size 1.
        method: where it was measured.
    """

    seconds: float
    tokens: float
    method: str


def step_budget(samples: Sequence[Sample]) -> dict[str, Any]:
    """Mean seconds per step of a batch by phase; an empty dict where the method does not say.

    `other` is the time after the first token that no phase accounts for. `per_token` divides by the tokens emitted in
    these steps, all rows together. `prefill` is per batch, and is no part of a step.
    """
    timed = [s for s in samples if s.calls and s.decode_time is not None and None not in map(s.spent, PHASES)]
    calls = sum(sample.share * sample.calls for sample in timed)
    if not calls:
        return {}
    total = sum(sample.decode_time or 0.0 for sample in timed)
    spent: dict[str, float] = {phase: sum(sample.spent(phase) or 0.0 for sample in timed) for phase in PHASES}
    spent["other"] = max(total - sum(spent.values()), 0.0)
    emitted = sum(sum(sample.steps("emitted")) for sample in timed)
    first = sum(sample.share * (sample.first_token or 0.0) for sample in timed)
    return {
        "steps": round(calls, 6),
        "per_step": {phase: seconds / calls for phase, seconds in spent.items()} | {"total": total / calls},
        "share": {phase: seconds / total if total else 0.0 for phase, seconds in spent.items()},
        "per_token": total / emitted if emitted else None,
        "tokens_per_call": emitted / calls,
        "prefill": first / sum(sample.share for sample in timed),
    }


def plain_step(samples: Sequence[Sample]) -> PlainStep | None:
    """Cost of a step that emits one token for each running row; None where the first token's time is not known.

    A batch takes as many steps as its longest row has tokens after the first.
    """
    timed = [sample for sample in samples if sample.decode_time is not None]
    longest: dict[tuple[int, int, int], int] = {}
    for sample in timed:
        batch = (sample.record["turn"], sample.record["repeat"], sample.record["batch"]["id"])
        longest[batch] = max(longest.get(batch, 0), sample.later_tokens)
    steps, tokens = sum(longest.values()), sum(sample.later_tokens for sample in timed)
    if not steps:
        return None
    seconds = sum(sample.decode_time or 0.0 for sample in timed)
    return PlainStep(seconds / steps, tokens / steps, timed[0].record["method"])


def prediction(budget: dict[str, Any], plain: PlainStep | None, measured: float | None) -> dict[str, Any]:
    """Speed-up of decoding that the measured costs predict, beside the measured one; {} where a cost is unknown.

    With tau tokens a call and costs c in plain steps it predicts tau / (c_draft + c_verify): what the models alone
    allow. What is measured falls short of it by acceptance, commit and bookkeeping.

    Args:
        budget: from `step_budget`.
        plain: cost of a step without speculation.
        measured: ratio of decode tokens per second, method over baseline.
    """
    if not budget or plain is None or not plain.seconds:
        return {}
    costs = {phase: seconds / plain.seconds for phase, seconds in budget["per_step"].items()}
    gain = budget["tokens_per_call"] / plain.tokens
    forwards = costs["draft"] + costs["verify"]
    return {
        "plain_step_seconds": plain.seconds,
        "plain_step_method": plain.method,
        "cost_in_plain_steps": costs,
        "predicted_decode": gain / forwards if forwards else None,
        "measured_decode": measured,
    }
