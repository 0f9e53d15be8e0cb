"""Is what `specdec tune` chooses the best there is, and as fast as it expects? The demo pair, or its target padded.

    python scripts/check_tuning.py                                              # the demo target, one thread
    python scripts/check_tuning.py --padded 150000000 --threads 2 --limit 4 --tokens 20

The same as `specdec tune --grid --dry-run`, with a grid that can be made smaller: of a large target every setting takes
seconds, and there are hundreds. Wants a machine that does nothing else. Exit code 1 when the choice is more than 5 %
behind the best of the grid, or what was expected more than 15 % off what was measured.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer, LlamaForCausalLM

import specdec
from specdec import demo
from specdec.bench import load_questions
from specdec.demo.padded import cost_padded
from specdec.tuning.decoded import Job
from specdec.tuning.grid import full_grid, measured_grid
from specdec.tuning.prompts import first_prompts
from specdec.tuning.tune import TABLE_FILE, Effort, tune

WITHIN_BEST, WITHIN_EXPECTED = 0.05, 0.15


def job_of(args: argparse.Namespace) -> Job:
    """The target and its prompts."""
    model = LlamaForCausalLM.from_pretrained(demo.target_path(), dtype=torch.float32).eval()
    model = cost_padded(model, parameters=args.padded) if args.padded else model
    specdec.optimize(model)
    tokenizer = AutoTokenizer.from_pretrained(demo.target_path())
    prompts = first_prompts(model, tokenizer, load_questions("demo-code"), args.limit, args.tokens)
    return Job(model, prompts, args.tokens, args.temperature)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", default="demo-draft")
    parser.add_argument("--padded", type=int, default=0, help="parameters; 0 for the demo target itself")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 8, 12, 16, 32])
    parser.add_argument("--limit", type=int, default=6, help="prompts")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console, effort = Console(width=120), Effort(tuple(args.depths), tuple(args.budgets))
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        os.environ["SPECDEC_CACHE"] = folder  # costs are measured anew
        bar = progress.add_task("")

        def tell(what: str, done: int, total: int) -> None:
            progress.update(bar, description=what, completed=done, total=total)

        job = job_of(args)
        found = tune(job, args.drafter, effort=effort, fresh=True, folder=Path(folder), tell=tell)
        settings = full_grid(found.subject, job, Path(folder) / TABLE_FILE, effort)
        ranked = measured_grid(found, job, settings, tell)
    assert found.measured is not None
    expected, measured, best = found.choice.tokens_per_second, found.measured.tokens_per_second, ranked[0]
    place = next(n for n, entry in enumerate(ranked) if entry.setting == found.choice.setting)
    share = ranked[place].tokens_per_second / best.tokens_per_second
    console.print(f"choice: {found.choice.setting.name}")
    plain = found.measured.plain_tokens_per_second
    console.print(f"expected {expected:.1f} tokens/s, measured {measured:.1f}, plain decoding {plain:.1f}")
    console.print(f"grid: {len(ranked)} settings, the best is {best.setting.name}")
    console.print(f"the choice is number {place + 1}, at {100 * share:.1f} % of the best")
    sys.exit(share < 1 - WITHIN_BEST or abs(expected / measured - 1) > WITHIN_EXPECTED)


if __name__ == "__main__":
    main()
