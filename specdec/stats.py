"""What a generation did: tokens per target call, acceptance by depth, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """One target call, one row.

    Attributes:
        drafted: proposed tokens.
        accepted: proposed tokens that were emitted, also one on which a stopping criterion ended.
        emitted: tokens emitted, next_token included.
        tried: deepest level at which a child could have been accepted: the accepted path's end plus one
            if that node had children, else the path's own depth.
        row: the row of the generation.
        call: index into `DecodeStats.calls`.
    """

    drafted: int
    accepted: int
    emitted: int
    tried: int
    row: int = 0
    call: int = 0


@dataclass(frozen=True)
class CallTimes:
    """Wall-clock seconds of one target call and what belongs to it.

    Attributes:
        draft, verify, accept: parts of `total`; 0 where phases are not timed, and for the prompt.
        total: from the end of the last call, bookkeeping included but not the time that the caller took.
        ended: `time.perf_counter()` when its tokens were there.
    """

    draft: float
    verify: float
    accept: float
    total: float
    ended: float


@dataclass
class DecodeStats:
    """Counts and wall-clock seconds of one generation.

    Attributes:
        steps: one record per verification and row, in order.
        calls: times of each target call, the prompt's first.
        prefill_time, draft_time, verify_time, accept_time, total_time: seconds; on a GPU the first ones
            measure launches unless `synchronize` is given. What a drafter does with final tokens is drafting.
        drawn: some proposed tokens were drawn, not chosen.
        only_chains: no proposed tree branched.
        lossy: the name of a rule that does not preserve the target's law, or None.
        phases: time the parts of a call, not only its whole.
        synchronize: waits for the device; called where a timed part ends.
    """

    steps: list[StepRecord] = field(default_factory=list)
    calls: list[CallTimes] = field(default_factory=list)
    target_calls: int = 0
    new_tokens: int = 0
    prefill_time: float = 0.0
    draft_time: float = 0.0
    verify_time: float = 0.0
    accept_time: float = 0.0
    total_time: float = 0.0
    drawn: bool = False
    only_chains: bool = True
    lossy: str | None = None
    phases: bool = True
    synchronize: Callable[[], None] | None = field(default=None, repr=False)
    _before_call: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0), repr=False)

    @property
    def tau(self) -> float:
        """Tokens emitted per target call and row, next_token included; the prefill's token is not counted.

        0 when nothing was verified.
        """
        return sum(step.emitted for step in self.steps) / len(self.steps) if self.steps else 0.0

    @property
    def alpha(self) -> list[float]:
        """Probability that a token drafted at depth 1, 2, ... is accepted, given that its parent was."""
        deepest = max((step.tried for step in self.steps), default=0)
        rates = []
        for depth in range(1, deepest + 1):
            tried = sum(step.tried >= depth for step in self.steps)
            accepted = sum(step.accepted >= depth for step in self.steps)
            rates.append(accepted / tried)
        return rates

    @property
    def drafted(self) -> int:
        """Proposed tokens in all."""
        return sum(step.drafted for step in self.steps)

    @property
    def accepted(self) -> int:
        """Proposed tokens that were emitted."""
        return sum(step.accepted for step in self.steps)

    @property
    def decode_time(self) -> float:
        """Seconds after the prefill."""
        return self.total_time - self.prefill_time

    @property
    def other_time(self) -> float:
        """Seconds of decoding outside of drafting and verification: acceptance, commit, bookkeeping."""
        return self.decode_time - self.draft_time - self.verify_time

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second, prefill included; 0 before anything was generated."""
        return self.new_tokens / self.total_time if self.total_time else 0.0

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to `<what>_time`, also when it raises; "total" ends a target call."""
        if not (self.phases or what == "total"):
            yield
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.synchronize is not None:
                self.synchronize()
            now = time.perf_counter()
            name = f"{what}_time"
            setattr(self, name, getattr(self, name) + now - started)
            if what == "total":
                self._end_call(now - started, now)

    def _end_call(self, total: float, now: float) -> None:
        so_far = self.draft_time, self.verify_time, self.accept_time
        draft, verify, accept = (after - before for after, before in zip(so_far, self._before_call, strict=True))
        self.calls.append(CallTimes(draft, verify, accept, total, now))
        self._before_call = so_far

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "new_tokens": self.new_tokens,
            "target_calls": self.target_calls,
            "tau": round(self.tau, 4),
            "alpha": [round(a, 4) for a in self.alpha],
            "drafted": self.drafted,
            "accepted": self.accepted,
            "tokens_per_second": round(self.tokens_per_second, 2),
            "seconds": {
                "prefill": round(self.prefill_time, 6),
                "draft": round(self.draft_time, 6),
                "verify": round(self.verify_time, 6),
                "other": round(self.other_time, 6),
                "total": round(self.total_time, 6),
            },
            "lossy": self.lossy,
        }
