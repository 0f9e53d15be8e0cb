"""Recordings: one generation with the moment at which each token arrived, to be compared and shown again later.

Nothing is drawn while a recording is made, so a slow terminal costs neither side anything.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.api import generate, target_of
from specdec.drafters.load import load_drafter
from specdec.stats import DecodeStats

WARM_UP_TOKENS = 32
TRIAL_TOKENS = 8
PATIENCE = 20.0
"""Seconds after which no further round of timed runs begins."""


@dataclass
class Recording:
    """A streamer for `generate` that notes times; its own cost is the same few microseconds for every side.

    Attributes:
        tokens: new token ids, in order.
        times: seconds after the start of the call at which each of them arrived.
        seconds: of the whole call, prompt included.
        stats: of a speculative generation.
    """

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    seconds: float = 0.0
    stats: DecodeStats | None = None
    started: float = field(default_factory=time.perf_counter)
    _prompt_seen: bool = False

    def put(self, value: Tensor) -> None:
        """The prompt first, then one token at a time."""
        if self._prompt_seen:
            self.tokens.append(int(value))
            self.times.append(time.perf_counter() - self.started)
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the seconds of the whole call."""
        return len(self.tokens) / self.seconds

    def accepted(self) -> list[bool]:
        """Per token, whether a drafter had proposed it; the first token of all comes from the prompt's forward."""
        flags = [False]
        for step in self.stats.steps if self.stats else []:
            flags += [True] * step.accepted + [False] * (step.emitted - step.accepted)
        return (flags + [False] * len(self.tokens))[: len(self.tokens)]


@dataclass
class Side:
    """All timed recordings of one way of generating; `drafter` is None for plain `model.generate`."""

    drafter: str | None
    recordings: list[Recording] = field(default_factory=list)

    @property
    def typical(self) -> Recording:
        """The recording of median speed (the lower one of an even number)."""
        speed = statistics.median_low([recording.tokens_per_second for recording in self.recordings])
        return next(r for r in self.recordings if r.tokens_per_second == speed)

    def identical_to(self, other: Side) -> bool:
        """All recordings of both hold the same tokens."""
        return len({tuple(r.tokens) for r in [*self.recordings, *other.recordings]}) == 1


def compare(
    model: PreTrainedModel, ids: Tensor, drafters: list[str], max_new_tokens: int, repeats: int
) -> tuple[Side, list[Side]]:
    """Plain and speculative greedy generation of one prompt, warmed up, then timed in turns.

    Args:
        model: the target, the same object for every side.
        ids: prompt [1, S].
        drafters: specifications; each is loaded afresh for every run, so that none remembers the last one.
        max_new_tokens: for every side.
        repeats: timed runs of each side; fewer, but at least one, when they take longer than PATIENCE.

    Returns:
        The plain side, and one side for each drafter.
    """
    target_of(model)  # probing is not part of any run
    plain, others = Side(None), [Side(drafter) for drafter in drafters]
    for side in [plain, *others]:
        record(model, ids, side.drafter, min(WARM_UP_TOKENS, max_new_tokens))
    started = time.perf_counter()
    for repeat in range(repeats):
        if repeat and time.perf_counter() - started > PATIENCE:
            break
        for side in [plain, *others]:
            side.recordings.append(record(model, ids, side.drafter, max_new_tokens))
    return plain, others


def choose_threads(model: PreTrainedModel, ids: Tensor) -> None:
    """Set torch to one CPU thread or to its own number, whichever makes plain generation faster here and now.

    On a busy machine the threads of a small model wait for each other most of the time.
    """
    counts = {torch.get_num_threads(), 1}
    seconds = {}
    for count in counts if len(counts) > 1 else ():
        torch.set_num_threads(count)
        trials = [record(model, ids, None, TRIAL_TOKENS).seconds for _ in range(3)]
        seconds[count] = min(trials[1:])  # the first one warms up
    if seconds:
        torch.set_num_threads(min(seconds, key=lambda count: seconds[count]))


def record(model: PreTrainedModel, ids: Tensor, drafter: str | None, max_new_tokens: int) -> Recording:
    """One greedy generation, plain for a drafter of None; loading the drafter is not timed."""
    loaded = load_drafter(drafter, model)
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    recording = Recording()
    if loaded is None:
        model.generate(ids, streamer=recording, **settings)  # type: ignore[operator]
    else:
        recording.stats = generate(model, ids, drafter=loaded, streamer=recording, **settings).stats  # type: ignore[union-attr]
    recording.seconds = time.perf_counter() - recording.started
    return recording
