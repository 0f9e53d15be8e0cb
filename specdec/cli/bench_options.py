"""Options of `specdec bench` that are its own."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.options import DRAFTER_HELP, ON_OR_OFF, within


class HistoryOf(StrEnum):
    """Whose answers the prompt of a later turn holds."""

    own = "own"
    reference = "reference"


Drafters = Annotated[
    list[str] | None,
    typer.Option("--drafter", "-d", help=DRAFTER_HELP + " May be given several times.", show_default=False),
]
Questions = Annotated[
    str | None,
    typer.Option(
        "--questions", "-q", help="A question set by name (six, demo-code, spec-bench, mt-bench, humaneval, gsm8k) or "
        "a file; by default demo-code for the target demo, six for others.", show_default=False,
    ),
]  # fmt: skip
Limit = Annotated[int | None, typer.Option(callback=within(1), help="At most so many questions of each column.")]
Categories = Annotated[
    list[str] | None, typer.Option("--category", help="Only this category or column. May be given several times.")
]
Repeats = Annotated[int, typer.Option(callback=within(1), help="Passes over all questions.")]
OutFolder = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Directory of the run; one with an unfinished run of the same settings is gone on with. "
        "By default a new one in specdec-bench/.", show_default=False,
    ),
]  # fmt: skip
BatchSize = Annotated[int, typer.Option(callback=within(1), help="Questions generated together.")]
Seed = Annotated[int, typer.Option(help="Of the order of methods and of the draws.")]
FixedLength = Annotated[
    bool, typer.Option("--fixed-length", help="Go on past the end of text: every answer has --max-new-tokens.")
]
History = Annotated[
    HistoryOf, typer.Option(help="Whose answers a second turn's prompt holds: the method's own, or plain's.")
]
CarryOver = Annotated[
    bool, typer.Option("--carry-over", help="Drafters keep what they remember from question to question.")
]
Assisted = Annotated[
    str | None,
    typer.Option(help="Also measure transformers' assisted generation with this draft model (demo-draft or a path)."),
]
PromptLookup = Annotated[
    int | None,
    typer.Option(callback=within(1), help="Also measure transformers' prompt lookup with so many tokens."),
]
AgainstItself = Annotated[
    bool, typer.Option("--against-itself", help="Also measure plain a second time: its interval should contain 1.")
]
Template = Annotated[str, typer.Option(help="Chat template: auto (the tokenizer's), raw for none, a file, or Jinja.")]
System = Annotated[str | None, typer.Option(help="System message.", show_default=False)]
Optimize = Annotated[
    bool,
    typer.Option(
        "--optimize/--no-optimize",
        help="Call specdec.optimize(model), for all methods alike.",
        rich_help_panel=ON_OR_OFF,
    ),
]
Phases = Annotated[
    bool,
    typer.Option(
        "--phases/--no-phases",
        help="Time drafting, verification and acceptance of each step.",
        rich_help_panel=ON_OR_OFF,
    ),
]
