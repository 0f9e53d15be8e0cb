"""A run's directory, read for statistics and reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.bench.exactness import EXACTNESS_FILE
from specdec.bench.manifest import MANIFEST_FILE
from specdec.bench.methods import NONE, PLAIN
from specdec.bench.question import SPEC_BENCH_COLUMNS
from specdec.bench.record import RECORDS_FILE, Record, read_records
from specdec.bench.run import SPEC_BENCH_FILE
from specdec.errors import SpecdecError


@dataclass(frozen=True)
class MeasuredRun:
    """What a run left behind.

    Attributes:
        path: its directory.
        manifest: command, target, drafters, questions, settings, hardware, versions.
        records: in the order in which they ran.
        verdicts: of exactness, one for each record that was judged.
        spec_bench: method -> task -> numbers by the formula of Spec-Bench itself.
    """

    path: Path
    manifest: dict[str, Any]
    records: list[Record]
    verdicts: list[dict[str, Any]]
    spec_bench: dict[str, Any]

    @property
    def methods(self) -> list[str]:
        """The baseline, our loop without a drafter, then the others as the manifest or else the alphabet has them."""
        found = {record["method"] for record in self.records}
        listed = self.manifest.get("methods") or []
        named = [name for entry in listed if (name := entry.get("name") if isinstance(entry, dict) else entry) in found]
        return list(dict.fromkeys([*(name for name in (PLAIN, NONE) if name in found), *named, *sorted(found)]))

    @property
    def columns(self) -> list[str]:
        """Spec-Bench's columns in its order, then the others."""
        found = {record["column"] for record in self.records}
        known = [column for column in dict.fromkeys(SPEC_BENCH_COLUMNS.values()) if column in found]
        return [*known, *sorted(found.difference(known))]

    @property
    def categories(self) -> list[str]:
        """Raw categories, in the order of their columns."""
        found = {record["category"]: record["column"] for record in self.records}
        known = list(SPEC_BENCH_COLUMNS)
        place = {category: known.index(category) if category in known else len(known) for category in found}
        return sorted(found, key=lambda category: (self.columns.index(found[category]), place[category], category))


def read_run(path: Path) -> MeasuredRun:
    """Read a run's directory.

    Raises:
        SpecdecError: it holds no run, or one of its files is damaged.
    """
    if not (path / RECORDS_FILE).is_file():
        raise SpecdecError(
            f"{path} holds no run: there is no {RECORDS_FILE}; give a directory written by specdec bench"
        )
    records = read_records(path)
    if not records:
        raise SpecdecError(f"{path} holds a run without records: let specdec bench finish at least one")
    lines = _text(path / EXACTNESS_FILE, "").splitlines()
    return MeasuredRun(
        path,
        _json(path / MANIFEST_FILE, _text(path / MANIFEST_FILE, "{}")),
        records,
        [_json(path / EXACTNESS_FILE, line) for line in lines if line.strip()],
        _json(path / SPEC_BENCH_FILE, _text(path / SPEC_BENCH_FILE, "{}")),
    )


def _text(file: Path, missing: str) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else missing


def _json(file: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise SpecdecError(f"{file} is not JSON: {error}; restore the file or measure again") from error
    if not isinstance(value, dict):
        raise SpecdecError(f"{file} holds {type(value).__name__}, expected a JSON object; restore the file")
    return value
