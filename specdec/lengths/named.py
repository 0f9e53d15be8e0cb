"""The length policies by name: `length=WORD` in a drafter's specification, with the policy's options beside it.

none                  as deep as the drafter goes
constant              never more than `levels`
heuristic             transformers' schedule: +2 after full acceptance, else -1
confidence            stop after a token that the draft thought unlikely
adaptive-confidence   the same with a threshold fitted to what was accepted
adaedl                stop where the draft law's entropy bounds acceptance too low
acceptance            stop by a trained head that predicts acceptance
thompson              the best length for a draw from what is believed of acceptance
goodput               the length of most expected tokens per second, 0 where speculation does not pay
"""

from __future__ import annotations

import inspect
from typing import Any

from specdec.lengths.acceptance_head import AcceptanceLength
from specdec.lengths.adaedl import AdaedlLength
from specdec.lengths.confidence import AdaptiveConfidenceLength, ConfidenceLength
from specdec.lengths.constant import ConstantLength
from specdec.lengths.goodput import GoodputLength
from specdec.lengths.heuristic import HeuristicLength
from specdec.lengths.policy import LengthPolicy
from specdec.lengths.thompson import ThompsonLength

LENGTHS: dict[str, type[LengthPolicy]] = {
    "constant": ConstantLength,
    "heuristic": HeuristicLength,
    "confidence": ConfidenceLength,
    "adaptive-confidence": AdaptiveConfidenceLength,
    "adaedl": AdaedlLength,
    "acceptance": AcceptanceLength,
    "thompson": ThompsonLength,
    "goodput": GoodputLength,
}


def options_of(word: str) -> dict[str, inspect.Parameter]:
    """The options of a policy by name."""
    parameters: dict[str, Any] = dict(inspect.signature(LENGTHS[word].__init__).parameters)
    parameters.pop("self")
    return parameters
