"""A drafter of two linear maps on a tiny target, and a loop around it; also runnable, so that it can be killed.

python -m tests.train.toy OUT --steps 12 [--pause 0.05] [--rows-at-once 4] [--fsdp]
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from specdec.drafter import Drafter
from specdec.probe import target_of
from specdec.train.batch import Document, TrainBatch
from specdec.train.features import TargetFeatures
from specdec.train.loop import Loop
from specdec.train.loop_settings import LoopSettings
from specdec.train.objective import Objective, Term
from specdec.train.order import Order, Piece
from specdec.train.report import Score, StepReport
from specdec.train.trainable import Trainable
from tests.tiny import VOCAB, shared_target


class Texts:
    """Random documents of unequal length; the first third of each is not supervised."""

    def __init__(self, count: int = 30) -> None:
        generator = torch.Generator().manual_seed(5)
        sizes = torch.randint(4, 30, (count,), generator=generator).tolist()
        self.ids = [torch.randint(3, VOCAB, (size,), generator=generator) for size in sizes]
        self.lengths = tuple(sizes)

    def piece(self, piece: Piece) -> Document:
        """Tokens [start, stop) of one document."""
        ids = self.ids[piece.document]
        supervised = torch.arange(len(ids)) >= len(ids) // 3
        return Document(ids[piece.start : piece.stop], supervised[piece.start : piece.stop])

    def supervised(self, piece: Piece) -> torch.Tensor:
        """Which of them are supervised."""
        return self.piece(piece).supervised


class Linears:
    """Two heads on the last hidden state; head d predicts token t + 1 + d. With dropout, so that noise matters."""

    kind = "linears"
    needs_logits = True

    def __init__(self) -> None:
        target = shared_target()
        self.taps = (int(target.config.num_hidden_layers),)
        torch.manual_seed(9)
        size = int(target.config.hidden_size)
        self.module: nn.Module = nn.ModuleList([nn.Linear(size, VOCAB) for _ in range(2)])

    def terms(self, batch: TrainBatch, objective: Objective) -> list[Term]:
        """One term for each head."""
        assert batch.logits is not None
        terms = []
        for depth, head in enumerate(cast(nn.ModuleList, self.module), start=1):
            here = batch.drafts(depth + 1)
            law = torch.zeros_like(here)
            law[:, depth:] = here[:, :-depth]
            terms.append(objective.term(depth, head(batch.taps[self.taps[0]][here]), batch.logits[law]))
        return terms

    def drafter(self) -> Drafter:
        """Nobody decodes with it."""
        raise AssertionError("nobody decodes with it")

    def save(self, path: Path) -> None:
        """The weights alone."""
        path.mkdir(parents=True)
        torch.save(self.module.state_dict(), path / "weights.pt")


ROW_LENGTH = 32


def make_loop(out: Path, *, pause: float = 0.0, reports: list[Any] | None = None, **overrides: Any) -> Loop:
    """A loop over Texts whose validation score is the loss with the sign turned."""
    values: dict[str, Any] = {"steps": 12, "rows_per_step": 4, "rows_at_once": 4, "save_every": 1, **overrides}
    settings = LoopSettings(**values)
    order = Order(Texts().lengths, ROW_LENGTH, settings.seed)
    trainable = Linears()
    heard: list[Any] = reports if reports is not None else []

    def report(what: StepReport | Score) -> None:
        heard.append(what)
        time.sleep(pause)

    def source(numbers: list[int]) -> TrainBatch:
        rows = [order.row(number) for number in numbers]
        return TrainBatch.of_rows(Texts(), rows, numbers, ROW_LENGTH, settings.seed)

    def evaluate(_trainable: Trainable) -> Score:
        return Score(-next(r.loss for r in reversed(heard) if isinstance(r, StepReport)))

    return Loop(
        trainable, source, TargetFeatures(target_of(shared_target()), trainable.taps), Objective(), settings, out,
        identity={"data": "texts"}, evaluate=evaluate if values.get("evaluate_every") else None, report=report,
    )  # fmt: skip


def main() -> None:
    """Train, print every loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--rows-at-once", type=int, default=4)
    parser.add_argument("--fsdp", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reports: list[Any] = []
    settings = {"steps": args.steps, "rows_at_once": args.rows_at_once, "fsdp": args.fsdp}
    loop = make_loop(args.out, pause=args.pause, reports=reports, **settings)
    print("ready", flush=True)
    write = partial(print, flush=True)
    try:
        loop.run()
    finally:
        if loop.accelerator.is_main_process:
            for report in reports:
                write(f"loss {report.step} {report.loss!r}")


if __name__ == "__main__":
    main()
