"""A draft model learns its target's law: DistillSpec (arXiv 2310.08461), with AdaSPEC's token filter as an option.

The draft is an ordinary causal language model, so one teacher-forced pass gives its law at every position: at t it
guesses token t + 1, as the target does there.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from specdec.drafter import Drafter
from specdec.drafters.directory import DrafterJson, fingerprint, write_drafter_json
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import BadRecipe, DrafterMismatch
from specdec.probe import target_of
from specdec.target import Target
from specdec.train.batch import TrainBatch
from specdec.train.logits import Logits, compared
from specdec.train.objective import Objective, Term, hardest
from specdec.train.tokenizer_files import copy_tokenizer
from specdec.vocabulary import check_vocabulary

Lesson = Literal["law", "tokens"]


class DraftModelTraining:
    """Trains a draft model on a frozen target.

    Args:
        target: probed.
        draft: what learns, all of it, in place; turned to fp32, since small updates vanish in bf16.
        learns: "law" compares with the target's law; "tokens" is cross-entropy on the text itself, for which the
            target does not run: pre-training, or sequence-level distillation where the target wrote the text.
        reference: a draft that was distilled before; with it only the `keep_share` of each row's positions counts
            where `draft` lags most behind it (AdaSPEC, arXiv 2510.19779).
        keep_share: AdaSPEC's k.
        dropout: whether the draft's own dropout is on while it learns; DistillSpec has none.
        recompute: logits are made, and layers run, again in the backward pass instead of being kept.
        options: of the drafter that validation decodes with; saved with the draft.

    Raises:
        DrafterMismatch: another vocabulary than the target's, or the target itself.
        BadRecipe: settings that do not fit each other.
    """

    kind = "draft-model"
    taps: tuple[int, ...] = ()

    def __init__(
        self,
        target: Target,
        draft: PreTrainedModel,
        *,
        learns: Lesson = "law",
        reference: PreTrainedModel | None = None,
        keep_share: float = 0.4,
        dropout: bool = False,
        recompute: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        if draft is target.model:
            raise DrafterMismatch("the draft model is the target itself; train a copy of it, or a smaller model")
        _check_settings(learns, reference, keep_share)
        check_vocabulary(draft, target.model)
        self.target = target
        self.module = cast(Any, draft).float().to(target.device).requires_grad_(True)
        self.needs_logits = learns == "law"
        self.reference = None if reference is None else frozen(cast(Any, reference).float().to(target.device))
        self.keep_share = keep_share
        self.dropout = dropout
        self.recompute = recompute
        if recompute:
            recomputed_layers(self.module)
        self.options = dict(options or {})
        self._served: PreTrainedModel | None = None
        frozen(target.model)

    def terms(self, batch: TrainBatch, objective: Objective) -> list[Term]:
        """One term: all supervised tokens."""
        self._begin_learning()
        drafted = self._drafted(self.module, batch)
        if not self.needs_logits:
            return [Term("tokens", cross_entropies(drafted, batch.tokens(1)))]
        law = batch.laws_to_make(batch.stands(1)) if self.recompute else batch.laws(1)
        term = objective.term(1, *in_common(drafted, law))
        return [term if self.reference is None else self._filtered(term, batch, objective, law)]

    def _drafted(self, model: PreTrainedModel, batch: TrainBatch) -> Tensor | Logits:
        """Logits [M, V] at all supervised tokens, of the draft or of the reference."""
        here = batch.drafts(1)
        return logits_to_make(model, batch, here) if self.recompute else logits_at(model, batch, here)

    def _begin_learning(self) -> None:
        """Training mode for dropout if wanted; recomputed layers ask for it themselves, not for their parts."""
        self.module.train(self.dropout)
        for layer in self.recomputed:
            layer.training = True

    @property
    def recomputed(self) -> list[nn.Module]:
        """Layers that are run again in the backward pass."""
        return _checkpointing(self.module) if self.recompute else []

    def _filtered(self, term: Term, batch: TrainBatch, objective: Objective, law: Tensor | Logits) -> Term:
        """The term with the weight of each row on the positions that AdaSPEC keeps.

        The choice is made row by row, so that it does not depend on which rows share a micro-batch.
        """
        assert self.reference is not None
        here = batch.drafts(1)
        with torch.no_grad():
            reference = objective.term(1, *in_common(self._drafted(self.reference, batch), law)).losses
        counts = here.sum(1).tolist()
        weights = [
            kept_weights(ours, theirs, self.keep_share)
            for ours, theirs in zip(term.losses.split(counts), reference.split(counts), strict=True)
        ]
        return replace(term, losses=term.losses * torch.cat(weights))

    def served(self) -> PreTrainedModel:
        """The draft as it will be used: in evaluation mode and in the target's dtype.

        In the target's dtype and place already, it is the module that learns; else a copy that is made once and
        refreshed.
        """
        target = self.target
        if (self.module.dtype, self.module.device) == (target.dtype, target.device):
            return self.module.eval()
        served = self._served
        if served is None:
            served = frozen(copy.deepcopy(self.module))
            for parameter in served.parameters():  # buffers stay: rotary frequencies do not survive bf16
                parameter.data = parameter.data.to(target.dtype)
            served = self._served = served.to(target.device)
        with torch.no_grad():
            for ours, learned in zip(served.parameters(), self.module.parameters(), strict=True):
                ours.copy_(learned)
        return served

    def drafter(self) -> Drafter:
        """Drafts with the weights as they are now."""
        return DraftModelDrafter(target_of(self.served()), vocab_size=self.target.vocab_size, **self.options)

    def save(self, path: Path) -> None:
        """Write the model, the target's tokenizer and drafter.json."""
        save_model(self.served(), path)
        copy_tokenizer(self.target.model, path)
        options = {key: str(value) for key, value in self.options.items()}
        write_drafter_json(path, DrafterJson(self.kind, options, fingerprint(self.target.model)))


def save_model(model: PreTrainedModel, path: Path) -> None:
    """A model directory, without transformers' bar for each file."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(path)
    finally:
        if shown:
            logging.enable_progress_bar()


def frozen(model: Any) -> Any:
    """The same model in evaluation mode, without gradients."""
    return model.eval().requires_grad_(False)


def recomputed_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Let a model's layers be run again in the backward pass; returns them.

    Raises:
        BadRecipe: this architecture cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise BadRecipe(f"{type(model).__name__} has no gradient checkpointing; leave it out")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return _checkpointing(model)


def _checkpointing(model: PreTrainedModel) -> list[nn.Module]:
    return [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]


def logits_at(model: PreTrainedModel, batch: TrainBatch, here: Tensor) -> Tensor:
    """The model's own logits [M, V] at the positions of `here` [R, S]; documents of a row do not see each other."""
    adapter = Target(model)
    inputs: dict[str, Any] = {"input_ids": batch.ids, "position_ids": batch.positions}
    columns = here.any(0).nonzero()[:, 0]
    if adapter.takes_logits_to_keep:
        return adapter.call((), **inputs, logits_to_keep=columns, attention_mask=None, use_cache=False).logits[
            here[:, columns]
        ]
    return adapter.call((), **inputs, attention_mask=None, use_cache=False).logits[here]


def logits_to_make(model: PreTrainedModel, batch: TrainBatch, here: Tensor) -> Logits:
    """The same from the states before the output matrix, for whoever reads some at a time."""
    adapter = Target(model)
    last = adapter.num_layers
    inputs: dict[str, Any] = {"input_ids": batch.ids, "position_ids": batch.positions}
    if adapter.takes_logits_to_keep:
        inputs["logits_to_keep"] = 1  # none are wanted, and 0 stands for all
    output = adapter.call((last,), **inputs, attention_mask=None, use_cache=False)
    return Logits(output.taps[last][here], adapter.logits_of, adapter.vocab_size)


def cross_entropies(drafted: Tensor | Logits, tokens: Tensor) -> Tensor:
    """-log q of tokens [M] by logits [M, V]."""

    def of(logits: Tensor, tokens: Tensor) -> tuple[Tensor]:
        return (F.cross_entropy(logits.float(), tokens, reduction="none"),)

    if isinstance(drafted, Tensor):
        return of(drafted, tokens)[0]
    named = Logits(tokens, lambda some: some, drafted.vocab_size)
    return torch.cat([losses for (losses,) in compared(of, drafted, named)])


def in_common(draft: Tensor | Logits, law: Tensor | Logits) -> tuple[Tensor | Logits, Tensor | Logits]:
    """Both logits [M, V] over the ids that both models have.

    Models of one tokenizer may pad their heads to different widths; ids beyond the tokenizer's last never come.
    """
    width = min(draft.shape[-1], law.shape[-1])
    return draft[:, :width], law[:, :width]


def kept_weights(losses: Tensor, reference: Tensor, share: float) -> Tensor:
    """Weights [M] of one row's positions: 0 for those left out, equal for the others, M in sum."""
    if not losses.numel():
        return torch.zeros_like(losses)
    kept = hardest(losses, reference, share)
    return kept * (losses.numel() / kept.sum())


def _check_settings(learns: str, reference: PreTrainedModel | None, keep_share: float) -> None:
    if learns not in get_args(Lesson):
        raise BadRecipe(f"a draft model learns {' or '.join(map(repr, get_args(Lesson)))}, got {learns!r}")
    if reference is not None and learns != "law":
        raise BadRecipe('the token filter compares laws; leave out the reference, or say learns = "law"')
    if not 0 < keep_share <= 1:
        raise BadRecipe(f"keep_share is above 0 and at most 1, got {keep_share}")
