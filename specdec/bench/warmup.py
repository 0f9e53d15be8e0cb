"""Warm-up: each method on a prompt that is never measured, until its times agree."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from specdec.bench.methods import Method, Request
from specdec.bench.prompts import Prompt, PromptBuilder

TEXT = (
    "A kettle stood on the stove of a small station in the hills. Every evening the guard filled it, lit the fire and "
    "waited for the last train, counting the lamps along the track. Tell what happened on the evening when a lamp was "
    "missing, who had taken it, and why the train came in on time all the same."
)
TOKENS = 32
AGREEING = 3
"""So many last times must agree."""
TOLERANCE = 0.1
"""The slowest of them takes at most this much longer than the fastest."""
MOST_RUNS = 12


def warm_up_prompt(builder: PromptBuilder, measured: Collection[tuple[int, ...]]) -> Prompt:
    """A prompt that is not among the measured ones."""
    text = TEXT
    prompt = builder.build([{"role": "user", "content": text}])
    while tuple(prompt.input_ids) in measured:
        text += " Tell it again."
        prompt = builder.build([{"role": "user", "content": text}])
    return prompt


def warm_up(method: Method, prompt: Prompt, *, rows: int, max_new_tokens: int, seed: int | None) -> dict[str, Any]:
    """Run the method on the prompt until it is stable, or MOST_RUNS times; returns an entry of the manifest's log."""
    request = Request([prompt.input_ids] * rows, min(TOKENS, max_new_tokens), seed)
    seconds: list[float] = []
    while len(seconds) < MOST_RUNS and not is_stable(seconds):
        method.prepare()
        seconds.append(method.generate(request).seconds["total"])
    return {"method": method.name, "seconds": seconds, "stable": is_stable(seconds)}


def is_stable(seconds: list[float]) -> bool:
    """The last AGREEING times agree within TOLERANCE."""
    last = seconds[-AGREEING:]
    return len(last) == AGREEING and max(last) <= (1 + TOLERANCE) * min(last)
