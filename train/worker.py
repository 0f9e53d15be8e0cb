"""One job at a time in a thread that gives way to everything else."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Result = TypeVar("Result")
LOWEST_PRIORITY = 19
"""On Linux threads have priorities of their own, and the threads of a matrix product inherit it."""


class Worker(Generic[Result]):
    """Runs jobs in the background; whoever takes a result gets the job's exception, too."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "specdec-learning", _give_way)
        self._running: Future[Result] | None = None

    @property
    def busy(self) -> bool:
        """A job has begun whose result was not taken."""
        return self._running is not None

    def start(self, job: Callable[[], Result]) -> None:
        """Begin a job; the last one's result must have been taken."""
        assert not self.busy, "one job at a time"
        self._running = self._pool.submit(job)

    def take(self, *, wait: bool) -> Result | None:
        """The result of the job, once; None while it is running (unless `wait`), and when there is none."""
        running = self._running
        if running is None or not (wait or running.done()):
            return None
        self._running = None
        return running.result()


def _give_way() -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
