"""Options that several commands of `specdec data` share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedTokenizerBase

from specdec.cli.options import within
from specdec.train.chat_template import ChatTemplate

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="Files (JSON lines, JSON, Parquet, CSV, text), folders of them, or a data set of the hub.",
        show_default=False,
    ),
]
TokenizerOption = Annotated[
    str, typer.Option("--tokenizer", "-t", help="The target: a directory, a hub id, or demo.", show_default=False)
]
MaxLength = Annotated[
    int, typer.Option("--max-length", callback=within(2), help="Longer chats are cut, longer texts divided.")
]
TemplateFile = Annotated[
    Path | None,
    typer.Option(
        "--template", help="A Jinja chat template instead of the tokenizer's.", exists=True, dir_okay=False,
        show_default=False,
    ),
]  # fmt: skip
TemplateOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--template-option", metavar="NAME=VALUE", help="For the template, such as enable_thinking=false.",
        show_default=False,
    ),
]  # fmt: skip
Split = Annotated[str, typer.Option(help="Of sources that have splits.")]
Limit = Annotated[int | None, typer.Option(callback=within(1), help="Read so many rows at most.", show_default=False)]


def template_of(
    tokenizer: PreTrainedTokenizerBase, file: Path | None, options: list[str] | None
) -> ChatTemplate | None:
    """The chat template that is given, or the tokenizer's; None where there is none: base models have no template.

    Raises:
        BadParameter: an option that is not NAME=VALUE.
    """
    if file is None and not tokenizer.chat_template:
        return None
    text = None if file is None else file.read_text(encoding="utf-8")
    return ChatTemplate(tokenizer, text, dict(_option(given) for given in options or []))


def _option(given: str) -> tuple[str, Any]:
    name, equals, value = given.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"got {given!r}, expected NAME=VALUE", param_hint="--template-option")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
