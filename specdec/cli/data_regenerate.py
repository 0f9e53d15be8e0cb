"""`specdec data regenerate`: prompts with the target's own answers."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.cli.console import FAILURE, INTERRUPTED, note, out
from specdec.cli.data_options import Limit, Sources, Split, TemplateFile, TemplateOptions, template_of
from specdec.cli.model import dtype_of, load_model, load_tokenizer
from specdec.cli.options import ON_OR_OFF, Device, DrafterOrNone, Dtype, DtypeOption, Json, Threads, within
from specdec.cli.progress import counting
from specdec.train.answerer import Answerer
from specdec.train.asked import Prompts
from specdec.train.chat_template import ChatTemplate
from specdec.train.encoding import Encoder
from specdec.train.endpoint import EndpointAnswerer, Patience
from specdec.train.exchange import RegenerateSettings
from specdec.train.in_process import InProcessAnswerer
from specdec.train.regenerate import Regenerated
from specdec.train.regenerate import regenerate as regenerate_answers
from specdec.train.source import read_source

OutFile = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE.jsonl", help="Gone on with when it exists.", show_default=False)
]
Target = Annotated[
    str | None, typer.Option("--target", help="The target, to answer in this process.", show_default=False)
]
Endpoint = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Ask a server instead, such as http://localhost:8000/v1.", show_default=False),
]
NameOnServer = Annotated[str | None, typer.Option(help="The target's name on the server.", show_default=False)]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Environment variable that holds the server's key.", show_default=False),
]
Temperatures = Annotated[
    list[float] | None,
    typer.Option(
        "--temperature", help="Each prompt gets one of them, by its text. May be given several times; by default "
        "0, 0.6 and 1.", show_default=False,
    ),
]  # fmt: skip
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", callback=within(1))]
PromptTokens = Annotated[int, typer.Option(callback=within(1), help="Of plain text, continue so many tokens.")]
MaxTurns = Annotated[int, typer.Option(callback=within(0), help="Answers for each conversation; 0 for all.")]
BatchSize = Annotated[int, typer.Option(callback=within(1), help="Prompts generated together.")]
Concurrency = Annotated[int, typer.Option(callback=within(1), help="Requests to the server at a time.")]
Timeout = Annotated[float, typer.Option(callback=within(0.1), help="Seconds to wait for the server.")]
Retries = Annotated[int, typer.Option(callback=within(0), help="Repetitions of a request that failed.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat", help="Whether a prompt column holds questions; by default when the target has a chat "
        "template.", rich_help_panel=ON_OR_OFF, show_default=False,
    ),
]  # fmt: skip
Seed = Annotated[int, typer.Option(help="Of temperatures and draws.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Pass over rows that cannot be used, and count them.")]


def regenerate(
    prompts: Sources,
    out_file: OutFile,
    target: Target = None,
    endpoint: Endpoint = None,
    model: NameOnServer = None,
    api_key_env: ApiKeyEnv = None,
    temperature: Temperatures = None,
    max_new_tokens: MaxNewTokens = 1024,
    prompt_tokens: PromptTokens = 64,
    max_turns: MaxTurns = 0,
    drafter: DrafterOrNone = "suffix",
    batch_size: BatchSize = 8,
    concurrency: Concurrency = 16,
    timeout: Timeout = 600.0,
    retries: Retries = 6,
    chat: Chat = None,
    limit: Limit = None,
    seed: Seed = 0,
    split: Split = "train",
    template: TemplateFile = None,
    template_option: TemplateOptions = None,
    skip_bad: SkipBad = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Let the target answer prompts itself: what a drafter learns best from.

    Conversations are replayed turn by turn with the target's own answers; plain text is continued. An answer that came
    is on the disk at once: after Ctrl-C or a crash, the same command goes on. `specdec data prepare` reads the result.

    Example: specdec data regenerate chats.jsonl --target path/to/target --out answers.jsonl
    """
    _one_of(target, endpoint, model)
    if endpoint is not None and (template is not None or template_option):
        raise typer.BadParameter("the server uses its own template", param_hint="--template, --template-option")
    if threads:
        torch.set_num_threads(threads)
    tokenizer = load_tokenizer(target) if target else None
    used = template_of(tokenizer, template, template_option) if tokenizer is not None else None
    talks = chat if chat is not None else tokenizer is None or used is not None
    rows = islice((row for source in prompts for row in read_source(source, split=split, keep_unreadable=True)), limit)
    asked = Prompts(rows, chat=talks, max_turns=max_turns, skip_bad=skip_bad)
    settings = RegenerateSettings(
        model=str(model or target), temperatures=tuple(temperature or (0.0, 0.6, 1.0)), seed=seed,
        max_new_tokens=max_new_tokens, prompt_tokens=prompt_tokens, max_turns=max_turns,
        vocabulary=None if tokenizer is None else Encoder(tokenizer).vocabulary,
        template=None if used is None else used.sha256,
        template_options=None if used is None else used.options or None,
    )  # fmt: skip
    answering: AbstractContextManager[Answerer]
    if target is not None and tokenizer is not None:
        loaded = load_model(target, dtype_of(target, dtype), device)
        answering = nullcontext(_in_process(loaded, tokenizer, drafter, used, batch_size, settings))
    else:
        patience = Patience(retries=retries, timeout=timeout)
        answering = _on_server(str(endpoint), str(model), api_key_env, concurrency, patience, settings)
    with answering as answerer:
        report = _regenerated(asked, answerer, out_file, settings, limit)
    _print_regenerated(report, asked, out_file, as_json)
    if report.failed:
        raise typer.Exit(FAILURE)


def _one_of(target: str | None, endpoint: str | None, model: str | None) -> None:
    if (target is None) == (endpoint is None):
        raise typer.BadParameter("give either --target PATH or --endpoint URL with --model NAME")
    if endpoint is not None and model is None:
        raise typer.BadParameter("the server needs the target's name there", param_hint="--model")


def _in_process(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: str,
    template: ChatTemplate | None,
    batch_size: int,
    settings: RegenerateSettings,
) -> InProcessAnswerer:
    return InProcessAnswerer(
        model, tokenizer, drafter=None if drafter == "none" else drafter, template=template, batch_size=batch_size,
        max_new_tokens=settings.max_new_tokens, prompt_tokens=settings.prompt_tokens,
    )  # fmt: skip


def _on_server(
    endpoint: str,
    model: str,
    api_key_env: str | None,
    concurrency: int,
    patience: Patience,
    settings: RegenerateSettings,
) -> EndpointAnswerer:
    return EndpointAnswerer(
        endpoint, model, key=_key(api_key_env), concurrency=concurrency, patience=patience,
        max_new_tokens=settings.max_new_tokens, prompt_tokens=settings.prompt_tokens,
    )  # fmt: skip


def _key(name: str | None) -> str | None:
    if name is not None and not os.environ.get(name):
        raise typer.BadParameter(f"the environment variable {name} is not set", param_hint="--api-key-env")
    return None if name is None else os.environ[name]


def _regenerated(
    asked: Prompts, answerer: Answerer, out_file: Path, settings: RegenerateSettings, limit: int | None
) -> Regenerated:
    try:
        with counting("prompts", limit) as bar:
            return regenerate_answers(
                asked,
                answerer,
                out_file,
                settings,
                tell=lambda r: bar.reach(asked.bad + r.found + r.finished + r.failed),
            )
    except KeyboardInterrupt:
        typer.echo("", err=True)
        note("interrupted; every answer that came is kept, and the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None


def _print_regenerated(report: Regenerated, asked: Prompts, out_file: Path, as_json: bool) -> None:
    if as_json:
        counts = {**asdict(report), "bad": asked.bad, "first_bad": asked.first_bad}
        print(json.dumps({"path": str(out_file), **counts}))
    else:
        before = f", {report.found:,} were there already" if report.found else ""
        out.print(
            f"{out_file}: {report.finished:,} rows with {report.answers:,} answers, {report.cut:,} of them cut at the "
            f"cap{before}",
            soft_wrap=True,
        )
    if asked.bad:
        rows = "1 row was" if asked.bad == 1 else f"{asked.bad:,} rows were"
        note(f"warning: {rows} passed over, the first because of {asked.first_bad}")
    if report.failed:
        note(f"{report.failed} prompts have no answer, the first because: {report.first_failure}; run again to retry")
