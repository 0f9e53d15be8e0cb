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

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from specdec.errors import BadRecipe
from specdec.train.loop import LoopSettings
from specdec.train.objective import Objective

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class DataSettings:
    """How documents become rows, and what validation decodes.

    Attributes:
        row_length: S; longer documents are cut.
        packed: several documents share a row.
        validation_prompts: held-out prompts that are decoded.
        validation_tokens: new tokens for each.
        validation_temperature: 0 for greedy decoding.
    """

    row_length: int = 512
    packed: bool = True
    validation_prompts: int = 8
    validation_tokens: int = 64
    validation_temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.row_length < 4:
            raise BadRecipe(f"row_length is at least 4, got {self.row_length}")
        if self.validation_prompts < 0 or self.validation_tokens < 1 or self.validation_temperature < 0:
            raise BadRecipe("validation needs 0 or more prompts, 1 or more tokens, and no negative temperature")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learned, but the data.

    Attributes:
        kind: what is trained.
        loop, objective, data: settings.
        head: keyword arguments of the kind's Training class.
    """

    kind: str
    loop: LoopSettings
    objective: Objective = field(default_factory=Objective)
    data: DataSettings = field(default_factory=DataSettings)
    head: dict[str, Any] = field(default_factory=dict)

    def changed(self, values: Mapping[str, Any]) -> Recipe:
        """With the sections of a TOML file, or of the same shape, laid over.

        Raises:
            BadRecipe: names the unknown section or field, or the value of a wrong type.
        """
        unknown = set(values) - {"kind", "loop", "objective", "data", "head"}
        if unknown:
            raise BadRecipe(
                f"a recipe has the sections loop, objective, data and head, got {', '.join(sorted(unknown))}"
            )
        if values.get("kind", self.kind) != self.kind:
            raise BadRecipe(f"the recipe is for {values['kind']!r}, the command trains {self.kind!r}")
        for name in ("loop", "objective", "data", "head"):
            if not isinstance(values.get(name, {}), Mapping):
                raise BadRecipe(f"[{name}] of a recipe is a section, got {values[name]!r}")
        return replace(
            self,
            loop=laid_over(self.loop, values.get("loop", {}), "loop"),
            objective=laid_over(self.objective, values.get("objective", {}), "objective"),
            data=laid_over(self.data, values.get("data", {}), "data"),
            head={**self.head, **values.get("head", {})},
        )

    def resolved(self) -> dict[str, Any]:
        """Every setting, for the file that is written beside the checkpoints."""
        return asdict(self)


DEFAULTS: dict[str, Recipe] = {
    "medusa": Recipe("medusa", LoopSettings(2000, learning_rate=1e-3, warmup=40), Objective(decay=0.8)),
    "hydra": Recipe("hydra", LoopSettings(2000, learning_rate=5e-4, warmup=40), Objective(decay=0.9)),
    "hydra++": Recipe(
        "hydra++", LoopSettings(2000, learning_rate=5e-4, warmup=40), Objective(decay=0.9), head={"num_layers": 4}
    ),
    "clover": Recipe("clover", LoopSettings(2000, learning_rate=1e-3, warmup=40), Objective(decay=0.7)),
    "mlp-speculator": Recipe("mlp-speculator", LoopSettings(2000, learning_rate=1e-3, warmup=100), Objective("ce")),
    "eagle": Recipe("eagle", LoopSettings(2000, learning_rate=5e-4, warmup=40, clip=0.5)),
    "eagle3": Recipe("eagle3", LoopSettings(2000, learning_rate=5e-4, warmup=40, clip=0.5), Objective(decay=0.8)),
    "kangaroo": Recipe("kangaroo", LoopSettings(2000, learning_rate=1e-3, warmup=40)),
}
"""Learning rates and weights by depth are the published ones where there are any (docs/training.md says which)."""


def recipe_for(kind: str, file: Path | None = None, **sections: Mapping[str, Any]) -> Recipe:
    """A kind's defaults with a TOML file and then explicit values laid over.

    Raises:
        BadRecipe: an unknown kind, a file that is no TOML, or a setting that does not exist.
    """
    if kind not in DEFAULTS:
        raise BadRecipe(f"no kind {kind!r} to train; there are {', '.join(DEFAULTS)}")
    recipe = DEFAULTS[kind]
    if file is not None:
        try:
            recipe = recipe.changed(tomllib.loads(file.read_text()))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise BadRecipe(f"the recipe {file} cannot be read: {error}") from error
        except BadRecipe as error:
            raise BadRecipe(f"{file}: {error}") from error
    return recipe.changed(sections)


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
        changes[name] = float(value) if number else value
    return replace(settings, **changes)  # type: ignore[type-var]
