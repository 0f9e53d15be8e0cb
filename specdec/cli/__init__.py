"""The command line: `specdec demo | generate | bench | data | train | info | convert`.

Every command parses, calls the library and prints. Results go to stdout, notes and errors to stderr. Exit status: 0,
1 for a failure, 2 for wrong usage (what can be seen from the command line alone), 130 after Ctrl-C.
"""

from __future__ import annotations

from typing import Annotated

import typer

from specdec.cli.bench import app as bench
from specdec.cli.console import Commands
from specdec.cli.convert import convert
from specdec.cli.data import app as data
from specdec.cli.demo import demo
from specdec.cli.generate import generate
from specdec.cli.info import info
from specdec.cli.simulate import simulate
from specdec.cli.train import train
from specdec.cli.tune import tune
from specdec.version import __version__

app = typer.Typer(
    cls=Commands,
    name="specdec",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: specdec demo",
)
app.command()(demo)
app.command()(generate)
app.add_typer(bench, name="bench", help="Compare drafters and baselines on the same questions, and report.")
app.add_typer(data, name="data", help="Regenerate, prepare, preview and cache what drafters are trained on.")
app.command()(tune)
app.command()(simulate)
app.command()(train)
app.command()(info)
app.command()(convert)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specdec {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def specdec(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", hidden=True)] = False,
) -> None:
    """Lossless speculative decoding: the same text as model.generate(), faster."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), nl=False)


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="specdec")
