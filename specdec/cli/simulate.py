"""`specdec simulate`: a benchmark run's acceptance under another machine's costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from specdec.cli.console import note, out
from specdec.cli.options import Json
from specdec.costs.roofline import MACHINES, machine_named
from specdec.costs.table import Costs, CostTable
from specdec.drafters.load import TEXT_WORDS
from specdec.errors import SpecdecError
from specdec.tuning.recorded import Recorded, read_recorded
from specdec.tuning.simulate import TOLERANCE, Projection, SelfCheck, self_check
from specdec.tuning.simulate import simulate as simulated

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (1, 2, 3, 5, 8)
LABEL = "PROJECTION, not a measurement"


def simulate(
    run: Annotated[
        Path,
        typer.Argument(help="A directory of specdec bench, or its records.jsonl.", exists=True, show_default=False),
    ],
    costs: Annotated[
        str,
        typer.Option(
            help="The machine to plan for: MODEL@DEVICE such as 8b@h100 or 70b@4xh100, or a cost table of specdec tune "
            "--save-costs."
        ),
    ] = "8b@h100",
    draft: Annotated[
        str | None,
        typer.Option(
            help="What drafts on a described machine: none, head or 1b. By default none for text drafters, else head.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Rows; may be given several times. By default 1 to 256.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option("--length", help="Most tokens of a chain; may be given several times.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Only this drafter of the run; may be given several times.")
    ] = None,
    machines: Annotated[
        Path | None,
        typer.Option(help="Describe machines in this file instead.", exists=True, dir_okay=False, show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay recorded acceptance under other costs: expected speed-up by batch size and draft length.

    What is printed is a projection from stated assumptions, with the bound that no choice of length can beat (oracle).
    First the replay is held against the run's own times.

    Example: specdec simulate specdec-bench/demo --costs 70b@4xh100
    """
    for name, values in (("--batch", batch), ("--length", length)):
        if values and min(values) < 1:
            raise typer.BadParameter(f"got {min(values)}, expected 1 or more", param_hint=name)
    recorded = _methods(read_recorded(run), method)
    reports = []
    for name, runs in recorded.items():
        source, about = _costs(costs, draft, name, machines)
        found = simulated(runs, source, tuple(batch or _batches(source)), tuple(length or LENGTHS))
        reports.append((name, about, self_check(runs), found))
    if as_json:
        print(json.dumps({"projection": True, "costs": costs, "methods": [_json(*report) for report in reports]}))
        return
    for report in reports:
        _print(*report)
    if "@" not in costs:
        note("batches and contexts beyond those of the cost table are extrapolated")


def _methods(found: dict[str, list[Recorded]], names: list[str] | None) -> dict[str, list[Recorded]]:
    for name in names or []:
        if name not in found:
            raise SpecdecError(f"the run has no method {name!r} that drafts; it has: {', '.join(found)}")
    return {name: runs for name, runs in found.items() if names is None or name in names}


def _costs(name: str, draft: str | None, method: str, machines: Path | None) -> tuple[Costs, str]:
    """Costs, and what they are in words."""
    if "@" in name:
        drafts = draft or ("none" if method.partition(":")[0] in (*TEXT_WORDS, "recycling") else "head")
        machine = machine_named(name, drafts, machines)
        count = f"{machine.device.count} x " if machine.device.count > 1 else ""
        about = f"{machine.model.about} on {count}{machine.device.about}; drafting: {machine.draft_model.about}"
        return machine, f"{about}; assumptions in {machines or MACHINES}"
    if draft is not None or machines is not None:
        raise SpecdecError("--draft and --machines describe machines such as 8b@h100; a cost table has its own drafter")
    return CostTable.load(Path(name).expanduser()), f"the measured costs in {name}"


def _batches(costs: Costs) -> Sequence[int]:
    """All of them on a described machine, the measured ones of a table."""
    if isinstance(costs, CostTable):
        return sorted({point.batch for point in costs.verifications})
    return BATCHES


def _print(method: str, about: str, checked: SelfCheck | None, found: Sequence[Projection]) -> None:
    out.print(f"{LABEL}: {escape(method)}, {escape(about)}", soft_wrap=True)
    out.print(_checked(checked), soft_wrap=True)
    ways = list(dict.fromkeys(entry.way for entry in found))
    table = Table.grid(padding=(0, 2))
    for _ in range(len(ways) + 2):
        table.add_column(justify="right", no_wrap=True)
    table.add_row("batch", "plain tokens/s", *ways, style="dim")
    for batch in dict.fromkeys(entry.batch for entry in found):
        row = {entry.way: entry for entry in found if entry.batch == batch}
        first = row[ways[0]]
        cells = [f"{row[way].speedup:.2f}x" if row[way].fits else "no room" for way in ways]
        table.add_row(str(batch), f"{first.plain_tokens_per_second:.0f}" if first.fits else "no room", *cells)
    out.print(table)


def _checked(checked: SelfCheck | None) -> str:
    if checked is None:
        return "replay not checked: the run has no times of single rows by phases"
    share = 100 * (checked.replayed / checked.measured - 1)
    verdict = "holds" if checked.holds else "DOES NOT HOLD"
    return (
        f"replay under the run's own costs: {checked.replayed:.1f} tokens/s, measured {checked.measured:.1f} "
        f"({share:+.1f} %; {verdict}, tolerance {100 * TOLERANCE:.0f} %)"
    )


def _json(method: str, about: str, checked: SelfCheck | None, found: Sequence[Projection]) -> dict[str, Any]:
    check = None if checked is None else {**asdict(checked), "holds": checked.holds}
    return {
        "method": method,
        "about": about,
        "self_check": check,
        "projections": [{**asdict(entry), "speedup": entry.speedup} for entry in found],
    }
