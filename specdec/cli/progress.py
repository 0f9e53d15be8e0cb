"""Progress bars for commands that take a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Tell = Callable[[str, int, int], None]
"""Called with what happens next, what is done, and all there is to do."""


@contextmanager
def progress() -> Iterator[Tell | None]:
    """A bar on stderr with the time left, on a terminal. It is drawn between generations, never while one is timed."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
    )
    bar = Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False, transient=True)
    task = bar.add_task("", total=None)

    def tell(what: str, done: int, total: int) -> None:
        bar.start()  # once; a run that is refused shows no bar
        bar.update(task, description=escape(what), completed=done, total=total)
        bar.refresh()

    try:
        yield tell
    finally:
        bar.stop()


class Count:
    """What a bar of `counting` is told."""

    def __init__(self, bar: Progress, task: Any) -> None:
        self._bar, self._task = bar, task

    def reach(self, done: int) -> None:
        """So many are done."""
        self._bar.update(self._task, completed=done)

    def advance(self, more: int) -> None:
        """So many more are done."""
        self._bar.update(self._task, advance=more)


@contextmanager
def counting(what: str, total: int | None) -> Iterator[Count]:
    """A bar on stderr with what is done, on a terminal; for work that nobody times, since it is drawn meanwhile.

    Args:
        what: is counted, in the plural.
        total: None where nobody knows it.
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Count(bar, bar.add_task(what, total=total))
