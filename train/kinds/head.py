"""What all draft heads have in common in training: fp32 weights that learn, and a drafter made from a copy of them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from specdec.drafter import Drafter
from specdec.drafters.directory import fingerprint, read_drafter_json, write_drafter_json
from specdec.drafters.load import HEAD_DRAFTERS
from specdec.errors import BadRecipe
from specdec.formats import write
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.target import Target
from specdec.train.batch import Places, TrainBatch
from specdec.train.logits import Logits
from specdec.train.objective import Objective, Term


class HeadTraining(ABC):
    """Base of a kind: subclasses say which taps they read and compute the terms.

    Args:
        target: probed; frozen here.
        head: the module that learns; turned to fp32, since small updates vanish in bf16.
        taps: hidden states that `terms` reads.
        options: of the drafter that validation decodes with.
    """

    kind: str
    needs_logits: bool = True
    recompute: bool = False
    """Logits are made again in the backward pass instead of being kept."""

    def __init__(
        self, target: Target, head: nn.Module, taps: tuple[int, ...], options: dict[str, Any] | None = None
    ) -> None:
        self.target = target
        self.taps = taps
        self.module = head.float().to(target.device)
        self.options = dict(options or {})
        for parameter in target.model.parameters():
            parameter.requires_grad_(False)

    @abstractmethod
    def terms(self, batch: TrainBatch, objective: Objective) -> list[Term]:
        """The loss of a batch, as addends."""

    def logits(self, states: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor | Logits:
        """What `make` gives of states [M, ...], row by row: logits [M, N], or what they can be made from."""
        return Logits(states, make, self.target.vocab_size) if self.recompute else make(states)

    def laws(self, batch: TrainBatch, ahead: int) -> Tensor | Logits:
        """The target's logits at the M positions of `drafts(ahead)`, see `TrainBatch.laws`."""
        return self.laws_at(batch, batch.stands(ahead))

    def laws_at(self, batch: TrainBatch, places: Places) -> Tensor | Logits:
        """The logits of a batch that stand at these places."""
        return batch.laws_to_make(places) if self.recompute else batch.laws_at(places)

    def target_logits(self, hidden: Tensor) -> Tensor:
        """The target's own output matrix on states [M, D] of any dtype, with its family's scale or cap."""
        weight = cast(Any, self.target.lm_head).weight
        return self.target.logits_of(hidden.to(weight.dtype))

    def drafter(self) -> Drafter:
        """Drafts with the weights as they are now, in the target's dtype and place."""
        head = copy.deepcopy(self.module).to(self.target.device, self.target.dtype).eval()
        return HEAD_DRAFTERS[self.kind](self.target, head, **self.options)

    def checkpoint(self) -> HeadCheckpoint:
        """The head in the target's dtype, as every format takes it."""
        return HeadCheckpoint(self.kind, self.module.config, self.tensors(), fingerprint(self.target.model))

    def tensors(self) -> dict[str, Tensor]:
        """The state dict in the target's dtype, on the host."""
        dtype = self.target.dtype
        return {
            name: (value.detach().to(dtype) if value.is_floating_point() else value).cpu().contiguous()
            for name, value in self.module.state_dict().items()
        }

    def save(self, path: Path) -> None:
        """Write a drafter directory that `load_drafter` takes; it drafts with the options of the validation."""
        write(self.checkpoint(), path)
        options = {key: str(value) for key, value in self.options.items()}
        write_drafter_json(path, replace(read_drafter_json(path), options=options))


def checked_taps(target: Target, taps: list[int], count: int | None = None) -> tuple[int, ...]:
    """The taps, when the target has them.

    Args:
        target: probed.
        taps: by `hidden_states` index.
        count: how many it has to be; None for one or more.

    Raises:
        BadRecipe: another number, or one that is no hidden state of the target.
    """
    if (
        not taps
        or count not in (None, len(taps))
        or not all(type(t) is int and 0 <= t <= target.num_layers for t in taps)
    ):
        many = "one or more" if count is None else str(count)
        raise BadRecipe(f"[head] taps are {many} of the target's hidden states 0 to {target.num_layers}, got {taps}")
    return tuple(taps)
