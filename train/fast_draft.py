"""A draft model from scratch in stages: FastDraft (arXiv 2411.11055).

Pre-training on text, continued pre-training on a mixture nearer to the use (text and code), and alignment on the
target's own answers. The architecture is chosen by measured latency, the vocabulary is the target's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from specdec.errors import BadCheckpoint, BadRecipe
from specdec.train.architecture import Architecture, Costs, candidates, choose, fresh_draft, measured_costs
from specdec.train.batch import Documents
from specdec.train.checkpoint import write_whole
from specdec.train.distill import Report, Scratch, train_draft_model
from specdec.train.loop import Loop
from specdec.train.recipe import Recipe

Restored = Callable[[Loop], None]


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: of its directory.
        documents: prepared texts.
        recipe: settings; learns = "tokens" in its `head` section for pre-training.
        data_identity: says which data this is; a resumed run must agree.
    """

    name: str
    documents: Documents
    recipe: Recipe
    data_identity: dict[str, Any] = field(default_factory=dict)


def fast_draft(
    model: PreTrainedModel,
    stages: Sequence[Stage],
    out: Path,
    *,
    share: float = Scratch().share,
    architecture: Architecture | None = None,
    grid: Sequence[Architecture] | None = None,
    costs: Costs | None = None,
    recompute: bool = False,
    prompts: list[list[int]] | None = None,
    report: Callable[[str], Report] = lambda _stage: lambda _report: None,
    report_reference: Callable[[str], Report] = lambda _stage: lambda _report: None,
    restored: Callable[[str], Restored] = lambda _stage: lambda _loop: None,
    restored_reference: Callable[[str], Restored] = lambda _stage: lambda _loop: None,
    resume: bool = True,
    accelerator: Accelerator | None = None,
) -> Loop:
    """Train a fresh draft model through all stages; `out/NAME/drafter` of the last one is the one to use.

    Each stage begins with the weights of the one before: of its best checkpoint where it validated, else its last. The
    first one begins with fresh weights, so its default learning rate follows the draft's width.

    Args:
        model: the target; frozen.
        stages: in order, each with a directory of its own in `out`.
        out: directory of the run; `architecture.json` in it holds the choice and what it rests on.
        share: budget of a draft step as a share of a target step.
        architecture: in place of a choice.
        grid: to choose from; None for `candidates`.
        costs: in place of measuring here.
        recompute: layers are run again in the backward pass instead of being remembered.
        prompts: held-out prompts to decode for validation.
        report: given a stage's name, hears of its steps and validations.
        report_reference: the same of the token filter's reference, where that is distilled before the stage.
        restored: given a stage's name, called before its first step, see `train_draft_model`.
        restored_reference: the same of the reference.
        resume: go on where an interrupted run stopped.
        accelerator: of the process, when there are several.

    Returns:
        the last stage's loop, or that of the stage, or of its reference, in which a signal stopped the run.

    Raises:
        SpecdecError: stages, data or checkpoints that do not fit; says which.
    """
    _check_stages(stages)
    made = architecture_of(model, out, share, architecture, costs, accelerator, grid=grid)
    draft = fresh_draft(model, made, stages[0].recipe.loop.seed)
    loop: Loop | None = None
    for stage in stages:
        recipe = stage.recipe
        if loop is None:
            recipe = recipe.for_width(made.hidden_size)
        else:
            draft.load_state_dict(loop.checkpoints.weights(), strict=False)  # tied names are stored once
        loop = train_draft_model(
            replace(recipe, head={**recipe.head, "draft": ""}), model, stage.documents, out / stage.name,
            draft=draft, prompts=prompts, data_identity=stage.data_identity or None, report=report(stage.name),
            report_reference=report_reference(stage.name), restored=restored(stage.name),
            restored_reference=restored_reference(stage.name), recompute=recompute, resume=resume,
            accelerator=accelerator,
        )  # fmt: skip
        if loop.step < loop.settings.steps or loop.stopped:
            break
    assert loop is not None
    return loop


def architecture_of(
    model: PreTrainedModel,
    out: Path,
    share: float,
    architecture: Architecture | None = None,
    costs: Costs | None = None,
    accelerator: Accelerator | None = None,
    *,
    grid: Sequence[Architecture] | None = None,
) -> Architecture:
    """The architecture of a run: as it was chosen once, else chosen now and written down.

    Raises:
        BadCheckpoint: `architecture.json` is damaged, or was chosen for another budget.
    """
    file = out / "architecture.json"
    if (accelerator is None or accelerator.is_main_process) and not file.exists():
        config = model.config.get_text_config(decoder=True)
        measured = costs
        if architecture is None:
            measured = costs or measured_costs(model, grid or candidates(config))
            architecture = choose(measured, config, share)
        _write_choice(file, architecture, share, measured)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    try:
        kept = json.loads(file.read_text())
        made, budget = Architecture(**kept["architecture"]), kept["share"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{file} cannot be read: {error}; remove it to choose anew") from error
    if budget != share or architecture not in (None, made) or (grid is not None and made not in grid):
        raise BadCheckpoint(
            f"{file} holds {made.name}, chosen for a budget of {budget:g}; this run asks for "
            f"{share:g}{'' if architecture is None else f' and {architecture.name}'}"
            f"{'' if grid is None or made in grid else ' and other sizes'}. Use another --out"
        )
    return made


def _write_choice(file: Path, architecture: Architecture, share: float, costs: Costs | None) -> None:
    table = [] if costs is None else [
        {**asdict(made), "seconds": seconds} for made, seconds in costs.candidates.items()
    ]  # fmt: skip
    content = {
        "architecture": asdict(architecture),
        "share": share,
        "target_seconds": None if costs is None else costs.target,
        "measured": table,
    }
    write_whole(file, json.dumps(content, indent=2) + "\n")


def _check_stages(stages: Sequence[Stage]) -> None:
    names = [stage.name for stage in stages]
    if not names or len(set(names)) != len(names) or any(not name or Path(name).name != name for name in names):
        raise BadRecipe(f"stages have names of their own that can be directories, got {names}")
