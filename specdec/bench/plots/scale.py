"""From values to pixels, and the round numbers to write on an axis."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A linear scale: `start` at pixel `first`, `end` at pixel `last`."""

    start: float
    end: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        """The value's pixel."""
        return self.first + (value - self.start) / (self.end - self.start) * (self.last - self.first)

    def ticks(self, about: int = 5) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten within the scale, roughly as many as asked."""
        rough = (self.end - self.start) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first = math.ceil(self.start / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.end / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number of an axis: no more digits than it needs."""
    return f"{value:.6g}"


def whole_ticks(last: int, room: int) -> list[int]:
    """Whole numbers from 1 to `last` for an axis that has room for `room` of them."""
    step = max(math.ceil(last / room), 1)
    return [number for number in range(1, last + 1) if step == 1 or number == 1 or number % step == 0]
