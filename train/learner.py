"""What learns while a drafter drafts: fp32 masters of its weights, their optimizer, and the way back into the drafter.

The masters are a copy. Training changes them alone; `publish` writes them into the weights that draft, at a moment that
the caller chooses. Nothing here draws from torch's global generator, which may be that of the text.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdec.drafter import Drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.load import HEAD_DRAFTERS
from specdec.errors import BadCheckpoint, BadRecipe, UnknownDrafter
from specdec.heads.kinds import HEADS
from specdec.target import Target
from specdec.train.batch import TrainBatch
from specdec.train.learning_model import LearningModel
from specdec.train.objective import Objective, Term
from specdec.train.parameter_groups import parameter_groups
from specdec.train.passage import Passage, lay_out
from specdec.train.run import HEADS as TRAININGS

WEIGHTS, MOMENTS = "training.safetensors", "optimizer.pt"


class Learnable(Protocol):
    """The part of a Trainable that is needed here."""

    kind: str
    module: nn.Module
    taps: tuple[int, ...]

    def terms(self, batch: TrainBatch, objective: Objective) -> list[Term]:
        """The loss of a batch with laws and taps, as addends."""
        ...

    def save(self, path: Path) -> None:
        """Write a drafter directory."""
        ...


@dataclass(frozen=True)
class LearningRate:
    """Of AdamW, constant: a stream has no end to decay towards.

    Attributes:
        rate: learning rate.
        weight_decay, beta1, beta2: beta2 near 1, since steps on few and similar texts are noisy.
        clip: bounds the gradient's norm; 0 does not.
    """

    rate: float = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0


@dataclass(frozen=True)
class Update:
    """What one update did.

    Attributes:
        number: 1, 2, ...
        steps: optimizer steps, without those that were skipped.
        skipped: steps whose loss or gradient was no number: weights stayed as they were.
        positions: supervised positions over all steps.
        loss: mean over positions.
        alpha: mean acceptance sum min(p, q) at depth 1 over the same positions, before each step.
        seconds: wall-clock time.
    """

    number: int
    steps: int
    skipped: int
    positions: int
    loss: float
    alpha: float
    seconds: float


class Learner:
    """Trains a copy of a drafter's weights.

    Args:
        drafter: whose weights shall learn; `drafter` of this object is a copy of it with weights of its own, so that
            others that were loaded by the same name are not changed.
        objective: the loss.
        learning_rate: of AdamW.
        seed: of the noise that some kinds of heads add.
        rows_at_once: of one forward.
        only_rejected: learn only where drafted tokens were rejected.
        options: of the kind's Training class, for heads.

    Raises:
        UnknownDrafter: it has no weights, or of a kind that cannot be trained.
        BadRecipe: an option that the kind does not have, or nothing that would learn.
    """

    @torch.inference_mode(False)  # what is made in inference mode can never learn
    def __init__(
        self,
        drafter: Drafter,
        objective: Objective,
        learning_rate: LearningRate,
        *,
        seed: int = 0,
        rows_at_once: int = 8,
        only_rejected: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.drafter = own_copy(drafter)
        self.live, self.learning = learnable(with_weights(self.drafter), options or {})
        self.objective, self.settings = objective, learning_rate
        self.seed, self.rows_at_once, self.only_rejected = seed, rows_at_once, only_rejected
        self.updates = self.published = 0
        self._rows = 0
        groups = parameter_groups(self.learning.module, learning_rate.weight_decay)
        betas = (learning_rate.beta1, learning_rate.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate.rate, betas=betas)

    def target_is(self, target: Target) -> None:
        """Say whose text is drafted; a saved draft model then names its target."""
        if isinstance(self.learning, LearningModel):
            self.learning.target = target.model

    @property
    def kind(self) -> str:
        """ "draft-model", or the kind of head."""
        return self.learning.kind

    @torch.inference_mode(False)
    @torch.enable_grad()
    def update(self, plan: list[list[Passage]]) -> Update:
        """An optimizer step for each list of passages."""
        started = time.perf_counter()
        totals = _Totals()
        for passages in plan:
            self._step(passages, totals)
        self.updates += 1
        seconds = time.perf_counter() - started
        mean = 1 / max(totals.positions, 1)
        return Update(
            self.updates, totals.steps, totals.skipped, totals.positions, totals.loss * mean,
            totals.alpha / max(totals.laws, 1), seconds,
        )  # fmt: skip

    def _step(self, passages: list[Passage], totals: _Totals) -> None:
        """Gradients over micro-batches, divided by the tokens of all of them."""
        module = self.learning.module.eval()  # drafts are made without dropout, and dropout would draw globally
        batches = []
        for first in range(0, len(passages), self.rows_at_once):
            rows = passages[first : first + self.rows_at_once]
            batches.append(lay_out(rows, only_rejected=self.only_rejected, seed=self.seed, first_row=self._rows))
            self._rows += len(rows)
        supervised = sum(batch.num_supervised for batch in batches)
        if not supervised:
            return
        device = next(module.parameters()).device
        step = _Totals(positions=supervised)
        try:
            for batch in batches:
                terms = self.learning.terms(batch.to(device), self.objective)
                loss = torch.stack([term.total for term in terms]).sum()
                loss.backward()
                step.add(terms, float(loss.detach()))
            learning = [p for p in module.parameters() if p.requires_grad]
            for parameter in learning:  # not in the loss: so small a gradient is 0 in a float16 target
                if parameter.grad is not None:
                    parameter.grad.div_(supervised)
            norm = float(nn.utils.clip_grad_norm_(learning, self.settings.clip or math.inf))
            if math.isfinite(norm) and math.isfinite(step.loss):
                self.optimizer.step()
                totals.include(step)
            else:
                totals.skipped += 1
        finally:  # also of a step that went wrong: the next one must not add to half a gradient
            self.optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def publish(self) -> None:
        """Let the drafter draft with what was learned."""
        learned = dict(self.learning.module.named_parameters())
        for name, weight in self.live.named_parameters():
            weight.copy_(learned[name])
        self.published = self.updates

    def write(self, folder: Path) -> None:
        """A drafter directory in `drafter/`, and beside it all that learning goes on from."""
        self.learning.save(folder / "drafter")
        save_file({n: p.detach().cpu().contiguous() for n, p in self._named()}, folder / WEIGHTS)
        torch.save(self.optimizer.state_dict(), folder / MOMENTS)

    def read(self, folder: Path) -> None:
        """Go on from a folder that `write` filled, at this object's own learning rate.

        Raises:
            BadCheckpoint: files that cannot be read, or of other weights.
        """
        try:
            weights = load_file(folder / WEIGHTS)
            moments = torch.load(folder / MOMENTS, weights_only=True)
        except Exception as error:
            raise BadCheckpoint(f"{folder} cannot be read: {error}") from error
        ours = dict(self._named())
        shapes = {name: tuple(weight.shape) for name, weight in ours.items()}
        theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
        differing = sorted(name for name in shapes.keys() | theirs.keys() if shapes.get(name) != theirs.get(name))
        if differing:
            raise BadCheckpoint(
                f"{folder} holds other weights than this {self.kind} has: {len(differing)} differ, the first is "
                f"{differing[0]} with shape {theirs.get(differing[0])}, here {shapes.get(differing[0])}"
            )
        with torch.inference_mode(False), torch.no_grad():
            for name, weight in ours.items():
                weight.copy_(weights[name])
        # The file's groups hold the rates of whoever wrote it.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments["state"]})

    def counters(self) -> dict[str, int]:
        """For a checkpoint's state."""
        return {"updates": self.updates, "rows": self._rows}

    def set_counters(self, counters: Mapping[str, int]) -> None:
        """From a checkpoint's state."""
        self.updates, self._rows = counters["updates"], counters["rows"]

    def _named(self) -> list[tuple[str, Tensor]]:
        return cast(Any, list(self.learning.module.named_parameters()))


@dataclass
class _Totals:
    """Sums over micro-batches."""

    steps: int = 0
    skipped: int = 0
    positions: int = 0
    loss: float = 0.0
    alpha: float = 0.0
    laws: int = 0

    def add(self, terms: list[Term], loss: float) -> None:
        self.loss += loss
        for term in terms:
            if term.depth == 1 and term.alpha is not None:
                self.alpha += float(term.alpha.sum())
                self.laws += term.alpha.numel()

    def include(self, step: _Totals) -> None:
        self.steps += 1
        self.positions += step.positions
        self.loss += step.loss
        self.alpha += step.alpha
        self.laws += step.laws


def own_copy(drafter: Drafter) -> Any:
    """The drafter with weights of its own; the target and what belongs to it are shared.

    Raises:
        UnknownDrafter: it has no weights that could learn.
    """
    target = getattr(with_weights(drafter), "target", None)
    shared: list[Any] = []
    if isinstance(target, Target):
        shared = [target, target.model, *target.model.modules(), *target.model.parameters(), *target.model.buffers()]
    try:
        return copy.deepcopy(drafter, {id(part): part for part in shared})
    except (RuntimeError, TypeError) as error:
        raise UnknownDrafter(
            f"this {type(drafter).__name__} cannot be copied ({error}); wrap it before its first generation"
        ) from error


def with_weights(drafter: Drafter) -> Any:
    """The drafter of a draft model or of a head, also inside of drafters that wrap it.

    Raises:
        UnknownDrafter: there is none.
    """
    inner: Any = drafter
    while not isinstance(inner, (DraftModelDrafter, *HEAD_DRAFTERS.values())):
        wrapped = inner.second if isinstance(inner, HybridDrafter) else getattr(inner, "drafter", None)
        if not isinstance(wrapped, Drafter):
            raise UnknownDrafter(
                f"a {type(inner).__name__} has no weights of its own that could learn; wrap the drafter of a draft "
                "model or of a head"
            )
        inner = wrapped
    return inner


def learnable(drafter: Any, options: Mapping[str, Any]) -> tuple[nn.Module, Learnable]:
    """The module that drafts, and a copy of it in training.

    Raises:
        UnknownDrafter: a kind of head that cannot be trained.
        BadRecipe: an option that the kind does not have.
    """
    if isinstance(drafter, DraftModelDrafter):
        if options:
            raise BadRecipe(f"a draft model has no options of training, got {', '.join(sorted(options))}")
        live = drafter.model.model
        return live, LearningModel(copy.deepcopy(live).requires_grad_(True), drafter.vocab_size, live)
    live = cast(nn.Module, drafter.module if hasattr(drafter, "module") else drafter.head)
    kind = next(name for name, made in HEADS.items() if type(live) is made.head)
    if kind not in TRAININGS:
        known = ", ".join(sorted({"draft-model", *TRAININGS}))
        raise UnknownDrafter(f"a head of kind {kind} cannot learn online yet; these can: {known}")
    head = copy.deepcopy(live).requires_grad_(True)
    if kind == "eagle3":  # deeper than it drafts it need not know its way
        options = {"steps": drafter.policy.depth, **options}
    try:
        learning = TRAININGS[kind](drafter.target, head=head, **options)
    except TypeError as error:
        raise BadRecipe(f"an option that training of {kind} does not have: {error}") from error
    for name, parameter in head.named_parameters():
        if "embed_tokens" in name:  # heads share the target's embedding; a copy in their file stays a copy
            parameter.requires_grad_(False)
    return live, learning
