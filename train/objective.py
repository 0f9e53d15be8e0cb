"""What a step of training minimises: terms, each a loss for every position, weighted and summed.

The sum is divided by the number of supervised tokens of the whole accumulation window over all processes, which is
known from the masks before any forward; so accumulation and several processes give the same gradient as one big
batch, to rounding.

Dimensions: M positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import BadRecipe
from specdec.train.divergence import Laws, acceptance, divergence
from specdec.train.logits import Logits, compared

POSITIONS_AT_ONCE = 4096
"""Rows of [M, V] in fp32 that a divergence works on at a time; bounds memory for large vocabularies."""


@dataclass
class Term:
    """One addend of the loss.

    Attributes:
        name: "depth 1", "features", ...
        losses: [M], one for each position, unweighted.
        weight: of the whole term.
        alpha: [M] acceptance sum min(p, q) at the same positions, without gradient; None where there is no law.
        hits: [M] bool, draft and target agree on the most probable token; None where there is no law.
        depth: 1, 2, ... of the drafted token; 0 for a term that drafts nothing.
        position_weights: [M] constants beside the weight; None for 1 everywhere.
    """

    name: str
    losses: Tensor
    weight: float = 1.0
    alpha: Tensor | None = None
    hits: Tensor | None = None
    depth: int = 0
    position_weights: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """Weighted sum over positions."""
        losses = self.losses if self.position_weights is None else self.losses * self.position_weights
        return self.weight * losses.sum()


@dataclass(frozen=True)
class Objective:
    """How far a draft law is from the target's, by depth.

    Args:
        divergence: a name of `train.divergence`, such as "forward-kl" or "jsd:0.3".
        decay: depth d weighs decay ** (d - 1).
        temperature: both laws are taken at this temperature.

    Raises:
        BadRecipe: a divergence that does not exist, a decay outside (0, 1], a temperature that is not positive.
    """

    divergence: str = "forward-kl"
    decay: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        divergence(self.divergence)
        if not 0 < self.decay <= 1:
            raise BadRecipe(f"decay lies in (0, 1], got {self.decay}")
        if not self.temperature > 0:
            raise BadRecipe(f"the temperature of the loss is positive, got {self.temperature}")

    def term(
        self,
        depth: int,
        draft: Tensor | Logits,
        target: Tensor | Logits,
        *,
        position_weights: Tensor | None = None,
        weight: float = 1.0,
    ) -> Term:
        """The term of one depth.

        Args:
            depth: 1 for the first drafted token.
            draft: logits [M, V] with gradient.
            target: logits [M, V] over the same vocabulary; both are there, or both are to be made.
            position_weights: [M], constants such as D-PACE's or a token filter's 0 and 1.
            weight: beside the decay.
        """
        if isinstance(draft, Logits) and isinstance(target, Logits):
            parts = list(compared(self.compare, draft, target))
        else:
            assert isinstance(draft, Tensor), "either both are there, or both are to be made"
            assert isinstance(target, Tensor)
            pairs = zip(draft.split(POSITIONS_AT_ONCE), target.split(POSITIONS_AT_ONCE), strict=True)
            parts = [self.compare(q, p) for q, p in pairs]
        losses, alphas, hits = (torch.cat(part) for part in zip(*parts, strict=True))
        return Term(f"depth {depth}", losses, weight * self.decay ** (depth - 1), alphas, hits, depth, position_weights)

    def compare(self, draft: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, acceptance and agreement [M] of logits [M, V]."""
        laws = Laws(draft, target)
        cooled = laws
        if self.temperature != 1:
            cooled = Laws(draft / self.temperature, target / self.temperature)
        return divergence(self.divergence)(cooled), acceptance(laws).detach(), laws.agree()


def confidence_weights(confidence: Tensor, counts: Tensor, smoothing: float = 0.5) -> Tensor:
    """D-PACE's weights for blocks of K depths behind M positions (arXiv 2605.18810).

    With q'_m = (1 - a) q_m + a, where q_m is the draft's probability of the token that came at depth m, depth j
    weighs sum_{m >= j} prod_{i <= m} q'_i: what the expected accepted length loses when depth j fails. No gradient.

    Args:
        confidence: q, [K, M].
        counts: bool [K, M], True down to where the text behind a position ends; deeper ones add nothing to a sum.
        smoothing: a.

    Returns:
        [K, M].
    """
    smooth = (1 - smoothing) * confidence.detach() + smoothing
    reach = smooth.cumprod(0) * counts
    return reach.flip(0).cumsum(0).flip(0)


def hardest(losses: Tensor, reference: Tensor, share: float) -> Tensor:
    """AdaSPEC's filter: 1 for the `share` of positions with the largest loss above a reference draft's, else 0.

    arXiv 2510.19779: what a reference draft already does as well cannot be gained; [M] each.
    """
    count = max(1, round(share * losses.numel())) if losses.numel() else 0
    kept = (losses - reference).detach().topk(count).indices
    return torch.zeros_like(losses).index_fill(0, kept, 1.0)
