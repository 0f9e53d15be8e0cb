"""Settings of a training run: sensible ones for each kind, so that no flag is needed, and TOML files over them.

kind = "eagle3"
[loop]            # train.loop.LoopSettings
steps = 2000
[objective]       # train.objective.Objective
divergence = "forward-kl"
[head]            # options of the kind's Training class
steps = 7
[data]            # DataSettings
row_length = 512
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from specdec.errors import BadRecipe
from specdec.train.loop_settings import LoopSettings
from specdec.train.objective import Objective

Settings = TypeVar("Settings")


class _Recipe(Protocol):
    def changed(self, values: Mapping[str, Any]) -> Self: ...


Changeable = TypeVar("Changeable", bound=_Recipe)


@dataclass(frozen=True)
class DataSettings:
    """How documents become rows, and what validation decodes.

    Attributes:
        row_length: S; longer documents are cut.
        packed: several documents share a row.
        validation_prompts: held-out prompts that are decoded.
        validation_tokens: new tokens for each.
        validation_temperature: 0 for greedy decoding.
        written_from: share of the run after which the target writes the documents anew behind their beginnings (the MLP
            speculator's second stage); 1 for never.
        written_temperature: at which it writes.
        written_speculative: the head in training drafts for it. Worth it for a large target and few rows at once; a
            batch that keeps the hardware busy is faster without. The law stays, the sampled text does not.
    """

    row_length: int = 512
    packed: bool = True
    validation_prompts: int = 8
    validation_tokens: int = 64
    validation_temperature: float = 0.0
    written_from: float = 1.0
    written_temperature: float = 1.0
    written_speculative: bool = False

    def __post_init__(self) -> None:
        if self.row_length < 4:
            raise BadRecipe(f"row_length is at least 4, got {self.row_length}")
        if self.validation_prompts < 0 or self.validation_tokens < 1 or self.validation_temperature < 0:
            raise BadRecipe("validation needs 0 or more prompts, 1 or more tokens, and no negative temperature")
        if not 0 <= self.written_from <= 1 or self.written_temperature < 0:
            raise BadRecipe(
                f"written_from is a share of the run, from 0 to 1, and written_temperature not negative, got "
                f"{self.written_from:g} and {self.written_temperature:g}"
            )


SECTIONS = ("loop", "objective", "data", "head")
DRAFT_MODEL, MEDUSA_2 = "draft-model", "medusa2"

PUBLISHED_WIDTH = 4096
"""Hidden size of the targets that learning rates were published for."""

MOST_FASTER = 4.0
"""Narrow targets get at most so many times the published rate, that of a width of 256: none narrower was measured."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learned, but the data.

    Attributes:
        kind: what is trained.
        loop, objective, data: settings.
        head: keyword arguments of the kind's Training class.
        given: "section.name" of every setting that is decided, since somebody chose it or it has been fitted to the
            target; the others may be fitted to the run.
    """

    kind: str
    loop: LoopSettings
    objective: Objective = field(default_factory=Objective)
    data: DataSettings = field(default_factory=DataSettings)
    head: dict[str, Any] = field(default_factory=dict)
    given: frozenset[str] = field(default=frozenset(), compare=False)

    def changed(self, values: Mapping[str, Any]) -> Recipe:
        """With the sections of a TOML file, or of the same shape, laid over.

        Raises:
            BadRecipe: names the unknown section or field, or the value of a wrong type.
        """
        check_sections("a recipe", values, self.kind, SECTIONS)
        return replace(
            self,
            loop=laid_over(self.loop, values.get("loop", {}), "loop"),
            objective=laid_over(self.objective, values.get("objective", {}), "objective"),
            data=laid_over(self.data, values.get("data", {}), "data"),
            head=merged(self.head, values.get("head", {})),
            given=self.given | {f"{section}.{name}" for section in SECTIONS for name in values.get(section, {})},
        )

    def fitted(self, processes: int = 1, max_positions: int | None = None, width: int | None = None) -> Recipe:
        """With defaults that suit the run; what somebody chose stays, and is refused where it cannot work.

        A short run warms up for a tenth of its steps at most. Rows at once divide among the processes. Rows are no
        longer than the target's positions. Heads of a narrow target learn faster; a draft model that has been trained
        already does not, see `for_width`. Fitting twice is the same as fitting once.

        Args:
            processes: that share a step's rows.
            max_positions: of the target; None for no limit.
            width: the target's hidden size; None leaves the learning rate as it is.

        Raises:
            BadRecipe: chosen settings that do not fit.
        """
        loop, data = self.loop, self.data
        if "loop.warmup" not in self.given:
            loop = replace(loop, warmup=min(loop.warmup, loop.steps // 10))
        if "loop.rows_at_once" not in self.given:
            loop = replace(loop, rows_at_once=_rows_at_once(loop, processes))
        if max_positions is not None and data.row_length > max_positions:
            if "data.row_length" in self.given:
                raise BadRecipe(
                    f"rows of {data.row_length} tokens are longer than the target's {max_positions} positions"
                )
            data = replace(data, row_length=max_positions)
        loop.check(processes)
        made = replace(self, loop=loop, data=data)
        return made if width is None or self.kind == DRAFT_MODEL else made.for_width(width)

    def for_width(self, width: int) -> Recipe:
        """With a default learning rate that suits fresh weights on states of so many numbers; a chosen one stays.

        A step of Adam changes a weight by about the learning rate, whatever the width, and fresh weights are of the
        size 1 / sqrt(width): so that a step turns a narrow matrix as far as the wide one that the rate was published
        for, the rate grows by sqrt(PUBLISHED_WIDTH / width). Wider targets keep it. Of Medusa-2 that holds for the
        first stage's heads; adapters fine-tune a target that has learned already, and keep theirs.
        """
        faster = min(max(PUBLISHED_WIDTH / width, 1.0) ** 0.5, MOST_FASTER)
        if self.kind == MEDUSA_2:
            rate = DEFAULTS["medusa"].loop.learning_rate * faster
            return replace(self, head={"frozen_rate": rate, **self.head})
        if "loop.learning_rate" in self.given:
            return self
        loop = replace(self.loop, learning_rate=self.loop.learning_rate * faster)
        return replace(self, loop=loop, given=self.given | {"loop.learning_rate"})

    def as_given(self, given: frozenset[str]) -> Recipe:
        """With another notion of what somebody chose."""
        return replace(self, given=given)

    def resolved(self) -> dict[str, Any]:
        """Every setting, for the file that is written beside the checkpoints; `of_resolved` reads it."""
        return {"kind": self.kind, **{name: _plain(getattr(self, name)) for name in SECTIONS}}

    @staticmethod
    def of_resolved(values: Mapping[str, Any]) -> Recipe:
        """The recipe that `resolved` describes."""
        return recipe_for(values["kind"]).changed(values)


def _loop(learning_rate: float, **values: Any) -> LoopSettings:
    """What the defaults of all kinds have in common: a run that is killed loses little, and shows how it gets on."""
    common: dict[str, Any] = {"warmup": 40, "save_every": 100, "evaluate_every": 400}
    return LoopSettings(2000, learning_rate=learning_rate, **{**common, **values})


DEFAULTS: dict[str, Recipe] = {
    "medusa": Recipe("medusa", _loop(1e-3), Objective(decay=0.8)),
    "hydra": Recipe("hydra", _loop(5e-4), Objective(decay=0.9)),
    "hydra++": Recipe("hydra++", _loop(5e-4), Objective(decay=0.9), head={"num_layers": 4}),
    "clover": Recipe("clover", _loop(1e-3), Objective(decay=0.7)),
    "mlp-speculator": Recipe("mlp-speculator", _loop(1e-3, warmup=100), Objective("ce")),
    "dflash": Recipe("dflash", _loop(6e-4)),
    "eagle": Recipe("eagle", _loop(5e-4, clip=0.5)),
    "eagle3": Recipe("eagle3", _loop(5e-4, clip=0.5), Objective(decay=0.8)),
    "kangaroo": Recipe("kangaroo", _loop(1e-3)),
    DRAFT_MODEL: Recipe(DRAFT_MODEL, _loop(3e-4)),
    MEDUSA_2: Recipe(MEDUSA_2, replace(_loop(5e-4), steps=1000), Objective(decay=0.8)),
}
"""Learning rates and weights by depth are the published ones where there are any (docs/training.md says which)."""


def recipe_for(kind: str, file: Path | None = None, **sections: Mapping[str, Any]) -> Recipe:
    """A kind's defaults with a TOML file and then explicit values laid over.

    Raises:
        BadRecipe: an unknown kind, a file that is no TOML, or a setting that does not exist.
    """
    check_kind(kind)
    return layered(DEFAULTS[kind], file, sections)


def check_kind(kind: str) -> None:
    """Refuse a kind that cannot be trained.

    Raises:
        BadRecipe: names those that can.
    """
    if kind not in DEFAULTS:
        raise BadRecipe(f"no kind {kind!r} to train; there are {', '.join(DEFAULTS)}")


def layered(recipe: Changeable, file: Path | None, sections: Mapping[str, Mapping[str, Any]]) -> Changeable:
    """A recipe with a TOML file and then explicit values laid over.

    Raises:
        BadRecipe: a file that is no TOML, or a setting that does not exist.
    """
    return (recipe if file is None else read_recipe(recipe, file)).changed(sections)


def read_recipe(recipe: Changeable, file: Path) -> Changeable:
    """A recipe with a TOML file laid over.

    Raises:
        BadRecipe: a file that is no TOML, or a setting that does not exist; names the file.
    """
    try:
        return recipe.changed(tomllib.loads(file.read_text()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadRecipe(f"the recipe {file} cannot be read: {error}") from error
    except BadRecipe as error:
        raise BadRecipe(f"{file}: {error}") from error


def check_sections(what: str, values: Mapping[str, Any], kind: str, sections: Sequence[str]) -> None:
    """Hold what shall be laid over a recipe of this kind to the form of one.

    Raises:
        BadRecipe: names the unknown section, the other kind, or what is no section.
    """
    if unknown := sorted(set(values) - {"kind", *sections}):
        raise BadRecipe(f"{what} has the sections {', '.join(sections)}, got {', '.join(unknown)}")
    if values.get("kind", kind) != kind:
        raise BadRecipe(f"the recipe is for {values['kind']!r}, got the kind {kind!r}")
    for name in sections:
        if not isinstance(values.get(name, {}), Mapping):
            raise BadRecipe(f"[{name}] of a recipe is a section, got {values[name]!r}")


def laid_over(settings: Settings, values: Mapping[str, Any], section: str) -> Settings:
    """A settings object with some fields replaced.

    Raises:
        BadRecipe: a field that does not exist, or a value of another type than the one it replaces.
    """
    known = {f.name for f in fields(settings)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise BadRecipe(f"[{section}] has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    changes: dict[str, Any] = {}
    for name, value in values.items():
        present = getattr(settings, name)
        number = type(present) is float and type(value) is int
        if type(value) is not type(present) and not number:
            raise BadRecipe(f"[{section}] {name} is of type {type(present).__name__}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRecipe(f"[{section}] {name} is a number, got {value!r}")
        changes[name] = float(value) if number else value
    return replace(settings, **changes)  # type: ignore[type-var]


def parsed_settings(assignments: Iterable[str], known: Sequence[str] = SECTIONS) -> dict[str, dict[str, Any]]:
    """`section.name=value` as sections; a value is written as in TOML, and what is no TOML is text.

    Args:
        assignments: of the command line.
        known: sections that there are.

    Raises:
        BadRecipe: not of this form, an unknown section, or a setting that is given twice.
    """
    sections: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        section, *names = (part.strip().replace("-", "_") for part in key.split("."))
        if not equals or not text.strip() or not names or not all(names):
            raise BadRecipe(f"got {assignment!r}, expected section.name=value such as loop.steps=500")
        if section not in known:
            raise BadRecipe(f"no section {section!r} in {assignment!r}; there are {', '.join(known)}")
        place = sections.setdefault(section, {})
        for name in names[:-1]:
            place = place.setdefault(name, {})
        if not isinstance(place, dict) or names[-1] in place:
            raise BadRecipe(f"{key.strip()} is given twice")
        place[names[-1]] = _value(text.strip())
    return sections


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries laid over each other."""
    result = dict(values)
    for name, value in over.items():
        before = result.get(name)
        result[name] = merged(before, value) if isinstance(before, dict) and isinstance(value, Mapping) else value
    return result


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _rows_at_once(loop: LoopSettings, processes: int) -> int:
    """The largest number up to the default that divides one process's share of a step."""
    share, rest = divmod(loop.rows_per_step, processes)
    if rest or share < 1:
        return loop.rows_at_once  # no number of rows at once would do; `check` says so
    return max(rows for rows in range(1, min(loop.rows_at_once, share) + 1) if share % rows == 0)


def _plain(settings: Any) -> dict[str, Any]:
    return dict(settings) if isinstance(settings, dict) else asdict(settings)
