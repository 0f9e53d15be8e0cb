"""AdaEDL: stop before a token whose acceptance the draft law's entropy makes unlikely (arXiv 2410.18351).

Acceptance is 1 - TV(p, q), at least 1 - sqrt(KL(q, p) / 2) by Pinsker's inequality; with KL taken as proportional to
the entropy H of q, drafting stops where

    1 - sqrt(scale * H(q)) < threshold

before anything is drawn from q. The threshold follows acceptance as in Draft & Verify (arXiv 2309.08168): with the
share r of drafted levels that was accepted,

    rate      <- 0.5 * rate + 0.5 * r
    threshold <- 0.9 * threshold + 0.1 * (threshold + 0.01 if rate < aim else threshold - 0.01)
"""

from __future__ import annotations

from torch import Tensor

from specdec.errors import UnknownDrafter
from specdec.grow.stopping import Level
from specdec.lengths.policy import LengthPolicy, Step

RATE_MEMORY, THRESHOLD_MEMORY, NUDGE = 0.5, 0.9, 0.01


class AdaedlLength(LengthPolicy):
    """Go on while the entropy bound on the next token's acceptance is large enough at some node of the row.

    Args:
        stop_below: the threshold, at first.
        scale: of the entropy in nats.
        aim: share of accepted levels that the threshold is moved towards; 0 leaves it where it is.
        at_least: levels that are drafted whatever the bound says. The law after the root is known by then, so a first
            token costs nothing but its verification, and says when the bound is too strict.
        carry_over: keep threshold and rate from one generation to the next.

    Raises:
        UnknownDrafter: an option out of range.
    """

    stops = True

    def __init__(
        self,
        *,
        stop_below: float = 0.3,
        scale: float = 0.2,
        aim: float = 0.8,
        at_least: int = 1,
        carry_over: bool = False,
    ) -> None:
        super().__init__(carry_over=carry_over, at_least=at_least)
        if scale < 0 or not 0 <= aim <= 1 or at_least < 0:
            raise UnknownDrafter(
                f"length=adaedl takes scale >= 0, aim from 0 to 1 and at_least >= 0, got {scale}, {aim}, {at_least}"
            )
        if not stop_below <= 1:
            raise UnknownDrafter(f"the bound is never above 1, got stop_below={stop_below}")
        self.start, self.scale, self.aim = stop_below, scale, aim
        self.forget()

    def forget(self) -> None:
        """Back to the first threshold, and to a rate that is as aimed at."""
        self.threshold, self.rate = self.start, self.aim

    def bound(self, entropy: Tensor) -> Tensor:
        """Of acceptance, from entropies in nats."""
        return 1.0 - (self.scale * entropy).sqrt()

    def after(self, level: Level) -> Tensor:
        """By the laws of children that do not exist yet."""
        assert level.below is not None
        return self.bound(level.below[..., 0]) >= self.threshold

    def observe(self, step: Step) -> None:
        """One update for each row with a proposal."""
        for row in step.rows:
            if row is None or not row.drafted or not self.aim:
                continue
            self.rate = RATE_MEMORY * self.rate + (1 - RATE_MEMORY) * row.accepted / row.drafted
            nudged = self.threshold + (NUDGE if self.rate < self.aim else -NUDGE)
            moved = THRESHOLD_MEMORY * self.threshold + (1 - THRESHOLD_MEMORY) * nudged
            self.threshold = min(max(moved, 0.0), 1.0)
