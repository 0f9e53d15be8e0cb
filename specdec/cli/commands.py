"""Every command: its summary, known without importing it, and the way to it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer

COMMANDS = {
    "demo": "Compare plain and speculative generation on the model that ships with specdec. Needs no network.",
    "generate": "Continue a prompt. The text streams to stdout; it is what plain generate() would write.",
    "bench": "Compare drafters and baselines on the same questions, and report.",
    "data": "Regenerate, prepare, preview and cache what drafters are trained on.",
    "tune": "Choose how much a drafter proposes by acceptance and costs measured here, and keep the choice.",
    "simulate": "Replay recorded acceptance under other costs: expected speed-up by batch size and draft length.",
    "train": "Train a drafter for a target and measure it on held-out prompts while it learns.",
    "info": "Say what a model, drafter or draft head is: its size, whether it verifies trees, which target it fits.",
    "convert": "Write a draft head in another format; what the format cannot hold is an error, never dropped.",
}
"""In the order of the help. The summary of a command is the first paragraph of its function (tests/test_cli.py)."""


def command_named(name: str) -> Any:
    """The parser's command: that of the function with the command's name in its module, or of the module's `app`."""
    module = import_module(f"specdec.cli.{name}")
    holder = typer.Typer(rich_markup_mode="rich")
    if hasattr(module, "app"):
        holder.add_typer(module.app, name=name, help=COMMANDS[name])
    else:
        holder.command(name)(getattr(module, name))
    return typer.main.get_group(holder).commands[name]
