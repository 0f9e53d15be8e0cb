"""Trackers: tensorboard, wandb and trackio through accelerate, each an optional package.

A run bears the name of its directory. What trackers print goes to stderr: trackio greets on stdout, which is for
results.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from specdec.errors import BadRecipe, SpecdecError

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


def begin_tracking(accelerator: Accelerator, settings: dict[str, Any], folder: Path) -> None:
    """Open the accelerator's trackers, if it has any, with the run's settings.

    Args:
        accelerator: of the main process.
        settings: nested; `flat` names them.
        folder: of the run; tensorboard's and wandb's files go there.

    Raises:
        SpecdecError: a tracker objects; says which and why.
    """
    if accelerator.log_with:
        name = folder.resolve().name
        options = {"wandb": {"name": name, "dir": str(folder)}, "trackio": {"name": name}}
        with _reporting(accelerator):
            accelerator.init_trackers(PROJECT, config=flat(settings), init_kwargs=options)


def track(accelerator: Accelerator, event: dict[str, Any]) -> None:
    """Hand a step's or a validation's numbers to the trackers.

    Raises:
        SpecdecError: a tracker objects.
    """
    if accelerator.log_with:
        numbers = {name: value for name, value in flat(event).items() if isinstance(value, int | float)}
        step = int(numbers.pop("step"))
        with _reporting(accelerator):
            accelerator.log({f"{event['event']}/{name}": value for name, value in numbers.items()}, step=step)


def end_tracking(accelerator: Accelerator) -> None:
    """Close the trackers; `end_training` of accelerate would end the process group as well, on this process alone."""
    with _reporting(accelerator):
        for tracker in accelerator.trackers:
            if tracker.name == "trackio":  # it would end the run again, and say so on stdout, as Python exits
                importlib.import_module("trackio").finish()
            else:
                tracker.finish()


@contextmanager
def _reporting(accelerator: Accelerator) -> Iterator[None]:
    try:
        with redirect_stdout(sys.stderr):
            yield
    except Exception as error:  # of three packages and their networks
        names = ", ".join(str(getattr(tracker, "name", tracker)) for tracker in accelerator.log_with)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SpecdecError(
            f"reporting to {names} failed: {reason}. Checkpoints are whole: the same command goes on, also without "
            "--report-to"
        ) from error


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
