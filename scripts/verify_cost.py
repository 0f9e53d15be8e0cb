"""What a target forward over n tree nodes costs, without and with `specdec.optimize`.

python scripts/verify_cost.py                        # demo target cost-padded to 150 M parameters
python scripts/verify_cost.py --padded 0 --context 256
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import cast

import torch
from bench_generate import environment
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

import specdec
from specdec import demo
from specdec.costs.measure import NODES as WIDTHS
from specdec.costs.measure import Grid, measure_verifications
from specdec.demo.padded import cost_padded
from specdec.target import Target

VARIANTS = (("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True))


def curve(model: LlamaForCausalLM, context_length: int, repeats: int) -> dict[int, float]:
    """Median milliseconds of one verification by number of nodes, after `context_length` tokens."""
    points = measure_verifications(Target(model), Grid(WIDTHS, (context_length,), repeats=repeats))
    return {point.nodes: 1e3 * point.seconds for point in points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--padded", type=int, default=150_000_000, help="parameters; 0 for the demo target itself")
    parser.add_argument("--extra-layers", type=int, default=0)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    args.dtype, args.tokens, args.rounds = "float32 and bfloat16", 0, args.repeats
    torch.set_num_threads(args.threads)
    curves = {}
    for dtype, optimized in VARIANTS:
        model = LlamaForCausalLM.from_pretrained(demo.target_path(), dtype=torch.float32).eval()
        if args.padded:
            model = cost_padded(model, parameters=args.padded, extra_layers=args.extra_layers)
        model = model.bfloat16() if dtype == "bfloat16" else model
        if optimized:
            specdec.optimize(model)
        curves[f"{dtype}{' optimized' if optimized else ''}"] = curve(
            cast(LlamaForCausalLM, model), args.context, args.repeats
        )
    header = ["nodes", *(f"{name} ms (x 1 node)" for name in curves)]
    lines = [[str(w), *(f"{c[w]:.1f} ({c[w] / c[1]:.2f})" for c in curves.values())] for w in WIDTHS]
    size = f"{args.padded:,} parameters" if args.padded else "demo target"
    title = f"verification cost, {size}, context {args.context}; {environment(args).split(';', 1)[1].strip()}"
    table = Table(*header, title=title)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if args.markdown:
        rendered = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]]
        with args.markdown.open("a") as file:
            file.write(f"\n`python {' '.join(sys.argv)}`\n\n{title}\n\n" + "\n".join(rendered) + "\n")


if __name__ == "__main__":
    main()
