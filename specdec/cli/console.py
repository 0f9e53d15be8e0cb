"""The console: results on stdout, one-line notes and errors on stderr, and how a command ends."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from specdec.cli.commands import command_named
from specdec.interrupt import INTERRUPTED, ends_at_once

UsageError: type[Exception] = typer.BadParameter.mro()[1]
"""The parser's error class. Typer exports only this subclass of it, and which parser it uses differs by version."""

FAILURE, BROKEN_PIPE = 1, 141

out = Console(highlight=False, soft_wrap=False)
"""Where results are printed."""


def note(message: str) -> None:
    """One line on stderr."""
    typer.echo(f"specdec: {message}", err=True)


class Commands(TyperGroup):
    """Ends every command with an exit status and at most one line, whatever a user does to it."""

    def main(self, args: Any = None, *rest: Any, **extra: Any) -> Any:
        """Parse and run; never returns."""
        arguments = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        if "--debug" in arguments[:1] or _asked_for_tracebacks():
            sys.exit(super().main(arguments, *rest, **extra) or 0)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 gets "?" instead of an error
        try:
            status = super().main(arguments, *rest, **extra) or 0
            sys.stdout.flush()
        except BrokenPipeError:
            status = _silenced()
        except UsageError as error:
            status = error.exit_code  # type: ignore[attr-defined]
            note(f"{_one_line(error.format_message())} {_see_help(error)}")  # type: ignore[attr-defined]
        except Exception as error:
            status = FAILURE
            note(explain(error))
        sys.exit(status)

    def resolve_command(self, ctx: Any, args: Any) -> Any:
        """Find the command by name and, only now, import it."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            with ends_at_once():
                command = command_named(name)
                if not (ctx.params.get("debug") or _asked_for_tracebacks()):
                    ctx.with_resource(quiet_libraries())
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C ends it with one line, a reader that has gone with none."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise typer.Exit(_silenced()) from None
        except KeyboardInterrupt:
            typer.echo("", err=True)  # leaves the line that was being written
            note("interrupted")
            raise typer.Exit(INTERRUPTED) from None


def _asked_for_tracebacks() -> bool:
    return os.environ.get("SPECDEC_DEBUG", "0") not in ("", "0")


def explain(error: Exception) -> str:
    """One line for an exception: what a user can cause as it is, anything else with where to look."""
    torch = sys.modules.get("torch")  # whoever ran out of its memory has imported it
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"out of memory ({_one_line(str(error))[:150]}); use a smaller --dtype, less text or another --device"
    if isinstance(error, ValueError | OSError):
        return _one_line(str(error)) or type(error).__name__
    return f"unexpected {type(error).__name__}: {_one_line(str(error))[:300]} (SPECDEC_DEBUG=1 shows the traceback)"


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _see_help(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"(see {context.command_path if context else 'specdec'} --help)"


def _silenced() -> int:
    """The reader has gone: say nothing, not even when Python flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the loading bars and advice of transformers; what matters to a user is an error or a note of ours."""
    import transformers

    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
