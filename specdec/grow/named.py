"""From the options of a drafter's name to a growth policy: `grow=WORD` with depth, budget, width, threshold, table.

fixed        one shape for all steps: the best one for the budget, or that of a table (paths, or Medusa's construction)
sequoia      one shape: the best one for a measured acceptance vector
eagle2       expand the 10 best of each level, keep the best of all
opt-tree     go deeper while that gains enough
clover       few nodes, spent from the top down; children far behind the likeliest are dropped
best-first   the best tree of its budget by draft probability (on independent marginals: DDTree)
dyspec       drawn children, best slot first, or all slots above a threshold
calibrated   best-first by acceptance learned while decoding, or all nodes above a threshold
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from specdec.errors import UnknownDrafter
from specdec.grow.accuracy import AcceptanceCounts
from specdec.grow.calibration import CalibratedGrowth
from specdec.grow.chosen import ChosenGrowth
from specdec.grow.clover import BUDGET, LEAST_SHARE, CloverGrowth
from specdec.grow.drawn import DrawnGrowth
from specdec.grow.fixed import FixedGrowth
from specdec.grow.levels import Children
from specdec.grow.policy import GrowthPolicy
from specdec.grow.sequoia import sequoia_shape
from specdec.grow.shape import DEFAULT_ACCEPTANCE, Shape, best_shape, check_limits, greedy_shape, shape_of

DEFAULT_BUDGET = 24
"""Proposed nodes of policies that follow the text, when nothing is said. A fixed shape is then a chain."""

DEFAULT_WIDTH = 10
"""Children looked at for each node, and EAGLE-2's beam, when nothing is said; EAGLE-2's own value."""

DEFAULT_GAIN = 0.5
"""OPT-Tree's own threshold; between the cost of a draft forward over that of a target forward, and 1."""


@dataclass(frozen=True)
class Limits:
    """The options of a policy, None where nothing was said."""

    depth: int
    budget: int | None
    width: int | None
    threshold: float | None
    table: Path | None
    children: Children
    min_confidence: float

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Budget, depth and width of a policy that follows the text."""
        return self.budget or DEFAULT_BUDGET, self.depth, self.width or DEFAULT_WIDTH


def growth_named(
    word: str,
    *,
    depth: int,
    budget: int | None = None,
    width: int | None = None,
    threshold: float | None = None,
    table: str | None = None,
    children: str = "chosen",
    min_confidence: float = 0.0,
) -> GrowthPolicy:
    """The policy of this name.

    Args:
        word: see the module.
        depth: most levels.
        budget: most proposed nodes; at most `depth` or None for a chain where the shape is fixed.
        width: most children of a node; None for no limit on fixed shapes, else DEFAULT_WIDTH.
        threshold: opt-tree's least gain of a level, dyspec's least key of a slot, calibrated's least chance of a node.
        table: a JSON file: paths or counts for `fixed`, counts or a vector for `sequoia`, tables for `calibrated`.
        children: "chosen" or "drawn", where the policy leaves it open.
        min_confidence: see `grow_levels`; fixed shapes only.

    Raises:
        UnknownDrafter: a word that is not one, or an option that is out of range or does nothing here.
    """
    if word not in POLICIES:
        raise UnknownDrafter(f"there is no growth {word!r}; the ones there are: {', '.join(POLICIES)}")
    if children not in ("chosen", "drawn"):
        raise UnknownDrafter(f'children is "chosen" or "drawn", got {children!r}')
    if not 0 <= min_confidence < 1:
        raise UnknownDrafter(f"min_confidence is at least 0 and below 1, got {min_confidence}")
    check_limits(depth if budget is None else budget, depth)
    if width is not None and width < 1:
        raise UnknownDrafter(f"a tree needs width >= 1, got {width}")
    if threshold is not None and not threshold >= 0:
        raise UnknownDrafter(f"a growth's threshold is at least 0, got {threshold}")
    given = {
        "threshold": threshold is not None,
        "table": table is not None,
        "min_confidence": min_confidence > 0,
        "children=drawn": children == "drawn",
    }
    for option, is_given in given.items():
        if is_given and option not in USED[word]:
            words = ", ".join(name for name, used in USED.items() if option in used)
            raise UnknownDrafter(f"grow={word} has no use for {option}; it is for: {words}")
    path = None if table is None else Path(table).expanduser()
    return POLICIES[word](Limits(depth, budget, width, threshold, path, cast(Children, children), min_confidence))


def _fixed(limits: Limits) -> GrowthPolicy:
    budget = limits.depth if limits.budget is None else limits.budget
    if limits.table is None:
        ranks = DEFAULT_ACCEPTANCE[: limits.width]
        return FixedGrowth(best_shape(budget, limits.depth, ranks), limits.children, limits.min_confidence)
    return FixedGrowth(_tabled_shape(limits, limits.table), limits.children, limits.min_confidence)


def _tabled_shape(limits: Limits, path: Path) -> Shape:
    """A list of paths as it stands, within depth and width; or Medusa's construction from counts."""
    content = _json(path)
    if isinstance(content, list):
        if not all(isinstance(nodes, list) for nodes in content):
            raise UnknownDrafter(f"{path} is not a list of paths such as [[0], [0, 1]]")
        shape = shape_of(content)
        return shape.up_to(limits.depth, limits.width or max(shape.width, 1))
    rates = AcceptanceCounts.of_json(content, path).by_depth_and_rank()
    return greedy_shape(limits.budget or DEFAULT_BUDGET, tuple(row[: limits.width] for row in rates[: limits.depth]))


def _sequoia(limits: Limits) -> GrowthPolicy:
    ranks = DEFAULT_ACCEPTANCE
    if limits.table is not None:
        content = _json(limits.table)
        is_vector = isinstance(content, list) and content and all(isinstance(rate, int | float) for rate in content)
        if is_vector and not all(0 <= rate <= 1 for rate in content):
            raise UnknownDrafter(f"{limits.table}: acceptance rates are numbers from 0 to 1")
        ranks = tuple(map(float, content)) if is_vector else AcceptanceCounts.of_json(content, limits.table).by_rank()
    shape = sequoia_shape(limits.budget or DEFAULT_BUDGET, limits.depth, ranks, limits.width)
    return FixedGrowth(shape, limits.children, limits.min_confidence)


def _eagle2(limits: Limits) -> GrowthPolicy:
    budget, depth, width = limits.sizes
    return ChosenGrowth(budget, depth, width, beam=width)


def _opt_tree(limits: Limits) -> GrowthPolicy:
    gain = DEFAULT_GAIN if limits.threshold is None else limits.threshold
    return ChosenGrowth(*limits.sizes, least_gain=gain)


def _clover(limits: Limits) -> GrowthPolicy:
    share = LEAST_SHARE if limits.threshold is None else limits.threshold
    return CloverGrowth(limits.budget or BUDGET, limits.depth, limits.width, least_share=share)


def _best_first(limits: Limits) -> GrowthPolicy:
    return ChosenGrowth(*limits.sizes)


def _dyspec(limits: Limits) -> GrowthPolicy:
    return DrawnGrowth(*limits.sizes, threshold=limits.threshold or 0.0)


def _calibrated(limits: Limits) -> GrowthPolicy:
    return CalibratedGrowth(*limits.sizes, limits.children, limits.table, threshold=limits.threshold or 0.0)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownDrafter(f"cannot read the table {path}: {error}") from error


POLICIES: dict[str, Callable[[Limits], GrowthPolicy]] = {
    "fixed": _fixed,
    "sequoia": _sequoia,
    "eagle2": _eagle2,
    "opt-tree": _opt_tree,
    "clover": _clover,
    "best-first": _best_first,
    "dyspec": _dyspec,
    "calibrated": _calibrated,
}
USED: dict[str, set[str]] = {
    "fixed": {"table", "min_confidence", "children=drawn"},
    "sequoia": {"table", "min_confidence", "children=drawn"},
    "eagle2": set(),
    "opt-tree": {"threshold"},
    "clover": {"threshold"},
    "best-first": set(),
    "dyspec": {"threshold", "children=drawn"},
    "calibrated": {"threshold", "table", "children=drawn"},
}
"""Options beside depth, budget and width that a policy has a use for."""
