"""`specdec data preview`: which tokens of documents are supervised."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedTokenizerBase

from specdec.cli.console import out
from specdec.cli.data_options import MaxLength, Split, TemplateFile, TemplateOptions, template_of
from specdec.cli.model import load_tokenizer
from specdec.cli.options import within
from specdec.errors import SpecdecError
from specdec.train.encoding import Encoder
from specdec.train.example import example_of
from specdec.train.order import Piece
from specdec.train.prepare import open_prepared
from specdec.train.prepared import MANIFEST
from specdec.train.preview import coloured, plain, segments
from specdec.train.source import read_source

Documents = Iterable[tuple[list[int], list[bool]]]
"""Of each document: its token ids, and which of them are supervised."""

Source = Annotated[
    str, typer.Argument(metavar="DIR|DATA", help="Prepared data, or text to be prepared.", show_default=False)
]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", "-t", help="The target; prepared data knows its own.", show_default=False)
]
Rows = Annotated[int, typer.Option("--rows", "-n", callback=within(1), help="Documents to show.")]
HeldOut = Annotated[bool, typer.Option("--held-out", help="Show what was held out instead.")]
Plain = Annotated[bool, typer.Option("--plain", help="Marks instead of colours: ⟦supervised⟧, a dot between tokens.")]


def preview(
    source: Source,
    tokenizer: TokenizerOption = None,
    rows: Rows = 3,
    max_length: MaxLength = 2048,
    held_out: HeldOut = False,
    split: Split = "train",
    template: TemplateFile = None,
    template_option: TemplateOptions = None,
    use_plain: Plain = False,
) -> None:
    """Show exactly which tokens are supervised: green ones, each token in a shade of its own.

    Without a terminal, and with --plain, marks take the place of colours.

    Example: specdec data preview data/chats --rows 2
    """
    path = Path(source).expanduser()
    if any((path / part / MANIFEST).is_file() for part in ("", "train")):
        loaded, documents = _prepared(path, "held-out" if held_out else "train", tokenizer, rows)
    elif tokenizer is None:
        raise typer.BadParameter("text that is not prepared yet needs the target's tokenizer", param_hint="--tokenizer")
    else:
        loaded = load_tokenizer(tokenizer)
        encoder = Encoder(loaded, max_length, template_of(loaded, template, template_option))
        examples = (example_of(row) for row in read_source(source, split=split))
        documents = ((one.ids, one.supervised) for example in examples for one in encoder.encode(example))
    _print(islice(documents, rows), loaded, colours=not use_plain and out.is_terminal and not out.no_color)


def _prepared(path: Path, part: str, tokenizer: str | None, rows: int) -> tuple[PreTrainedTokenizerBase, Documents]:
    """The first documents of prepared data, and the tokenizer whose tokens they are."""
    data = open_prepared(path, part)
    name = tokenizer or (data.manifest.get("tokenizer") or {}).get("name")
    if not name:
        raise SpecdecError(f"{path} does not say whose tokens it holds; give --tokenizer")
    pieces = (data.piece(Piece(number, 0, length)) for number, length in enumerate(data.lengths[:rows]))
    return load_tokenizer(name), ((piece.ids.tolist(), piece.supervised.tolist()) for piece in pieces)


def _print(documents: Documents, tokenizer: PreTrainedTokenizerBase, *, colours: bool) -> None:
    for number, (ids, supervised) in enumerate(documents):
        out.rule(f"document {number}: {len(ids)} tokens, {sum(supervised)} supervised", characters="-", style="dim")
        shown = segments(tokenizer, ids, supervised)
        out.print(coloured(shown) if colours else plain(shown), markup=False, soft_wrap=True)
