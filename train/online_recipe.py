"""Settings of `specdec train --online`: defaults, and TOML files over them.

kind = "draft-model"
[online]          # online.OnlineSettings; max_age = 0 and top_k = 0 mean never and all
learn_every = 512
[online.learning] # learner.LearningRate
rate = 1e-4
[stream]          # StreamSettings
max_new_tokens = 128
[head]            # options of the kind's Training class, for heads
steps = 4
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from specdec.errors import BadRecipe
from specdec.train.online import OnlineSettings
from specdec.train.recipe import check_kind, check_sections, laid_over, layered, merged
from specdec.train.replay import ReplayBuffer

SECTIONS = ("online", "stream", "head")
NONE_AT_ZERO: dict[str, type] = {"max_age": float, "top_k": int}
"""Settings that may be None, for which TOML has no word, and what they are else."""

REPLAYED = OnlineSettings(max_age=None)
"""A replay does not look at the clock, so that it comes out the same whenever it runs and wherever it is broken."""


@dataclass(frozen=True)
class StreamSettings:
    """How the requests of a stream are decoded.

    Attributes:
        max_new_tokens: for each request.
        temperature: 0 for greedy decoding.
        stop_at_end: let texts end with the model's own end of text.
        save_every: requests between checkpoints.

    Raises:
        BadRecipe: a number out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    stop_at_end: bool = True
    save_every: int = 20

    def __post_init__(self) -> None:
        if self.max_new_tokens < 2 or self.temperature < 0 or self.save_every < 1:
            raise BadRecipe(
                "a stream has 2 new tokens or more, no negative temperature, and 1 request or more between checkpoints"
                f", got {self.max_new_tokens}, {self.temperature:g} and {self.save_every}"
            )


@dataclass(frozen=True)
class OnlineRecipe:
    """Everything that decides what is learned, but the prompts and the drafter to begin with."""

    kind: str
    online: OnlineSettings = REPLAYED
    stream: StreamSettings = field(default_factory=StreamSettings)
    head: dict[str, Any] = field(default_factory=dict)

    def changed(self, values: Mapping[str, Any]) -> OnlineRecipe:
        """With the sections of a TOML file, or of the same shape, laid over.

        Raises:
            BadRecipe: names the unknown section or field, or the value of a wrong type.
        """
        check_sections("a recipe with --online", values, self.kind, SECTIONS)
        return replace(
            self,
            online=_online(self.online, dict(values.get("online", {}))),
            stream=laid_over(self.stream, values.get("stream", {}), "stream"),
            head=merged(self.head, values.get("head", {})),
        )

    def resolved(self) -> dict[str, Any]:
        """Every setting, for the file that is written beside the checkpoints."""
        return asdict(self)


def online_recipe_for(kind: str, file: Path | None = None, **sections: Mapping[str, Any]) -> OnlineRecipe:
    """The defaults with a TOML file and then explicit values laid over.

    Raises:
        BadRecipe: an unknown kind, a file that is no TOML, or a setting that does not exist or is out of range.
    """
    check_kind(kind)
    recipe = layered(OnlineRecipe(kind), file, sections)
    settings = recipe.online
    _ = settings.objective, ReplayBuffer(settings.buffer_tokens, settings.keep)  # wrong words are found now
    if not settings.learning.rate > 0:
        raise BadRecipe(f"the learning rate is positive, got {settings.learning.rate:g}")
    return recipe


def _online(settings: OnlineSettings, values: dict[str, Any]) -> OnlineSettings:
    learning = values.pop("learning", {})
    if not isinstance(learning, Mapping):
        raise BadRecipe(f"[online.learning] of a recipe is a section, got {learning!r}")
    changes: dict[str, Any] = {"learning": laid_over(settings.learning, learning, "online.learning")}
    for name, kind in NONE_AT_ZERO.items():
        if name not in values:
            continue
        value = values.pop(name)
        if type(value) not in (int, kind) or not 0 <= value < math.inf:
            raise BadRecipe(f"[online] {name} is of type {kind.__name__} and not negative, got {value!r}")
        changes[name] = kind(value) or None
    return replace(laid_over(settings, values, "online"), **changes)
