"""Train the draft heads that ship with the demo pair, and measure every kind before and after.

    python scripts/train_demo_heads.py texts                       # the target writes; about ten minutes on two cores
    python scripts/train_demo_heads.py features                    # what heads read of it, once for all kinds: 4 GB
    python scripts/train_demo_heads.py train medusa hydra eagle eagle3 kangaroo
    python scripts/train_demo_heads.py table --markdown docs/benchmarks/FILE.md
    python scripts/train_demo_heads.py gains --markdown docs/benchmarks/FILE.md     # after over before, with intervals
    python scripts/train_demo_heads.py export medusa hydra eagle eagle3 kangaroo

Half of the text is the target's own, sampled at temperatures 0, 0.7 and 1 after beginnings from the standard library's
source; the other half is that source itself. Modules that the target never saw (HELD_OUT in train_demo.py) give the
prompts that validation decodes. Without `features` the target runs beside every kind, which takes longer and learns the
same; it runs beside dflash, which reads more of it, and in medusa2's second stage, where it learns, in any case.
Everything resumes after an interruption.

medusa2 changes its target: what it was worth is measured with the adapted one, which lies in WORK/medusa2/target and
is compared with the one that ships.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from train_demo import Corpus
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec import demo, formats
from specdec.bench.statistics.bootstrap import Floats, estimate
from specdec.drafter import Drafter
from specdec.drafters.directory import read_drafter_json, write_drafter_json
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.probe import target_of
from specdec.target import BEFORE_NORM
from specdec.train.batch import Documents
from specdec.train.checkpoint import Checkpoints, read_state
from specdec.train.distill import train_draft_model
from specdec.train.drift import AGREEMENT, KL
from specdec.train.evaluate import Evaluator
from specdec.train.feature_cache import CachedData, plan_features, write_features
from specdec.train.features import stored_taps
from specdec.train.joint import HEADS, head_recipe, train_medusa2
from specdec.train.kinds.draft_model import DraftModelTraining
from specdec.train.kinds.head import HeadTraining
from specdec.train.prepared import PreparedData, write_prepared
from specdec.train.recipe import DRAFT_MODEL, MEDUSA_2, Recipe, recipe_for
from specdec.train.report import Score, StepReport
from specdec.train.run import make_training, train_head

TEMPERATURES = (0.0, 0.7, 1.0, 1.0)
ROWS, NEW_TOKENS, DOCUMENT = 48, 160, 256
PROMPTS, PROMPT_TOKENS = 16, 48
GAIN_PROMPTS = 64
INTERRUPTED = 130
"""Exit status where a signal ended a run."""

OPTIONS: dict[str, dict[str, Any]] = {
    "medusa": {"budget": 15},
    "medusa2": {"budget": 15},
    "hydra": {"budget": 12},
    "hydra++": {"budget": 12},
    "clover": {"budget": 12},
    "mlp-speculator": {"budget": 10},
    "dflash": {"budget": 12, "grow": "best-first"},
    "eagle": {"depth": 4, "budget": 12},
    "eagle3": {"depth": 4, "budget": 12},
    "kangaroo": {"depth": 4},
    "draft-model": {"depth": 4, "budget": 12},
}
"""The trees that validation decodes with. Sizes and learning rates are each kind's defaults."""

SHIPPED_HYDRA_HEADS = 2

TAPS = (2, 4, 5, BEFORE_NORM)
"""What is kept of the target: EAGLE-3's and Kangaroo's layers, and the last state. The five states that DFlash reads
would make it half as large again, and running a target of 7 M costs less than DFlash's own layers do."""


def demo_recipe(kind: str, steps: int, model: Any) -> Recipe:
    """A kind's recipe fitted to the demo target: rows of 256 tokens, 1024 tokens in a step.

    Of medusa2 both stages have so many steps.
    """
    loop = {"steps": steps, "rows_per_step": 4, "rows_at_once": 4, "save_every": 100,
            "evaluate_every": 400}  # fmt: skip
    data = {"row_length": DOCUMENT, "validation_prompts": PROMPTS, "validation_tokens": 48}
    head = {"options": OPTIONS[kind], **({"frozen_steps": steps} if kind == MEDUSA_2 else {})}
    recipe, target = recipe_for(kind, None, loop=loop, data=data, head=head), target_of(model)
    if kind == DRAFT_MODEL:  # a fresh one
        recipe = recipe.for_width(LlamaConfig.from_pretrained(demo.draft_path()).hidden_size)
    return recipe.fitted(1, target.max_positions, target.hidden_size)


def corpus_ids(work: Path, split: str) -> Tensor:
    """Token ids of the standard library's "train" or "held_out" files; encoded once, which takes a minute."""
    file = work / "corpus.pt"
    if not file.exists():
        corpus = Corpus(work.parent / "demo", seed=0)
        torch.save({"train": corpus.train, "held_out": corpus.held_out}, file)
    return torch.load(file)[split]


def write_texts(work: Path, batches: int) -> None:
    """Let the target continue beginnings from its training corpus; [ROWS, length] for each batch, kept as one file."""
    file = work / "texts.pt"
    texts: list[Tensor] = torch.load(file) if file.exists() else []
    corpus, model = corpus_ids(work, "train"), demo_target()
    with Progress() as progress:
        bar = progress.add_task("the target writes", total=batches, completed=len(texts))
        for batch in range(len(texts), batches):
            generator = torch.Generator().manual_seed(batch)
            length = int(torch.randint(24, 64, (1,), generator=generator))
            starts = torch.randint(0, len(corpus) - length - 1, (ROWS,), generator=generator).tolist()
            ids = torch.stack([corpus[start : start + length] for start in starts]).long()
            temperature = TEMPERATURES[batch % len(TEMPERATURES)]
            sampling: dict[str, Any] = {"temperature": temperature, "top_k": 0} if temperature else {}
            torch.manual_seed(batch)
            texts.append(
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                    do_sample=temperature > 0, **sampling,
                ).short()
            )  # fmt: skip
            torch.save(texts, file.with_suffix(".unfinished"))
            file.with_suffix(".unfinished").replace(file)
            progress.advance(bar)


def documents(work: Path) -> PreparedData:
    """The target's texts and as many tokens of the corpus; every token but a document's first is supervised."""
    folder = work / "data"
    if not folder.exists():
        texts = [row.long() for batch in torch.load(work / "texts.pt") for row in batch]
        corpus = corpus_ids(work, "train")
        count = sum(map(len, texts)) // DOCUMENT
        generator = torch.Generator().manual_seed(1)
        starts = torch.randint(0, len(corpus) - DOCUMENT, (count,), generator=generator).tolist()
        texts += [corpus[start : start + DOCUMENT].long() for start in starts]
        rows = ((text.tolist(), [False, *[True] * (len(text) - 1)]) for text in texts)
        write_prepared(folder, rows, {"sources": ["the demo target's texts", "the standard library's source"]})
    return PreparedData(folder)


def write_states(work: Path) -> None:
    """Run the target over all documents once and keep the states that heads read."""
    data, target = documents(work), target_of(demo_target())
    plan = plan_features(data, target, TAPS, row_length=DOCUMENT)
    with Progress() as progress:
        bar = progress.add_task(f"features, {plan.bytes / 1e9:.1f} GB", total=plan.tokens)
        write_features(plan, data, target, work / "features", tell=lambda tokens: progress.advance(bar, tokens))


def untrained(recipe: Recipe, model: Any) -> HeadTraining | DraftModelTraining:
    """A kind before its first step; the draft model has the shape of the one that ships, and random weights.

    medusa2 begins as its heads on the target that ships.
    """
    torch.manual_seed(recipe.loop.seed)
    if recipe.kind != DRAFT_MODEL:
        return make_training(head_recipe(recipe), target_of(model))
    draft = LlamaForCausalLM(LlamaConfig.from_pretrained(demo.draft_path())).float().eval()
    return DraftModelTraining(target_of(model), draft, options=recipe.head["options"])


def documents_for(training: HeadTraining | DraftModelTraining, work: Path) -> Documents:
    """The documents with the states that this kind reads, where they are kept; else as they are."""
    data, cache = documents(work), work / "features"
    if not set(stored_taps(training.target, training.taps)) <= set(TAPS) or not cache.exists():
        return data
    return CachedData(data, cache, training.target, training.taps, row_length=DOCUMENT)


def held_out_prompts(work: Path, count: int = PROMPTS, seed: int = 2) -> list[list[int]]:
    """Beginnings from modules that nothing here was trained on."""
    corpus = corpus_ids(work, "held_out")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(corpus) - PROMPT_TOKENS, (count,), generator=generator).tolist()
    return [corpus[start : start + PROMPT_TOKENS].tolist() for start in starts]


def demo_target() -> Any:
    """The target that ships."""
    return LlamaForCausalLM.from_pretrained(demo.target_path(), dtype=torch.float32).eval()


def train(work: Path, kind: str, steps: int, console: Console) -> None:
    """Train one kind and note what it was worth before and after."""
    out, model = work / kind.replace("+", "p"), demo_target()
    recipe, prompts = demo_recipe(kind, steps, model), held_out_prompts(work)
    before = _measure_fresh(recipe, model, prompts, out)
    started, spent = time.monotonic(), _spent(out)

    def report(what: StepReport | Score) -> None:
        if isinstance(what, Score):
            console.print(f"{kind}: {what.details}")
        elif what.step % 20 == 0:
            alpha = " ".join(f"{a:.2f}" for a in what.alpha)
            console.print(f"{kind} {what.step}: loss {what.loss:.3f}, alpha {alpha}, {what.seconds:.2f} s")

    fresh = untrained(recipe, model)
    data = documents_for(fresh, work)
    if isinstance(fresh, DraftModelTraining):
        loop = train_draft_model(recipe, model, data, out, draft=fresh.module, prompts=prompts, report=report)
    elif kind == MEDUSA_2:  # the model is the adapted one afterwards
        loop = train_medusa2(recipe, model, data, out, prompts=prompts, report=report, report_heads=report)
    else:
        loop = train_head(recipe, model, data, out, prompts=prompts, report=report)
    if loop.stopped or loop.step < loop.settings.steps:
        console.print(f"{kind} stopped after step {loop.step} of {loop.settings.steps}; the same command goes on")
        raise SystemExit(INTERRUPTED)
    after = Evaluator(model, prompts, max_new_tokens=48).measure(specdec.load_drafter(best(out), model)).details()
    result = {
        "before": before,
        "after": {**after, **_drift(out)},
        "parameters": sum(parameter.numel() for parameter in loop.trainable.module.parameters()),
        "steps": recipe.loop.steps,
        "minutes": round((time.monotonic() - started + spent) / 60, 1),
        "settings": recipe.resolved(),
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"{kind}: tau {before['tau']} -> {result['after']['tau']}")


def _drift(out: Path) -> dict[str, float]:
    """How far the adapted target of the best checkpoint is from the one that ships; nothing where it is that one."""
    details = read_state((out / "best").resolve())["score"]["details"]
    return {name: details[name] for name in (KL, AGREEMENT) if name in details}


def _spent(out: Path) -> float:
    """Seconds that an interrupted run has taken up to its newest checkpoint, by the files' times."""
    spent = 0.0
    for run in (out / HEADS, out):
        latest, recipe = Checkpoints(run).latest(), run / "recipe.json"
        spent += latest.stat().st_mtime - recipe.stat().st_mtime if latest and recipe.exists() else 0.0
    return spent


def _measure_fresh(recipe: Recipe, model: Any, prompts: list[list[int]], out: Path) -> dict[str, Any]:
    """The untrained drafter's numbers, measured once."""
    file = out / "before.json"
    if not file.exists():
        measured = Evaluator(model, prompts, max_new_tokens=48).measure(untrained(recipe, model).drafter())
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measured.details()))
    return json.loads(file.read_text())


def best(out: Path) -> Path:
    """The drafter directory of the checkpoint with the best tau."""
    return out / "best" / "drafter"


def table(work: Path, markdown: Path | None, console: Console) -> None:
    """One line for each kind that has been trained, and the draft model beside them."""
    model, prompts = demo_target(), held_out_prompts(work)
    draft = LlamaForCausalLM.from_pretrained(demo.draft_path(), dtype=torch.float32).eval()
    drafter = DraftModelDrafter(target_of(draft), depth=4, budget=12)
    reference = Evaluator(model, prompts, max_new_tokens=48).measure(drafter).details()
    header = [
        "kind",
        "parameters",
        "steps",
        "minutes",
        "tau before",
        "tau after",
        "alpha by depth",
        "expected speed-up",
        "KL from the target that ships",
    ]
    numel = sum(parameter.numel() for parameter in draft.parameters())
    lines = [["draft model (ships)", f"{numel:,}", "", "", "", f"{reference['tau']:.2f}", _listed(reference["alpha"]),
              f"{reference['expected_speedup']:.2f}", ""]]  # fmt: skip
    for kind in OPTIONS:
        file = work / kind.replace("+", "p") / "result.json"
        if file.exists():
            r = json.loads(file.read_text())
            lines.append([kind, f"{r['parameters']:,}", str(r["steps"]), str(r["minutes"]), f"{r['before']['tau']:.2f}",
                          f"{r['after']['tau']:.2f}", _listed(r["after"]["alpha"]),
                          f"{r['after']['expected_speedup']:.2f}",
                          f"{r['after'][KL]:.3f}" if KL in r["after"] else ""])  # fmt: skip
    _show(header, lines, markdown, console)


def gains(work: Path, markdown: Path | None, console: Console) -> None:
    """tau after training over tau before it, on prompts that no checkpoint was chosen by, paired by prompt."""
    header = ["kind", "tau before", "tau after", "after / before, 95 %"]
    lines = []
    for kind in OPTIONS:
        out = work / kind.replace("+", "p")
        if not (out / "result.json").exists():
            continue
        adapted = out / "target"
        model = LlamaForCausalLM.from_pretrained(adapted).float().eval() if adapted.exists() else demo_target()
        steps = json.loads((out / "result.json").read_text())["steps"]
        fresh = demo_target()
        before = _counts(work, untrained(demo_recipe(kind, steps, fresh), fresh).drafter(), fresh)
        after = _counts(work, specdec.load_drafter(best(out), model), model)
        gain = estimate(np.hstack([after, before]), _ratio_of_taus, range(GAIN_PROMPTS))
        taus = [f"{tokens / calls:.2f}" for tokens, calls in (before.sum(0), after.sum(0))]
        lines.append([kind, *taus, f"{gain.value:.2f} ({gain.low:.2f} to {gain.high:.2f})"])
    _show(header, lines, markdown, console)


def _counts(work: Path, drafter: Drafter | None, model: Any) -> Floats:
    """Tokens and target calls of each prompt [GAIN_PROMPTS, 2]."""
    prompts = held_out_prompts(work, GAIN_PROMPTS, seed=3)
    runs = Evaluator(model, prompts, max_new_tokens=48).decode_all(drafter)
    return np.array([(sum(step.emitted for step in run.steps), len(run.steps)) for run in runs], dtype=np.float64)


def _ratio_of_taus(sums: Floats) -> Floats:
    return sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3])


def _show(header: list[str], lines: list[list[str]], markdown: Path | None, console: Console) -> None:
    """The lines on the terminal and, where a file is named, behind what it holds."""
    shown = Table(*header)
    for cells in lines:
        shown.add_row(*cells)
    console.print(shown)
    if markdown is not None:
        text = "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])
        with markdown.open("a") as opened:
            opened.write(f"\n{text}\n\ntorch {torch.__version__}, transformers {transformers.__version__}, "
                         f"{platform.machine()}, {torch.get_num_threads()} threads\n")  # fmt: skip


def _listed(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def export(work: Path, kinds: list[str], to: Path) -> None:
    """Write the best checkpoint of each kind in bf16 to `to`/KIND, with where it came from beside it."""
    for kind in kinds:
        out = work / kind.replace("+", "p")
        result = json.loads((out / "result.json").read_text())
        destination = to / kind.replace("+", "p")
        shutil.rmtree(destination, ignore_errors=True)
        destination.mkdir(parents=True)
        formats.write(small(formats.read(best(out))), destination)
        options = read_drafter_json(best(out)).options
        write_drafter_json(destination, replace(read_drafter_json(destination), options=options))
        step = read_state((out / "best").resolve())["step"]
        note = {"step": step, **{key: result[key] for key in ("before", "after", "parameters", "settings")}}
        (destination / "training.json").write_text(json.dumps(note, indent=2) + "\n")


def small(checkpoint: HeadCheckpoint) -> HeadCheckpoint:
    """What ships of a head: bf16, and of Hydra's heads, each with an output matrix of its own, the first two.

    A Hydra head reads the tokens before it, never another head, so those that stay guess as before.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    if checkpoint.kind == "hydra":
        config = replace(config, num_heads=SHIPPED_HYDRA_HEADS)
        tensors = {name: value for name, value in tensors.items() if int(name.split(".")[1]) < SHIPPED_HYDRA_HEADS}
    return replace(checkpoint, config=config, tensors={name: value.bfloat16() for name, value in tensors.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("texts", "features", "train", "table", "gains", "export"))
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(OPTIONS))
    parser.add_argument("--work", type=Path, default=Path("build/heads"))
    parser.add_argument("--batches", type=int, default=48, help=f"of {ROWS} texts that the target writes")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--to", type=Path, default=Path("specdec/demo/heads"))
    args = parser.parse_args()
    unknown = sorted(set(args.kinds) - set(OPTIONS))
    if unknown:
        parser.error(f"no kind {unknown[0]!r}; there are {', '.join(OPTIONS)}")
    if args.command == "export" and MEDUSA_2 in args.kinds:
        parser.error(f"{MEDUSA_2} fits its adapted target alone, which does not ship")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    console = Console(width=160)
    if args.command == "texts":
        write_texts(args.work, args.batches)
    elif args.command == "features":
        write_states(args.work)
    elif args.command == "train":
        for kind in args.kinds or OPTIONS:
            train(args.work, kind, args.steps, console)
    elif args.command == "table":
        table(args.work, args.markdown, console)
    elif args.command == "gains":
        gains(args.work, args.markdown, console)
    else:
        export(args.work, args.kinds, args.to)


if __name__ == "__main__":
    main()
