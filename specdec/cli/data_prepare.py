"""`specdec data prepare`: from text to token ids with a loss mask."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.console import note, out
from specdec.cli.data_options import (
    Limit,
    MaxLength,
    Sources,
    Split,
    TemplateFile,
    TemplateOptions,
    TokenizerOption,
    template_of,
)
from specdec.cli.model import load_tokenizer, locate
from specdec.cli.options import ON_OR_OFF, Json, within
from specdec.cli.progress import counting
from specdec.train.encoding import Encoder
from specdec.train.prepare import Prepared
from specdec.train.prepare import prepare as prepare_data

OutFolder = Annotated[
    Path, typer.Option("--out", "-o", help="A directory that does not exist yet.", show_default=False)
]
Holdout = Annotated[float, typer.Option(callback=within(0, 0.9), help="Share of rows held out for validation.")]
Seed = Annotated[int, typer.Option(help="Decides which rows are held out.")]
EndOfText = Annotated[
    bool,
    typer.Option(
        "--end-of-text/--no-end-of-text", help="Learn where plain texts and completions end.", rich_help_panel=ON_OR_OFF
    ),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Pass over rows that cannot be used, and count them.")]


def prepare(
    sources: Sources,
    tokenizer: TokenizerOption,
    out_folder: OutFolder,
    max_length: MaxLength = 2048,
    limit: Limit = None,
    holdout: Holdout = 0.02,
    seed: Seed = 0,
    split: Split = "train",
    template: TemplateFile = None,
    template_option: TemplateOptions = None,
    end_of_text: EndOfText = True,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Turn text into token ids with a loss mask, and hold a part of it out.

    Answers of the assistant are supervised with their end-of-turn token; completions of prompts; plain text as a
    whole. Look at it with `specdec data preview`.

    Example: specdec data prepare chats.jsonl --tokenizer path/to/target --out data/chats
    """
    loaded = load_tokenizer(tokenizer)
    encoder = Encoder(loaded, max_length, template_of(loaded, template, template_option), end_of_text=end_of_text)
    with counting("rows", limit) as bar:
        counts = prepare_data(
            list(sources), encoder, out_folder, limit=limit, seed=seed, holdout=holdout, split=split,
            skip_bad=skip_bad, tokenizer_name=str(locate(tokenizer)), tell=bar.reach,
        )  # fmt: skip
    for warning in counts.warnings:
        note(f"warning: {warning}")
    if as_json:
        print(json.dumps({"path": str(out_folder), **asdict(counts)}))
    else:
        _print_counts(counts, out_folder)


def _print_counts(counts: Prepared, folder: Path) -> None:
    share = counts.supervised / counts.tokens
    out.print(f"{folder}: {counts.documents:,} documents to train on, {counts.held_out:,} held out", soft_wrap=True)
    out.print(f"{counts.tokens:,} tokens, {counts.supervised:,} of them supervised ({share:.1%})", soft_wrap=True)
    if counts.turns:
        out.print(f"{counts.turns:,} conversations became one document for each answer", soft_wrap=True)
    if counts.cut:
        out.print(
            f"{counts.cut:,} documents were cut, {counts.cut_answers:,} of them within an answer; {counts.lost:,} "
            "tokens lost",
            soft_wrap=True,
        )
