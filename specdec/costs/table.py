"""What one step costs, as numbers: verification by nodes, drafting by levels and nodes, and the rest.

A table says nothing of where it comes from beyond its `source`: `measure` fills one on this machine, `roofline` has the
same calls for a machine that is only described. Whoever weighs tokens against seconds asks these:

    costs.verify(nodes, batch, context)           one target forward
    costs.draft(levels, nodes, batch, growth)     one proposal
    costs.overhead(tokens)                        acceptance, commit and bookkeeping of one step
    step_seconds(costs, nodes, levels, tokens)    all of it

`nodes` of a verification counts the root, `nodes` of a proposal does not.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from specdec.costs.interpolation import interpolated, least_squares
from specdec.errors import SpecdecError

FORMAT = "specdec-costs-1"


class VerifyPoint(NamedTuple):
    """One measured verification.

    Attributes:
        batch: rows.
        context: committed tokens of each row.
        nodes: of each row's tree, the root included.
        seconds: median.
        spread: interquartile range of the repeats, in seconds.
    """

    batch: int
    context: int
    nodes: int
    seconds: float
    spread: float = 0.0


class DraftPoint(NamedTuple):
    """One measured proposal.

    Attributes:
        growth: how the tree took its shape, a word of `specdec.grow.named`; "" for drafters without one.
        levels: of the tree.
        nodes: proposed, in the mean.
        batch: rows.
        seconds: median.
        spread: interquartile range, in seconds.
    """

    growth: str
    levels: int
    nodes: float
    batch: int
    seconds: float
    spread: float = 0.0


class Costs(Protocol):
    """What a step costs, in seconds."""

    def verify(self, nodes: float, batch: int = 1, context: float | None = None) -> float:
        """One target forward over trees of so many nodes, each after so many tokens."""
        ...

    def draft(self, levels: float, nodes: float, batch: int = 1, growth: str = "fixed") -> float:
        """One proposal of so many levels and nodes."""
        ...

    def overhead(self, tokens: float = 1.0) -> float:
        """The rest of a step that emits so many tokens."""
        ...


@dataclass(frozen=True)
class CostTable:
    """Measured costs.

    Attributes:
        verifications: at least one.
        proposals: none for a drafter that costs nothing, or that was not measured.
        per_step: seconds of acceptance, commit and bookkeeping that every step takes.
        per_token: further seconds for each emitted token.
        source: what was measured, for people: target, drafter, device, threads, versions.
        measured_at: seconds since 1970.

    Raises:
        SpecdecError: no verification, or a number that is no cost.
    """

    verifications: tuple[VerifyPoint, ...]
    proposals: tuple[DraftPoint, ...] = ()
    per_step: float = 0.0
    per_token: float = 0.0
    source: dict[str, Any] = field(default_factory=dict)
    measured_at: float = 0.0

    def __post_init__(self) -> None:
        if not self.verifications:
            raise SpecdecError("a cost table needs at least one verification; expected batch, context, nodes, seconds")
        times = [point.seconds for point in (*self.verifications, *self.proposals)]
        sizes = [size for point in self.verifications for size in (point.batch, point.nodes)]
        if not all(math.isfinite(t) and t > 0 for t in times) or min(sizes) < 1:
            raise SpecdecError("costs are finite seconds above 0, batch and nodes at least 1")
        if not (0 <= self.per_step < math.inf and 0 <= self.per_token < math.inf):
            raise SpecdecError("per_step and per_token are finite seconds, 0 or more")

    def verify(self, nodes: float, batch: int = 1, context: float | None = None) -> float:
        """Seconds of one target forward; linear between what was measured in nodes, context and batch.

        Args:
            nodes: of each row's tree, the root included.
            batch: rows.
            context: committed tokens of each row; None for the shortest measured.
        """
        by_batch = []
        for rows, contexts in self._curves.items():
            length = next(iter(contexts)) if context is None else context
            by_batch.append((rows, interpolated([(c, interpolated(p, nodes)) for c, p in contexts.items()], length)))
        return interpolated(by_batch, batch)

    def draft(self, levels: float, nodes: float, batch: int = 1, growth: str = "fixed") -> float:
        """Seconds of one proposal: a + b levels + c nodes, fitted to this growth's proposals in the nearest batch.

        A growth that was not measured is taken to cost what the others do; nothing measured costs nothing.
        """
        a, b, c = self._fit(growth, batch)
        return a + b * levels + c * nodes

    def overhead(self, tokens: float = 1.0) -> float:
        """Seconds of the rest of a step that emits so many tokens for each row."""
        return self.per_step + self.per_token * tokens

    @cached_property
    def _curves(self) -> dict[int, dict[int, list[tuple[float, float]]]]:
        """batch -> context -> (nodes, seconds), all in rising order."""
        curves: dict[int, dict[int, list[tuple[float, float]]]] = {}
        for point in sorted(self.verifications):
            curves.setdefault(point.batch, {}).setdefault(point.context, []).append((point.nodes, point.seconds))
        return curves

    @cached_property
    def _fits(self) -> dict[tuple[str, int], tuple[float, ...]]:
        return {}

    def _fit(self, growth: str, batch: int) -> tuple[float, ...]:
        if (growth, batch) not in self._fits:
            points = [p for p in self.proposals if p.growth == growth] or list(self.proposals)
            nearest = min((p.batch for p in points), key=lambda rows: abs(rows - batch), default=batch)
            points = [p for p in points if p.batch == nearest]
            rows = [(1.0, float(p.levels), p.nodes) for p in points]
            fit = least_squares(rows, [p.seconds for p in points]) if points else (0.0, 0.0, 0.0)
            self._fits[growth, batch] = fit
        return self._fits[growth, batch]

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> CostTable:
        """The table of a file that `save` wrote.

        Raises:
            SpecdecError: it cannot be read, or holds something else.
        """
        try:
            return CostTable.of_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise SpecdecError(f"there is no cost table {path}; specdec tune writes one with --save-costs") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SpecdecError(f"{path} does not hold a cost table ({FORMAT}): {error}") from error

    @staticmethod
    def of_dict(content: dict[str, Any]) -> CostTable:
        """The table that `as_dict` gave.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is none.
        """
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')!r}, expected {FORMAT!r}")
        fields = {key: value for key, value in content.items() if key != "format"}
        fields["verifications"] = tuple(VerifyPoint(*point) for point in fields["verifications"])
        fields["proposals"] = tuple(DraftPoint(*point) for point in fields.get("proposals", ()))
        return CostTable(**fields)


def step_seconds(
    costs: Costs, nodes: float, levels: float, tokens: float, batch: int = 1, context: float | None = None,
    growth: str = "fixed",
) -> float:  # fmt: skip
    """Seconds of a whole step that proposes `nodes` nodes in `levels` levels and emits `tokens` tokens for each row."""
    draft = costs.draft(levels, nodes, batch, growth) if nodes else 0.0
    return draft + costs.verify(nodes + 1, batch, context) + costs.overhead(tokens)
