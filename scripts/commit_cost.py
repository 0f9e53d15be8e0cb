"""Time per step after 100 and after 4000 committed tokens: a commit must not grow with the past.

    python scripts/commit_cost.py

Beside our step stands a plain decode step over transformers' DynamicCache, which copies the past on every append.
The attention itself reads the past, so the forward grows; the commit and the append must not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from specdec.context import Context
from specdec.target import Target
from specdec.tree import TokenTree

LENGTHS = (100, 1000, 4000)
BRANCHING = [(0, 5), (0, 6), (1, 7), (2, 8), (4, 9), (3, 10), (5, 11)]


def model(layers: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=8192,
        )
    ).eval()  # fmt: skip


@torch.no_grad()
def our_step(target: Target, length: int, repeats: int, batch: int) -> tuple[float, float]:
    """Median ms of (forward over an 8-node tree, commit that moves a branch of 3 nodes)."""
    context = Context(target, length + 8 * repeats + 64)
    context.prefill([(torch.arange(length) % 4000 + 5).tolist()] * batch)
    tree = TokenTree.of_nodes(torch.tensor([7] * batch), [BRANCHING] * batch)
    forwards, commits = [], []
    for _ in range(repeats):
        t0 = time.perf_counter()
        context.run(tree.tokens, tree.depths(), tree.ancestors())
        t1 = time.perf_counter()
        context.keep([[0, 2, 4, 5]] * batch)
        commits.append(time.perf_counter() - t1)
        forwards.append(t1 - t0)
    return 1e3 * statistics.median(forwards), 1e3 * statistics.median(commits)


@torch.no_grad()
def dynamic_step(llama: LlamaForCausalLM, length: int, repeats: int, batch: int) -> float:
    """Median ms of one plain decode step over a DynamicCache."""
    cache = DynamicCache()
    llama(input_ids=(torch.arange(length) % 4000 + 5).expand(batch, -1), past_key_values=cache, logits_to_keep=1)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        llama(input_ids=torch.full((batch, 1), 7), past_key_values=cache, logits_to_keep=1)
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    llama = model(args.layers, args.hidden)
    target = Target(llama)
    header = ["committed tokens", "8-node tree forward ms", "commit of 4 columns ms", "plain step, DynamicCache ms"]
    lines = []
    for length in LENGTHS:
        forward, commit = our_step(target, length, args.repeats, args.batch)
        plain = dynamic_step(llama, length, args.repeats, args.batch)
        lines.append([str(length), f"{forward:.2f}", f"{commit:.3f}", f"{plain:.2f}"])
    size = sum(p.numel() for p in llama.parameters()) / 1e6
    title = f"random Llama of {size:.0f} M parameters, fp32, batch {args.batch}, {args.threads} threads"
    table = Table(*header, title=title)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if args.markdown:
        rendered = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]]
        with args.markdown.open("a") as file:
            file.write(f"\n`python {' '.join(sys.argv)}`\n\n{title}\n\n" + "\n".join(rendered) + "\n")


if __name__ == "__main__":
    main()
