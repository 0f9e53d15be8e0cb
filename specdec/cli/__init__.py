"""The command line: `specdec demo | generate | bench | data | train | info | convert`.

Every command parses, calls the library and prints. Results go to stdout, notes and errors to stderr. Exit status: 0,
1 for a failure, 2 for wrong usage (what can be seen from the command line alone), 130 after Ctrl-C.

A command's module is imported when that command is asked for: torch and transformers take seconds.
"""

from __future__ import annotations

from typing import Annotated

import typer

from specdec.cli.commands import COMMANDS
from specdec.cli.console import Commands
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


def _stands_for_a_command() -> None:
    """`Commands` puts the command itself in its place before anything is parsed."""


for _name, _summary in COMMANDS.items():
    app.command(_name, help=_summary)(_stands_for_a_command)


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
    """Parse the process's arguments and run."""
    app(prog_name="specdec")
