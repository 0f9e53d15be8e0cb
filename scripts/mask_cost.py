"""What a step's mask costs after a short and a long past: built anew, written where something changed, block-sparse.

    python scripts/mask_cost.py
    python scripts/mask_cost.py --blocks      # blocks of the tree's mask with anything in them, by order of the nodes
    python scripts/mask_cost.py --nodes 16 --batch 8 --device cuda --dtype bfloat16

Every step a row commits a few columns and a tree of the same topology is scored. Nothing else runs: no model.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from specdec.additive_mask import AdditiveMask, whole_mask
from specdec.block_mask import BlockedMask
from specdec.cache import whole_width
from specdec.tree import NO_NODE, Topology, stacked, topology
from specdec.visibility import Reach, Visibility

PASTS = (256, 1024, 4096, 16384, 65536)
REACHES = {"full": Reach(), "window 1024": Reach(window=1024)}
MOST_COMMITTED = 5
WARM_UP = 3


BLOCK_SIZES = (16, 32, 64, 128)
TREE_SIZES = (64, 128, 256, 512, 1024)
TREES = 3


def grown_tree(nodes: int, seed: int = 0) -> Topology:
    """A tree whose early nodes have more children, as a best-first policy leaves them."""
    rng = random.Random(seed)
    return topology((NO_NODE, *(min(rng.randrange(n), rng.randrange(n)) for n in range(1, nodes))))


def steps(past: int, shape: Topology, batch: int, count: int) -> list[Visibility]:
    """`count` steps after `past` columns; rows of a batch commit unequally."""
    rng = random.Random(past)
    depths = stacked([shape.depth_row] * batch)
    lengths, asked = [past] * batch, []
    for _ in range(count):
        handed_out = whole_width(max(lengths) + depths.shape[1])
        asked.append(Visibility([0] * batch, lengths, depths, depths, (shape,) * batch, handed_out))
        lengths = [length + rng.randint(1, MOST_COMMITTED) for length in lengths]
    return asked


def median_us(make: Callable[[Visibility], object], asked: list[Visibility], device: torch.device) -> float:
    """Median microseconds of one mask, after a few that warm up."""
    seconds = []
    for visibility in asked:
        started = time.perf_counter()
        make(visibility)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 1e6 * statistics.median(seconds[WARM_UP:])


def measured(past: int, reach: Reach, args: argparse.Namespace) -> list[float]:
    """Microseconds of the three masks."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    asked = steps(past, grown_tree(args.nodes), args.batch, args.repeats + WARM_UP)
    return [
        median_us(lambda v: whole_mask(v, reach, dtype).to(device), asked, device),
        median_us(AdditiveMask(reach, dtype, device).of, asked, device),
        median_us(BlockedMask(reach, device).of, asked, device),
    ]


def non_empty_blocks(shape: Topology, order: tuple[int, ...], size: int) -> int:
    """Blocks of `size` nodes, laid out in this order, in which any query sees any column."""
    seen = shape.in_order(order).ancestors
    rows = [block.any(0) for block in seen.split(size)]
    return sum(int(columns.any()) for row in rows for columns in row.split(size))


def blocks_by_order() -> tuple[list[str], list[list[str]]]:
    """Median over a few grown trees, breadth first and depth first into the heavy path."""
    lines = []
    for nodes in TREE_SIZES:
        line = [str(nodes)]
        for size in BLOCK_SIZES:
            medians = []
            for depth_first in (False, True):
                counts = []
                for seed in range(TREES):
                    shape = grown_tree(nodes, seed)
                    by_level = tuple(sorted(range(nodes), key=lambda n: (shape.depths[n], n)))
                    counts.append(non_empty_blocks(shape, shape.heavy_first if depth_first else by_level, size))
                medians.append(f"{statistics.median(counts):.0f}")
            line.append(" -> ".join(medians))
        lines.append(line)
    return ["nodes", *(f"blocks of {size}" for size in BLOCK_SIZES)], lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--blocks", action="store_true", help="count blocks instead of timing masks")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.blocks:
        title = f"non-empty blocks, breadth first -> heavy path first, median of {TREES} trees"
        tell(title, *blocks_by_order(), args.markdown)
        return
    header = ["attention", "past", "built anew us", "where it changed us", "block mask us"]
    lines = []
    for name, reach in REACHES.items():
        for past in PASTS:
            lines.append([name, str(past), *(f"{us:.0f}" for us in measured(past, reach, args))])
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    title = (
        f"one layer kind's mask, {args.nodes} nodes, batch {args.batch}, {args.dtype}, {hardware}, "
        f"{args.threads} threads, torch {torch.__version__}"
    )
    tell(title, header, lines, args.markdown)


def tell(title: str, header: list[str], lines: list[list[str]], markdown: Path | None) -> None:
    """Print a table, and append it to a file where one is named."""
    table = Table(*header, title=title)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if markdown:
        rendered = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]]
        with markdown.open("a") as file:
            file.write(f"\n`python {' '.join(sys.argv)}`\n\n{title}\n\n" + "\n".join(rendered) + "\n")


if __name__ == "__main__":
    main()
