"""The target's laws as they are kept to be learned from later: in fp16, the most probable tokens only.

Dimensions: M laws, V vocabulary, k tokens kept of each law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = -50.0
"""Logarithm of the smallest probability that is kept: 2e-22. Keeps infinities out of every divergence."""


@dataclass(frozen=True)
class StoredLaws:
    """M laws over V tokens.

    Attributes:
        log_p: fp16 [M, k] log-probabilities, largest first; [M, V] by id when all tokens are kept.
        tokens: int32 [M, k], whose they are; None when all are kept.
        log_rest: fp16 [M], log-probability that the other V - k tokens share; None when there are none.
        vocab_size: V.
    """

    log_p: Tensor
    tokens: Tensor | None
    log_rest: Tensor | None
    vocab_size: int

    @staticmethod
    def of(logits: Tensor, top_k: int | None) -> StoredLaws:
        """From raw logits [M, V]; None, or V and more, keeps all tokens."""
        log_p = logits.float().log_softmax(-1)
        vocab_size = log_p.shape[-1]
        if top_k is None or top_k >= vocab_size:
            return StoredLaws(_small(log_p), None, None, vocab_size)
        kept = log_p.topk(top_k, dim=-1)
        rest = log_p.scatter(-1, kept.indices, -torch.inf).logsumexp(-1)  # 1 - sum of the kept would lose small rests
        return StoredLaws(_small(kept.values), kept.indices.int(), _small(rest), vocab_size)

    def __len__(self) -> int:
        return self.log_p.shape[0]

    def dense(self) -> Tensor:
        """Logits [M, V] in fp32: kept tokens as they were, the others sharing their mass evenly.

        So the result is a law that can be read as any other. The tokens that share have the smallest value of their
        row, by which `BucketObjective` finds them.
        """
        if self.tokens is None or self.log_rest is None:
            return self.log_p.float()
        kept, others = self.log_p.float(), self.vocab_size - self.log_p.shape[1]
        share = (self.log_rest.float() - math.log(others)).minimum(kept[:, -1])  # rounding must not turn the order
        return share[:, None].repeat(1, self.vocab_size).scatter(-1, self.tokens.long(), kept)

    def best(self, index: int) -> int:
        """The most probable token of one law."""
        return int(self.log_p[index].argmax()) if self.tokens is None else int(self.tokens[index, 0])

    def select(self, index: Tensor | slice) -> StoredLaws:
        """Some of the laws."""
        tokens = None if self.tokens is None else self.tokens[index]
        rest = None if self.log_rest is None else self.log_rest[index]
        return StoredLaws(self.log_p[index], tokens, rest, self.vocab_size)

    def to(self, device: torch.device | str) -> StoredLaws:
        """The same laws on a device."""
        tokens = None if self.tokens is None else self.tokens.to(device)
        rest = None if self.log_rest is None else self.log_rest.to(device)
        return StoredLaws(self.log_p.to(device), tokens, rest, self.vocab_size)

    def copy(self) -> StoredLaws:
        """In memory of its own: a view would hold the whole that it was cut from."""
        tokens = None if self.tokens is None else self.tokens.clone()
        rest = None if self.log_rest is None else self.log_rest.clone()
        return StoredLaws(self.log_p.clone(), tokens, rest, self.vocab_size)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(part.nbytes for part in (self.log_p, self.tokens, self.log_rest) if part is not None)

    @staticmethod
    def joined(laws: list[StoredLaws]) -> StoredLaws:
        """One after the other; all must keep as many tokens."""
        first = laws[0]
        tokens = None if first.tokens is None else torch.cat([part.tokens for part in laws if part.tokens is not None])
        rest = None if first.log_rest is None else torch.cat([p.log_rest for p in laws if p.log_rest is not None])
        return StoredLaws(torch.cat([part.log_p for part in laws]), tokens, rest, first.vocab_size)


def _small(log_p: Tensor) -> Tensor:
    return log_p.clamp(min=LEAST).half()
