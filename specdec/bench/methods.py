"""Methods: a name and a way of generating. Baselines are methods like any other.

    plain            transformers' generate; the baseline, and the reference for exactness
    plain-again      the same once more, in turns with it: how large a difference is none
    none             specdec's loop with no drafter
    <drafter spec>   specdec's loop with that drafter
    assisted         transformers' assisted generation with a draft model
    prompt-lookup    transformers' prompt lookup

All of them get the same prompts as tensors on the device, and the same settings. The timed region is one call.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.acceptance import Rule
from specdec.api import generate
from specdec.bench.clock import Arrivals, PeakMemory, waiter
from specdec.bench.fresh import FreshDrafter
from specdec.bench.manifest import folder_sha256
from specdec.bench.record import Finish, Seconds, Steps
from specdec.demo import draft_path
from specdec.drafter import Drafter
from specdec.drafters.load import draft_for, load_drafter, parse_spec
from specdec.stats import DecodeStats
from specdec.vocabulary import check_vocabulary

PLAIN, NONE, ASSISTED, PROMPT_LOOKUP = "plain", "none", "assisted", "prompt-lookup"
PLAIN_AGAIN = "plain-again"
RESERVED = (PLAIN, PLAIN_AGAIN, NONE, ASSISTED, PROMPT_LOOKUP)
UNUSED_PAD = 0
"""Fills the left of shorter prompts where the model names no pad token; it is masked."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and where they end, the same for every method.

    Attributes:
        temperature: 0 takes the argmax; above 0 draws from the whole law, with neither top-k nor top-p.
        fixed_length: go on past the end of text, up to the cap.
        phases: time drafting, verification and acceptance within each step.
        rule: acceptance rule of specdec's loop.
    """

    temperature: float = 0.0
    fixed_length: bool = False
    phases: bool = True
    rule: Rule = "auto"

    @property
    def samples(self) -> bool:
        """Tokens are drawn."""
        return self.temperature > 0

    def arguments(self, model: PreTrainedModel) -> dict[str, Any]:
        """Keyword arguments of `generate`; what is not among them comes from the model's generation config."""
        ends, pad = end_tokens(model), model.generation_config.pad_token_id
        end = None if self.fixed_length else model.generation_config.eos_token_id
        arguments = {"eos_token_id": end, "pad_token_id": next(iter(ends), UNUSED_PAD) if pad is None else pad}
        if self.samples:
            return {**arguments, "do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return {**arguments, "do_sample": False}


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The model's end-of-text tokens."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list) else [int(ends)]


@dataclass(frozen=True)
class Request:
    """What to generate: prompts of B rows, the cap, and torch's seed when sampling."""

    prompts: list[list[int]]
    max_new_tokens: int
    seed: int | None = None


@dataclass(frozen=True)
class Generated:
    """What came of a request: fields of `record.Record`, those with a list for each row first."""

    token_ids: list[list[int]]
    finish: list[Finish]
    steps: list[Steps]
    seconds: Seconds
    children: Literal["chosen", "drawn"] | None
    chain: bool | None
    target_calls: int | None
    peak_memory_bytes: int | None
    lossy: str | None


class Method(ABC):
    """A way of generating.

    Attributes:
        name: in records and tables.
        single_rows: serves batches of one only.
        repeats_plain_draws: with a seed and one row, sampling gives the very tokens of plain sampling, unless the
            drafted tokens were drawn.
        resets: the method remembers nothing from one request to the next.
    """

    single_rows = False
    repeats_plain_draws = False
    resets = True

    def __init__(self, name: str, model: PreTrainedModel, decoding: Decoding) -> None:
        self.name, self.model, self.decoding = name, model, decoding
        self._wait = waiter(model.device)
        self._memory = PeakMemory(model.device)

    def describe(self) -> dict[str, Any]:
        """For the manifest: everything that makes this method differ from another one."""
        return {"name": self.name, "resets": self.resets, "repeats_plain_draws": self.repeats_plain_draws}

    def begin_pass(self) -> None:
        """Forget everything, also what is carried over: a new pass over the questions begins."""
        self.prepare()

    def prepare(self) -> None:  # noqa: B027 - most methods have nothing to get ready
        """Get ready for the next request; not timed."""

    @abstractmethod
    def generate(self, request: Request) -> Generated:
        """Serve a request.

        Raises:
            Exception: whatever the model or the drafter raises.
        """

    def _timed(self, request: Request, call: Callable[..., Tensor]) -> tuple[float, float, int, Tensor]:
        """When it started, how long it took, the peak of memory, and the ids that `call(ids, **arguments)` returned."""
        ids, mask = padded(request.prompts, self._arguments()["pad_token_id"], self.model.device)
        arguments = {**self._arguments(), "attention_mask": mask, "max_new_tokens": request.max_new_tokens}
        if request.seed is not None:
            torch.manual_seed(request.seed)
        self._memory.begin()
        if self._wait is not None:
            self._wait()
        started = time.perf_counter()
        sequences = call(ids, **arguments)
        if self._wait is not None:
            self._wait()
        seconds = time.perf_counter() - started
        return started, seconds, self._memory.read(), sequences

    def _arguments(self) -> dict[str, Any]:
        return self.decoding.arguments(self.model)

    def _new_tokens(self, request: Request, sequences: Tensor) -> tuple[list[list[int]], list[Finish]]:
        """Each row's new tokens, without what fills it up after its end, and why it ended."""
        length = max(map(len, request.prompts))
        ends = set() if self.decoding.fixed_length else set(end_tokens(self.model))
        rows = [cut_after_end(row, ends) for row in sequences[:, length:].tolist()]
        return rows, [_finish(row, ends, request.max_new_tokens) for row in rows]


class TransformersMethod(Method):
    """transformers' own `generate`, timed by a streamer.

    Args:
        name: of the method.
        model: the target.
        decoding: settings of all methods.
        extra: further keyword arguments of `generate`, which make it assisted.
        description: of `extra`, for the manifest.
        carry_over: an assistant's adapted draft length stays from one request to the next.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        decoding: Decoding,
        extra: dict[str, Any] | None = None,
        description: dict[str, Any] | None = None,
        *,
        carry_over: bool = False,
    ) -> None:
        super().__init__(name, model, decoding)
        self.extra, self.description = extra or {}, description or {}
        self.single_rows = bool(self.extra)
        self.repeats_plain_draws = not self.extra
        assistant = self.extra.get("assistant_model")
        self.resets = assistant is None or not carry_over
        self._assistant_config = None if assistant is None else copy.deepcopy(assistant.generation_config)

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return {**super().describe(), "engine": "transformers", **self.description}

    def begin_pass(self) -> None:
        """The assistant's draft length is that of its own config again."""
        if self._assistant_config is not None:
            self.extra["assistant_model"].generation_config = copy.deepcopy(self._assistant_config)

    def prepare(self) -> None:
        """As `begin_pass`, unless it is carried over."""
        if self.resets:
            self.begin_pass()

    def generate(self, request: Request) -> Generated:
        """Serve a request."""
        arrivals = Arrivals(self._wait)
        plain = cast(Any, type(self.model)).generate  # an attached model carries another one

        def call(ids: Tensor, **arguments: Any) -> Tensor:
            return plain(self.model, ids, streamer=arrivals, **arguments, **self.extra)

        started, total, memory, sequences = self._timed(request, call)
        rows, finish = self._new_tokens(request, sequences)
        steps = [_steps_of_arrivals(arrivals, len(row)) for row in rows]
        ttft = arrivals.times[0] - started
        seconds = Seconds(total=total, prefill=None, draft=None, verify=None, accept=None, other=None, ttft=ttft)
        return Generated(rows, finish, steps, seconds, None, None, len(arrivals.times), memory, None)


class SpeculativeMethod(Method):
    """specdec's loop, with or without a drafter.

    Args:
        name: of the method.
        model: the target.
        decoding: settings of all methods.
        drafter: a specification, a draft model or a Drafter; None for no speculation.
        carry_over: the drafter keeps what it remembers from one request to the next.

    Raises:
        SpecdecError: the drafter does not serve, or its state cannot be reset.
    """

    repeats_plain_draws = True

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        decoding: Decoding,
        drafter: Drafter | PreTrainedModel | str | Path | None,
        *,
        carry_over: bool = False,
    ) -> None:
        super().__init__(name, model, decoding)
        self._drafter = load_drafter(drafter, model)
        self._spec = str(drafter) if isinstance(drafter, str | Path) else None
        self._given = None if isinstance(drafter, str | Path) else drafter
        self._fresh = None if self._drafter is None or carry_over else FreshDrafter(name, self._drafter)
        self.resets = self._drafter is None or self._fresh is not None

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        kind = None if self._drafter is None else type(self._drafter).__name__
        path = None if self._spec is None else Path(parse_spec(self._spec)[0]).expanduser()
        files = None if path is None else folder_sha256(path)
        return {**super().describe(), "engine": "specdec", "drafter": self._spec, "class": kind, "files_sha256": files}

    def begin_pass(self) -> None:
        """A drafter as it was when it was loaded."""
        if self._drafter is not None and self._fresh is None:
            self._drafter = load_drafter(self._spec if self._spec is not None else self._given, self.model)
        self.prepare()

    def prepare(self) -> None:
        """A drafter that remembers nothing, unless it is to be carried over."""
        if self._fresh is not None:
            self._drafter = self._fresh.copy()

    def generate(self, request: Request) -> Generated:
        """Serve a request."""
        phases = self.decoding.phases
        stats = DecodeStats(phases=phases, synchronize=self._wait if phases else None)

        def call(ids: Tensor, **arguments: Any) -> Tensor:
            rule = self.decoding.rule
            return cast(Tensor, generate(self.model, ids, drafter=self._drafter, rule=rule, stats=stats, **arguments))

        started, total, memory, sequences = self._timed(request, call)
        rows, finish = self._new_tokens(request, sequences)
        steps = [_steps_of_stats(stats, number, len(row)) for number, row in enumerate(rows)]
        seconds = _seconds(stats, started, total)
        children = None if not stats.drafted else "drawn" if stats.drawn else "chosen"
        return Generated(
            rows, finish, steps, seconds, children, stats.only_chains, stats.target_calls, memory, stats.lossy
        )


def assisted(
    model: PreTrainedModel, decoding: Decoding, draft: PreTrainedModel | str | Path, *, carry_over: bool = False
) -> TransformersMethod:
    """transformers' assisted generation with a draft model: the word demo-draft, a path, or a loaded model."""
    description = {"assistant_model": type(draft).__name__ if isinstance(draft, PreTrainedModel) else str(draft)}
    if not isinstance(draft, PreTrainedModel):
        draft = draft_for(draft_path() if str(draft) == "demo-draft" else Path(draft).expanduser(), model)
    check_vocabulary(draft, model)
    extra = {"assistant_model": draft}
    return TransformersMethod(ASSISTED, model, decoding, extra, description, carry_over=carry_over)


def prompt_lookup(model: PreTrainedModel, decoding: Decoding, tokens: int) -> TransformersMethod:
    """transformers' prompt lookup with so many drafted tokens."""
    extra = {"prompt_lookup_num_tokens": tokens}
    return TransformersMethod(PROMPT_LOOKUP, model, decoding, extra, dict(extra))


def padded(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded ids [B, S] and their mask."""
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in prompts])
    return ids.to(device), mask.to(device)


def cut_after_end(tokens: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first end-of-text one, which is kept."""
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _finish(tokens: list[int], ends: set[int], max_new_tokens: int) -> Finish:
    if tokens and tokens[-1] in ends:
        return "eos"
    return "length" if len(tokens) >= max_new_tokens else "stop"


def _steps_of_arrivals(arrivals: Arrivals, length: int) -> Steps:
    """The steps of a row of so many new tokens; a batch goes on for its longest row."""
    left = length - arrivals.counts[0]
    emitted, total = [], []
    for count, (before, after) in zip(arrivals.counts[1:], pairwise(arrivals.times), strict=True):
        if left <= 0:
            break
        emitted.append(min(count, left))
        total.append(after - before)
        left -= count
    return Steps(
        drafted=None, accepted=None, emitted=emitted, tried=None, draft=None, verify=None, accept=None, total=total
    )


def _steps_of_stats(stats: DecodeStats, row: int, length: int) -> Steps:
    """The steps of a row of so many new tokens; rows that go in step take part until the last one has ended."""
    steps, left = [], length - 1
    for step in stats.steps:
        if step.row == row and left > 0:
            steps.append((step, min(step.emitted, left)))
            left -= step.emitted
    calls = [stats.calls[step.call] for step, _ in steps]
    timed = calls if stats.phases else None
    return Steps(
        drafted=[step.drafted for step, _ in steps],
        accepted=[min(step.accepted, emitted) for step, emitted in steps],
        emitted=[emitted for _, emitted in steps],
        tried=[step.tried for step, _ in steps],
        draft=None if timed is None else [call.draft for call in timed],
        verify=None if timed is None else [call.verify for call in timed],
        accept=None if timed is None else [call.accept for call in timed],
        total=[stats.calls[step.call].ended - stats.calls[step.call - 1].ended for step, _ in steps],
    )


def _seconds(stats: DecodeStats, started: float, total: float) -> Seconds:
    """The parts of a call of specdec's loop. The prompt's part holds the first token's choice."""
    first = stats.calls[0]
    parts = (stats.draft_time, stats.verify_time, stats.accept_time) if stats.phases else (None, None, None)
    draft, verify, accept = parts
    return Seconds(
        total=total,
        prefill=first.total,
        draft=draft,
        verify=verify,
        accept=accept,
        other=total - first.total - sum(part or 0.0 for part in parts) if stats.phases else None,
        ttft=first.ended - started,
    )
