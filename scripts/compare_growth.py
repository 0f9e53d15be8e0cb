"""tau and tokens per second of every growth policy, over temperatures and budgets, on the demo pair.

    python scripts/compare_growth.py --out build/growth-1.jsonl --temperatures 1 --only tau
    python scripts/compare_growth.py --out build/growth-0.jsonl --temperatures 0 0.6 --only tau     # beside the first
    python scripts/compare_growth.py --out build/growth-1.jsonl --temperatures 1 --markdown docs/benchmarks/FILE.md

Every measured cell is one JSON line of --out. A run that was broken off goes on where it stopped, and one half can be
measured after the other; other settings want another file. tau comes from batches and needs no quiet machine; tokens
per second are of one prompt at a time, all policies in turns on each prompt in shuffled order, and want a machine that
does nothing else.

Prompts are beginnings from modules that the demo pair was not trained on. What a policy learns or measures beforehand
(Sequoia's acceptance vector, the warmed calibration) comes from other modules than those it is tested on. All policies
see the same prompts; intervals and paired ratios resample prompts.

    chain               a drafted sequence, at most --depth long
    fixed               the shape for acceptance rates typical of small draft models
    sequoia             the best shape for the acceptance vector measured on the other modules
    eagle2, best-first  chosen children by draft probability (best-first on independent marginals is DDTree)
    dyspec              drawn children, best slot first, verified by traversal; at temperature 0 it is best-first
    dyspec-recursive    the same trees verified as the paper does, by recursive rejection
    calibrated          begins with tables learned on the other modules, and goes on learning
    calibrated-0.1      the same, but no node whose chance of acceptance is below 0.1: the budget is only the most
    calibrated-cold     as it comes, and learns nothing: the first step of a first prompt, which later ones surpass

Children are drawn at temperatures above 0 wherever a policy can do both. What cannot differ is measured once: a chain
is the same under all budgets beyond its depth, and at temperature 0 there is one rule.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from train_demo import corpus_files, read_texts
from transformers import AutoTokenizer, LlamaForCausalLM

import specdec
from specdec import demo
from specdec.bench.statistics.bootstrap import Estimate, estimate, quotient
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.measured import MeasuredDrafter
from specdec.environment import hardware, versions
from specdec.grow.calibration import CalibratedGrowth
from specdec.probe import target_of
from specdec.target import Target
from specdec.tree import TokenTree

POLICIES = (
    "chain", "fixed", "sequoia", "eagle2", "best-first", "dyspec", "dyspec-recursive", "calibrated",
    "calibrated-0.1", "calibrated-cold",
)  # fmt: skip
WIDTH = 10
"""Children of a node at most, of all policies that follow the text."""
BASE = "dyspec"
"""What the others are compared with."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """The demo pair, ready to decode."""

    target: LlamaForCausalLM
    draft: Target
    test: list[list[int]]
    learn: list[list[int]]


def demo_pair(args: argparse.Namespace) -> Pair:
    """Models, and prompts of two sets of held-out modules."""
    target = LlamaForCausalLM.from_pretrained(demo.target_path(), dtype=torch.float32).eval()
    draft = LlamaForCausalLM.from_pretrained(demo.draft_path(), dtype=torch.float32).eval()
    target.generation_config.eos_token_id = None
    for model in (target, draft):
        specdec.optimize(model)
    files = corpus_files()[1]
    tokenizer = AutoTokenizer.from_pretrained(demo.target_path())
    sets = [
        passages([tokenizer(text)["input_ids"] for text in read_texts(part)], args.prompts, args.prompt_tokens, seed)
        for seed, part in enumerate((files[::2], files[1::2]))
    ]
    return Pair(target, target_of(draft), *sets)


def passages(texts: list[list[int]], count: int, length: int, seed: int) -> list[list[int]]:
    """So many passages, the texts taken round and round."""
    generator = random.Random(seed)
    long = [text for text in texts if len(text) > length]
    chosen = [long[number % len(long)] for number in range(count)]
    starts = [generator.randrange(len(text) - length) for text in chosen]
    return [text[start : start + length] for text, start in zip(chosen, starts, strict=True)]


# --- Policies ---------------------------------------------------------------------------------------------------------


def drafter_of(name: str, budget: int, temperature: float, pair: Pair, args: argparse.Namespace) -> DraftModelDrafter:
    """The draft model under a policy of this name, as it is before the first prompt."""
    children = "drawn" if temperature else "chosen"
    either = {"children": children}
    options: dict[str, dict[str, Any]] = {
        "chain": {"grow": "fixed", "depth": min(budget, args.depth), "budget": None, **either},
        "fixed": {"grow": "fixed", "depth": min(args.depth, budget // 2), **either},  # within its depth it is a chain
        "sequoia": {"grow": "sequoia", "table": str(vector_file(args, temperature)), **either},
        "eagle2": {"grow": "eagle2"},
        "best-first": {"grow": "best-first"},
        "dyspec": {"grow": "dyspec"},
        "dyspec-recursive": {"grow": "dyspec"},
        "calibrated": {"grow": "calibrated", "table": str(tables_file(args, temperature)), **either},
        "calibrated-0.1": {
            "grow": "calibrated",
            "table": str(tables_file(args, temperature)),
            "threshold": 0.1,
            **either,
        },
        "calibrated-cold": {"grow": UnlearnedGrowth(budget, args.depth, WIDTH, children)},
    }
    return DraftModelDrafter(pair.draft, **{"depth": args.depth, "budget": budget, **options[name]})


class UnlearnedGrowth(CalibratedGrowth):
    """The calibrated policy at its first step."""

    def observe(self, tree: TokenTree, nodes: list[list[int]]) -> None:
        """Learns nothing."""


def tables_file(args: argparse.Namespace, temperature: float) -> Path:
    """Where the calibration of a temperature is kept."""
    return args.out.with_suffix(f".calibration-{temperature:g}.json")


def vector_file(args: argparse.Namespace, temperature: float) -> Path:
    """Where Sequoia's acceptance counts of a temperature are kept."""
    return args.out.with_suffix(f".counts-{temperature:g}.json")


def prepare(temperature: float, pair: Pair, args: argparse.Namespace) -> None:
    """Measure acceptance by rank, and learn a calibration, on prompts that are not tested."""
    children = "drawn" if temperature else "chosen"
    if not vector_file(args, temperature).is_file():
        wide = DraftModelDrafter(pair.draft, depth=3, budget=40, children=children)
        measured = MeasuredDrafter(wide, depth=3)
        decode(pair, measured, pair.learn, temperature, args.learn_tokens, "auto", args.seed)
        measured.counts.save(vector_file(args, temperature))
    if not tables_file(args, temperature).is_file():
        policy = CalibratedGrowth(32, args.depth, WIDTH, "drawn" if temperature else "chosen")
        learner = DraftModelDrafter(pair.draft, grow=policy)
        decode(pair, learner, pair.learn, temperature, args.learn_tokens, "auto", args.seed)
        policy.save(tables_file(args, temperature))


def decode(
    pair: Pair, drafter: Any, prompts: Sequence[list[int]], temperature: float, tokens: int, rule: Any, seed: int
) -> specdec.DecodeStats:
    """One generation of a batch; a fixed length, so that every policy does the same work."""
    ids = torch.tensor(prompts)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    )
    torch.manual_seed(seed)
    output: Any = specdec.generate(
        pair.target, ids, attention_mask=torch.ones_like(ids), drafter=drafter, rule=rule, max_new_tokens=tokens,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, **sampling,
    )  # fmt: skip
    return output.stats


def rule_of(name: str, temperature: float) -> str:
    """The acceptance rule of a policy's name."""
    return "recursive" if name == "dyspec-recursive" and temperature else "auto"


# --- Cells ------------------------------------------------------------------------------------------------------------


def tau_line(cell: Line, pair: Pair, args: argparse.Namespace) -> Line:
    """One policy, temperature and budget: tokens and steps of each prompt."""
    tokens, steps = [0] * args.prompts, [0] * args.prompts
    nodes = 0
    for start in range(0, args.prompts, args.batch):
        drafter = drafter_of(cell["policy"], cell["budget"], cell["temperature"], pair, args)
        stats = decode(
            pair, drafter, pair.test[start : start + args.batch], cell["temperature"], args.tokens,
            rule_of(cell["policy"], cell["temperature"]), args.seed + start,
        )  # fmt: skip
        for step in stats.steps:
            tokens[start + step.row] += step.emitted
            steps[start + step.row] += 1
            nodes += step.drafted
    return {**cell, "tokens": tokens, "steps": steps, "nodes": nodes / sum(steps)}


def speed_line(cell: Line, pair: Pair, args: argparse.Namespace) -> Line:
    """One temperature and budget: seconds of every policy on each prompt, policies in turns."""
    names = [None, *(policy for policy in args.policies if differs(policy, cell, args))]
    order = random.Random(args.seed)
    spent: dict[str, Line] = {name or "none": {"tokens": [], "steps": [], "seconds": []} for name in names}
    for number, prompt in enumerate(pair.test[: args.speed_prompts]):
        order.shuffle(names)
        for name in names:
            drafter = name and drafter_of(name, cell["budget"], cell["temperature"], pair, args)
            if number == 0:  # warms up kernels and masks
                decode(pair, drafter, [prompt], cell["temperature"], 8, "auto", 0)
                drafter = name and drafter_of(name, cell["budget"], cell["temperature"], pair, args)
            rule = rule_of(name or "", cell["temperature"])
            stats = decode(pair, drafter, [prompt], cell["temperature"], args.speed_tokens, rule, args.seed + number)
            entry = spent[name or "none"]
            entry["tokens"].append(sum(step.emitted for step in stats.steps))
            entry["steps"].append(len(stats.steps))
            entry["seconds"].append(stats.decode_time)
    return {**cell, "policies": spent}


def cells(args: argparse.Namespace) -> Iterator[Line]:
    """Everything to measure, cheap cells first."""
    for budget in sorted(args.budgets):
        for temperature in args.temperatures:
            at = {"temperature": temperature, "budget": budget}
            if args.only != "speed":
                for policy in args.policies:
                    if differs(policy, at, args):
                        yield {"what": "tau", **at, "policy": policy}
            if args.only != "tau":
                yield {"what": "speed", **at}


def differs(policy: str, at: Line, args: argparse.Namespace) -> bool:
    """Whether a cell is not the same as another one."""
    if policy == "dyspec-recursive":
        return at["temperature"] > 0
    return policy != "chain" or not any(args.depth <= budget < at["budget"] for budget in args.budgets)


def key_of(line: Line) -> tuple[Any, ...]:
    """What makes a cell."""
    return tuple(line.get(name) for name in ("what", "temperature", "budget", "policy"))


SETTINGS = ("prompts", "prompt_tokens", "tokens", "batch", "depth", "seed", "learn_tokens", "speed_prompts",
            "speed_tokens", "threads")  # fmt: skip


def measured(pair: Pair, args: argparse.Namespace) -> dict[tuple[Any, ...], Line]:
    """All cells: those in the file, and the rest measured now."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    if lines and lines[0] != settings:
        sys.exit(f"{args.out} was made with other settings: {lines[0]}; give another --out")
    found = {key_of(line): line for line in lines[1:]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    todo = [cell for cell in cells(args) if key_of(cell) not in found]
    with args.out.open("a") as file, Progress(console=Console(stderr=True)) as progress:
        if not lines:
            print(json.dumps(settings), file=file, flush=True)
        task = progress.add_task("measuring", total=len(todo))
        for cell in todo:
            progress.update(task, description=" ".join(f"{value}" for value in cell.values()))
            prepare(cell["temperature"], pair, args)
            started = time.perf_counter()
            line = tau_line(cell, pair, args) if cell["what"] == "tau" else speed_line(cell, pair, args)
            found[key_of(cell)] = line = {**line, "took": round(time.perf_counter() - started, 1)}
            print(json.dumps(line), file=file, flush=True)
            progress.advance(task)
    return found


# --- The table --------------------------------------------------------------------------------------------------------


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Sum over sum, with its interval over prompts."""
    return estimate(np.array([above, below], dtype=np.float64).T, quotient, range(len(above)))


def gain(line: Line, base: Line, above: str, below: str) -> Estimate:
    """Ratio of two ratios, on the same prompts."""
    columns = np.array([line[above], line[below], base[above], base[below]], dtype=np.float64).T

    def statistic(sums: Any) -> Any:
        return sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3])

    return estimate(columns, statistic, range(len(columns)))


def shown(value: Estimate, form: Callable[[float], str], interval: bool = True) -> str:
    """A value and, where there is one, its interval."""
    if value.low is None or value.high is None or not interval:
        return form(value.value)
    return f"{form(value.value)} ({form(value.low)} to {form(value.high)})"


HEADER = ["T", "budget", "policy", "nodes", "tau", f"tau / {BASE}", "tokens/s", f"x {BASE}", "x no drafter"]


def rows(found: dict[tuple[Any, ...], Line], args: argparse.Namespace) -> Iterator[list[str]]:
    """One line of the table for each temperature, budget and policy."""
    for temperature in args.temperatures:
        for budget in sorted(args.budgets):
            at = (temperature, budget)
            base = found.get(("tau", *at, BASE))
            spent = found.get(("speed", *at, None), {}).get("policies", {})
            for policy in args.policies:
                line, timed = found.get(("tau", *at, policy)), spent.get(policy)
                if line is None and timed is None:
                    continue
                taus = ["", "", ""]
                if line:
                    taus[:2] = f"{line['nodes']:.1f}", shown(ratio(line["tokens"], line["steps"]), "{:.2f}".format)
                if line and base and policy != BASE:
                    taus[2] = shown(gain(line, base, "tokens", "steps"), "{:.2f}".format)
                speeds = ["", "", ""]
                if timed:
                    speeds[0] = shown(ratio(timed["tokens"], timed["seconds"]), "{:.0f}".format)
                    for place, other in ((1, BASE), (2, "none")):
                        if other in spent and other != policy:
                            speeds[place] = shown(gain(timed, spent[other], "tokens", "seconds"), "{:.2f}".format)
                yield [f"{temperature:g}", str(budget), policy, *taus, *speeds]


def verdict(found: dict[tuple[Any, ...], Line], args: argparse.Namespace) -> Iterator[str]:
    """Where the calibrated trees stand beside DySpec's in tau."""
    for policy in [name for name in args.policies if name.startswith("calibrated")]:
        for temperature in args.temperatures:
            cell = [(b, found.get(("tau", temperature, b, policy)), found.get(("tau", temperature, b, BASE)))
                    for b in sorted(args.budgets)]  # fmt: skip
            ratios = [(b, gain(one, base, "tokens", "steps").value) for b, one, base in cell if one and base]
            if ratios:
                told = ", ".join(f"{100 * (value - 1):+.0f} % at {b}" for b, value in ratios)
                yield f"{policy} over {BASE} in tau at temperature {temperature:g}: {told}"


def report(found: dict[tuple[Any, ...], Line], args: argparse.Namespace) -> str:
    """The whole result as Markdown."""
    machine, environment = hardware(torch.device("cpu")), ", ".join(f"{k} {v}" for k, v in versions().items() if v)
    told = (
        f"tau of {args.prompts} prompts of {args.prompt_tokens} tokens and {args.tokens} new ones, in batches of "
        f"{args.batch}; tokens/s of {args.speed_prompts} prompts and {args.speed_tokens} new tokens, one at a time; "
        f"depth {args.depth} at most; fp32, {machine['cpu']}, {args.threads} threads of {machine['cores']}; "
        f"{environment}. In brackets: 95 % by bootstrap over prompts."
    )
    table = ["| " + " | ".join(row) + " |" for row in [HEADER, ["---"] * len(HEADER), *rows(found, args)]]
    verdicts = [f"- {line}" for line in verdict(found, args)]
    return "\n".join([f"`python {' '.join(sys.argv)}`", "", told, "", *table, "", *verdicts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each cell; begun or gone on with")
    parser.add_argument("--only", choices=("tau", "speed"), help="only one half")
    parser.add_argument("--budgets", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6, 1.0])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--depth", type=int, default=12, help="most levels of all policies")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learn-tokens", type=int, default=64, help="on each of the other prompts, beforehand")
    parser.add_argument("--speed-prompts", type=int, default=6)
    parser.add_argument("--speed-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text = report(measured(demo_pair(args), args), args)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
