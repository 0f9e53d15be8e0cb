"""Sections that let a reader judge and repeat a run: conventions, command, machine, versions."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from specdec.bench.report.document import Block, Cell, Code, Heading, Paragraph, Table
from specdec.bench.report.words import MISSING, Summary

CONVENTIONS = (
    ("tau", "this report", "yes", "steps"),
    ("tau by request", "this report", "yes", "requests"),
    ("accepted / drafted", "this report, vLLM and NVIDIA (acceptance rate)", "no", "drafted tokens"),
    ("#mean accepted tokens", "Spec-Bench", "yes", "steps"),
    ("mean acceptance length", "vLLM", "yes", "steps that drafted"),
    ("accept length", "SGLang, SpecForge's matrix", "yes", "tokens over verifications"),
    ("average acceptance length", "SpecForge's benchmark, NVIDIA (Average_AL)", "yes", "requests"),
    ("mean_accept_length", "NVIDIA's speculation profile", "yes", "steps"),
    ("mean accepted", "gpt-fast", "no", "steps"),
)
SECTIONS = ("target", "questions", "prompts", "settings", "hardware", "versions")
LEFT_OUT = ("target.fingerprint.", "target.generation_config.")
"""Details that manifest.json has."""
STARTS = ("started", "git_commit", "load_average")
LONG = 120


def conventions_section(summary: Summary) -> list[Block]:
    """Whose number of accepted tokens means what."""
    rows: list[list[str | Cell]] = [list(row) for row in CONVENTIONS]
    note = (
        "Numbers of accepted tokens compare only within one row. summary.json holds vLLM's and NVIDIA's numbers under "
        "their own names; profiles/ holds a speculation profile for each method that drafted."
    )
    head = ["name", "used by", "next_token counted", "averaged over"]
    return [Heading("Conventions"), Table(head, rows, names=4), Paragraph(note, small=True)]


def reproduce_section(summary: Summary) -> list[Block]:
    """Command, machine and versions."""
    manifest = summary["manifest"]
    blocks: list[Block] = [Heading("Reproduce")]
    if manifest.get("command"):
        blocks.append(Code(command_line(manifest["command"])))
    fields = [field for section in SECTIONS for field in flat(manifest.get(section), section)]
    fields = [(name, value) for name, value in fields if not name.startswith(LEFT_OUT)]
    for start in (manifest.get("starts") or [])[-1:]:
        fields += [(f"start.{key}", _shown(start[key])) for key in STARTS if key in start]
    blocks.append(Table(["what", "value"], fields, names=2))
    return blocks


def command_line(command: Any) -> str:
    """What was typed: the program by its name, arguments quoted where a shell needs it."""
    if isinstance(command, str):
        return command
    words = [str(word) for word in command]
    program = "specdec" if PurePath(words[0]).name == "__main__.py" else PurePath(words[0]).name
    return shlex.join([program, *words[1:]])


def flat(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Dotted names and values of nested fields; long lists and hashes are cut."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}")
    else:
        yield name, _shown(value)


def _shown(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)} entries"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONG else f"{text[:LONG]}…"
