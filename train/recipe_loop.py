"""The loop that a recipe describes, with every setting in OUT/recipe.json beside its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from specdec.train.checkpoint import write_whole
from specdec.train.loop import Features, Loop, Source
from specdec.train.recipe import Recipe
from specdec.train.report import Score, StepReport
from specdec.train.trainable import Trainable


def run_loop(
    recipe: Recipe,
    training: Trainable,
    source: Source,
    features: Features,
    out: Path,
    *,
    identity: dict[str, Any],
    rates: Mapping[str, float] | None = None,
    evaluate: Callable[[Trainable], Score] | None,
    report: Callable[[StepReport | Score], None],
    restored: Callable[[Loop], None],
    resume: bool,
    accelerator: Accelerator | None,
) -> Loop:
    """Take up the newest checkpoint, write the recipe down, and train to the end or until a signal comes.

    Args:
        recipe: fitted, as it is written down.
        training: what learns.
        source, features, identity, rates, evaluate, report, accelerator: see Loop.
        out: directory of the run.
        restored: called once the newest checkpoint is taken up, before the first step.
        resume: False wants a folder without checkpoints.

    Raises:
        SpecdecError: checkpoints of another run, or settings that do not fit; says which.
        OSError: something cannot be written.
    """
    loop = Loop(
        training, source, features, recipe.objective, recipe.loop, out, identity=identity, rates=rates,
        evaluate=evaluate, report=report, accelerator=accelerator,
    )  # fmt: skip
    loop.restore(resume=resume)
    if loop.accelerator.is_main_process:
        write_whole(out / "recipe.json", json.dumps(recipe.resolved(), indent=2) + "\n")
    restored(loop)
    loop.run()
    return loop
