"""Divergences from laws of which only the most probable tokens are known.

What is known of the other tokens is their mass together. So they count as one outcome, the bucket: p and q are compared
on the kept tokens and the bucket. Coarser laws are never further apart (data processing), so each divergence here is a
lower bound of that between the whole laws, and zero only where kept tokens and bucket agree.

Renormalising the kept tokens instead, as if the others could not happen, would teach the draft to say them never: the
gradient of KL(p || q) is q - p, and p = 0 pushes each of them down without end. In the bucket the gradient is
q_v (1 - p_bucket / q_bucket): the mass of the others is corrected as a whole, and how the draft spreads it among them
stays as it is, since nothing is known of that.

It is computed by filling the bucket of p with the draft's own spread, held constant: p_v := p_bucket q_v / q_bucket.
For every divergence of the form sum_v p_v f(q_v / p_v) (forward and reverse KL, JSD, TV; alpha through TV) the quotient
q_v / p_v is then the same for all tokens of the bucket, so value and gradient are those of the bucket as one outcome.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import BadRecipe
from specdec.train.objective import Objective


@dataclass(frozen=True)
class BucketObjective(Objective):
    """An Objective for targets from `StoredLaws.dense`: the smallest value of each row marks the bucket.

    With laws that were kept whole the bucket is one token, and nothing changes.

    Raises:
        BadRecipe: a temperature other than 1, at which the mass of the bucket is not known.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature != 1.0:
            raise BadRecipe(
                f"laws of which only the top tokens are kept are known at temperature 1 alone, got "
                f"{self.temperature}; keep whole laws (top_k=None), or leave the temperature of the loss at 1"
            )

    def compare(self, draft: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Objective.compare`. Agreement, and the label of cross-entropy, come from the kept tokens."""
        filled = target if self.divergence == "ce" else with_bucket(draft, target)
        losses, alpha, _ = super().compare(draft, filled)
        return losses, alpha, (draft.argmax(-1) == target.argmax(-1)).detach()


@torch.no_grad()
def with_bucket(draft: Tensor, target: Tensor) -> Tensor:
    """Log-law [M, V] of the target whose bucket is spread as the draft's [M, V] is."""
    log_p, log_q = target.float().log_softmax(-1), draft.float().log_softmax(-1)
    bucket = log_p == log_p.amin(-1, keepdim=True)
    mass_p = log_p.masked_fill(~bucket, -torch.inf).logsumexp(-1, keepdim=True)
    mass_q = log_q.masked_fill(~bucket, -torch.inf).logsumexp(-1, keepdim=True)
    spreads = bucket & mass_q.isfinite()  # a draft that cannot say any of them has no spread
    return torch.where(spreads, log_q + mass_p - mass_q, log_p)
