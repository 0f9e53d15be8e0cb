"""The training loop: one for every kind of drafter, resumable to the bit.

The number of finished optimizer steps is the only state beside weights and moments. Data (train.order), noise
(TrainBatch.generator), learning rate (train.schedule) and everything drawn inside a step are functions of it.
accelerate wraps the module, runs backward and talks between processes; its loaders and its saving are not used, since
neither survives being killed.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdec.errors import BadCheckpoint, BadRecipe
from specdec.train.batch import PADDING, TrainBatch
from specdec.train.checkpoint import Checkpoints, read_state
from specdec.train.objective import Objective, Term
from specdec.train.order import derived_seed
from specdec.train.processes import accelerator_for
from specdec.train.schedule import Form, Schedule
from specdec.train.trainable import Trainable

Source = Callable[[list[int]], TrainBatch]
"""Row numbers over the whole run -> a batch; taps may be there already (from a feature cache)."""

Features = Callable[[TrainBatch], TrainBatch]
"""Adds what the target computes."""


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast.

    Attributes:
        steps: optimizer steps.
        rows_per_step: rows of all processes and micro-batches together.
        rows_at_once: rows of one forward; the rest of a step is accumulated.
        learning_rate, weight_decay, beta1, beta2, clip: of AdamW; `clip` bounds the gradient's norm, 0 does not.
        schedule, warmup, floor: see Schedule.
        bf16: autocast; weights and moments stay fp32.
        seed: of data order and noise.
        save_every, evaluate_every: in steps; 0 only at the end.
        keep: checkpoints beside the best.
    """

    steps: int
    rows_per_step: int = 8
    rows_at_once: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    schedule: Form = "cosine"
    warmup: int = 0
    floor: float = 0.1
    bf16: bool = False
    seed: int = 0
    save_every: int = 0
    evaluate_every: int = 0
    keep: int = 2

    def check(self, processes: int) -> None:
        """Refuse what cannot be divided evenly.

        Raises:
            BadRecipe: says which numbers do not fit.
        """
        if self.steps < 1 or self.rows_per_step < 1 or self.rows_at_once < 1:
            raise BadRecipe("steps, rows per step and rows at once are at least 1")
        if self.rows_per_step % (self.rows_at_once * processes):
            raise BadRecipe(
                f"{self.rows_per_step} rows per step cannot be shared by {processes} processes "
                f"with {self.rows_at_once} rows at once; make it a multiple of {self.rows_at_once * processes}"
            )
        if not self.learning_rate > 0:
            raise BadRecipe(f"the learning rate is positive, got {self.learning_rate:g}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.weight_decay >= 0 and self.clip >= 0):
            raise BadRecipe(
                f"betas lie in [0, 1), weight decay and clip are not negative, got {self.beta1:g}, {self.beta2:g}, "
                f"{self.weight_decay:g} and {self.clip:g}"
            )
        if min(self.save_every, self.evaluate_every) < 0 or self.keep < 1:
            raise BadRecipe("save_every and evaluate_every are 0 or more steps, keep is 1 or more")


@dataclass
class StepReport:
    """What one optimizer step did, over all processes.

    Attributes:
        step: finished steps, this one included.
        loss: weighted sum of all terms over supervised tokens.
        supervised: tokens that the loss was divided by.
        tokens: all tokens of the step's rows, without padding.
        terms: mean loss of each term by name.
        alpha: mean acceptance sum min(p, q) by depth, on the data's own prefixes.
        agreement: share of positions where the most probable tokens agree, by depth.
        gradient_norm: before clipping.
        seconds: wall-clock time.
    """

    step: int
    loss: float
    supervised: int
    terms: dict[str, float] = field(default_factory=dict)
    alpha: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    gradient_norm: float = 0.0
    learning_rate: float = 0.0
    seconds: float = 0.0
    tokens: int = 0


@dataclass
class Score:
    """A validation: `value` decides which checkpoint is the best (tau), `details` are logged."""

    value: float
    details: dict[str, Any] = field(default_factory=dict)


class _Terms(nn.Module):
    """The module as distributed wrappers want it: its forward computes the terms."""

    def __init__(self, trainable: Trainable, objective: Objective) -> None:
        super().__init__()
        self.module = trainable.module
        self._compute = [trainable, objective]  # in a list: the target must not become a submodule

    def forward(self, batch: TrainBatch) -> list[Term]:
        trainable, objective = cast(tuple[Trainable, Objective], tuple(self._compute))
        return trainable.terms(batch, objective)


class Loop:
    """Trains, saves, validates, resumes.

    Args:
        trainable: what learns.
        source: rows by number.
        features: what the target adds to a batch.
        objective: the loss.
        settings: how long and how fast.
        folder: of checkpoints.
        identity: what must agree on resume: data, target, objective; compared field by field.
        evaluate: decodes held-out prompts for real; None skips validation.
        report: called with every StepReport and Score on the main process.
        accelerator: None makes one for this process.
    """

    def __init__(
        self,
        trainable: Trainable,
        source: Source,
        features: Features,
        objective: Objective,
        settings: LoopSettings,
        folder: Path,
        *,
        identity: dict[str, Any] | None = None,
        evaluate: Callable[[Trainable], Score] | None = None,
        report: Callable[[StepReport | Score], None] = lambda _report: None,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = accelerator or accelerator_for(bf16=settings.bf16)
        settings.check(self.accelerator.num_processes)
        self.trainable, self.source, self.features = trainable, source, features
        self.objective, self.settings = objective, settings
        self.schedule = Schedule(settings.schedule, settings.steps, settings.warmup, settings.floor)
        self.checkpoints = Checkpoints(folder, settings.keep)
        self.evaluate, self.report = evaluate, report
        self.identity = {
            **(identity or {}),
            "kind": trainable.kind,
            "objective": asdict(objective),
            "settings": {k: v for k, v in asdict(settings).items() if k not in FREE_SETTINGS},
            "processes": self.accelerator.num_processes,
        }
        self.step = 0
        self.best = -math.inf
        self._restored = False
        self._stopping = False
        groups = parameter_groups(trainable.module, settings.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2))
        self.model, self.optimizer = self.accelerator.prepare(_Terms(trainable, objective), optimizer)

    def run(self, *, resume: bool = True) -> int:
        """Train to the last step, or until SIGTERM or SIGINT, after which the step is finished and saved.

        Returns the number of finished steps.

        Raises:
            BadCheckpoint: the folder holds another run's checkpoints.
            BadRecipe: the loss is no number any more; the last checkpoint is whole.
            OSError: a checkpoint cannot be written; earlier ones are whole.
        """
        self.restore(resume=resume)
        with self._signals():
            while self.step < self.settings.steps and not self._stopping:
                self.report_here(self._train_step())
                self.step += 1
                self._stopping = self._anybody(self._stopping)
                self._validate_and_save()
        return self.step

    def restore(self, *, resume: bool = True) -> int:
        """Take up the newest checkpoint, once; `run` does so where nobody has.

        Args:
            resume: False wants a folder without checkpoints.

        Returns:
            the number of finished steps.

        Raises:
            BadCheckpoint: another run's or damaged checkpoints; or some that shall not be taken up.
        """
        if not self._restored:
            if resume:
                self._resume()
            elif self.checkpoints.all():
                raise BadCheckpoint(
                    f"{self.checkpoints.folder} holds checkpoints already; resume, or choose another --out"
                )
        self._restored = True
        return self.step

    def report_here(self, report: StepReport | Score) -> None:
        """Report on the main process only."""
        if self.accelerator.is_main_process:
            self.report(report)

    def _train_step(self) -> StepReport:
        started = time.perf_counter()
        self.trainable.module.train()
        batches = list(self._batches())
        counts = [(batch.num_supervised, int((batch.documents != PADDING).sum())) for batch in batches]
        supervised, tokens = (int(count) for count in self._sum(torch.tensor(counts).sum(0)))
        if not supervised:
            raise BadRecipe(f"step {self.step + 1} has no supervised token; check the data's loss mask")
        totals = _Totals()
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                torch.manual_seed(derived_seed(self.settings.seed, "micro-batch", batch.row_numbers[0]))
                with self.accelerator.autocast():
                    terms = self.model(self.features(batch))
                loss = torch.stack([term.total for term in terms]).sum()
                self.accelerator.backward(loss * (self.accelerator.num_processes / supervised))
                totals.add(terms)
        report = self._report(totals, supervised)
        if not math.isfinite(report.loss):
            raise BadRecipe(
                f"the loss of step {self.step + 1} is {report.loss}; nothing was saved after step "
                f"{self._last_saved()}. Lower the learning rate, or look at the data with `specdec data preview`"
            )
        report.learning_rate = self.settings.learning_rate * self.schedule(self.step)
        report.gradient_norm = self._update(report.learning_rate)
        report.tokens = tokens
        report.seconds = time.perf_counter() - started
        return report

    def _batches(self) -> Iterator[TrainBatch]:
        """This process's share of the step's rows. Groups of rows go round the processes."""
        size, rows = self.settings.rows_at_once, self.settings.rows_per_step
        first = self.step * rows
        groups = [list(range(start, start + size)) for start in range(first, first + rows, size)]
        for group in groups[self.accelerator.process_index :: self.accelerator.num_processes]:
            yield self.source(group)

    def _update(self, learning_rate: float) -> float:
        """One optimizer step; returns the gradient's norm before clipping."""
        parameters = [p for p in self.trainable.module.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, self.settings.clip or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(cast(Tensor, norm))

    def _report(self, totals: _Totals, supervised: int) -> StepReport:
        names, values = totals.flat()
        summed = self._sum(values).tolist()
        report = StepReport(self.step + 1, 0.0, supervised)
        for index, (name, depth) in enumerate(names):
            total, losses, count, alpha, hits, laws = summed[6 * index : 6 * index + 6]
            report.loss += total / supervised
            report.terms[name] = losses / max(count, 1)
            if depth:
                report.alpha.append(alpha / max(laws, 1))
                report.agreement.append(hits / max(laws, 1))
        return report

    def _validate_and_save(self) -> None:
        finished = self.step == self.settings.steps
        validates = self.evaluate is not None and (finished or _due(self.step, self.settings.evaluate_every))
        score = self._validate() if validates else None
        if finished or self._stopping or _due(self.step, self.settings.save_every) or score is not None:
            self._save(score)

    def _validate(self) -> Score:
        """Decode held-out prompts on the main process; the run's random numbers stay as they are."""
        assert self.evaluate is not None
        score = Score(0.0)
        if self.accelerator.is_main_process:
            self.trainable.module.eval()
            with torch.random.fork_rng(), torch.no_grad():
                score = self.evaluate(self.trainable)
            self.report(score)
        self.accelerator.wait_for_everyone()
        return score

    def _save(self, score: Score | None) -> None:
        if self.accelerator.is_main_process:
            better = score is not None and score.value > self.best
            if better:
                assert score is not None
                self.best = score.value
            state = {
                "identity": self.identity,
                "best": self.best if math.isfinite(self.best) else None,
                "score": asdict(score) if score is not None else None,
            }
            path = self._written(state)
            if better:
                self.checkpoints.link("best", path)
                self.checkpoints.rotate()
            self.checkpoints.offer()
        self.accelerator.wait_for_everyone()

    def _written(self, state: dict[str, Any]) -> Path:
        try:
            return self.checkpoints.save(self.step, self._write, state)
        except (OSError, SafetensorError, RuntimeError) as error:  # of the file system, safetensors and torch.save
            raise OSError(unwritten(self.checkpoints, self.step, error)) from error

    def _write(self, folder: Path) -> None:
        """The drafter, ready to be used, in `drafter/`; all that resuming needs beside it."""
        self.trainable.save(folder / "drafter")
        weights = {name: value.detach().contiguous() for name, value in self.trainable.module.state_dict().items()}
        save_file(_untied(weights), folder / "training.safetensors")
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def _resume(self) -> None:
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            return
        state = read_state(checkpoint)
        check_identity(state.get("identity", {}), self.identity, checkpoint)
        try:
            weights = load_file(checkpoint / "training.safetensors")
            moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)
            missing, unexpected = self.trainable.module.load_state_dict(weights, strict=False)
        except Exception as error:
            raise BadCheckpoint(f"{checkpoint} cannot be read: {error}") from error
        tied = {name for name in missing if name in _tied_names(self.trainable.module)}
        if set(missing) - tied or unexpected:
            raise BadCheckpoint(f"{checkpoint} lacks {sorted(set(missing) - tied)} and has {sorted(unexpected)} beyond")
        self.optimizer.load_state_dict(moments)
        self.step = int(state["step"])
        self.best = -math.inf if state["best"] is None else float(state["best"])

    def _last_saved(self) -> int:
        latest = self.checkpoints.latest()
        return read_state(latest)["step"] if latest else 0

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over processes, in float64."""
        return cast(Tensor, self.accelerator.reduce(values.double().to(self.accelerator.device), "sum")).cpu()

    def _anybody(self, flag: bool) -> bool:
        return bool(self._sum(torch.tensor([float(flag)]))[0]) if self.accelerator.num_processes > 1 else flag

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT finish the step and save; the second one ends at once."""

        def stop(number: int, _frame: FrameType | None) -> None:
            self._stopping = True
            signal.signal(number, previous[signal.Signals(number)])

        try:
            previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread: whoever runs us there handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


FREE_SETTINGS = ("save_every", "evaluate_every", "keep")
"""Settings that may change on resume without changing what is learned."""


class _Totals:
    """Sums over micro-batches by term: weighted, losses, positions, alpha, hits, positions with a law."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], Tensor] = {}

    def add(self, terms: list[Term]) -> None:
        for term in terms:
            laws = 0 if term.alpha is None else term.alpha.numel()
            alpha = 0.0 if term.alpha is None else term.alpha.sum().item()
            hits = 0.0 if term.hits is None else term.hits.sum().item()
            losses = term.losses.detach()
            values = [term.total.item(), losses.sum().item(), losses.numel(), alpha, hits, laws]
            key = (term.name, term.depth)
            self._sums[key] = self._sums.get(key, torch.zeros(6, dtype=torch.float64)) + torch.tensor(values).double()

    def flat(self) -> tuple[list[tuple[str, int]], Tensor]:
        """Names with depth, in order of appearance, and all sums one after the other."""
        return list(self._sums), torch.cat(list(self._sums.values()))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not; frozen parameters are left out.

    Raises:
        BadRecipe: nothing would learn.
    """
    learning = [p for p in module.parameters() if p.requires_grad]
    if not learning:
        raise BadRecipe("no parameter of this drafter learns")
    matrices, vectors = [p for p in learning if p.ndim > 1], [p for p in learning if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def unwritten(checkpoints: Checkpoints, step: int, error: Exception) -> str:
    """What to say when a checkpoint cannot be written."""
    latest = checkpoints.latest()
    kept = f"{latest.name} is whole" if latest else "nothing was saved before"
    reason = " ".join(str(error).split())[:160]
    free = shutil.disk_usage(checkpoints.folder).free if checkpoints.folder.is_dir() else 0
    return (
        f"the checkpoint of step {step} cannot be written to {checkpoints.folder} ({reason}; {free / 1e6:.0f} MB free)"
        f"; {kept}. Make room and run the same command again: it goes on from there"
    )


def check_identity(saved: dict[str, Any], ours: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue a run with other data, another objective or another number of processes.

    Raises:
        BadCheckpoint: names every field that differs.
    """
    before, now = _flat(saved), _flat(ours)
    differing = [
        f"{key} {now.get(key)!r} (checkpoint: {before.get(key)!r})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise BadCheckpoint(
            f"{checkpoint} belongs to another run: {'; '.join(differing)}. "
            "Use another --out, or the settings of that run"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _untied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """One name for tensors that share memory: safetensors stores no aliases."""
    seen: set[int] = set()
    result = {}
    for name, value in weights.items():
        if value.data_ptr() not in seen or value.numel() == 0:
            result[name] = value
        seen.add(value.data_ptr())
    return result


def _tied_names(module: nn.Module) -> set[str]:
    """Names that a saved state leaves out because another name holds the same tensor."""
    weights = module.state_dict()
    return set(weights) - set(_untied(weights))
