"""Attention masks of packed training rows: additive, since that is what heads and targets take alike."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.train.batch import TrainBatch


def document_mask(batch: TrainBatch, like: Tensor) -> Tensor:
    """[R, 1, S, S] in dtype and device of `like`: each token sees itself and what is before it in its document."""
    length = batch.ids.shape[1]
    same = batch.documents[:, :, None] == batch.documents[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
    return additive(same & causal, like)[:, None]


def additive(sees: Tensor, like: Tensor) -> Tensor:
    """0 where `sees` holds, the dtype's minimum elsewhere."""
    mask = torch.zeros(sees.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~sees.to(like.device), torch.finfo(like.dtype).min)
