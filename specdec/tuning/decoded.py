"""Real decoding with times: what a setting does, on every prompt, and what its steps cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from specdec.api import generate
from specdec.bench.clock import waiter
from specdec.bench.methods import Decoding, cut_after_end, end_tokens
from specdec.costs.interpolation import median_of
from specdec.costs.table import Costs
from specdec.drafters.load import load_drafter
from specdec.stats import DecodeStats
from specdec.tuning.traces import Step

CLIPPED = 0.95
"""Times above this quantile count as it: a mean over steps that a hiccup of the machine does not move."""


@dataclass(frozen=True)
class Job:
    """What is generated: the same for every setting.

    Attributes:
        model: the target.
        prompts: ids of each.
        max_new_tokens: the cap.
        temperature: 0 for greedy decoding.
        seed: torch's, set before every generation.
    """

    model: PreTrainedModel
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0

    def first(self, count: int) -> Job:
        """Only the first prompts."""
        return Job(self.model, self.prompts[:count], self.max_new_tokens, self.temperature, self.seed)


@dataclass(frozen=True)
class Decoded:
    """One prompt, decoded with one setting.

    Attributes:
        text: generated ids.
        steps: of the generation, in order; their `levels` are not known and 0.
        draft, verify, rest: seconds of each step.
        seconds: of decoding after the prompt.
        drawn: some children were drawn.
    """

    text: tuple[int, ...]
    steps: tuple[Step, ...]
    draft: tuple[float, ...]
    verify: tuple[float, ...]
    rest: tuple[float, ...]
    seconds: float
    drawn: bool = False


def decode_all(
    job: Job, drafters: Sequence[Any], tell: Callable[[int, int], None] | None = None
) -> list[list[Decoded]]:
    """Decode every prompt with every drafter, prompt by prompt, so that all meet the machine in the same moods.

    Args:
        job: prompts and cap.
        drafters: what `load_drafter` takes; None for no speculation.
        tell: told what is done and how much there is.

    Returns:
        For each drafter, one entry a prompt.
    """
    results: list[list[Decoded]] = [[] for _ in drafters]
    if job.prompts:
        for drafter in drafters:  # warms up kernels, packed weights and caches
            decode_one(Job(job.model, job.prompts[:1], min(job.max_new_tokens, 8), job.temperature), drafter, 0)
    for number in range(len(job.prompts)):
        for place, drafter in enumerate(drafters):
            if tell is not None:
                tell(number * len(drafters) + place, len(job.prompts) * len(drafters))
            results[place].append(decode_one(job, drafter, number))
    return results


def decode_one(job: Job, drafter: Any, number: int) -> Decoded:
    """Decode one prompt of the job with a drafter that remembers nothing of earlier ones."""
    ids = torch.tensor([job.prompts[number]], device=job.model.device)
    stats = DecodeStats(synchronize=waiter(job.model.device))
    arguments = Decoding(job.temperature).arguments(job.model)
    torch.manual_seed(job.seed + number)
    loaded = load_drafter(drafter, job.model)
    sequences: Any = generate(
        job.model, ids, drafter=loaded, stats=stats, attention_mask=torch.ones_like(ids),
        max_new_tokens=job.max_new_tokens, **arguments,
    )  # fmt: skip
    text = cut_after_end(sequences[0, ids.shape[1] :].tolist(), set(end_tokens(job.model)))
    return _decoded(stats, ids.shape[1], text)


def _decoded(stats: DecodeStats, prompt: int, text: Sequence[int]) -> Decoded:
    steps, context = [], prompt
    for step in stats.steps:
        steps.append(Step(context, step.drafted, 0, step.emitted))
        context += step.emitted
    calls = stats.calls[1:]
    return Decoded(
        tuple(text),
        tuple(steps),
        tuple(call.draft for call in calls),
        tuple(call.verify for call in calls),
        tuple(max(call.total - call.draft - call.verify, 0.0) for call in calls),
        stats.decode_time,
        stats.drawn,
    )


def tokens_per_second(runs: Sequence[Decoded]) -> float:
    """Tokens after each prompt's first one, over the seconds they took."""
    seconds = sum(run.seconds for run in runs)
    return sum(step.emitted for run in runs for step in run.steps) / seconds if seconds else 0.0


def tau_of(steps: Sequence[Step]) -> float:
    """Tokens for each target call; 0 without any."""
    return sum(step.emitted for step in steps) / len(steps) if steps else 0.0


def typical(values: Sequence[float]) -> float:
    """The mean of values clipped at their CLIPPED quantile; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    most = ordered[min(int(CLIPPED * len(ordered)), len(ordered) - 1)]
    return sum(min(value, most) for value in values) / len(values)


def steady_seconds(runs: Sequence[Decoded]) -> float:
    """Seconds of decoding all this where no step meets a hiccup of the machine.

    First steps count apart: in them the drafter digests the prompt.
    """
    total = 0.0
    for phase in ("draft", "verify", "rest"):
        times: list[tuple[float, ...]] = [getattr(run, phase) for run in runs]
        first = [seconds[0] for seconds in times if seconds]
        later = [second for seconds in times for second in seconds[1:]]
        total += typical(first) * len(first) + typical(later) * len(later)
    return total


def verify_ratios(runs: Sequence[Decoded], costs: Costs) -> list[float]:
    """Seconds of each verification over what the costs say of it."""
    return [
        seconds / costs.verify(step.nodes + 1, 1, step.context)
        for run in runs
        for step, seconds in zip(run.steps, run.verify, strict=True)
    ]


def overhead_of(runs: Sequence[Decoded]) -> tuple[float, float]:
    """Seconds of a step outside of drafting and verification: (fixed, for each emitted token), by Theil and Sen."""
    by_emitted: dict[int, list[float]] = {}
    for run in runs:
        for step, seconds in zip(run.steps, run.rest, strict=True):
            by_emitted.setdefault(step.emitted, []).append(seconds)
    points = [(count, median_of(times)[0], len(times)) for count, times in sorted(by_emitted.items())]
    if not points:
        return 0.0, 0.0
    slopes = [
        (high - low) / (more - less)
        for place, (less, low, _) in enumerate(points)
        for more, high, _ in points[place + 1 :]
    ]
    slope = max(median_of(slopes)[0], 0.0) if slopes else 0.0
    every = [max(seconds - slope * count, 0.0) for count, seconds, times in points for _ in range(times)]
    return median_of(every)[0], slope
