"""How much faster than the baseline: paired by prompt, repeats averaged first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specdec.bench.statistics.bootstrap import Estimate, Floats, estimate, quotient
from specdec.bench.statistics.sample import Question, Sample

SLOWEST = 5
"""How many of the worst prompts a report names."""


@dataclass(frozen=True)
class Pair:
    """One question measured with two methods: seconds and tokens over the turns that both of them finished."""

    question: Question
    column: str
    base_seconds: float
    base_tokens: float
    seconds: float
    tokens: float

    @property
    def ratio(self) -> float:
        """The baseline's time per token over the method's: above 1 the method is faster.

        Per token, because answers may differ in length where generation ends by itself.
        """
        return (self.base_seconds / self.base_tokens) / (self.seconds / self.tokens)


def pair_up(base: Iterable[Sample], method: Iterable[Sample]) -> list[Pair]:
    """Questions that both methods answered, by the turns they have in common; answers without tokens are left out."""
    ours, theirs, pairs = _answers(method), _answers(base), []
    for question, turns in ours.items():
        common = [turn for turn in turns if turn in theirs.get(question, {})]
        own = [_mean(turns[turn]) for turn in common]
        other = [_mean(theirs[question][turn]) for turn in common]
        if common:
            column = turns[common[0]][0].column
            seconds, tokens = (sum(part) for part in zip(*own, strict=True))
            base_seconds, base_tokens = (sum(part) for part in zip(*other, strict=True))
            pairs.append(Pair(question, column, base_seconds, base_tokens, seconds, tokens))
    return [pair for pair in pairs if min(pair.base_seconds, pair.base_tokens, pair.seconds, pair.tokens) > 0]


def geometric_mean(pairs: Sequence[Pair], units: Mapping[Question, int], stratified: bool = False) -> Estimate:
    """Geometric mean over prompts of the per-prompt ratios: every prompt weighs the same."""
    columns = np.array([[1.0, math.log(pair.ratio)] for pair in pairs])
    return _over_prompts(columns, _exp_mean, pairs, units, stratified)


def total_time_ratio(pairs: Sequence[Pair], units: Mapping[Question, int], stratified: bool = False) -> Estimate:
    """Time per token of all prompts together, baseline over method: every second weighs the same.

    At equal token counts this is total time over total time.
    """
    columns = np.array([[pair.base_seconds, pair.base_tokens, pair.seconds, pair.tokens] for pair in pairs])
    return _over_prompts(columns, _ratio_of_paces, pairs, units, stratified)


def ratio_of_means(pairs: Sequence[Pair], units: Mapping[Question, int], stratified: bool = False) -> Estimate:
    """Spec-Bench's formula on true token counts: mean tokens per second over prompts, method over baseline."""
    columns = np.array([[pair.tokens / pair.seconds, pair.base_tokens / pair.base_seconds] for pair in pairs])
    return _over_prompts(columns, quotient, pairs, units, stratified)


def speedup(pairs: Sequence[Pair], units: Mapping[Question, int], stratified: bool = False) -> dict[str, Any]:
    """Every form of the speed-up for JSON; an empty dict without pairs.

    Args:
        pairs: the prompts to average over.
        units: question -> what it is resampled with, see `units_of`.
        stratified: resample each column apart; for a group that holds several.
    """
    if not pairs:
        return {}
    ratios = sorted((pair.ratio, str(pair.question), pair.column) for pair in pairs)
    return {
        "prompts": len(pairs),
        "geometric_mean": geometric_mean(pairs, units, stratified).as_dict(),
        "total_time_ratio": total_time_ratio(pairs, units, stratified).as_dict(),
        "spec_bench_formula_from_counts": ratio_of_means(pairs, units, stratified).as_dict(),
        "prompts_faster": sum(ratio > 1 for ratio, _, _ in ratios),
        "prompts_slower": sum(ratio < 1 for ratio, _, _ in ratios),
        "prompts_of_other_length": sum(pair.tokens != pair.base_tokens for pair in pairs),
        "tenth_percentile": float(np.quantile([ratio for ratio, _, _ in ratios], 0.1)),
        "slowest": [{"ratio": ratio, "question_id": name, "column": at} for ratio, name, at in ratios[:SLOWEST]],
    }


def _answers(samples: Iterable[Sample]) -> dict[Question, dict[int, list[Sample]]]:
    """question -> turn -> its repeats."""
    found: dict[Question, dict[int, list[Sample]]] = {}
    for sample in samples:
        found.setdefault(sample.question, {}).setdefault(sample.record["turn"], []).append(sample)
    return found


def _mean(repeats: Sequence[Sample]) -> tuple[float, float]:
    """Seconds and tokens of one turn, averaged over its repeats."""
    return sum(sample.time for sample in repeats) / len(repeats), sum(s.tokens for s in repeats) / len(repeats)


def _over_prompts(
    columns: Floats, statistic: Any, pairs: Sequence[Pair], units: Mapping[Question, int], stratified: bool
) -> Estimate:
    strata = [pair.column for pair in pairs] if stratified else None
    return estimate(columns, statistic, [units[pair.question] for pair in pairs], strata)


def _exp_mean(sums: Floats) -> Floats:
    return np.exp(sums[..., 1] / sums[..., 0])


def _ratio_of_paces(sums: Floats) -> Floats:
    return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])
