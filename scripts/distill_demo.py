"""Distil the demo draft model: four divergences on three sources of text, measured before and after.

    python scripts/distill_demo.py                                  # one to two hours on one core
    python scripts/distill_demo.py --steps 5 --prompts 2 --work build/try       # does it run?
    python scripts/distill_demo.py --only jsd:0.5/draft             # one cell
    python scripts/distill_demo.py --markdown docs/benchmarks/FILE.md           # the table of what has been measured

DistillSpec (arXiv 2310.08461) compares these. "fixed" is the standard library's source; "target" and "draft" continue
its beginnings at temperature 1, inside the loop. Every cell begins with the draft model that ships and takes the same
number of steps over the same beginnings. Measured on modules that no model was trained on: tau of a chain of four when
decoding greedily and at temperature 1, and the expected acceptance sum min(p, q) on text that the target wrote there.
Everything resumes after an interruption.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from train_demo_heads import corpus_ids, demo_target
from transformers import LlamaForCausalLM

from specdec import demo
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.load import load_drafter
from specdec.probe import target_of
from specdec.train.batch import Document, TrainBatch
from specdec.train.distill import DEFAULT_RECIPE, train_draft_model
from specdec.train.evaluate import Evaluator
from specdec.train.features import TargetFeatures
from specdec.train.kinds.draft_model import DraftModelTraining
from specdec.train.objective import Objective
from specdec.train.on_policy import Writing, continued
from specdec.train.order import Piece
from specdec.train.prepared import MemoryData
from specdec.train.recipe import Recipe
from specdec.train.report import Score, StepReport

DIVERGENCES = ("forward-kl", "reverse-kl", "jsd:0.5", "tv")
SOURCES = ("fixed", "target", "draft")
DOCUMENT, DOCUMENTS, PROMPT_TOKENS, NEW_TOKENS = 128, 6000, 32, 64
DEPTH = 4


def recipe(divergence: str, source: str, steps: int, *, bf16: bool) -> Recipe:
    """1024 tokens in a step; a quarter of each written document is the beginning that it was given."""
    loop = {"steps": steps, "rows_per_step": 4, "rows_at_once": 4, "bf16": bf16, "learning_rate": 5e-4,
            "save_every": 25}  # fmt: skip
    return DEFAULT_RECIPE.changed(
        {
            "loop": {**loop, "warmup": min(20, steps // 10)},
            "objective": {"divergence": divergence},
            "data": {"row_length": 256, "validation_prompts": 0},
            "head": {"text": {source: 1.0}, "writing": {"prompt_tokens": PROMPT_TOKENS}},
        }
    )


def documents(heads: Path) -> MemoryData:
    """Passages of the standard library's source; every token but a passage's first is supervised."""
    corpus = corpus_ids(heads, "train")
    generator = torch.Generator().manual_seed(11)
    starts = torch.randint(0, len(corpus) - DOCUMENT, (DOCUMENTS,), generator=generator).tolist()
    return MemoryData([(corpus[s : s + DOCUMENT].long(), torch.arange(DOCUMENT) > 0) for s in starts])


def held_out_prompts(heads: Path, count: int) -> list[list[int]]:
    """Beginnings from modules that nothing here was trained on."""
    corpus = corpus_ids(heads, "held_out")
    generator = torch.Generator().manual_seed(12)
    starts = torch.randint(0, len(corpus) - PROMPT_TOKENS, (count,), generator=generator).tolist()
    return [corpus[start : start + PROMPT_TOKENS].tolist() for start in starts]


class Yardstick:
    """Held-out prompts, and what the target says after them at temperature 1."""

    def __init__(self, model: Any, prompts: list[list[int]]) -> None:
        self.target = target_of(model)
        self.greedy = Evaluator(model, prompts, max_new_tokens=NEW_TOKENS)
        self.sampled = Evaluator(model, prompts, max_new_tokens=NEW_TOKENS, temperature=1.0)
        length = PROMPT_TOKENS + NEW_TOKENS
        given = [Document(torch.tensor(prompt + [0] * NEW_TOKENS), torch.arange(length) >= PROMPT_TOKENS)
                 for prompt in prompts]  # fmt: skip
        texts = continued(model, given, Writing(), seed=13)
        data = MemoryData([(text.ids, text.supervised) for text in texts])
        rows = [(Piece(number, 0, len(text.ids)),) for number, text in enumerate(texts)]
        batch = TrainBatch.of_rows(data, rows, list(range(len(rows))), length)
        self.batch = TargetFeatures(self.target, ())(batch)

    def measure(self, draft: Any) -> dict[str, float]:
        """tau of chains, acceptance while decoding, and expected acceptance on the target's text."""
        greedy = self.greedy.measure(DraftModelDrafter(target_of(draft), depth=DEPTH))
        drawn = DraftModelDrafter(target_of(draft), depth=DEPTH, children="drawn")
        sampled = self.sampled.measure(drawn)
        with torch.no_grad():
            (term,) = DraftModelTraining(self.target, draft).terms(self.batch, Objective())
        assert term.alpha is not None
        return {
            "tau greedy": greedy.tau,
            "alpha greedy": greedy.alpha[0],
            "tau sampled": sampled.tau,
            "alpha sampled": sampled.alpha[0],
            "expected alpha": float(term.alpha.double().mean()),
        }


def demo_draft() -> Any:
    """The draft model that ships, in fp32."""
    return LlamaForCausalLM.from_pretrained(demo.draft_path(), dtype=torch.float32).eval()


def train_cell(args: argparse.Namespace, divergence: str, source: str, yardstick: Yardstick, console: Console) -> None:
    """Train one cell of the table and keep what it was worth."""
    out = args.work / f"{divergence.replace(':', '-')}-{source}"
    if (out / "result.json").exists():
        return
    chosen = recipe(divergence, source, args.steps, bf16=args.bf16)
    started = time.monotonic()

    def report(what: StepReport | Score) -> None:
        if isinstance(what, StepReport) and what.step % 20 == 0:
            console.print(f"{divergence} on {source} {what.step}: loss {what.loss:.4f}, alpha {what.alpha[0]:.3f}, "
                          f"{what.seconds:.2f} s")  # fmt: skip

    train_draft_model(chosen, yardstick.target.model, documents(args.heads), out, draft=demo_draft(), report=report)
    trained: Any = load_drafter(str(out / "latest" / "drafter"), yardstick.target.model)
    result = {
        "divergence": divergence, "source": source, "after": yardstick.measure(trained.model.model),
        "minutes": round((time.monotonic() - started) / 60, 1), "settings": chosen.resolved(),
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"{divergence} on {source}: {result['after']}")


def show(args: argparse.Namespace, before: dict[str, float], console: Console) -> None:
    """One line for each cell, on the terminal and in the Markdown file."""
    header = ["divergence", "text", *before, "minutes"]
    lines = [["(as it ships)", "", *(f"{value:.3f}" for value in before.values()), ""]]
    for divergence in DIVERGENCES:
        for source in SOURCES:
            file = args.work / f"{divergence.replace(':', '-')}-{source}" / "result.json"
            if file.exists():
                result = json.loads(file.read_text())
                values = [f"{value:.3f}" for value in result["after"].values()]
                lines.append([divergence, source, *values, str(result["minutes"])])
    shown = Table(*header)
    for cells in lines:
        shown.add_row(*cells)
    console.print(shown)
    if args.markdown is not None:
        text = "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])
        with args.markdown.open("a") as opened:
            opened.write(
                f"\n{text}\n\n{args.steps} steps, {args.prompts} prompts of {NEW_TOKENS} new tokens, "
                f"{'bf16' if args.bf16 else 'fp32'} products, torch "
                f"{torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, "
                f"{torch.get_num_threads()} threads\n"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/distill"))
    parser.add_argument("--heads", type=Path, default=Path("build/heads"), help="where the encoded corpus is kept")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--only", help="one cell, as DIVERGENCE/SOURCE")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="bf16 products; faster only on a CPU that has them")
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    args = parser.parse_args()
    cells = [(divergence, source) for divergence in DIVERGENCES for source in SOURCES]
    if args.only is not None:
        cells = [cell for cell in cells if "/".join(cell) == args.only]
        if not cells:
            parser.error(f"no cell {args.only!r}; divergences: {', '.join(DIVERGENCES)}; text: {', '.join(SOURCES)}")
    torch.set_num_threads(args.threads)
    for folder in (args.work, args.heads):
        folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=160)
    yardstick = Yardstick(demo_target(), held_out_prompts(args.heads, args.prompts))
    before = yardstick.measure(demo_draft())
    for divergence, source in cells:
        train_cell(args, divergence, source, yardstick, console)
    show(args, before, console)


if __name__ == "__main__":
    main()
