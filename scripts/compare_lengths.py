"""tau and tokens per second of every length policy, on the pair that ships or on a cost-padded target.

    python scripts/compare_lengths.py                                   # the demo pair, greedy, batch 1
    python scripts/compare_lengths.py --padded 150000000 --batch 1 8 --temperature 1 --children drawn
    python scripts/compare_lengths.py --markdown docs/benchmarks/FILE.md

Policies run in turn on every batch of prompts, in an order shuffled per round, so that a slow minute of the machine
hits all of them; ratios are medians over (batch, round) pairs, against the drafter at its full depth and against
decoding without one in the same loop. Greedy outputs are compared with plain decoding. The acceptance head is trained
beforehand on text that the target writes after the beginnings of other files.
"""

from __future__ import annotations

import argparse
import heapq
import inspect
import itertools
import random
import statistics
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from bench_generate import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import specdec
from specdec import demo
from specdec.demo.padded import cost_padded
from specdec.drafters.limited import LimitedDrafter
from specdec.lengths.acceptance_head import AcceptanceRecorder, fit_acceptance_head

PLAIN, FULL = "no drafter", "full depth"
LENGTHS = (
    "length=constant,levels=2", "length=constant,levels=4", "length=heuristic", "length=confidence",
    "length=confidence,of=path,stop_below=0.3", "length=adaptive-confidence", "length=adaedl", "length=acceptance",
    "length=thompson", "length=goodput",
)  # fmt: skip
OTHER_TEXTS = (heapq, textwrap, random, statistics)
Inputs = dict[str, Tensor]


@dataclass
class Runs:
    """What one policy did: seconds and tokens by (batch, round), and taus."""

    seconds: dict[tuple[int, int], float] = field(default_factory=dict)
    tokens: dict[tuple[int, int], int] = field(default_factory=dict)
    taus: list[float] = field(default_factory=list)
    levels: list[float] = field(default_factory=list)
    identical: bool = True

    def rate(self, key: tuple[int, int]) -> float:
        """Tokens per second of one generation."""
        return self.tokens[key] / self.seconds[key]

    def ratio_to(self, other: Runs) -> float:
        """Median over pairs of how many times faster than `other`."""
        return statistics.median(self.rate(key) / other.rate(key) for key in self.seconds)


def batches(tokenizer: Any, texts: list[str], size: int) -> list[Inputs]:
    """The texts in batches of this size, taken round and round until each was in one."""
    count = -(-len(texts) // size)
    endless = itertools.cycle(texts)
    return [
        dict(tokenizer([next(endless) for _ in range(size)], return_tensors="pt", padding=True, padding_side="left"))
        for _ in range(count)
    ]


def trained_head(target: LlamaForCausalLM, tokenizer: Any, args: argparse.Namespace) -> Path:
    """An acceptance head for the drafter of this run."""
    recorder = AcceptanceRecorder()
    drafter = LimitedDrafter(cast(Any, specdec.load_drafter(drafter_name(args), target)), recorder)
    for inputs in batches(tokenizer, [inspect.getsource(module)[:300] for module in OTHER_TEXTS], 1):
        specdec.generate(target, **inputs, **decoding(args, args.head_tokens), drafter=drafter)
    path = Path(tempfile.mkdtemp()) / "acceptance_head.safetensors"
    fit_acceptance_head(*recorder.records).save(path)
    return path


def drafter_name(args: argparse.Namespace, length: str = "") -> str:
    """The drafter of this run under a length."""
    budget = f",budget={args.budget}" if args.budget else ""
    return f"demo-draft:depth={args.depth}{budget},children={args.children}" + (f",{length}" if length else "")


def decoding(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Fixed length: every policy does the same work."""
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    return {"max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0, **sampling}


def measure(args: argparse.Namespace, batch_size: int) -> dict[str, Runs]:
    """All policies on all batches, `rounds` times."""
    target = LlamaForCausalLM.from_pretrained(demo.target_path(), dtype=getattr(torch, args.dtype)).eval()
    if args.padded:
        target = cost_padded(target, parameters=args.padded, extra_layers=args.extra_layers)
    target.generation_config.eos_token_id = None
    if not args.default_kernels:
        specdec.optimize(target)
    tokenizer = AutoTokenizer.from_pretrained(demo.target_path())
    tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    head = trained_head(target, tokenizer, args)
    lengths = [f"{name},weights={head}" if name == "length=acceptance" else name for name in args.length or LENGTHS]
    drafters = {PLAIN: None, FULL: specdec.load_drafter(drafter_name(args), target)}
    drafters |= {
        name.partition(",weights")[0]: specdec.load_drafter(drafter_name(args, name), target) for name in lengths
    }
    inputs = batches(tokenizer, list(demo.prompts().values()), batch_size)
    runs = {name: Runs() for name in drafters}
    for drafter in drafters.values():  # warm-up; goodput also measures its costs, which stay
        specdec.generate(target, **inputs[0], **decoding(args, 16), drafter=drafter)
    order = random.Random(0)
    for round_number in range(args.rounds):
        for number, tensors in enumerate(inputs):
            names = list(drafters)
            order.shuffle(names)
            outputs = {name: run(runs[name], target, tensors, drafters[name], args, (number, round_number))
                       for name in names}  # fmt: skip
            for name in names:
                runs[name].identical &= torch.equal(outputs[name], outputs[PLAIN])
    return runs


def run(
    runs: Runs, target: LlamaForCausalLM, inputs: Inputs, drafter: Any, args: argparse.Namespace, key: tuple[int, int]
) -> Tensor:
    """One generation, measured."""
    torch.manual_seed(key[0])
    started = time.perf_counter()
    output = specdec.generate(
        target, **inputs, **decoding(args, args.tokens), drafter=drafter, return_dict_in_generate=True
    )
    runs.seconds[key] = time.perf_counter() - started
    assert isinstance(output, specdec.SpeculativeOutput)
    assert output.stats is not None
    runs.tokens[key] = output.stats.new_tokens
    runs.taus.append(output.stats.tau)
    runs.levels.append(output.stats.drafted / max(len(output.stats.steps), 1))
    return output.sequences


HEADER = ["batch", "length", "tau", "drafted a step", "tokens/s", "x no drafter", "x full depth", "identical"]


def rows(runs: dict[str, Runs], batch_size: int, greedy: bool) -> list[list[str]]:
    """The table's lines for one batch size."""
    return [
        [
            str(batch_size),
            name,
            f"{statistics.mean(one.taus):.2f}",
            f"{statistics.mean(one.levels):.2f}",
            f"{statistics.median(one.rate(key) for key in one.seconds):.0f}",
            f"{one.ratio_to(runs[PLAIN]):.2f}",
            f"{one.ratio_to(runs[FULL]):.2f}",
            ("yes" if one.identical else "NO") if greedy else "",
        ]
        for name, one in runs.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--padded", type=int, default=0, help="cost-pad the target to so many parameters")
    parser.add_argument("--extra-layers", type=int, default=0, help="cost-pad with so many layers, too")
    parser.add_argument("--default-kernels", action="store_true", help="without specdec.optimize")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--temperature", type=float, default=0.0, help="0 for greedy decoding")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--budget", type=int, default=0, help="0 for a chain")
    parser.add_argument("--children", choices=("chosen", "drawn"), default="chosen")
    parser.add_argument("--length", action="append", help="length options instead of the default list")
    parser.add_argument("--head-tokens", type=int, default=200, help="recorded after each text for the acceptance head")
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measured = {size: measure(args, size) for size in args.batch}
    lines = [line for size, runs in measured.items() for line in rows(runs, size, not args.temperature)]
    kind = f"temperature {args.temperature}, {args.children} children, depth {args.depth}, budget {args.budget or '-'}"
    title = f"{kind}; {environment(args).replace('greedy, batch 1, ', '')}"
    table = Table(*HEADER, title=title)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if args.markdown:
        cells = ["| " + " | ".join(line) + " |" for line in [HEADER, ["---"] * len(HEADER), *lines]]
        with args.markdown.open("a") as file:
            file.write(f"\n`python {' '.join(sys.argv)}`\n\n{title}\n\n" + "\n".join(cells) + "\n")
    if args.dtype == "float32" and not args.temperature:
        wrong = [name for runs in measured.values() for name, one in runs.items() if not one.identical]
        if wrong:
            sys.exit(f"an output differs from plain decoding: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
