"""Stop after a token that the draft thought unlikely, with a threshold that is fixed, or fitted to what was accepted.

transformers' "assistant_confidence_threshold": fixed, and as unsupervised DISCO (arXiv 2405.04304) fitted online.
The unlikely token itself stays in the tree. Kangaroo's second exit and `min_confidence` are the fixed form.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from specdec.errors import UnknownDrafter
from specdec.grow.stopping import ConfidenceRule, Level
from specdec.lengths.policy import LengthPolicy, Step

THRESHOLD = 0.4
"""transformers' default."""

MISSED = 3.0
"""Cost of stopping at a token that would have been accepted, in units of going on after one that is rejected."""

FEWEST = 6
"""Tokens, among them accepted and rejected ones, before a threshold is fitted."""


class ConfidenceLength(LengthPolicy):
    """Go deeper only where some path's last token, or the path as a whole, is likely enough under the draft.

    Args:
        stop_below: least draft probability.
        of: "token" for the last token's own, "path" for the product along the path (`min_confidence`).

    Raises:
        UnknownDrafter: a threshold that is no probability, or another word.
    """

    stops = True

    def __init__(self, *, stop_below: float = THRESHOLD, of: str = "token", carry_over: bool = False) -> None:
        super().__init__(carry_over=carry_over)
        if not 0 <= stop_below <= 1:
            raise UnknownDrafter(f"stop_below is a probability, got {stop_below}")
        if of not in ("token", "path"):
            raise UnknownDrafter(f'of is "token" or "path", got {of!r}')
        self.threshold, self.of = stop_below, of

    def before(self, level: Level) -> Tensor:
        """By what is in the tree already."""
        if self.of == "path":
            return ConfidenceRule(least_path=self.threshold).before(level)
        return ConfidenceRule(least_share=self.threshold).before(level)


class AdaptiveConfidenceLength(ConfidenceLength):
    """The threshold that would have cost least on the tokens seen so far.

    Args:
        stop_below: the threshold until enough was seen.
        window: tokens to fit to, the latest ones; transformers keeps all of a call.
        carry_over: keep tokens and threshold from one generation to the next.
    """

    watches_tokens = True

    def __init__(self, *, stop_below: float = THRESHOLD, window: int = 1000, carry_over: bool = False) -> None:
        super().__init__(stop_below=stop_below, carry_over=carry_over)
        if window < FEWEST:
            raise UnknownDrafter(f"window is at least {FEWEST} tokens, got {window}")
        self.start = stop_below
        self.seen: deque[tuple[float, bool]] = deque(maxlen=window)

    def forget(self) -> None:
        """Back to the first threshold."""
        self.threshold = self.start
        self.seen.clear()

    def observe(self, step: Step) -> None:
        """Take note of every token that was tried, then fit."""
        if step.tokens is None:
            return
        shares = step.tokens.shares.tolist()
        for index, row in enumerate(step.rows):
            self.seen.extend((shares[index][node], accepted) for node, accepted in (row.tokens if row else ()))
        fitted = best_threshold(self.seen)
        self.threshold = self.threshold if fitted is None else fitted


def best_threshold(seen: Iterable[tuple[float, bool]]) -> float | None:
    """The draft probability t of least cost

        (rejected tokens of at least t) / (rejected tokens) + 3 * (accepted tokens below t) / (accepted tokens)

    among those seen, the larger one of two that cost the same; None before there is enough to go by. transformers
    takes the same from a ROC curve.
    """
    pairs = list(seen)
    shares, fates = [share for share, _ in pairs], [fate for _, fate in pairs]
    if len(shares) < FEWEST or all(fates) or not any(fates):
        return None
    at = torch.tensor(shares, dtype=torch.float64)
    accepted = torch.tensor(fates)
    order = at.sort(descending=True)
    hits = accepted[order.indices].double()
    kept_accepted, kept_rejected = hits.cumsum(0), (1 - hits).cumsum(0)
    costs = kept_rejected / kept_rejected[-1] + MISSED * (1 - kept_accepted / kept_accepted[-1])
    last_of_equal = torch.cat([order.values[1:] != order.values[:-1], torch.tensor([True])])
    costs = costs.masked_fill(~last_of_equal, torch.inf)  # a threshold takes all tokens of equal probability
    return float(order.values[int(costs.argmin())])
