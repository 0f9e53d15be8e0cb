"""What this machine reaches in training, as a share of its own fastest matrix product: the rates of scripts/scaling.py.

    python scripts/scaling_rates.py --out rates.json

A Llama of 33 million random parameters stands for the target. Measured are the machine's matrix product, the target's
forward, a training step of several kinds without the target (forward, loss, backward, AdamW), the same with gradient
checkpointing, the feature cache's writing and reading, and the bytes that a loss keeps for its backward pass. Work is
timed in seconds of CPU time, which what else runs on the machine disturbs little, in interleaved rounds, and the
fastest counts; the disk by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from scaling_work import draft_model_flops, head_flops
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.environment import hardware, versions
from specdec.probe import target_of
from specdec.target import Target
from specdec.train.batch import TrainBatch
from specdec.train.feature_cache import CachedData, plan_features, write_features
from specdec.train.features import TargetFeatures
from specdec.train.kinds.draft_model import DraftModelTraining
from specdec.train.objective import Objective
from specdec.train.order import Order, Piece
from specdec.train.prepared import PreparedData, write_prepared
from specdec.train.recipe import recipe_for
from specdec.train.run import keep_less, make_training
from specdec.train.trainable import Trainable

VOCABULARY, ROWS, ROW_LENGTH = 8192, 2, 256
DRAFT_VOCABULARY = 2048
KINDS = ("medusa", "hydra", "eagle3", "draft-model")
DOCUMENTS = 32
AGAIN = "recompute"
"""Of a kind's rates: how many times as long a step takes with logits and layers made again in the backward pass."""


def llama(hidden: int, layers: int) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, bos_token_id=1, eos_token_id=None,
        )
    ).eval()  # fmt: skip


def training_of(kind: str, target: Target, *, recompute: bool = False) -> Trainable:
    """A fresh drafter of this kind, in fp32."""
    if kind == "draft-model":
        return DraftModelTraining(target, llama(256, 4), recompute=recompute)
    head = {"draft_vocab_size": DRAFT_VOCABULARY} if kind == "eagle3" else {}
    training = make_training(recipe_for(kind, head=head), target)
    if recompute:
        keep_less(training)
    return training


def flops_of(kind: str, training: Trainable, target: Target, row_length: int = ROW_LENGTH) -> float:
    """For each token, target aside; see scaling_work.py."""
    if kind == "draft-model":
        return draft_model_flops(training.module, row_length)
    return head_flops(kind, training.module, target, row_length, getattr(training, "steps", 1))


def documents(folder: Path) -> PreparedData:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (ROW_LENGTH,), generator=generator).tolist() for _ in range(DOCUMENTS)]
    write_prepared(folder, ((ids, [True] * len(ids)) for ids in rows), {})
    return PreparedData(folder)


def batch_of(data: PreparedData) -> TrainBatch:
    """ROWS full rows, every token supervised."""
    rows = Order(data.lengths, ROW_LENGTH).rows_of(0)[:ROWS]
    return TrainBatch.of_rows(data, rows, list(range(ROWS)), ROW_LENGTH)


def learn(training: Trainable, batch: TrainBatch, optimizer: torch.optim.Optimizer) -> None:
    """One step on features that are there already."""
    terms = training.terms(batch, Objective())
    (torch.stack([term.total for term in terms]).sum() / batch.num_supervised).backward()
    optimizer.step()
    optimizer.zero_grad()


def fastest(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """CPU seconds of each, in interleaved rounds."""
    best = dict.fromkeys(works, float("inf"))
    for _ in track(range(rounds), "measuring", console=Console(stderr=True)):
        for name, work in works.items():
            started = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - started)
    return best


def speeds(target: Target, data: PreparedData, rounds: int) -> dict[str, Any]:
    """Tokens per second of CPU time and the share of the peak, of forward and training steps."""
    batch, tokens = batch_of(data), ROWS * ROW_LENGTH
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    features = TargetFeatures(target, (2, target.num_layers))
    works: dict[str, Callable[[], Any]] = {"peak": lambda: left @ right, "forward": lambda: features(batch)}
    flops = {"forward": float(forward_flops(target))}
    for kind in KINDS:
        for recompute in (False, True):
            training = training_of(kind, target, recompute=recompute)
            ready = TargetFeatures(target, training.taps)(batch)
            optimizer = torch.optim.AdamW([p for p in training.module.parameters() if p.requires_grad], lr=1e-5)
            name = f"{kind} {AGAIN}" if recompute else kind
            works[name] = lambda t=training, b=ready, o=optimizer: learn(t, b, o)
        flops[kind] = flops_of(kind, training, target)
    seconds = fastest(works, rounds)
    peak = 2 * 2048**3 / seconds["peak"]
    rates = {
        name: {"tokens_per_second": tokens / seconds[name], "fraction": flops[name] * tokens / seconds[name] / peak}
        for name in flops
    }
    for kind in KINDS:
        rates[kind][AGAIN] = seconds[f"{kind} {AGAIN}"] / seconds[kind]
    return {"peak_flops": peak, "forward": rates.pop("forward"), "training": rates}


def forward_flops(target: Target) -> float:
    """For each token: all parameters, as specdec.costs.roofline counts, and attention over half a row."""
    size = sum(parameter.numel() for parameter in target.model.parameters())
    return 2 * size + 4 * (ROW_LENGTH / 2) * target.hidden_size * target.num_layers


def disk(target: Target, data: PreparedData, folder: Path) -> dict[str, float]:
    """Bytes per second of the feature cache: with the target, and read from the disk and from memory."""
    taps = (2, 4, 5)
    plan = plan_features(data, target, taps, row_length=ROW_LENGTH)
    started = time.perf_counter()
    write_features(plan, data, target, folder / "cache", rows_at_once=ROWS)
    written = time.perf_counter() - started
    payload = os.urandom(plan.bytes)
    started = time.perf_counter()
    with (folder / "payload").open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    plain = time.perf_counter() - started
    order = list(range(DOCUMENTS))
    random.Random(0).shuffle(order)
    seconds = {}
    for state in ("cold", "warm"):
        cached = CachedData(data, folder / "cache", target, taps, row_length=ROW_LENGTH)
        if state == "cold":
            forget(folder / "cache")
        started = time.perf_counter()
        for number in order:
            cached.piece(Piece(number, 0, ROW_LENGTH))
        seconds[state] = time.perf_counter() - started
    return {
        "bytes": plan.bytes,
        "write_with_target": plan.bytes / written,
        "write": plan.bytes / plain,
        "read_cold": plan.bytes / seconds["cold"],
        "read_warm": plan.bytes / seconds["warm"],
    }


def forget(folder: Path) -> None:
    """Ask the kernel to drop the files from memory."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def kept_bytes(divergence: str, positions: int = 128, vocabulary: int = 4096) -> float:
    """Bytes for each position and token of the vocabulary that one term of the loss keeps for its backward pass."""
    kept: dict[int, int] = {}
    draft = torch.randn(positions, vocabulary, requires_grad=True)
    outside = draft.untyped_storage().data_ptr()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != outside:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        term = Objective(divergence).term(1, draft, torch.randn(positions, vocabulary).bfloat16())
    assert term.losses.requires_grad
    return sum(kept.values()) / (positions * vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = target_of(cast(Any, llama(512, 8)))
    with tempfile.TemporaryDirectory(dir=args.out.parent) as name:
        data = documents(Path(name) / "data")
        rates = speeds(target, data, args.rounds) | {"disk": disk(target, data, Path(name))}
    rates["kept_bytes"] = kept_bytes("forward-kl")
    rates |= {"hardware": hardware(torch.device("cpu")), "versions": versions(), "rounds": args.rounds}
    args.out.write_text(json.dumps(rates, indent=1) + "\n")
    print(json.dumps(rates, indent=1))


if __name__ == "__main__":
    main()
