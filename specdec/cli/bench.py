"""`specdec bench`: drafters and baselines on the same questions, with statistics that can be trusted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from specdec.bench import BenchRun, QuestionSet, Settings, load_questions, run_bench
from specdec.bench.methods import PLAIN
from specdec.bench.report import write_report
from specdec.bench.summary import Summary, summarize, write_summary
from specdec.cli import bench_options as option
from specdec.cli.console import FAILURE, INTERRUPTED, note, out
from specdec.cli.model import DEMO_MODELS, load_for_timing
from specdec.cli.options import Device, Dtype, DtypeOption, Json, MaxNewTokens, TargetName, Temperature, Threads
from specdec.cli.progress import progress

DEMO_QUESTIONS, QUESTIONS = "demo-code", "six"


class _BenchGroup(TyperGroup):
    """What follows `bench` belongs to its command run, unless it names a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] in (["run"], ["report"]) else ["run", *args])


app = typer.Typer(cls=_BenchGroup, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]})


def questions_for(target: str, name: str | None) -> QuestionSet:
    """The question set of this name or file; without one, that which suits the target."""
    return load_questions(name or (DEMO_QUESTIONS if target in DEMO_MODELS else QUESTIONS))


@app.command("run", epilog="Render and compare runs without running anything: specdec bench report DIR... --out DIR")
def bench(
    target: TargetName,
    drafter: option.Drafters = None,
    questions: option.Questions = None,
    limit: option.Limit = None,
    category: option.Categories = None,
    repeats: option.Repeats = 1,
    max_new_tokens: MaxNewTokens = 128,
    out_folder: option.OutFolder = None,
    batch_size: option.BatchSize = 1,
    temperature: Temperature = 0.0,
    seed: option.Seed = 0,
    fixed_length: option.FixedLength = False,
    history: option.History = option.HistoryOf.own,
    carry_over: option.CarryOver = False,
    assisted: option.Assisted = None,
    prompt_lookup: option.PromptLookup = None,
    against_itself: option.AgainstItself = False,
    template: option.Template = "auto",
    system: option.System = None,
    use_optimized: option.Optimize = True,
    phases: option.Phases = True,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run drafters and baselines on the same questions in turns, and write records, statistics and a report.

    transformers' plain generate() is the baseline; specdec's own loop without a drafter is measured, too.
    Exit status 1 when a lossless method gave a wrong answer, or a method failed. After Ctrl-C or a crash the same
    command goes on where it stopped.

    Example: specdec bench demo --drafter lookup --drafter demo-draft --limit 6
    """
    settings = Settings(
        max_new_tokens=max_new_tokens, repeats=repeats, batch_size=batch_size, temperature=temperature, seed=seed,
        fixed_length=fixed_length, history=history.value, carry_over=carry_over, phases=phases,
    )  # fmt: skip
    chosen = _limited(questions_for(target, questions), limit, category)
    model, tokenizer = load_for_timing(target, dtype, device, threads, optimize=use_optimized)
    with progress() as tell, _interruptible():
        run = run_bench(
            model, tokenizer, chosen, list(dict.fromkeys(drafter or [])), out=out_folder, settings=settings,
            assistant=assisted, lookup_tokens=prompt_lookup, against_itself=against_itself, template=template,
            system=system, target_name=target, progress=tell,
        )  # fmt: skip
    summary = summarize(run.path)
    write_summary(summary, run.path)
    write_report([run.path], run.path)
    _print(run, summary, as_json)
    if _failed(run):
        raise typer.Exit(FAILURE)


@app.command("report")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs.", show_default=False)],
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to write; by default into the only run.", show_default=False),
    ] = None,
) -> None:
    """Render the report of a run, or compare several, without running anything.

    Example: specdec bench report runs/monday runs/tuesday --out runs/both
    """
    if out_folder is None and len(runs) > 1:
        raise typer.BadParameter("comparing several runs needs a directory for the result", param_hint="--out")
    folder = out_folder or runs[0]
    for run in runs:
        write_summary(summarize(run), run)
    write_report(runs, folder)
    note(f"report: {folder / 'report.html'}")


def _limited(questions: QuestionSet, limit: int | None, categories: list[str] | None) -> QuestionSet:
    return questions.limited(limit, categories) if limit is not None or categories else questions


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("", err=True)
        note("interrupted; every finished generation is kept, and the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None


def _print(run: BenchRun, summary: Summary, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"path": str(run.path), **summary}))
    else:
        out.print(_table(summary))
        out.print(f"report: {run.path / 'report.html'}", soft_wrap=True)
    if run.found:
        note(f"{run.found} of {len(run.records)} records were there already")
    for verdict in run.wrong[:1]:
        place = f"question {verdict['question_id']}, turn {verdict['turn'] + 1}, new token {verdict['position']}"
        note(f"{len(run.wrong)} wrong answers; the first: {verdict['method']}, {place}: {verdict['reason']}")
    for record in run.errors[:1]:
        place = f"question {record['question_id']}, turn {record['turn'] + 1}"
        note(f"{len(run.errors)} generations failed; the first: {record['method']}, {place}: {record['error']}")


def _failed(run: BenchRun) -> bool:
    return bool(run.wrong or run.errors)


def _table(summary: Summary) -> Table:
    """One line for each method: speed-up with its interval, tau, tokens per second, and how many answers are exact."""
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "left", "right", "right", "left"):
        table.add_column(justify=justify, overflow="fold")
    table.add_row("method", "speed-up", "95 %", "tau", "tokens/s", "exact", style="dim")
    for name, method in summary["methods"].items():
        numbers = method["overall"]
        mean = numbers["speedup"].get("geometric_mean")
        speedup = "1.00x" if name == PLAIN else "" if mean is None else f"{mean['value']:.2f}x"
        interval = "" if mean is None or mean["low"] is None else f"{mean['low']:.2f} to {mean['high']:.2f}"
        tau = numbers["acceptance"].get("tau")
        speed = numbers["throughput"]["tokens_per_second"]
        mark = escape(f"{name} (lossy: {method['lossy']})" if method["lossy"] else name)
        cells = mark, speedup, interval, "" if tau is None else f"{tau['value']:.2f}", f"{speed or 0:.0f}"
        table.add_row(*cells, _exact(name, numbers["exactness"]["questions"]))
    return table


def _exact(name: str, counts: dict[str, int]) -> str:
    if name == PLAIN:
        return "the reference"
    compared = sum(counts[verdict] for verdict in ("exact", "near-tie", "wrong"))
    if not compared:
        return "not compared"
    text = f"{counts['exact']} of {compared}"
    text += f", {counts['near-tie']} near ties" if counts["near-tie"] else ""
    return text + (f", [bold red]{counts['wrong']} WRONG[/bold red]" if counts["wrong"] else "")
