"""The training loop: one for every kind of drafter, resumable to the bit.

The number of finished optimizer steps is the only state beside weights and moments. Data (train.order), noise
(TrainBatch.generator), learning rate (train.schedule) and everything drawn inside a step are functions of it.
accelerate wraps the module, runs backward and talks between processes; its loaders and its saving are not used, since
neither survives being killed.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from specdec.errors import BadCheckpoint, BadRecipe
from specdec.train.batch import PADDING, TrainBatch
from specdec.train.checkpoint import BEST, LATEST, WEIGHTS, Checkpoints, check_identity, read_state, step_of
from specdec.train.loop_settings import FREE_SETTINGS, LoopSettings
from specdec.train.objective import Objective, Term
from specdec.train.order import derived_seed
from specdec.train.parameter_groups import parameter_groups
from specdec.train.processes import accelerator_for
from specdec.train.report import Score, StepReport, Totals
from specdec.train.schedule import Schedule
from specdec.train.shards import Shards, load_moments, whole_state
from specdec.train.stop_signals import on_stop
from specdec.train.trainable import Trainable

Source = Callable[[list[int]], TrainBatch]
"""Row numbers over the whole run -> a batch; taps may be there already (from a feature cache).

One that lets the drafter in training write has `reads_weights(numbers)`, which says whether it does for these rows.
"""

Features = Callable[[TrainBatch], TrainBatch]
"""Adds what the target computes."""


class _Terms(nn.Module):
    """The module as distributed wrappers want it: its forward computes the loss and the terms that it is made of.

    The loss is a result of its own because FSDP2 finds tensors in tuples and not in a Term.
    """

    def __init__(self, trainable: Trainable, objective: Objective) -> None:
        super().__init__()
        self.module = trainable.module
        self._compute = [trainable, objective]  # in a list: the target must not become a submodule

    def forward(self, batch: TrainBatch) -> tuple[Tensor, list[Term]]:
        trainable, objective = cast(tuple[Trainable, Objective], tuple(self._compute))
        terms = trainable.terms(batch, objective)
        return torch.stack([term.total for term in terms]).sum(), terms


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
        rates: multipliers of the learning rate by the first word of a parameter's name; 1 where none is given.
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
        rates: Mapping[str, float] | None = None,
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
        self._heard = False  # by this process, at any moment; what is decided depends on what all have agreed on
        self._stopping = False
        self._shards: Shards | None = None
        self._learning = trainable
        if settings.fsdp:
            self._shards = Shards(trainable.module, self.accelerator.device, self.accelerator.num_processes)
            self._learning = copy.copy(trainable)
            self._learning.module = self._shards.module
        self.model: nn.Module = _Terms(self._learning, objective)
        if self._shards is None:
            self.model = self.accelerator.prepare(self.model)
        else:
            self._shards.spread(self.model)
        groups = parameter_groups(self._learning.module, settings.weight_decay, rates)
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2))
        self.optimizer = self.accelerator.prepare(optimizer)

    def run(self, *, resume: bool = True) -> int:
        """Train to the last step, or until SIGTERM or SIGINT, after which the step is finished and saved.

        Returns the number of finished steps.

        Raises:
            BadCheckpoint: the folder holds another run's checkpoints.
            BadRecipe: the loss or its gradient is no number any more, the last checkpoint is whole; or a kind that
                cannot be divided.
            SpecdecError: another process trains in the folder.
            OSError: a checkpoint cannot be written; earlier ones are whole.
        """
        self.restore(resume=resume)
        with self._alone(), on_stop(self._stop):
            while self.step < self.settings.steps and not self._stopping:
                self.report_here(self._train_step())
                self.step += 1
                self._stopping = self._anybody(self._heard)
                self._validate_and_save()
        self._stopping = self._anybody(self._heard)  # one that came while the last step was saved
        return self.step

    def restore(self, *, resume: bool = True) -> int:
        """Take up the newest checkpoint, once; `run` does so where nobody has.

        Args:
            resume: False wants a folder without checkpoints.

        Returns:
            the number of finished steps.

        Raises:
            BadCheckpoint: another run's or damaged checkpoints; or some that shall not be taken up.
            SpecdecError: another process trains in the folder.
        """
        if not self._restored:
            with self._alone():
                if self.accelerator.is_main_process:
                    self.checkpoints.clear_unfinished()
                self.accelerator.wait_for_everyone()  # what was to be replaced has its name again
                if resume:
                    self._resume()
                elif self.checkpoints.all():
                    raise BadCheckpoint(
                        f"{self.checkpoints.folder} holds checkpoints already; resume, or choose another --out"
                    )
        self._restored = True
        return self.step

    @property
    def stopped(self) -> bool:
        """Whether a signal ended it."""
        return self._stopping

    def _alone(self) -> AbstractContextManager[None]:
        """No other run writes to the folder meanwhile; the main process speaks for all of this one."""
        return self.checkpoints.alone() if self.accelerator.is_main_process else nullcontext()

    def report_here(self, report: StepReport | Score) -> None:
        """Report on the main process only."""
        if self.accelerator.is_main_process:
            self.report(report)

    def _train_step(self) -> StepReport:
        started = time.perf_counter()
        self._learning.module.train()
        batches = list(self._batches())
        counts = [(batch.num_supervised, int((batch.documents != PADDING).sum())) for batch in batches]
        supervised, tokens = (int(count) for count in self._sum(torch.tensor(counts).sum(0)))
        if not supervised:
            raise BadRecipe(f"step {self.step + 1} has no supervised token; check the data's loss mask")
        totals = Totals()
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                torch.manual_seed(derived_seed(self.settings.seed, "micro-batch", batch.row_numbers[0]))
                with self.accelerator.autocast():
                    loss, terms = self.model(self.features(batch))
                self.accelerator.backward(loss)
                totals.add(terms)
        report = totals.report(self.step + 1, supervised, self._sum)
        self._check_number("loss", report.loss)
        report.learning_rate = self.settings.learning_rate * self.schedule(self.step)
        report.gradient_norm = self._update(report.learning_rate, self.accelerator.num_processes / supervised)
        report.tokens = tokens
        report.seconds = time.perf_counter() - started
        return report

    def _batches(self) -> Iterator[TrainBatch]:
        """This process's share of the step's rows. Groups of rows go round the processes."""
        size, rows = self.settings.rows_at_once, self.settings.rows_per_step
        first = self.step * rows
        reads_weights = getattr(self.source, "reads_weights", None)
        if reads_weights is not None and reads_weights(range(first, first + rows)):
            self._gather()
        groups = [list(range(start, start + size)) for start in range(first, first + rows, size)]
        for group in groups[self.accelerator.process_index :: self.accelerator.num_processes]:
            yield self.source(group)

    def _update(self, learning_rate: float, share: float) -> float:
        """One optimizer step; returns the gradient's norm before clipping.

        The gradient is multiplied by `share` here and not in the loss: where it passes the output matrix of a float16
        target, a four-thousandth of an improbable token's probability would be 0.

        Every process has the same norm, of the gradient of all, so that all refuse together.
        """
        parameters = [p for p in self._learning.module.parameters() if p.requires_grad]
        if self._shards is not None and all(p.grad is None for p in parameters):
            raise BadRecipe(f"{self.trainable.kind} learns with weights beside its own module; leave --fsdp out")
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(share)
        clipped = cast(Tensor, self.accelerator.clip_grad_norm_(parameters, self.settings.clip or math.inf))
        norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
        self._check_number("gradient's norm", norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _check_number(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise BadRecipe(
                f"the {what} of step {self.step + 1} is {value}; nothing was saved after step "
                f"{self._last_saved()}. Lower the learning rate, or look at the data with `specdec data preview`"
            )

    def _validate_and_save(self) -> None:
        finished = self.step == self.settings.steps
        validates = self.evaluate is not None and (finished or _due(self.step, self.settings.evaluate_every))
        if finished or self._stopping or _due(self.step, self.settings.save_every) or validates:
            self._gather()
            self._save(self._validate() if validates else None)

    def _gather(self) -> None:
        """Bring the trainable's own module up to date, in every process."""
        if self._shards is not None:
            self._shards.gather()

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
        moments = whole_state(self.optimizer.state_dict())
        if self.accelerator.is_main_process:
            better = score is not None and score.value > self.best
            if better:
                assert score is not None
                self.best = score.value
            state = {
                "identity": self.identity,
                "score": asdict(score) if score is not None else None,
            }
            path = self.checkpoints.save(self.step, lambda folder: self._write(folder, moments), state)
            if better:
                self.checkpoints.link(BEST, path)
                self.checkpoints.rotate()
            self.checkpoints.offer()
        self.accelerator.wait_for_everyone()

    def _write(self, folder: Path, moments: dict[str, Any]) -> None:
        """The drafter, ready to be used, in `drafter/`; all that resuming needs beside it."""
        self.trainable.save(folder / "drafter")
        weights = {name: value.detach().contiguous() for name, value in self.trainable.module.state_dict().items()}
        save_file(_untied(weights), folder / WEIGHTS)
        torch.save(moments, folder / "optimizer.pt")

    def _resume(self) -> None:
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            return
        state = read_state(checkpoint)
        check_identity(state.get("identity", {}), self.identity, checkpoint)
        try:
            weights = load_file(checkpoint / WEIGHTS)
            moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)
            missing, unexpected = self.trainable.module.load_state_dict(weights, strict=False)
        except Exception as error:
            raise BadCheckpoint(f"{checkpoint} cannot be read: {error}") from error
        tied = {name for name in missing if name in _tied_names(self.trainable.module)}
        if set(missing) - tied or unexpected:
            raise BadCheckpoint(f"{checkpoint} lacks {sorted(set(missing) - tied)} and has {sorted(unexpected)} beyond")
        load_moments(self.optimizer, moments)
        if self._shards is not None:
            self._shards.scatter()
        self.step = int(state["step"])
        if self.accelerator.is_main_process:
            self.checkpoints.link(LATEST, checkpoint)
            self._link_best()
            self.checkpoints.offer()

    def _link_best(self) -> None:
        """Let `best` point to the best checkpoint up to here: a kill may have come between its save and its link."""
        past = sorted((path for path in self.checkpoints.all() if step_of(path) <= self.step), key=step_of)
        scores = {path: float(score["value"]) for path in past if (score := read_state(path).get("score"))}
        best = max(
            (path for path in scores if math.isfinite(scores[path])), key=lambda path: scores[path], default=None
        )
        if best is not None:
            self.best = scores[best]
            if best.resolve() != self.checkpoints.best():
                self.checkpoints.link(BEST, best)

    def _last_saved(self) -> int:
        latest = self.checkpoints.latest()
        return read_state(latest)["step"] if latest else 0

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over processes, in float64."""
        return cast(Tensor, self.accelerator.reduce(values.double().to(self.accelerator.device), "sum")).cpu()

    def _anybody(self, flag: bool) -> bool:
        return bool(self._sum(torch.tensor([float(flag)]))[0]) if self.accelerator.num_processes > 1 else flag

    def _stop(self) -> None:
        self._heard = True


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
