"""A stream of prompts, decoded one after the other with one drafter, and what each was worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from specdec.api import generate
from specdec.drafter import Drafter
from specdec.json_lines import JsonLines
from specdec.stats import DecodeStats
from specdec.train.online import LearningDrafter
from specdec.train.stream_prompts import StreamPrompt


@dataclass(frozen=True)
class Request:
    """What one request was worth.

    Attributes:
        number: 0, 1, ... in the stream.
        topic: of the prompt.
        tau: tokens per target call, next_token included.
        alpha: probability that a drafted token is accepted given that its parent was, over all depths.
        steps: verifications.
        emitted: tokens that came out of them.
        accepted: drafted tokens that were accepted.
        tried: levels at which one could have been.
        new_tokens: generated.
        seconds: of decoding, without learning.
        learning_seconds: spent on learning after it; in the background 0.
        updates: whose weights drafted.
    """

    number: int
    topic: str | None
    tau: float
    alpha: float
    steps: int
    emitted: int
    accepted: int
    tried: int
    new_tokens: int
    seconds: float
    learning_seconds: float
    updates: int


def replay_stream(
    model: PreTrainedModel,
    drafter: Drafter,
    prompts: Iterable[StreamPrompt],
    *,
    log: Path | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop_at_end: bool = True,
    report: Callable[[Request], None] = lambda _request: None,
) -> list[Request]:
    """Decode the prompts in order; a LearningDrafter learns in between.

    Args:
        model: the target.
        drafter: any; one that does not learn is the comparison.
        prompts: in order; consumed as they are needed.
        log: JSONL file to which a line is appended for each request.
        max_new_tokens: for each prompt.
        temperature: 0 for greedy decoding.
        seed: of sampling; request n of two streams draws from the same numbers.
        stop_at_end: let texts end with the model's own end of text.
        report: hears of every request.

    Raises:
        BadData: a prompt cannot be read.
        SpecdecError: model and drafter do not fit.
    """
    settings = decoding(max_new_tokens, temperature, stop_at_end=stop_at_end)
    requests = []
    with nullcontext() if log is None else JsonLines(log) as lines:
        for number, prompt in enumerate(prompts):
            request = decode_request(model, drafter, prompt, number, seed, settings)
            if lines is not None:
                lines.append([asdict(request)])
            report(request)
            requests.append(request)
    return requests


def decoding(max_new_tokens: int, temperature: float, *, stop_at_end: bool = True) -> dict[str, Any]:
    """Options of `generate` for every request of a stream; see `replay_stream`."""
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    if not stop_at_end:
        settings["eos_token_id"] = None
    return settings


def decode_request(
    model: PreTrainedModel, drafter: Drafter, prompt: StreamPrompt, number: int, seed: int, settings: dict[str, Any]
) -> Request:
    """One request, and then the update that may be due after it."""
    learns = isinstance(drafter, LearningDrafter)
    named = drafter.topic(prompt.topic) if learns and prompt.topic is not None else nullcontext()
    ids = torch.tensor([prompt.ids], device=model.device)
    generator = torch.Generator(model.device).manual_seed(seed + number)
    stats = DecodeStats()
    updates = drafter.learner.published if learns else 0
    with named:
        generate(
            model, ids, attention_mask=torch.ones_like(ids), drafter=drafter, generator=generator, stats=stats,
            **settings,
        )  # fmt: skip
    started = time.perf_counter()
    if learns:
        drafter.finish()
    learning = time.perf_counter() - started
    tried = sum(step.tried for step in stats.steps)
    return Request(
        number, prompt.topic, round(stats.tau, 4), round(stats.accepted / tried, 4) if tried else 0.0,
        len(stats.steps), sum(step.emitted for step in stats.steps), stats.accepted, tried, stats.new_tokens,
        round(stats.total_time, 4), round(learning, 4), updates,
    )  # fmt: skip
