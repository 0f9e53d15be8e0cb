"""Settings: the options of one drafter that are tried, and the shape that they make where it is fixed."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from specdec.drafters.directory import read_drafter_json
from specdec.drafters.load import TEXT_WORDS, load_drafter, parse_spec
from specdec.errors import SpecdecError, UnknownDrafter
from specdec.grow.fixed import FixedGrowth
from specdec.grow.named import growth_named
from specdec.grow.shape import Shape

DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12)
"""Levels that are tried."""
BUDGETS = (4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Proposed nodes that are tried."""
FIXED = ("fixed", "sequoia")
"""Growth policies whose shape is the same in every step."""
FOLLOWING = {
    "chosen": ("eagle2", "opt-tree", "clover", "best-first", "calibrated"),
    "drawn": ("dyspec", "calibrated"),
}
"""Growth policies that follow the text, by kind of children."""
TEXT_GRIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "LookupDrafter": {"tokens": (2, 4, 6, 10, 16), "min_ngram": (1, 2)},
    "SuffixDrafter": {"budget": (2, 4, 8, 12, 16, 24), "branches": (1, 2)},
    "RecyclingDrafter": {"budget": (4, 8, 15, 24, 40), "depth": (3, 5)},
}
"""What is varied of drafters without a growth policy."""
LENGTHS = ("confidence", "adaptive-confidence", "adaedl", "thompson", "goodput", "heuristic")
"""Length policies that are tried on chains."""
RESETS = {
    "budget": "none",
    "width": "none",
    "threshold": "none",
    "table": "none",
    "min_confidence": "0",
    "length": "none",
    "children": "chosen",
}
"""What takes back an option that a drafter directory brings along from an earlier choice."""


@dataclass(frozen=True)
class Setting:
    """Options of a drafter, and the shape that they make where it is fixed.

    Attributes:
        options: as in a drafter's specification.
        shape: what is proposed in every step; None where it follows the text.
        growth: the word of the growth policy; "" for drafters without one.
        drafts: False decodes without speculation.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    shape: Shape | None = None
    growth: str = ""
    drafts: bool = True

    @property
    def name(self) -> str:
        """Options as they are written, without the place of a table."""
        if not self.drafts:
            return "none"
        shown = (f"{key}={value}" for key, value in self.options.items() if key != "table")
        return ",".join(shown) or "defaults"


NO_SPECULATION = Setting(drafts=False)


@dataclass(frozen=True)
class Subject:
    """The drafter that is tuned.

    Attributes:
        name: a word or a path, without options.
        given: options that the user fixed; they are never varied.
        own: options of its drafter.json.
        kind: the drafter's class.
        takes: names of all options.
    """

    name: str
    given: Mapping[str, str]
    own: Mapping[str, str]
    kind: str
    takes: frozenset[str]

    def spec(self, setting: Setting) -> str | None:
        """The specification of a setting, for `load_drafter`; None for no speculation."""
        if not setting.drafts:
            return None
        resets = {key: RESETS[key] for key in self.own if key in RESETS}
        options = {**resets, **self.given, **setting.options}
        return self.name + (":" + ",".join(f"{key}={value}" for key, value in options.items()) if options else "")

    @property
    def grows(self) -> bool:
        """It has growth policies."""
        return "grow" in self.takes

    @property
    def children(self) -> str:
        """How its children are obtained when nobody varies it: "chosen" or "drawn"."""
        return self.given.get("children", "chosen")

    def kinds(self, temperature: float) -> tuple[str, ...]:
        """How children may be obtained: both ways where sampling leaves the choice, and the user did."""
        left_open = temperature > 0 and "children" in self.takes and "children" not in self.given
        return ("chosen", "drawn") if left_open else (self.children,)

    @property
    def is_traceable(self) -> bool:
        """Fixed shapes are told from traces: children are chosen, and nothing else shortens the trees."""
        return self.grows and self.children == "chosen" and "length" not in self.given

    def allows(self, options: Mapping[str, str]) -> bool:
        """Whether the user left these options open, or fixed them to the same."""
        return all(self.given.get(key, value) == value for key, value in options.items())


def subject_of(spec: str, model: PreTrainedModel) -> Subject:
    """What a specification lets vary.

    Raises:
        SpecdecError: two drafters, one without anything to vary, or one that does not fit the target.
    """
    if "+" in spec and spec.partition("+")[0].partition(":")[0] in TEXT_WORDS:
        raise SpecdecError(f"two drafters at once cannot be tuned, got {spec!r}; tune each one and join what comes out")
    drafter = load_drafter(spec, model)
    if drafter is None:
        raise SpecdecError("there is no drafter to tune; give a word or a path")
    drafter = getattr(drafter, "drafter", drafter)  # one under a length policy
    name, given = parse_spec(spec)
    path = Path(name).expanduser()
    own = read_drafter_json(path).options if (path / "drafter.json").is_file() else {}
    kind, takes = type(drafter).__name__, frozenset(inspect.signature(type(drafter)).parameters)
    if "grow" not in takes and kind not in TEXT_GRIDS:
        raise SpecdecError(
            f"{kind} has no growth policy, and none of {', '.join(TEXT_GRIDS)}; there is nothing to vary"
        )
    return Subject(name, given, own, kind, takes)


def text_settings(subject: Subject) -> list[Setting]:
    """All settings of a drafter without growth policies."""
    grid = TEXT_GRIDS[subject.kind]
    found = []
    for values in product(*grid.values()):
        options = {key: str(value) for key, value in zip(grid, values, strict=True)}
        if subject.allows(options):
            found.append(Setting(options))
    return found or [Setting()]


def deepest(subject: Subject, model: PreTrainedModel, depths: tuple[int, ...] = DEPTHS) -> int:
    """The most of these levels that the drafter takes.

    Raises:
        UnknownDrafter: none of them.
    """
    if "depth" in subject.given:
        return int(subject.given["depth"])
    for depth in sorted(depths, reverse=True):
        try:
            load_drafter(subject.spec(Setting({"depth": str(depth), "budget": str(depth), "grow": "fixed"})), model)
        except UnknownDrafter:
            if depth == min(depths):
                raise
        else:
            return depth
    raise AssertionError("depths is not empty")


def chain_settings(subject: Subject, most: int, depths: tuple[int, ...] = DEPTHS) -> Iterator[Setting]:
    """Chains of 1, 2, ... levels."""
    for depth in sorted({*(depth for depth in depths if depth <= most), most}):
        options = {"grow": "fixed", "depth": str(depth), "budget": str(depth)}
        if subject.allows(options):
            yield Setting(options, _shape("fixed", depth, depth, None), "fixed")


def tree_settings(
    subject: Subject, most: int, table: Path, depths: Sequence[int] = DEPTHS, budgets: Sequence[int] = BUDGETS
) -> Iterator[Setting]:
    """Fixed trees of every depth and budget, made from what was measured; of several with one shape the first."""
    seen: set[Shape] = set()
    for word, depth, budget in product(FIXED, [depth for depth in depths if depth <= most], budgets):
        options = {"grow": word, "depth": str(depth), "budget": str(budget), "table": str(table)}
        if budget > depth and subject.allows(options):
            shape = _shape(word, depth, budget, table)
            if shape not in seen:
                seen.add(shape)
                yield Setting(options, shape, word)


def following_settings(
    subject: Subject,
    most: int,
    depths: Sequence[int] = DEPTHS,
    budgets: Sequence[int] = BUDGETS,
    *,
    temperature: float = 0.0,
) -> Iterator[Setting]:
    """Trees that follow the text, of every depth and budget; when sampling, of chosen and of drawn children."""
    words = [(kind, word) for kind in subject.kinds(temperature) for word in FOLLOWING[kind]]
    for (kind, word), depth, budget in product(words, [depth for depth in depths if depth <= most], budgets):
        options = {"grow": word, "depth": str(depth), "budget": str(budget), **_how(kind, subject)}
        if budget > depth and subject.allows(options):
            yield Setting(options, None, word)


def drawn_chains(
    subject: Subject, most: int, depths: tuple[int, ...] = DEPTHS, *, temperature: float = 0.0
) -> Iterator[Setting]:
    """Chains of 1, 2, ... drawn tokens, where they may be drawn; no trace tells of these."""
    if "drawn" in subject.kinds(temperature):
        for setting in chain_settings(subject, most, depths):
            yield Setting({**setting.options, **_how("drawn", subject)}, None, "fixed")


def length_settings(subject: Subject, most: int, depths: Sequence[int]) -> Iterator[Setting]:
    """Chains under every length policy."""
    for word, depth in product(LENGTHS, [depth for depth in depths if depth <= most]):
        options = {"grow": "fixed", "depth": str(depth), "budget": str(depth), "length": word}
        if subject.allows(options):
            yield Setting(options, None, "fixed")


def loadable(settings: Iterable[Setting], subject: Subject, model: PreTrainedModel) -> list[Setting]:
    """Without those that the drafter refuses."""
    taken = []
    for setting in settings:
        with suppress(UnknownDrafter):
            load_drafter(subject.spec(setting), model)
            taken.append(setting)
    return taken


def _how(kind: str, subject: Subject) -> dict[str, str]:
    """The option that obtains children in this way, where they would not be obtained so anyway."""
    return {} if kind == subject.children else {"children": kind}


def _shape(word: str, depth: int, budget: int, table: Path | None) -> Shape:
    policy = growth_named(word, depth=depth, budget=budget, table=None if table is None else str(table))
    return cast(FixedGrowth, policy).shape
