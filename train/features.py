"""What the target computes on a batch of training rows, in process.

Packed rows keep documents apart by positions that start again at 0 and by passing no mask: transformers then builds a
mask by document, for every kind of layer. An all-ones mask would let documents see each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from specdec.errors import UnsupportedModel
from specdec.probe import tolerance
from specdec.target import BEFORE_NORM, Target
from specdec.train.batch import TrainBatch


class TargetFeatures:
    """Adds taps and logits to a batch.

    Args:
        target: frozen; runs without gradient.
        taps: hidden states to add, by `hidden_states` index or BEFORE_NORM.
        needs_logits: whether to add logits.
    """

    def __init__(self, target: Target, taps: tuple[int, ...], *, needs_logits: bool = True) -> None:
        self.target = target
        self.taps = taps
        self.needs_logits = needs_logits

    @torch.no_grad()
    def __call__(self, batch: TrainBatch) -> TrainBatch:
        """The same batch on the target's device, with features.

        Taps that the batch has (from a feature cache) are kept. The whole target runs only where they do not suffice;
        the tap after the final norm and the logits need no more than the last layer's output before it.
        """
        batch = batch.to(self.target.device)
        if not self.taps and not self.needs_logits:
            return batch
        if stored_taps(self.target, self.taps, needs_logits=self.needs_logits) <= batch.taps.keys():
            return self._completed(batch)
        inputs: dict[str, Any] = {"input_ids": batch.ids, "position_ids": batch.positions}
        if not self.needs_logits and self.target.takes_logits_to_keep:
            inputs["logits_to_keep"] = 1
        output = self.target.call(self.taps, **inputs, attention_mask=None, use_cache=False)
        return replace(batch, taps=output.taps, logits=output.logits if self.needs_logits else None)

    def _completed(self, batch: TrainBatch) -> TrainBatch:
        last = self.target.num_layers
        taps = {tap: batch.taps[tap] for tap in self.taps if tap != last}
        if not self.needs_logits and last not in self.taps:
            return replace(batch, taps=taps)
        output = self.target.norm_and_head(batch.taps[BEFORE_NORM], taps=(last,) if last in self.taps else ())
        return replace(batch, taps=taps | output.taps, logits=output.logits if self.needs_logits else None)


def stored_taps(target: Target, taps: Iterable[int], *, needs_logits: bool = True) -> set[int]:
    """The taps that have to be kept so that these taps, and the logits, follow without running a layer."""
    last = target.num_layers
    wanted = {BEFORE_NORM if tap == last else tap for tap in taps}
    return wanted | ({BEFORE_NORM} if needs_logits else set())


@torch.no_grad()
def check_packing(target: Target) -> None:
    """Refuse to pack for a model whose documents see each other in a packed row.

    Raises:
        UnsupportedModel: packed and separate logits differ; train with one document in a row.
    """
    vocabulary = target.vocab_size
    first = (torch.arange(5, 12) * 7 % vocabulary)[None].to(target.device)
    second = (torch.arange(3, 12) * 11 % vocabulary)[None].to(target.device)
    ids = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(first.shape[1]), torch.arange(second.shape[1])])[None].to(target.device)
    packed = target.call((), input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False)
    alone = target.call((), input_ids=second, attention_mask=None, use_cache=False)
    expected, got = alone.logits.float(), packed.logits[:, first.shape[1] :].float()
    difference = (expected - got).abs().max().item()
    if not difference <= tolerance(target.dtype, 0.0, expected.std().item()):
        raise UnsupportedModel(
            f"documents packed into one row see each other in {type(target.model).__name__} "
            f"(logits differ by {difference:.2g}); train with packing off"
        )
