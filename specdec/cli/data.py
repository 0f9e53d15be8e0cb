"""`specdec data`: regenerate, prepare, preview and cache what drafters are trained on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from specdec.api import target_of
from specdec.cli.console import FAILURE, INTERRUPTED, note, out
from specdec.cli.model import DEMO_MODELS, load_model, load_tokenizer, locate
from specdec.cli.options import DRAFTER_HELP, Device, Dtype, DtypeOption, Json, Threads, within
from specdec.errors import SpecdecError
from specdec.target import BEFORE_NORM
from specdec.train.chat_template import ChatTemplate
from specdec.train.encoding import Encoder
from specdec.train.endpoint import EndpointAnswerer, Patience
from specdec.train.example import example_of
from specdec.train.feature_cache import FeaturePlan, name_of, plan_features, write_features
from specdec.train.features import check_packing
from specdec.train.in_process import InProcessAnswerer
from specdec.train.joint import head_recipe
from specdec.train.order import Piece
from specdec.train.prepare import Prepared, open_prepared
from specdec.train.prepare import prepare as prepare_data
from specdec.train.prepared import MANIFEST
from specdec.train.preview import coloured, plain, segments
from specdec.train.recipe import DRAFT_MODEL, recipe_for
from specdec.train.regenerate import Answerer, Regenerated, RegenerateSettings, asked_of
from specdec.train.regenerate import regenerate as regenerate_answers
from specdec.train.run import make_training
from specdec.train.source import read_source

app = typer.Typer(rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]})

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


@app.command("prepare")
def prepare(
    sources: Sources,
    tokenizer: TokenizerOption,
    out_folder: Annotated[
        Path, typer.Option("--out", "-o", help="A directory that does not exist yet.", show_default=False)
    ],
    max_length: MaxLength = 2048,
    limit: Limit = None,
    holdout: Annotated[
        float, typer.Option(callback=within(0, 0.9), help="Share of rows held out for validation.")
    ] = 0.02,
    seed: Annotated[int, typer.Option(help="Decides which rows are held out.")] = 0,
    split: Split = "train",
    template: TemplateFile = None,
    template_option: TemplateOptions = None,
    end_of_text: Annotated[
        bool, typer.Option("--end-of-text/--no-end-of-text", help="Learn where plain texts and completions end.")
    ] = True,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Pass over rows that cannot be used, and count them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn text into token ids with a loss mask, and hold a part of it out.

    Answers of the assistant are supervised with their end-of-turn token; completions of prompts; plain text as a
    whole. Look at it with `specdec data preview`.

    Example: specdec data prepare chats.jsonl --tokenizer path/to/target --out data/chats
    """
    loaded = load_tokenizer(tokenizer)
    encoder = Encoder(loaded, max_length, _template(loaded, template, template_option), end_of_text=end_of_text)
    with _progress("rows", limit) as bar:
        counts = prepare_data(
            list(sources),
            encoder,
            out_folder,
            limit=limit,
            seed=seed,
            holdout=holdout,
            split=split,
            skip_bad=skip_bad,
            tokenizer_name=str(locate(tokenizer)),
            tell=bar.reach,
        )
    for warning in counts.warnings:
        note(f"warning: {warning}")
    if as_json:
        print(json.dumps({"path": str(out_folder), **asdict(counts)}))
    else:
        _print_counts(counts, out_folder)


@app.command("preview")
def preview(
    source: Annotated[
        str, typer.Argument(metavar="DIR|DATA", help="Prepared data, or text to be prepared.", show_default=False)
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", "-t", help="The target; prepared data knows its own.", show_default=False),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", "-n", callback=within(1), help="Documents to show.")] = 3,
    max_length: MaxLength = 2048,
    held_out: Annotated[bool, typer.Option("--held-out", help="Show what was held out instead.")] = False,
    split: Split = "train",
    template: TemplateFile = None,
    template_option: TemplateOptions = None,
    use_plain: Annotated[
        bool, typer.Option("--plain", help="Marks instead of colours: ⟦supervised⟧, a dot between tokens.")
    ] = False,
) -> None:
    """Show exactly which tokens are supervised: green ones, each token in a shade of its own.

    Without a terminal, and with --plain, marks take the place of colours.

    Example: specdec data preview data/chats --rows 2
    """
    path = Path(source).expanduser()
    if any((path / part / MANIFEST).is_file() for part in ("", "train")):
        data = open_prepared(path, "held-out" if held_out else "train")
        name = tokenizer or (data.manifest.get("tokenizer") or {}).get("name")
        if not name:
            raise SpecdecError(f"{path} does not say whose tokens it holds; give --tokenizer")
        loaded = load_tokenizer(name)
        pieces = (data.piece(Piece(number, 0, length)) for number, length in enumerate(data.lengths[:rows]))
        documents: Iterator[Any] = ((piece.ids.tolist(), piece.supervised.tolist()) for piece in pieces)
    elif tokenizer is None:
        raise typer.BadParameter("text that is not prepared yet needs the target's tokenizer", param_hint="--tokenizer")
    else:
        loaded = load_tokenizer(tokenizer)
        encoder = Encoder(loaded, max_length, _template(loaded, template, template_option))
        examples = (example_of(row) for row in read_source(source, split=split))
        documents = ((one.ids, one.supervised) for example in examples for one in encoder.encode(example))
    colours = not use_plain and out.is_terminal and not out.no_color
    for number, (ids, supervised) in enumerate(islice(documents, rows)):
        out.rule(f"document {number}: {len(ids)} tokens, {sum(supervised)} supervised", characters="-", style="dim")
        shown = segments(loaded, ids, supervised)
        out.print(coloured(shown) if colours else plain(shown), markup=False, soft_wrap=True)


@app.command("regenerate")
def regenerate(
    prompts: Sources,
    out_file: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE.jsonl", help="Gone on with when it exists.", show_default=False)
    ],
    target: Annotated[
        str | None, typer.Option("--target", help="The target, to answer in this process.", show_default=False)
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ask a server instead, such as http://localhost:8000/v1.", show_default=False),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The target's name on the server.", show_default=False)] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Environment variable that holds the server's key.", show_default=False),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            "--temperature", help="Each prompt gets one of them, by its text. May be given several times; by default "
            "0, 0.6 and 1.", show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", callback=within(1))] = 1024,
    prompt_tokens: Annotated[
        int, typer.Option(callback=within(1), help="Of plain text, continue so many tokens.")
    ] = 64,
    max_turns: Annotated[int, typer.Option(callback=within(0), help="Answers for each conversation; 0 for all.")] = 0,
    drafter: Annotated[
        str, typer.Option("--drafter", "-d", help=DRAFTER_HELP + " [bold]none[/bold] decodes without speculation.")
    ] = "suffix",
    batch_size: Annotated[int, typer.Option(callback=within(1), help="Prompts generated together.")] = 8,
    concurrency: Annotated[int, typer.Option(callback=within(1), help="Requests to the server at a time.")] = 16,
    timeout: Annotated[float, typer.Option(callback=within(0.1), help="Seconds to wait for the server.")] = 600.0,
    retries: Annotated[int, typer.Option(callback=within(0), help="Repetitions of a request that failed.")] = 6,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Whether a prompt column holds questions; by default when the target "
                     "has a chat template.", show_default=False),
    ] = None,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Of temperatures and draws.")] = 0,
    split: Split = "train",
    template: TemplateFile = None,
    template_option: TemplateOptions = None,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Let the target answer prompts itself: what a drafter learns best from.

    Conversations are replayed turn by turn with the target's own answers; plain text is continued. An answer that came
    is on the disk at once: after Ctrl-C or a crash, the same command goes on. `specdec data prepare` reads the result.

    Example: specdec data regenerate chats.jsonl --target path/to/target --out answers.jsonl
    """
    _one_of(target, endpoint, model)
    if threads:
        _set_threads(threads)
    tokenizer = load_tokenizer(target) if target else None
    used = _template(tokenizer, template, template_option) if tokenizer is not None else None
    talks = chat if chat is not None else tokenizer is None or used is not None
    settings = RegenerateSettings(
        model=str(model or target),
        temperatures=tuple(temperature or (0.0, 0.6, 1.0)),
        seed=seed,
        max_new_tokens=max_new_tokens,
        prompt_tokens=prompt_tokens,
        max_turns=max_turns,
        vocabulary=None if tokenizer is None else Encoder(tokenizer).vocabulary,
        template=None if used is None else used.sha256,
    )
    rows = (row for source in prompts for row in read_source(source, split=split))
    asked = (asked_of(row, chat=talks, max_turns=max_turns) for row in islice(rows, limit))
    if target is not None and tokenizer is not None:
        answerer: Answerer = InProcessAnswerer(
            load_model(target, _dtype_of(target, dtype), device),
            tokenizer,
            drafter=None if drafter == "none" else drafter,
            template=used,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            prompt_tokens=prompt_tokens,
        )
        report = _regenerated(asked, answerer, out_file, settings, limit)
    else:
        with EndpointAnswerer(
            str(endpoint),
            str(model),
            key=_key(api_key_env),
            concurrency=concurrency,
            max_new_tokens=max_new_tokens,
            prompt_tokens=prompt_tokens,
            patience=Patience(retries=retries, timeout=timeout),
        ) as server:
            report = _regenerated(asked, server, out_file, settings, limit)
    _print_regenerated(report, out_file, as_json)
    if report.failed:
        raise typer.Exit(FAILURE)


@app.command("features")
def features(
    prepared: Annotated[
        Path, typer.Argument(help="A directory of `specdec data prepare`.", exists=True, show_default=False)
    ],
    target: Annotated[str, typer.Option("--target", help="The target.", show_default=False)],
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Gone on with when it exists.", show_default=False)],
    taps: Annotated[
        str | None,
        typer.Option(help="Numbers of hidden states, such as 2,16,29 or before-norm.", show_default=False),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Instead of taps: what this kind of drafter reads.", show_default=False)
    ] = None,
    row_length: Annotated[
        int, typer.Option(callback=within(4), help="Of the training recipe: documents are cut there.")
    ] = 512,
    rows_at_once: Annotated[int, typer.Option(callback=within(1), help="Rows of one forward.")] = 8,
    packed: Annotated[bool, typer.Option("--packed/--no-packed", help="Compute several documents in one row.")] = True,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before writing.")] = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Cache what the target computes on prepared data. Optional: training computes it as it goes otherwise.

    The size is told before anything is written. A run that was stopped goes on behind its last whole shard.

    Example: specdec data features data/chats --target path/to/target --kind eagle3 --out features
    """
    if (taps is None) == (kind is None):
        raise typer.BadParameter("give either --taps or --kind")
    if kind == DRAFT_MODEL:
        raise typer.BadParameter("a draft model reads no hidden states of the target; there is nothing to cache for it")
    wanted = _numbers(taps) if taps is not None else ()
    recipe = None if kind is None else recipe_for(kind)
    if threads:
        _set_threads(threads)
    data = open_prepared(prepared)
    adapter = target_of(load_model(target, _dtype_of(target, dtype), device))
    needs_logits = True
    if recipe is not None:
        training = make_training(head_recipe(recipe), adapter)
        wanted, needs_logits = training.taps, training.needs_logits
    if packed:
        check_packing(adapter)
    plan = plan_features(data, adapter, wanted, row_length=row_length, packed=packed, needs_logits=needs_logits)
    if not as_json:
        _print_plan(plan)
    if not yes and not _agreed():
        raise typer.Exit(FAILURE)
    with _progress("tokens", plan.tokens) as bar:
        computed = write_features(plan, data, adapter, out_folder, rows_at_once=rows_at_once, tell=bar.advance)
    if as_json:
        described = {"path": str(out_folder), "bytes": plan.bytes, "tokens": plan.tokens, "computed": computed}
        print(json.dumps({**described, "taps": [name_of(tap) for tap in plan.taps]}))
    else:
        out.print(f"{out_folder}: {plan.tokens:,} tokens, {computed:,} of them computed now", soft_wrap=True)


# --- Options ------------------------------------------------------------------------------------------------


def _one_of(target: str | None, endpoint: str | None, model: str | None) -> None:
    if (target is None) == (endpoint is None):
        raise typer.BadParameter("give either --target PATH or --endpoint URL with --model NAME")
    if endpoint is not None and model is None:
        raise typer.BadParameter("the server needs the target's name there", param_hint="--model")


def _key(name: str | None) -> str | None:
    if name is not None and not os.environ.get(name):
        raise typer.BadParameter(f"the environment variable {name} is not set", param_hint="--api-key-env")
    return None if name is None else os.environ[name]


def _numbers(taps: str) -> tuple[int, ...]:
    words = [word.strip() for word in taps.split(",")]
    if not all(word == "before-norm" or word.isdigit() for word in words):
        raise typer.BadParameter(f"got {taps!r}, expected numbers such as 2,16,29 or before-norm", param_hint="--taps")
    return tuple(BEFORE_NORM if word == "before-norm" else int(word) for word in words)


def _template(tokenizer: PreTrainedTokenizerBase, file: Path | None, options: list[str] | None) -> ChatTemplate | None:
    """None where there is none: base models have no template."""
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


def _dtype_of(target: str, dtype: Dtype) -> Dtype:
    return Dtype.float32 if target in DEMO_MODELS and dtype is Dtype.auto else dtype


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise SpecdecError("nobody is there to be asked; add --yes to write so much")
    return typer.confirm("Go on?", err=True)


# --- Output -------------------------------------------------------------------------------------------------


class _Bar:
    """A progress bar on stderr."""

    def __init__(self, bar: Progress, task: Any) -> None:
        self._bar, self._task = bar, task

    def reach(self, done: int) -> None:
        """So many are done."""
        self._bar.update(self._task, completed=done)

    def advance(self, more: int) -> None:
        """So many more are done."""
        self._bar.update(self._task, advance=more)


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[_Bar]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield _Bar(bar, bar.add_task(what, total=total))


def _regenerated(
    asked: Iterator[Any], answerer: Answerer, out_file: Path, settings: RegenerateSettings, limit: int | None
) -> Regenerated:
    try:
        with _progress("prompts", limit) as bar:
            return regenerate_answers(
                asked, answerer, out_file, settings, tell=lambda r: bar.reach(r.found + r.finished + r.failed)
            )
    except KeyboardInterrupt:
        typer.echo("", err=True)
        note("interrupted; every answer that came is kept, and the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None


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


def _print_regenerated(report: Regenerated, out_file: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"path": str(out_file), **asdict(report)}))
    else:
        before = f", {report.found:,} were there already" if report.found else ""
        out.print(
            f"{out_file}: {report.finished:,} rows with {report.answers:,} answers, {report.cut:,} of them cut at the "
            f"cap{before}",
            soft_wrap=True,
        )
    if report.failed:
        note(f"{report.failed} prompts have no answer, the first because: {report.first_failure}; run again to retry")


def _print_plan(plan: FeaturePlan) -> None:
    names = ", ".join(name_of(tap) for tap in plan.taps)
    out.print(
        f"{names} of {plan.tokens:,} tokens in {plan.dtype}: {_size(plan.bytes)} ({plan.bytes_per_token:,} bytes a "
        f"token) in {len(plan.shards)} files",
        soft_wrap=True,
    )


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.1f} TiB"
