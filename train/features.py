"""What the target computes on a batch of training rows, in process.

Packed rows keep documents apart by positions that start again at 0 and by passing no mask: transformers then builds a
mask by document, for every kind of layer. An all-ones mask would let documents see each other.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from specdec.errors import UnsupportedModel
from specdec.probe import tolerance
from specdec.target import Target
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
        """The same batch on the target's device, with features."""
        batch = batch.to(self.target.device)
        if not self.taps and not self.needs_logits:
            return batch
        output = self.target.call(
            self.taps, input_ids=batch.ids, position_ids=batch.positions, attention_mask=None, use_cache=False
        )
        return replace(batch, taps=output.taps, logits=output.logits if self.needs_logits else None)


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
