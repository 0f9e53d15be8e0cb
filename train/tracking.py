"""Trackers: tensorboard, wandb and trackio through accelerate, each an optional package."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator

from specdec.errors import BadRecipe

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""What each tracker needs: one of these packages."""

PROJECT = "specdec"


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that are not known or not installed; accelerate would leave them out without a word.

    Raises:
        BadRecipe: says what to install.
    """
    for name in names:
        if name not in PACKAGES:
            raise BadRecipe(f"no tracker {name!r}; there are {', '.join(PACKAGES)}")
        if not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
            raise BadRecipe(
                f"reporting to {name} needs the package {PACKAGES[name][0]}: pip install {PACKAGES[name][0]}"
            )


def begin_tracking(accelerator: Accelerator, settings: dict[str, Any]) -> None:
    """Open the accelerator's trackers, if it has any, with the run's settings."""
    if accelerator.log_with:
        accelerator.init_trackers(PROJECT, config=flat(settings))


def track(accelerator: Accelerator, event: dict[str, Any]) -> None:
    """Hand a step's or a validation's numbers to the trackers."""
    if accelerator.log_with:
        numbers = {name: value for name, value in flat(event).items() if isinstance(value, int | float)}
        step = int(numbers.pop("step"))
        accelerator.log({f"{event['event']}/{name}": value for name, value in numbers.items()}, step=step)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists under one level of names such as "loop.steps" and "alpha.1"; lists count from 1."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        inner = dict(enumerate(value, start=1)) if isinstance(value, list | tuple) else value
        if isinstance(inner, dict):
            result |= flat({str(key): item for key, item in inner.items()}, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = inner if isinstance(inner, int | float | str) else str(inner)
    return result
