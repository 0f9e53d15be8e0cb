"""The same number of levels in every step."""

from __future__ import annotations

from specdec.errors import UnknownDrafter
from specdec.lengths.policy import LengthPolicy


class ConstantLength(LengthPolicy):
    """Never more than these levels.

    Args:
        levels: 0 or more; 0 decodes plainly.

    Raises:
        UnknownDrafter: a negative number.
    """

    def __init__(self, *, levels: int = 4) -> None:
        super().__init__()
        if levels < 0:
            raise UnknownDrafter(f"length=constant takes levels >= 0, got {levels}")
        self.levels = levels

    def limits(self, rows: int, most: int) -> list[int]:
        """The same for all."""
        return [min(self.levels, most)] * rows
