"""`specdec train --online`: a stream of prompts, decoded by a drafter that learns meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from specdec.cli.console import note, out
from specdec.cli.model import dtype_of, load_model, load_tokenizer
from specdec.cli.train_display import LINE_SECONDS, time_text
from specdec.cli.train_plan import settings_table
from specdec.train.online_job import (
    FINISHED,
    NOTE,
    REQUEST,
    OnlineJob,
    learning_drafter,
    prompts_of,
    run_online,
    topics_of,
)
from specdec.train.publish import push_to_hub

WINDOW = 10
"""Requests of the same topic over which tau is shown while the stream runs."""


def replay_online(
    job: OnlineJob, *, dtype: str, device: str, threads: int | None, hub: str | None, plan: bool, as_json: bool
) -> None:
    """Run the job and print what it was worth.

    Raises:
        SpecdecError, OSError: one clear line.
    """
    if threads:
        torch.set_num_threads(threads)
    tokenizer = load_tokenizer(job.target)
    model = load_model(job.target, dtype_of(job.target, dtype), device)
    if plan:
        _print_plan(job, model, tokenizer, as_json)
        return
    last: dict[str, Any] = {}
    with online_display(as_json=as_json) as show:

        def hear(event: dict[str, Any]) -> None:
            if event["event"] == FINISHED:
                last.update(event)
            else:
                show(event)

        run_online(job, model, tokenizer, hear)
    _conclude(last, job, as_json)
    if hub and not last["stopped"]:
        note(f"pushed to {push_to_hub(Path(last['drafter']), hub)}")


@contextmanager
def online_display(*, as_json: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What hears a run's events and shows them: a bar on a terminal, lines elsewhere, JSON for machines."""
    console = Console(stderr=True, highlight=False)
    if as_json:
        yield lambda event: print(json.dumps(event), flush=True)
    elif not console.is_terminal:
        yield _Lines()
    else:
        columns = BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
        with Progress(*columns, console=console) as bar:
            yield _Bar(bar)


class Recent:
    """tau of the last requests of each topic."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str | None, bool], list[tuple[int, int]]] = {}

    def text(self, event: dict[str, Any]) -> str:
        """Topic, tau now, beside it that of the drafter as it was, and updates, with one more request."""
        now = self._tau(event["topic"], event, static=False)
        was = f" (static {self._tau(event['topic'], event['static'], static=True):.2f})" if "static" in event else ""
        updates = f"{event['updates']} update{'' if event['updates'] == 1 else 's'}"
        return f"{event['topic']}: tau {now:.2f}{was}, {updates}"

    def _tau(self, topic: str | None, row: dict[str, Any], *, static: bool) -> float:
        rows = self._rows.setdefault((topic, static), [])
        rows.append((row["emitted"], row["steps"]))
        del rows[:-WINDOW]
        return sum(emitted for emitted, _ in rows) / max(sum(steps for _, steps in rows), 1)


class _Lines:
    """The first request, one every few seconds, and the last, on stderr."""

    def __init__(self) -> None:
        self.recent = Recent()
        self.shown = -LINE_SECONDS
        self.begun: tuple[int, float] | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == NOTE:
            note(event["text"])
        elif event["event"] == REQUEST:
            self._request(event)

    def _request(self, event: dict[str, Any]) -> None:
        now, number, text = time.monotonic(), event["number"] + 1, self.recent.text(event)
        self.begun = self.begun or (number - 1, now - event["seconds"])
        if now - self.shown >= LINE_SECONDS or number == event["of"]:
            self.shown = now
            left = time_text((event["of"] - number) * (now - self.begun[1]) / (number - self.begun[0]))
            note(f"request {number} of {event['of']}, {text}, {left} left")


class _Bar:
    """A bar whose text is the latest request."""

    def __init__(self, bar: Progress) -> None:
        self.bar, self.recent = bar, Recent()
        self.task = bar.add_task("", total=None)

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == NOTE:
            self.bar.console.print(event["text"], markup=False)
        elif event["event"] == REQUEST:
            text = escape(self.recent.text(event))
            self.bar.update(self.task, completed=event["number"] + 1, total=event["of"], description=text)


def _conclude(finished: dict[str, Any], job: OnlineJob, as_json: bool) -> None:
    """Acceptance by topic, where the drafter lies and how to use it."""
    if as_json:
        print(json.dumps(finished), flush=True)
    if finished["stopped"]:
        note(f"stopped and saved after request {finished['requests']} of {finished['of']}; the same command goes on")
    if finished["skipped_steps"]:
        note(f"{finished['skipped_steps']} steps were skipped, since their loss was no number; lower --lr")
    if as_json or finished["drafter"] is None or not finished["requests"]:
        return
    out.print(_table(finished))
    seconds, updates = finished["seconds"], finished["updates"]
    times = f"{seconds['decoding']:.0f} s of decoding and {seconds['learning']:.0f} s of learning"
    static = seconds["decoding_static"]
    out.print(times + ("" if static is None else f"; the drafter as it was: {static:.0f} s"), soft_wrap=True)
    out.print(f"learned drafter: {finished['drafter']} ({updates} updates)", soft_wrap=True)
    out.print(f"use it: specdec generate {job.target} --drafter {finished['name']}", soft_wrap=True)


def _table(finished: dict[str, Any]) -> Table:
    """tau and alpha in the first and the last third of each topic's requests, and tau of the drafter as it was."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("topic", overflow="fold")
    columns = ["requests", "tau first", "tau last", "alpha first", "alpha last"]
    static = [topic for topic in finished["topics"] if topic["static"] is not None]
    columns += ["static first", "static last"] if static else []
    for column in columns:
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))
    for topic in finished["topics"]:
        ours, theirs = topic["learning"], topic["static"]
        cells = [f"{ours[third]['tau']:.2f}" for third in THIRDS] + [f"{ours[third]['alpha']:.2f}" for third in THIRDS]
        if static:
            cells += ["", ""] if theirs is None else [f"{theirs[third]['tau']:.2f}" for third in THIRDS]
        table.add_row(escape(topic["topic"] or "no topic"), str(topic["requests"]), *cells)
    return table


THIRDS = ("first_third", "last_third")


def _print_plan(job: OnlineJob, model: Any, tokenizer: Any, as_json: bool) -> None:
    prompts = prompts_of(job, model, tokenizer)
    learner = learning_drafter(job, model).learner
    learning = sum(p.numel() for p in learner.learning.module.parameters() if p.requires_grad)
    numbers = {
        "requests": len(prompts),
        "topics": topics_of(prompts),
        "new_tokens": len(prompts) * job.recipe.stream.max_new_tokens,
        "learning": learning,
        "learner_bytes": 16 * learning,
    }
    if as_json:
        print(json.dumps({"recipe": job.recipe.resolved(), **numbers}))
        return
    table = settings_table(job.recipe.resolved())
    topics = ", ".join(f"{name or 'no topic'} {count}" for name, count in numbers["topics"].items())
    table.add_row("[bold]run", "")
    table.add_row("  requests", escape(f"{len(prompts)}: {topics}"))
    table.add_row("  new tokens", f"{numbers['new_tokens']:,} at most")
    table.add_row("  parameters", f"{learning:,} learn")
    table.add_row("  memory", f"{16 * learning / 1e6:.3g} MB for the weights that learn, gradients and two moments")
    out.print(table)
