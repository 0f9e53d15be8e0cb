"""How a training run shows itself: a bar with the latest numbers on a terminal, lines elsewhere, JSON for machines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specdec.cli.console import note
from specdec.train.drift import AGREEMENT, KL
from specdec.train.job import FINISHED, NOTE, STAGE, STEP, VALIDATION

LINE_SECONDS = 10.0
"""Outside a terminal a step is shown when so much time has passed since the last one that was."""

Hear = Callable[[dict[str, Any]], None]


@contextmanager
def display(steps: int, *, as_json: bool) -> Iterator[Hear]:
    """What hears a run's events and shows them."""
    console = Console(stderr=True, highlight=False)
    if as_json:
        yield _print_json
    elif not console.is_terminal:
        yield _Lines(steps)
    else:
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
        with Progress(*columns, console=console) as bar:
            yield _Bar(bar, steps)


def step_text(event: dict[str, Any], tau: float | None) -> str:
    """Loss, last measured tau, acceptance by depth and speed of one step."""
    alpha = " ".join(f"{value:.2f}" for value in event["alpha"])
    parts = [f"loss {event['loss']:.3f}"]
    parts += [f"tau {tau:.2f}"] if tau is not None else []
    parts += [f"alpha {alpha}"] if alpha else []
    return ", ".join([*parts, f"{event['tokens_per_second']:.0f} tokens/s"])


def validation_text(event: dict[str, Any]) -> str:
    """Tau, acceptance by depth and expected speed-up on held-out prompts; of a target that learns, how far it moved."""
    alpha = " ".join(f"{value:.2f}" for value in event.get("alpha") or [])
    speedup = event.get("expected_speedup")
    text = f"step {event['step']}: held-out tau {event['value']:.2f}, alpha {alpha or 'none'}"
    text = text if speedup is None else f"{text}, expected speed-up {speedup:.2f}"
    if KL in event:
        text += f"; from the original target KL {event[KL]:.4f}, same favourite token {event[AGREEMENT]:.1%}"
    return text


def time_text(seconds: float) -> str:
    """Hours, minutes and seconds, as much of it as is needed."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _print_json(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


class _Lines:
    """The first step, one every few seconds, and every validation, on stderr."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.tau: float | None = None
        self.shown = -LINE_SECONDS
        self.begun: tuple[int, float] | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == STEP:
            self._step(event)
        elif event["event"] == VALIDATION:
            self.tau = event["value"]
            note(validation_text(event))
        elif event["event"] == STAGE:
            self.steps, self.tau, self.begun, self.shown = event["steps"], None, None, -LINE_SECONDS
            note(event["text"])
        elif event["event"] == NOTE:
            note(event["text"])

    def _step(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        self.begun = self.begun or (event["step"] - 1, now - event["seconds"])
        if now - self.shown >= LINE_SECONDS or event["step"] == self.steps:
            self.shown = now
            done, since = event["step"] - self.begun[0], now - self.begun[1]
            left = time_text((self.steps - event["step"]) * since / done)
            note(f"step {event['step']} of {self.steps}: {step_text(event, self.tau)}, {left} left")


class _Bar:
    """A bar whose text is the latest step; validations stay above it."""

    def __init__(self, bar: Progress, steps: int) -> None:
        self.bar = bar
        self.task = bar.add_task("", total=steps)
        self.tau: float | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == STEP:
            self.bar.update(self.task, completed=event["step"], description=escape(step_text(event, self.tau)))
        elif event["event"] == VALIDATION:
            self.tau = event["value"]
            self.bar.console.print(validation_text(event), markup=False)
        elif event["event"] == STAGE:
            self.tau = None
            self.bar.reset(self.task, total=event["steps"])
            self.bar.console.print(event["text"], markup=False)
        elif event["event"] == NOTE:
            self.bar.console.print(event["text"], markup=False)
        elif event["event"] == FINISHED:
            self.bar.update(self.task, completed=event["step"])
