"""The settings of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from specdec.acceptance import Rule
from specdec.bench.methods import Decoding
from specdec.bench.record import History
from specdec.errors import SpecdecError


@dataclass(frozen=True)
class Settings:
    """How a run is made.

    Attributes:
        max_new_tokens: the cap, for every method and prompt.
        repeats: passes over all questions.
        batch_size: questions generated together.
        temperature: 0 takes the argmax; above 0 draws from the whole law.
        seed: of the order of methods, and of the draws.
        fixed_length: go on past the end of text, so that every answer has the same length.
        history: whose answers a later turn's prompt holds: the method's "own", or the plain method's ("reference").
        carry_over: drafters keep what they remember from question to question, within one repeat.
        phases: time drafting, verification and acceptance within each step.
        rule: acceptance rule of specdec's loop.

    Raises:
        SpecdecError: a value outside its limits.
    """

    max_new_tokens: int = 128
    repeats: int = 1
    batch_size: int = 1
    temperature: float = 0.0
    seed: int = 0
    fixed_length: bool = False
    history: History = "own"
    carry_over: bool = False
    phases: bool = True
    rule: Rule = "auto"

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "repeats", "batch_size"):
            if getattr(self, name) < 1:
                raise SpecdecError(f"{name} is at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise SpecdecError(f"temperature is 0 or more, got {self.temperature}")
        if self.history not in ("own", "reference"):
            raise SpecdecError(f'history is "own" or "reference", got {self.history!r}')

    @property
    def decoding(self) -> Decoding:
        """What a method needs of them."""
        return Decoding(self.temperature, self.fixed_length, self.phases, self.rule)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)
