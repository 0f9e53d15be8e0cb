"""Where one decode step spends its time: forwards, and the tree bookkeeping between them.

    python scripts/profile_step.py                                # the demo pair, its target padded to 150 M parameters
    python scripts/profile_step.py --budget 64 --grow calibrated --temperature 1
    python scripts/profile_step.py --budget 64 --grow dyspec --temperature 1 --functions 25
    python scripts/profile_step.py --markdown docs/benchmarks/FILE.md

The clock wraps the seams of the decode loop from outside and counts exclusive time: what a part calls and what is a
part itself is charged to that one. Milliseconds are medians over steps; a part's share is the median over steps of its
share of that step. *Bookkeeping* is everything but the forwards of draft model and target: growth, masks, acceptance,
commit, observation, and the rest of the loop. Settings run in turn on every prompt, so that a slow minute hits all. On
a machine that does other work, `--cpu-time` counts the CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import itertools
import pstats
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_generate import environment
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

import specdec
from specdec import decode, demo
from specdec.context import Context
from specdec.demo.padded import cost_padded
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.grow.policy import Columns
from specdec.verifier import Verifier

FORWARDS = ("draft forwards", "verify forward")
PARTS = ("growth", "masks", "accept", "commit", "observe", "other")
"""Bookkeeping."""

GROWTHS = ("fixed", "eagle2", "dyspec", "calibrated", "best-first")
BUDGETS = (8, 16, 32, 64, 128)
DRAWS = ("fixed", "calibrated")
"""Policies that draw their children only when told to."""


class SeamClock:
    """Exclusive seconds of each part of each step. A step begins with a proposal; what no part claims is "other"."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.steps: list[dict[str, float]] = []
        self._clock = clock
        self._now: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = clock()

    def enter(self, part: str) -> None:
        self._charge()
        self._open.append(part)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        now = self._clock()
        self._now[self._open[-1] if self._open else "other"] += now - self._since
        self._since = now

    def begin_step(self) -> None:
        self._charge()
        self._now = defaultdict(float)
        self.steps.append(self._now)

    def wrapped(self, function: Callable[..., Any], part: str, *, begins: bool = False) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if begins:
                self.begin_step()
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return timed

    @contextmanager
    def on(self, drafter: DraftModelDrafter, target: nn.Module) -> Iterator[None]:
        """Watch the seams while the block runs."""
        seams = [
            (Context, "run", "masks"), (Context, "finish", "masks"), (Columns, "append", "masks"),
            (Verifier, "score", "masks"), (Context, "keep", "commit"), (decode, "accept", "accept"),
            (drafter, "observe", "observe"), (drafter, "propose", "growth"), (drafter.runner, "forward", FORWARDS[0]),
        ]  # fmt: skip
        with ExitStack() as stack:
            for owner, name, part in seams:
                timed = self.wrapped(getattr(owner, name), part, begins=name == "propose")
                stack.enter_context(mock.patch.object(owner, name, timed))
            stack.callback(target.register_forward_pre_hook(lambda *_: self.enter(FORWARDS[1])).remove)
            stack.callback(target.register_forward_hook(lambda *_: self.leave()).remove)
            yield


@dataclass
class Steps:
    """All steps of one setting."""

    seconds: list[dict[str, float]] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)

    def add(self, clock: SeamClock, stats: specdec.DecodeStats) -> None:
        """The steps of one generation but the last, which has little room and whose end nothing marks."""
        for seconds, record in list(zip(clock.steps, stats.steps, strict=False))[:-1]:
            self.seconds.append(seconds)
            self.drafted.append(record.drafted)
            self.emitted.append(record.emitted)

    def milliseconds(self, *parts: str) -> float:
        return 1e3 * statistics.median(sum(step[part] for part in parts) for step in self.seconds)

    def share(self, *parts: str) -> float:
        return statistics.median(sum(step[part] for part in parts) / sum(step.values()) for step in self.seconds)


@dataclass(frozen=True)
class Setting:
    temperature: float
    grow: str
    budget: int
    depth: int
    top_k: int

    @property
    def drafter(self) -> str:
        drawn = ",children=drawn" if self.temperature and self.grow in DRAWS else ""
        return f"demo-draft:grow={self.grow},budget={self.budget},depth={self.depth}{drawn}"

    @property
    def decoding(self) -> dict[str, Any]:
        """Fixed length, so that every setting does the same work."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k}
        return {"eos_token_id": None, "pad_token_id": 0, **(sampling if self.temperature else {"do_sample": False})}


def measure(args: argparse.Namespace) -> dict[Setting, Steps]:
    """Every setting on every prompt."""
    target = LlamaForCausalLM.from_pretrained(demo.target_path(), dtype=getattr(torch, args.dtype)).eval()
    target = cost_padded(target, parameters=args.padded) if args.padded else target
    target.generation_config.eos_token_id = None
    specdec.optimize(target)
    tokenizer = AutoTokenizer.from_pretrained(demo.target_path())
    inputs = [dict(tokenizer(text, return_tensors="pt")) for text in demo.prompts().values()]
    settings = [
        Setting(temperature, grow, budget, args.depth, args.top_k)
        for temperature, grow, budget in itertools.product(args.temperature, args.grow, args.budget)
    ]
    drafters = {setting: _drafter(setting, target) for setting in settings}
    measured = {setting: Steps() for setting in settings}
    for setting in settings:  # warm-up: packing, the allocator, first words of the calibration
        specdec.generate(target, **inputs[0], **setting.decoding, max_new_tokens=8, drafter=drafters[setting])
    for number, tensors in enumerate(args.rounds * inputs):
        for setting in settings:
            torch.manual_seed(number)
            clock = SeamClock(time.thread_time if args.cpu_time else time.perf_counter)
            with clock.on(drafters[setting], target):
                output = specdec.generate(
                    target, **tensors, **setting.decoding, max_new_tokens=args.tokens, drafter=drafters[setting],
                    return_dict_in_generate=True,
                )  # fmt: skip
            assert isinstance(output, specdec.SpeculativeOutput)
            assert output.stats is not None
            measured[setting].add(clock, output.stats)
    return measured


def _drafter(setting: Setting, target: LlamaForCausalLM) -> DraftModelDrafter:
    drafter = specdec.load_drafter(setting.drafter, target)
    assert isinstance(drafter, DraftModelDrafter)
    return drafter


HEADER = ["T", "grow", "budget", "nodes", "tau", *FORWARDS, *PARTS, "step ms", "bookkeeping ms", "bookkeeping"]


def rows(measured: dict[Setting, Steps]) -> list[list[str]]:
    """The table's lines: milliseconds and, behind them, percent of the step."""
    return [
        [
            f"{setting.temperature:g}",
            setting.grow,
            str(setting.budget),
            f"{statistics.mean(steps.drafted):.0f}",
            f"{statistics.mean(steps.emitted):.2f}",
            *(f"{steps.milliseconds(part):.2f} ({steps.share(part):.1%})" for part in (*FORWARDS, *PARTS)),
            f"{steps.milliseconds(*FORWARDS, *PARTS):.1f}",
            f"{steps.milliseconds(*PARTS):.2f}",
            f"{steps.share(*PARTS):.1%}",
        ]
        for setting, steps in measured.items()
    ]


def print_functions(args: argparse.Namespace, count: int) -> None:
    """The functions with the most time of their own, over all settings asked for."""
    profile = cProfile.Profile()
    profile.runcall(measure, args)
    pstats.Stats(profile).sort_stats("tottime").print_stats(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0], help="0 for greedy decoding")
    parser.add_argument("--grow", nargs="+", default=list(GROWTHS))
    parser.add_argument("--budget", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=50, help="as transformers samples by default; 0 for all tokens")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--padded", type=int, default=150_000_000, help="parameters; 0 for the demo target itself")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds in place of wall-clock; needs --threads 1")
    parser.add_argument("--functions", type=int, default=0, help="print so many functions of cProfile instead")
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time counts one thread: add --threads 1")
    torch.set_num_threads(args.threads)
    if args.functions:
        print_functions(args, args.functions)
        return
    lines = rows(measure(args))
    clock = "CPU time" if args.cpu_time else "wall clock"
    title = (
        f"one step, depth {args.depth}, top-k {args.top_k}, ms of {clock}; {environment(args).replace('greedy, ', '')}"
    )
    table = Table(*HEADER, title=title)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 240).print(table)
    if args.markdown:
        cells = ["| " + " | ".join(line) + " |" for line in [HEADER, ["---"] * len(HEADER), *lines]]
        with args.markdown.open("a") as file:
            file.write(f"\n`python {' '.join(sys.argv)}`\n\n{title}\n\n" + "\n".join(cells) + "\n")


if __name__ == "__main__":
    main()
