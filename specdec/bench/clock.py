"""Time and memory of one generation: a monotonic clock with the device waited for, and the peak of memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.stats import DecodeStats

CLEAR_PEAK = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
PROBE_BLOCKS = 20_000
PHASES_PER_STEP = 5
"""Timed blocks of one target call: draft twice (proposing, observing), verify, accept, and the whole."""


def waiter(device: torch.device) -> Callable[[], None] | None:
    """A function that waits until the device has done all its work; None on a CPU, which has nothing pending."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "cpu":
        return None
    return getattr(torch, device.type).synchronize


class Arrivals:
    """A streamer for transformers' `generate` that notes when tokens came out, and how many.

    Attributes:
        times: `time.perf_counter()` at each arrival, the prompt's not among them.
        counts: tokens of each row that arrived then.
    """

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []
        self._wait = wait
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """The prompt first; then [B] tokens of one step, or [1, n] of one row."""
        if self._prompt_seen:
            if self._wait is not None:
                self._wait()
            self.times.append(time.perf_counter())
            self.counts.append(value.shape[1] if value.ndim == 2 else 1)
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


class PeakMemory:
    """The highest use of memory during a generation, in bytes.

    On a GPU what torch had allocated there. On a CPU the resident memory of the whole process: since the start of the
    generation where the system can reset its mark (Linux), else since the start of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.meaning = self._meaning()

    def _meaning(self) -> str:
        if self._device.type == "cuda":
            return "allocated by torch on the device, during the generation"
        try:
            CLEAR_PEAK.write_text("5")
        except OSError:
            return "resident memory of the process, high-water mark since its start"
        return "resident memory of the process, high-water mark during the generation"

    def begin(self) -> None:
        """Forget the mark of earlier generations, where that is possible."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self.meaning.endswith("during the generation"):
            CLEAR_PEAK.write_text("5")

    def read(self) -> int:
        """Bytes at the highest point since `begin`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self.meaning.endswith("during the generation"):
            line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def probe_cost(device: torch.device) -> dict[str, Any]:
    """What it costs to take the times, by many empty measurements with the very code that takes them.

    On a GPU the cost of waiting for an idle device is in it; that a step's launches no longer overlap is not.
    """
    wait = waiter(device)
    stats = DecodeStats(synchronize=wait)

    def block() -> None:
        with stats.timing("draft"):
            pass

    arrivals, token = Arrivals(wait), torch.zeros(1, dtype=torch.long)
    per_block = _seconds_of(block)
    return {
        "seconds_per_block": per_block,
        "blocks_per_step": PHASES_PER_STEP,
        "seconds_per_step": PHASES_PER_STEP * per_block,
        "seconds_per_streamed_token": _seconds_of(lambda: arrivals.put(token)),
        "synchronizes": wait is not None,
    }


def _seconds_of(work: Callable[[], None], rounds: int = 5) -> float:
    """Median over rounds of the mean time of one call."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(PROBE_BLOCKS // rounds):
            work()
        times.append((time.perf_counter() - started) / (PROBE_BLOCKS // rounds))
    return statistics.median(times)
