"""`specdec tune`: the options of a drafter that give the most tokens per second here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from specdec.cli.bench import questions_for
from specdec.cli.console import out
from specdec.cli.model import load_for_timing
from specdec.cli.options import (
    DRAFTER_HELP,
    ON_OR_OFF,
    Device,
    Dtype,
    DtypeOption,
    Json,
    TargetName,
    Temperature,
    Threads,
    within,
)
from specdec.cli.progress import progress
from specdec.costs.table import CostTable
from specdec.tuning.choice import Kept, check_out, keep
from specdec.tuning.decoded import Job
from specdec.tuning.grid import full_grid, measured_grid
from specdec.tuning.pricing import Expectation
from specdec.tuning.prompts import first_prompts
from specdec.tuning.settings import subject_of
from specdec.tuning.tune import TABLE_FILE, Effort, Tuned
from specdec.tuning.tune import tune as tuned

Drafter = Annotated[
    str,
    typer.Option("--drafter", "-d", help=DRAFTER_HELP + " Options given here stay as they are.", show_default=False),
]
Questions = Annotated[
    str | None,
    typer.Option(
        "--questions", "-q", help="A question set by name or a file, as for bench; by default demo-code for the target "
        "demo, six for others.", show_default=False,
    ),
]  # fmt: skip
Limit = Annotated[int, typer.Option(callback=within(1), help="Questions to decode.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", callback=within(2), help="Tokens to generate at most.")
]
Seed = Annotated[int, typer.Option(help="Of the draws.")]
OutFolder = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Make a drafter directory of a word and the choice.", show_default=False),
]
CostFile = Annotated[
    Path | None,
    typer.Option(
        help="Use the costs in this file instead of measuring: a plan for another machine.", exists=True,
        dir_okay=False, show_default=False,
    ),
]  # fmt: skip
SaveCosts = Annotated[Path | None, typer.Option(help="Also write the measured costs to this file.", show_default=False)]
Grid = Annotated[
    bool, typer.Option("--grid", help="Also race every setting there is and rank the choice among them. Slow.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure costs also where kept ones still hold.")]
Write = Annotated[
    bool, typer.Option("--write/--dry-run", help="Keep the choice, or only print it.", rich_help_panel=ON_OR_OFF)
]
Optimize = Annotated[
    bool,
    typer.Option(
        "--optimize/--no-optimize", help="Call specdec.optimize(model), as bench does.", rich_help_panel=ON_OR_OFF
    ),
]


def tune(
    target: TargetName,
    drafter: Drafter,
    questions: Questions = None,
    limit: Limit = 12,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    out_folder: OutFolder = None,
    costs: CostFile = None,
    save_costs: SaveCosts = None,
    grid: Grid = False,
    fresh: Fresh = False,
    write: Write = True,
    use_optimized: Optimize = True,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Choose how much a drafter proposes by acceptance and costs measured here, and keep the choice.

    Prints what it expects, decodes with the choice, and prints what that gave. In a drafter's directory the choice
    becomes its defaults, which generate and bench pick up. Where nothing pays it says so and keeps nothing.

    Example: specdec tune demo --drafter demo-draft --limit 6
    """
    given = _given_costs(costs, fresh, save_costs)
    chosen = questions_for(target, questions)
    model, tokenizer = load_for_timing(target, dtype, device, threads, optimize=use_optimized)
    check_out(subject_of(drafter, model), out_folder)
    prompts = first_prompts(model, tokenizer, chosen, limit, max_new_tokens)
    job, effort = Job(model, prompts, max_new_tokens, temperature, seed), Effort()
    with tempfile.TemporaryDirectory(prefix="specdec-") as folder, progress() as tell:
        found = tuned(job, drafter, costs=given, effort=effort, fresh=fresh, folder=Path(folder), tell=tell)
        table = Path(folder) / TABLE_FILE
        ranked = measured_grid(found, job, full_grid(found.subject, job, table, effort), tell) if grid else []
        kept = keep(found, model, table if table.is_file() else None, out_folder) if write else None
    if save_costs is not None:
        assert isinstance(found.costs, CostTable)
        found.costs.save(save_costs)
    if as_json:
        print(json.dumps(_report(found, ranked, kept)))
    else:
        _print(found, ranked, kept, len(prompts))


def _given_costs(costs: Path | None, fresh: bool, save_costs: Path | None) -> CostTable | None:
    """Costs that are read instead of measured; None where they are measured."""
    if costs is None:
        return None
    if fresh or save_costs is not None:
        raise typer.BadParameter("measures nothing; leave out --fresh and --save-costs", param_hint="--costs")
    return CostTable.load(costs)


def _print(found: Tuned, ranked: Sequence[Expectation], kept: Kept | None, prompts: int) -> None:
    out.print(_table(found))
    choice, plain, measured = found.choice, found.plain, found.measured
    assert measured is not None
    how = "projected from the given costs" if found.projected else "measured"
    if not choice.setting.drafts:
        best = found.finalists[0] if found.finalists else None
        gain = "" if best is None else f"; the best setting, {best.setting.name}, is expected at " + _times(best, plain)
        out.print(f"speculation does not pay here{escape(gain)}; decode with --drafter none", soft_wrap=True)
    else:
        out.print(f"choice: {escape(choice.setting.name)}", soft_wrap=True)
    out.print(
        f"expected: {choice.tokens_per_second:.1f} tokens/s, tau {choice.tau:.2f}, {_times(choice, plain)} of plain"
    )
    speedup = measured.tokens_per_second / measured.plain_tokens_per_second if measured.plain_tokens_per_second else 0.0
    out.print(f"{how}: {measured.tokens_per_second:.1f} tokens/s, tau {measured.tau:.2f}, {speedup:.2f}x of plain, "
              f"on {prompts} prompts")  # fmt: skip
    if ranked:
        _print_grid(found, ranked)
    if kept is not None:
        where = f"kept in {kept.path}" if kept.path is not None else f"not kept: {kept.reason}"
        out.print(f"{escape(where)}; use --drafter {escape(kept.spec)}", soft_wrap=True)


def _print_grid(found: Tuned, ranked: Sequence[Expectation]) -> None:
    best, place = ranked[0], _place(found, ranked)
    out.print(f"grid: {len(ranked)} settings; the best is {escape(best.setting.name)} with "
              f"{best.tokens_per_second:.1f} tokens/s", soft_wrap=True)  # fmt: skip
    if place is not None:
        share = ranked[place].tokens_per_second / best.tokens_per_second
        out.print(f"grid: the choice is number {place + 1}, at {100 * share:.1f} % of the best")


def _place(found: Tuned, ranked: Sequence[Expectation]) -> int | None:
    return next((n for n, entry in enumerate(ranked) if entry.setting == found.choice.setting), None)


def _times(one: Expectation, plain: Expectation) -> str:
    return f"{one.tokens_per_second / plain.tokens_per_second:.2f}x"


def _table(found: Tuned) -> Table:
    """The settings that were decoded on all prompts, and plain decoding."""
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "right", "right", "right"):
        table.add_column(justify=justify, overflow="fold")
    unit = "projected tokens/s" if found.projected else "expected tokens/s"
    table.add_row("setting", "nodes", "tau", "ms a step", unit, style="dim")
    for entry in [*found.finalists, found.plain]:
        cells = f"{entry.nodes:.1f}", f"{entry.tau:.2f}", f"{1e3 * entry.step_seconds:.2f}"
        table.add_row(escape(entry.setting.name), *cells, f"{entry.tokens_per_second:.1f}")
    return table


def _report(found: Tuned, ranked: Sequence[Expectation], kept: Kept | None) -> dict[str, Any]:
    measured = found.measured
    assert measured is not None
    return {
        "drafter": found.subject.name,
        "projected": found.projected,
        "pays": found.choice.setting.drafts,
        "choice": _entry(found.choice),
        "plain": _entry(found.plain),
        "measured": {
            "tokens_per_second": measured.tokens_per_second,
            "plain_tokens_per_second": measured.plain_tokens_per_second,
            "tau": measured.tau,
        },
        "considered": [_entry(entry) for entry in found.considered],
        "grid": [_entry(entry) for entry in ranked],
        "spec": None if kept is None else kept.spec,
        "path": None if kept is None or kept.path is None else str(kept.path),
    }


def _entry(entry: Expectation) -> dict[str, Any]:
    options = dict(entry.setting.options) if entry.setting.drafts else None
    return {"options": options, "tau": entry.tau, "nodes": entry.nodes, "step_seconds": entry.step_seconds,
            "tokens_per_second": entry.tokens_per_second}  # fmt: skip
