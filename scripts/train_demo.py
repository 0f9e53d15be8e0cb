"""Train the pair that ships with specdec: a small Llama-style target and a draft model distilled from it.

    python scripts/train_demo.py --work build/demo          # trains, resumes after an interruption
    python scripts/train_demo.py --work build/demo --export specdec/demo

Corpus: the Python standard library of the running interpreter; the modules in HELD_OUT are never
trained on. One loop trains everything: the target on the text, its second layer through the target's
own norm and head (LayerSkip, arXiv 2404.16710, so that the early-exit drafter has something to read),
and the draft model on the target's distribution (forward KL). Batches are a pure function of
(seed, step), so a killed run that is started again ends with the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import random
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
VOCAB_SIZE = 4096
EXIT_LAYER = 2
HELD_OUT = (
    "bisect.py", "csv.py", "dataclasses.py", "graphlib.py", "heapq.py", "json", "sched.py",
    "shelve.py", "statistics.py", "textwrap.py", "tomllib", "wsgiref", "zipfile.py",
)  # fmt: skip
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "ensurepip"}

TARGET = LlamaConfig(
    vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=704, num_hidden_layers=8,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
DRAFT = LlamaConfig(
    vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=352, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip


def corpus_files() -> tuple[list[Path], list[Path]]:
    """The standard library's sources as (training files, held-out files), in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        (held_out if relative.parts[0] in HELD_OUT else train).append(path)
    return train, held_out


def read_texts(paths: list[Path]) -> list[str]:
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; id 0 is the only special token and serves as bos, eos and pad."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS, eos_token=EOS, pad_token=EOS,
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts in one row of ids, an end-of-text id before each."""
    ids = []
    for text in texts:
        ids.append(0)
        ids.extend(tokenizer(text)["input_ids"])
    return torch.tensor(ids, dtype=torch.int32)


class Corpus:
    """Token ids of both splits, built once and kept in the work folder."""

    def __init__(self, work: Path, seed: int) -> None:
        train_files, held_out_files = corpus_files()
        train_texts, held_out_texts = read_texts(train_files), read_texts(held_out_files)
        self.sha256 = hashlib.sha256("\0".join(train_texts).encode()).hexdigest()
        cache = work / "tokenizer"
        if (cache / "tokenizer.json").exists():
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(cache)
        else:
            self.tokenizer = train_tokenizer(train_texts)
            self.tokenizer.save_pretrained(cache)
        random.Random(seed).shuffle(train_texts)
        self.train = encode(self.tokenizer, train_texts)
        self.held_out = encode(self.tokenizer, held_out_texts)
        self.seed = seed

    def batch(self, start_token: int, rows: int, length: int) -> Tensor:
        """Rows [rows, length] that begin `start_token` tokens into the run; every epoch is cut anew."""
        per_epoch = len(self.train) // length - 1
        first_row = start_token // length
        picked = []
        for row in range(first_row, first_row + rows):
            epoch, index = divmod(row, per_epoch)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            shift = int(torch.randint(length, (1,), generator=generator))
            order = torch.randperm(per_epoch, generator=generator)
            begin = shift + int(order[index]) * length
            picked.append(self.train[begin : begin + length])
        return torch.stack(picked).long()


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def distillation_loss(student: Tensor, p: Tensor) -> Tensor:
    """Forward KL(p || student) up to the entropy of p; student logits and p are [B, S, V]."""
    return F.cross_entropy(student.flatten(0, 1).float(), p.flatten(0, 1))


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_scale(step: int, steps: int) -> float:
    """Linear warm-up, flat, then linear decay over the last 40 % of the run."""
    warm_up = min(1.0, (step + 1) / 60)
    decay = min(1.0, (steps - step) / (0.4 * steps))
    return warm_up * decay


@torch.no_grad()
def held_out_losses(target: LlamaForCausalLM, draft: LlamaForCausalLM, ids: Tensor, rows: int) -> dict[str, float]:
    """Nats per token of target, early exit and draft on held-out rows of 512, and how often draft agrees."""
    length = 512
    rows = min(rows, len(ids) // length)
    sums = dict.fromkeys(("target", "exit", "draft", "draft_agrees", "exit_agrees"), 0.0)
    for row in range(rows):
        x = ids[row * length : (row + 1) * length].long()[None]
        full = target(input_ids=x, output_hidden_states=[EXIT_LAYER])
        early = target.lm_head(target.model.norm(full.hidden_states[EXIT_LAYER]))
        drafted = draft(input_ids=x).logits
        sums["target"] += next_token_loss(full.logits, x).item()
        sums["exit"] += next_token_loss(early, x).item()
        sums["draft"] += next_token_loss(drafted, x).item()
        best = full.logits.argmax(-1)
        sums["draft_agrees"] += (drafted.argmax(-1) == best).float().mean().item()
        sums["exit_agrees"] += (early.argmax(-1) == best).float().mean().item()
    return {name: total / rows for name, total in sums.items()}


class Run:
    """Models, optimizers and the step counter: everything a checkpoint holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.target, self.draft = LlamaForCausalLM(TARGET), LlamaForCausalLM(DRAFT)
        self.target_optimizers = optimizers(self.target, args.lr)
        self.draft_optimizers = optimizers(self.draft, args.draft_lr)
        self.step = 0
        self.tokens = 0

    @property
    def all_optimizers(self) -> list[torch.optim.Optimizer]:
        return self.target_optimizers + self.draft_optimizers

    def save(self, path: Path) -> None:
        state = {
            "target": self.target.state_dict(),
            "draft": self.draft.state_dict(),
            "optimizers": [o.state_dict() for o in self.all_optimizers],
            "step": self.step,
            "tokens": self.tokens,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)  # a kill leaves either the old file or the new one

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.target.load_state_dict(state["target"])
        self.draft.load_state_dict(state["draft"])
        for optimizer, saved in zip(self.all_optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens = state["step"], state["tokens"]

    def train_step(self, ids: Tensor, lr_scale: float, base_lrs: list[float]) -> tuple[float, float, float]:
        for optimizer, base in zip(self.all_optimizers, base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * lr_scale
        with torch.autocast("cpu", torch.bfloat16):
            full = self.target(input_ids=ids, output_hidden_states=[EXIT_LAYER])
            # The students are taught at every other position: the large heads are half of a step's cost.
            taught = torch.arange(self.step % 2, ids.shape[1], 2)
            early = self.target.lm_head(self.target.model.norm(full.hidden_states[EXIT_LAYER][:, taught]))
            drafted = self.draft(input_ids=ids, logits_to_keep=taught).logits
        loss = next_token_loss(full.logits, ids)
        p = full.logits.detach()[:, taught].float().softmax(-1)
        exit_loss, draft_loss = distillation_loss(early, p), distillation_loss(drafted, p)
        (loss + 0.2 * exit_loss + draft_loss).backward()
        for model in (self.target, self.draft):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in self.all_optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item(), exit_loss.item(), draft_loss.item()


def train(args: argparse.Namespace) -> None:
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(work, args.seed)
    print(f"corpus: {len(corpus.train):,} training tokens, {len(corpus.held_out):,} held out", flush=True)
    run = Run(args)
    base_lrs = [group["lr"] for o in run.all_optimizers for group in o.param_groups]
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        run.load(checkpoint)
        print(f"resumed at step {run.step}", flush=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stdout.isatty()) as progress:
        bar = progress.add_task("training", total=args.steps, completed=run.step)
        started, started_tokens = time.monotonic(), run.tokens
        while run.step < args.steps:
            long_rows = run.step >= 0.85 * args.steps  # the last part teaches the longer positions
            rows, length = (4, 1024) if long_rows else (8, 512)
            ids = corpus.batch(run.tokens, rows, length)
            losses = run.train_step(ids, learning_rate_scale(run.step, args.steps), base_lrs)
            run.step += 1
            run.tokens += rows * length
            progress.update(bar, completed=run.step, description=f"loss {losses[0]:.3f}")
            if run.step % 25 == 0:
                rate = (run.tokens - started_tokens) / (time.monotonic() - started)
                line = {"step": run.step, "loss": losses[0], "exit": losses[1], "draft": losses[2], "tokens/s": rate}
                with (work / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
            if run.step % 100 == 0 or run.step == args.steps:
                run.save(checkpoint)
                held_out = held_out_losses(run.target, run.draft, corpus.held_out, rows=16)
                print(f"step {run.step}: held out {json.dumps(held_out)}", flush=True)
    if args.export:
        export(run, corpus, Path(args.export), args)


def export(run: Run, corpus: Corpus, out: Path, args: argparse.Namespace) -> None:
    """Write both models as bf16 safetensors with the tokenizer, and measure the files that were written."""
    for name, model in (("target", run.target), ("draft", run.draft)):
        model.generation_config.update(bos_token_id=0, eos_token_id=0, pad_token_id=0)
        model.bfloat16().save_pretrained(out / name)
        corpus.tokenizer.save_pretrained(out / name)
    target = LlamaForCausalLM.from_pretrained(out / "target", dtype=torch.float32)
    draft = LlamaForCausalLM.from_pretrained(out / "draft", dtype=torch.float32)
    losses = held_out_losses(target, draft, corpus.held_out, rows=10_000)
    facts = {
        "command": f"python scripts/train_demo.py --steps {args.steps} --seed {args.seed} "
        f"--lr {args.lr} --draft-lr {args.draft_lr}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "corpus_sha256": corpus.sha256,
        "training_tokens": run.tokens,
        "held_out_modules": list(HELD_OUT),
        "held_out_nats_per_token": {k: round(losses[k], 4) for k in ("target", "exit", "draft")},
        "held_out_bits_per_byte": round(losses["target"] / math.log(2) / bytes_per_token(corpus), 4),
        "held_out_argmax_agreement": {k: round(losses[f"{k}_agrees"], 4) for k in ("draft", "exit")},
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


def bytes_per_token(corpus: Corpus) -> float:
    held_out = read_texts(corpus_files()[1])
    return sum(len(text.encode()) for text in held_out) / len(corpus.held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="build/demo", help="tokenizer, log and checkpoint go here")
    parser.add_argument("--export", help="write the bf16 models here when training has ended")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of 4096 tokens")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--draft-lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()
