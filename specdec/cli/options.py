"""Options that several commands share, with the values they accept."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from specdec.drafters.load import WORDS

MACHINE, ON_OR_OFF = "Machine", "On or off"
"""Panels of the help. Options with an opposite have one, where both names do not narrow the texts of all others."""

DRAFTER_HELP = (
    f"What proposes: {', '.join(sorted(WORDS))}, with options as in [bold]lookup:ngram=3[/bold]; "
    "a model directory; or a drafter directory."
)


def within(least: float, most: float = math.inf) -> Callable[[float | None], float | None]:
    """A callback for options whose value has limits; its message says what was got, which typer's own does not."""
    limits = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"

    def check(value: float | None) -> float | None:
        if value is not None and not least <= value <= most:
            raise typer.BadParameter(f"got {value:g}, expected {limits}")
        return value

    return check


class Dtype(StrEnum):
    """Number formats of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


TargetName = Annotated[
    str, typer.Argument(help="The model: a directory, a hub id, or the word [bold]demo[/bold].", show_default=False)
]
DrafterOrNone = Annotated[
    str, typer.Option("--drafter", "-d", help=DRAFTER_HELP + " [bold]none[/bold] decodes without speculation.")
]
Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.", show_default=False)]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompt-file",
        help="Read the prompt from this file.",
        exists=True,
        dir_okay=False,
        readable=True,
        show_default=False,
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", callback=within(1), help="Tokens to generate at most.")
]
Temperature = Annotated[float, typer.Option(callback=within(0), help="0 takes the most probable token; above 0 draws.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", callback=within(1), help="CPU threads; as many as torch chooses.", rich_help_panel=MACHINE,
        show_default=False,
    ),
]  # fmt: skip
Device = Annotated[
    str,
    typer.Option(
        "--device", help="cpu, cuda, cuda:1, ...; auto takes a GPU when there is one.", rich_help_panel=MACHINE
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype", metavar="FORMAT", help=f"Of weights: {', '.join(Dtype)}; auto is the checkpoint's own.",
        rich_help_panel=MACHINE,
    ),
]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
