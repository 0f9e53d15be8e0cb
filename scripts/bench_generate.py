"""Time specdec against transformers in one process, on the pair that ships or on a cost-padded target.

    python scripts/bench_generate.py                                  # the demo pair
    python scripts/bench_generate.py --padded 150000000 --dtype bfloat16
    python scripts/bench_generate.py --markdown docs/benchmarks/FILE.md

Methods run in turn on every prompt, in an order shuffled per round, so that a slow minute of the machine hits all
of them. Every output is compared with plain generate's. Ratios are medians over (prompt, round) pairs. Both
sides run without and with `specdec.optimize`. "outside" is the share of decoding time spent outside model forwards.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

import specdec
from specdec import demo
from specdec.context import Runner
from specdec.demo.padded import cost_padded
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.lean import lean

OURS = (
    "lookup", "suffix", "recycling", "early-exit:layer=2,depth=2", "early-exit:layer=2,depth=3,budget=7",
    "demo-draft:depth=3", "demo-draft:depth=5", "demo-draft:depth=4,budget=8", "demo-draft:depth=5,budget=15",
)  # fmt: skip


@dataclass
class Runs:
    """Every measurement of one method: seconds by (prompt, round)."""

    seconds: dict[tuple[str, int], float] = field(default_factory=dict)
    tokens: dict[tuple[str, int], int] = field(default_factory=dict)
    taus: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    identical: bool = True

    def rate(self) -> float:
        """Median tokens per second."""
        return statistics.median(self.tokens[key] / self.seconds[key] for key in self.seconds)

    def ratio_to(self, other: Runs) -> float:
        """Median over pairs of how many times faster than `other`."""
        return statistics.median(
            (self.tokens[k] / self.seconds[k]) / (other.tokens[k] / other.seconds[k]) for k in self.seconds
        )


class ForwardClock:
    """Seconds spent inside the forwards of a target and a draft model, whoever runs them."""

    def __init__(self, target: nn.Module, draft: PreTrainedModel) -> None:
        self.seconds = 0.0
        self._running = 0
        self._started = 0.0
        self.runner: Any = lean(specdec.target_of(draft))  # found before it is watched
        self.runner.forward = self._timed(self.runner.forward)
        for model in (target, draft):
            model.register_forward_pre_hook(self._start)
            model.register_forward_hook(self._stop)

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._start()
            try:
                return forward(*args, **kwargs)
            finally:
                self._stop()

        return timed

    def _start(self, *_: Any) -> None:
        if not self._running:
            self._started = time.perf_counter()
        self._running += 1

    def _stop(self, *_: Any) -> None:
        self._running -= 1
        if not self._running:
            self.seconds += time.perf_counter() - self._started


def methods(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, runner: Runner, names: list[str], only_plain: bool
) -> dict[str, Callable[[dict[str, Tensor], int], tuple[Tensor, specdec.DecodeStats | None]]]:
    """Each method as (inputs, new tokens) -> (sequence, statistics); `runner` runs the draft model in ours."""

    def plain(inputs: dict[str, Tensor], tokens: int) -> tuple[Tensor, None]:
        return cast(Tensor, cast(Any, target).generate(**inputs, **common(tokens))), None

    def assisted(count: int | None) -> Callable[..., tuple[Tensor, None]]:
        def run(inputs: dict[str, Tensor], tokens: int) -> tuple[Tensor, None]:
            config = draft.generation_config
            if count is not None:
                config.num_assistant_tokens, config.assistant_confidence_threshold = count, 0.0
            else:
                config.num_assistant_tokens, config.assistant_confidence_threshold = 20, 0.4
            config.num_assistant_tokens_schedule = "constant"
            return cast(Tensor, cast(Any, target).generate(**inputs, **common(tokens), assistant_model=draft)), None

        return run

    def prompt_lookup(inputs: dict[str, Tensor], tokens: int) -> tuple[Tensor, None]:
        return cast(Tensor, cast(Any, target).generate(**inputs, **common(tokens), prompt_lookup_num_tokens=10)), None

    def ours(spec: str) -> Callable[..., tuple[Tensor, specdec.DecodeStats | None]]:
        drafter = specdec.load_drafter(spec, target)
        if isinstance(drafter, DraftModelDrafter):
            drafter = DraftModelDrafter(specdec.target_of(draft), grow=drafter.policy)
            drafter.runner = runner

        def run(inputs: dict[str, Tensor], tokens: int) -> tuple[Tensor, specdec.DecodeStats | None]:
            out = specdec.generate(target, **inputs, **common(tokens), drafter=drafter, return_dict_in_generate=True)
            assert isinstance(out, specdec.SpeculativeOutput)
            return out.sequences, out.stats

        return run

    table: dict[str, Any] = {
        "transformers: plain": plain,
        "transformers: assisted (default)": assisted(None),
        "transformers: assisted (3 tokens)": assisted(3),
        "transformers: assisted (5 tokens)": assisted(5),
        "transformers: prompt lookup": prompt_lookup,
        "specdec: no drafter": lambda inputs, tokens: (
            cast(Tensor, specdec.generate(target, **inputs, **common(tokens), drafter=None)),
            None,
        ),
    }
    if only_plain:
        table = {"transformers: plain": plain}
    return table | {f"specdec: {name}": ours(name) for name in names}


def common(tokens: int) -> dict[str, Any]:
    """Greedy, fixed length: every method does the same work."""
    return {"max_new_tokens": tokens, "min_new_tokens": None, "do_sample": False, "eos_token_id": None}


def measure(args: argparse.Namespace, optimized: bool) -> dict[str, Runs]:
    """All methods on all prompts, `rounds` times."""
    dtype = getattr(torch, args.dtype)
    target = LlamaForCausalLM.from_pretrained(demo.target_path(), dtype=dtype).eval()
    draft = LlamaForCausalLM.from_pretrained(demo.draft_path(), dtype=dtype).eval()
    if args.padded:
        target = cost_padded(target, parameters=args.padded, extra_layers=args.extra_layers)
    for model in (target, draft):
        model.generation_config.eos_token_id = None
        if optimized:
            specdec.optimize(model)
    clock = ForwardClock(target, draft)
    tokenizer = AutoTokenizer.from_pretrained(demo.target_path())
    inputs = {name: dict(tokenizer(text, return_tensors="pt")) for name, text in demo.prompts().items()}
    table = methods(target, draft, clock.runner, args.drafter or list(OURS), args.only_plain)
    runs = {name: Runs() for name in table}
    first = next(iter(inputs.values()))
    for run in table.values():  # warm-up: packing, probes, allocator
        run(first, 16)
    order = random.Random(0)
    for round_number in range(args.rounds):
        for prompt, tensors in inputs.items():
            names = list(table)
            order.shuffle(names)
            outputs: dict[str, Tensor] = {}
            for name in names:
                clock.seconds = 0.0
                started = time.perf_counter()
                outputs[name], stats = table[name](tensors, args.tokens)
                seconds = time.perf_counter() - started
                key = (prompt, round_number)
                runs[name].seconds[key] = seconds
                runs[name].tokens[key] = outputs[name].shape[1] - tensors["input_ids"].shape[1]
                runs[name].outside.append(1 - clock.seconds / seconds)
                if stats is not None:
                    runs[name].taus.append(stats.tau)
            for name in names:
                runs[name].identical &= torch.equal(outputs[name], outputs["transformers: plain"])
    return runs


def rows(plain_runs: dict[str, Runs], optimized_runs: dict[str, Runs]) -> list[list[str]]:
    """The table: without and with optimize, each against the baselines with the same optimisation."""
    result = []
    for name, run in plain_runs.items():
        cells = [name, f"{statistics.mean(run.taus):.2f}" if run.taus else ""]
        for runs in (plain_runs, optimized_runs):
            assisted = [run for other, run in runs.items() if other.startswith("transformers: assisted")]
            mine = runs[name]
            cells += [
                f"{mine.rate():.0f}",
                f"{mine.ratio_to(runs['transformers: plain']):.2f}",
                f"{mine.ratio_to(max(assisted, key=lambda run: run.rate())):.2f}" if assisted else "",
                f"{statistics.median(mine.outside):.0%}",
                "yes" if mine.identical else "NO",
            ]
        result.append(cells)
    return result


HEADER = ["method", "tau"] + [
    f"{kind} {column}"
    for kind in ("default", "optimized")
    for column in ("tokens/s", "x plain", "x assisted", "outside", "identical")
]


def environment(args: argparse.Namespace) -> str:
    """One line that says what the numbers were measured with."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    target = "demo target" if not args.padded else f"demo target cost-padded to {args.padded:,} parameters"
    versions = f"specdec {specdec.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return (
        f"{target}, {args.dtype}, greedy, batch 1, {args.tokens} new tokens, "
        f"{len(demo.prompts())} prompts x {args.rounds} rounds; {cpu}, {args.threads} threads of {os.cpu_count()}; "
        f"{versions}, Python {platform.python_version()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--padded", type=int, default=0, help="cost-pad the target to so many parameters")
    parser.add_argument("--extra-layers", type=int, default=0, help="cost-pad with so many layers, too")
    parser.add_argument("--drafter", action="append", help="drafter specifications instead of the default list")
    parser.add_argument("--only-plain", action="store_true", help="of transformers' methods only plain decoding")
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    default, optimized = measure(args, optimized=False), measure(args, optimized=True)
    table = rows(default, optimized)
    console = Console(width=None if sys.stdout.isatty() else 200)
    shown = Table(*HEADER, title=environment(args))
    for cells in table:
        shown.add_row(*cells)
    console.print(shown)
    if args.markdown:
        lines = ["| " + " | ".join(line) + " |" for line in [HEADER, ["---"] * len(HEADER), *table]]
        with args.markdown.open("a") as file:
            file.write(f"\n`python {' '.join(sys.argv)}`\n\n{environment(args)}\n\n" + "\n".join(lines) + "\n")
    if args.json:
        dump = {n: {"default": default[n].rate(), "optimized": optimized[n].rate()} for n in default}
        args.json.write_text(json.dumps(dump, indent=2) + "\n")
    if args.dtype == "float32" and not all(run.identical for runs in (default, optimized) for run in runs.values()):
        console.print("[red]an output differs from plain generate")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
