"""Ctrl-C while modules are imported.

An exception is no way out of an import: torch and transformers catch some, and one that falls into a callback of the
import system is printed and lost. Nothing has been begun at that time, so the process may simply end.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Ctrl-C within ends the process with one line on stderr and status 130.

    Outside of the main thread, and where somebody handles or ignores SIGINT already, nothing is changed.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: Any) -> None:
    os.write(2, b"\nspecdec: interrupted\n")  # leaves the line in which the terminal shows ^C
    os._exit(INTERRUPTED)
