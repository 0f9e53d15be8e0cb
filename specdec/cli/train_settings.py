"""Settings of a recipe that options of `specdec train` stand for, and which options go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdec.errors import BadRecipe
from specdec.train.on_policy import TEXTS
from specdec.train.recipe import DRAFT_MODEL, MEDUSA_2, merged, parsed_settings

Given = dict[str, Any]
"""Values of options by the names of their parameters."""

FLAGS = {
    "steps": "loop.steps",
    "lr": "loop.learning_rate",
    "batch_rows": "loop.rows_per_step",
    "rows_at_once": "loop.rows_at_once",
    "row_length": "data.row_length",
    "seed": "loop.seed",
    "bf16": "loop.bf16",
    "fsdp": "loop.fsdp",
    "save_every": "loop.save_every",
    "evaluate_every": "loop.evaluate_every",
    "temperature": "data.validation_temperature",
    "divergence": "objective.divergence",
}
"""Settings of a recipe that have an option of their own."""

DRAFT_FLAGS = {
    "keep_share": "head.keep_share",
    "text": "head.text",
    "cut_from": "head.draft",
    "from_scratch": "head.draft",
    "share": "head.scratch.share",
    "pretrain": "",
    "continue_on": "",
}
"""Those of draft models alone; `layers` and `width` are sizes of `head.cut` or `head.scratch`."""

ONLINE_FLAGS = {
    "steps": "online.steps",
    "lr": "online.learning.rate",
    "batch_rows": "online.rows",
    "rows_at_once": "online.rows_at_once",
    "row_length": "online.row_length",
    "seed": "online.seed",
    "divergence": "online.divergence",
    "learn_every": "online.learn_every",
    "max_age": "online.max_age",
    "background": "online.background",
    "replay_share": "online.replay_share",
    "top_k": "online.top_k",
    "save_every": "stream.save_every",
    "temperature": "stream.temperature",
    "max_new_tokens": "stream.max_new_tokens",
}
"""Settings of a recipe of `--online` that have an option of their own."""

SIZES = {"layers": "num_layers", "width": "hidden_size"}
OF_ONLINE = ("static", "chat", "max_new_tokens", "learn_every", "max_age", "background", "replay_share", "top_k")
NOT_ONLINE = (
    "bf16",
    "fsdp",
    "evaluate_every",
    "prompts",
    "features",
    "gradient_checkpointing",
    "report_to",
    *DRAFT_FLAGS,
    *SIZES,
)


OFF = ("online", "static", "background", "from_scratch", "gradient_checkpointing")
"""Options that are off where nobody says otherwise."""


def given_among(parameters: Mapping[str, Any]) -> Given:
    """The parameters of the command that say something; `--from` also by its own name.

    Args:
        parameters: every parameter with its value.
    """
    said = {name: value for name, value in parameters.items() if value not in (None, [])}
    given = {name: value for name, value in said.items() if value or name not in OFF}
    return given | ({"from": given["begin_from"]} if given.get("begin_from") else {})


def option_name(parameter: str) -> str:
    """A parameter as somebody writes it."""
    return "--" + parameter.replace("_", "-")


def check_use(kind: str, given: Mapping[str, Any], *, online: bool) -> None:
    """Refuse options that would do nothing.

    Args:
        kind: what is trained.
        given: parameters of the command that have another value than their default.
        online: whether a stream is replayed.

    Raises:
        BadRecipe: names the option.
    """
    if online and kind == MEDUSA_2:
        raise BadRecipe("medusa2 changes its target, and --online does not; its heads learn on as the kind medusa")
    if online and (idle := [name for name in NOT_ONLINE if name in given]):
        raise BadRecipe(f"{option_name(idle[0])} does nothing with --online; leave it out")
    if not online and (idle := [name for name in OF_ONLINE if name in given]):
        raise BadRecipe(f"{option_name(idle[0])} belongs to --online; say that, or leave it out")
    if kind != DRAFT_MODEL and (idle := [name for name in (*DRAFT_FLAGS, *SIZES) if name in given]):
        raise BadRecipe(f"{option_name(idle[0])} belongs to the kind {DRAFT_MODEL}, got {kind}; leave it out")
    if kind == DRAFT_MODEL and "features" in given:
        raise BadRecipe("a draft model reads no hidden states of the target; leave --features out")
    scratch = [name for name in ("share", "pretrain", "continue_on") if name in given]
    if scratch and "from_scratch" not in given:
        raise BadRecipe(f"{option_name(scratch[0])} belongs to --from-scratch; say that, or leave it out")
    begins = [name for name in ("from", "cut_from", "from_scratch") if name in given]
    if len(begins) > 1:
        raise BadRecipe(f"{' and '.join(map(option_name, begins))} are two ways to begin; choose one")
    sizes = [name for name in SIZES if name in given]
    if sizes and not {"cut_from", "from_scratch"} & given.keys():
        raise BadRecipe(f"{option_name(sizes[0])} belongs to --cut-from or --from-scratch; say one of them")


def sections_of(
    assignments: list[str], given: Mapping[str, Any], flags: Mapping[str, str], known: tuple[str, ...]
) -> Any:
    """Sections of a recipe from `--set` and from options.

    Raises:
        BadRecipe: a setting that is given twice, or not of the form that is expected.
    """
    sections: dict[str, Any] = parsed_settings(assignments, known)
    for name, value in given.items():
        if not flags.get(name):
            continue
        *path, field = flags[name].split(".")
        place: Any = sections
        for part in path:
            place = place.get(part, {}) if isinstance(place, dict) else {}
        if isinstance(place, dict) and field in place:
            raise BadRecipe(f"{flags[name]} is given twice, by --set and by {option_name(name)}")
        nested: Any = {field: value}
        for part in reversed(path):
            nested = {part: nested}
        sections = merged(sections, nested)
    return sections


def draft_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of draft models as the settings that they stand for.

    Raises:
        BadRecipe: a word that is none.
    """
    values = dict(given)
    if "text" in values:
        if values["text"] not in TEXTS:
            raise BadRecipe(f"no text {values['text']!r} to learn from; there are {', '.join(TEXTS)}")
        values["text"] = TEXTS[values["text"]]
    if "from_scratch" in values:
        values["from_scratch"] = "scratch"
    return values
