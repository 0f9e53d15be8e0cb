"""Keeping a choice: in the drafter's directory, in a new one, or as a specification to be used."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from specdec.drafters.directory import DrafterJson, fingerprint, read_drafter_json, write_drafter_json
from specdec.drafters.load import WORDS
from specdec.errors import SpecdecError
from specdec.probe import cache_folder
from specdec.tuning.settings import RESETS, Subject
from specdec.tuning.tune import TABLE_FILE, Tuned

FILE = "drafter.json"


@dataclass(frozen=True)
class Kept:
    """Where a choice is.

    Attributes:
        spec: what to say for it from now on.
        path: the file that holds it; None where it is only said.
        reason: why it was not written; "" where it was.
    """

    spec: str
    path: Path | None = None
    reason: str = ""


def check_out(subject: Subject, out: Path | None) -> None:
    """Refuse a directory for the choice before anything takes time.

    Raises:
        SpecdecError: the drafter has files of its own, or the directory holds something.
    """
    if out is None:
        return
    if _word(subject) is None:
        raise SpecdecError(
            f"{subject.name} has files of its own, beside which its options are kept; leave out --out, or tune a "
            "copy of it"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SpecdecError(f"{out} is not an empty directory; choose another --out")


def keep(found: Tuned, model: PreTrainedModel, table: Path | None, out: Path | None = None) -> Kept | None:
    """Write the choice to where `generate` and `bench` pick it up, as far as that is possible.

    Args:
        found: with a choice; one of no speculation is not written, and None comes back.
        model: the target.
        table: the file of measured acceptance that the choice may name.
        out: make a drafter directory there, of a drafter that is a word.
    """
    if not found.choice.setting.drafts:
        return None
    subject, word = found.subject, _word(found.subject)
    options = {**subject.given, **found.choice.setting.options}
    if out is not None:
        assert word is not None, "see check_out"
        _write(out, DrafterJson(word, {}, fingerprint(model)), options, table)
        return Kept(str(out), out / FILE)
    folder = Path(subject.name).expanduser()
    if subject.name in WORDS:
        return Kept(_said(found, table), None, "a word has no files; --out DIR makes a drafter directory of it")
    if not (folder / FILE).is_file() and not (folder / "config.json").is_file():
        return Kept(_said(found, table), None, f"{folder} is in a format that keeps no options")
    if not os.access(folder, os.W_OK):
        return Kept(_said(found, table), None, f"{folder} cannot be written to")
    described = DrafterJson("draft-model", {}, fingerprint(model))
    if (folder / FILE).is_file():
        described = read_drafter_json(folder)
        replaced = {*RESETS, *options, "grow"}
        described = replace(described, options={k: v for k, v in described.options.items() if k not in replaced})
    _write(folder, described, options, table)
    return Kept(str(folder), folder / FILE)


def _word(subject: Subject) -> str | None:
    """The word that a drafter is, by name or by its drafter.json."""
    if subject.name in WORDS:
        return subject.name
    folder = Path(subject.name).expanduser()
    kind = read_drafter_json(folder).kind if (folder / FILE).is_file() else ""
    return kind if kind in WORDS else None


def _write(folder: Path, described: DrafterJson, options: dict[str, str], table: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if "table" in options and table is not None and Path(options["table"]) == table:
        shutil.copyfile(table, folder / TABLE_FILE)
        options = {**options, "table": TABLE_FILE}
    write_drafter_json(folder, replace(described, options={**described.options, **options}))


def _said(found: Tuned, table: Path | None) -> str:
    """The specification; a table that it names is kept in the user's cache folder, under its contents' hash."""
    spec = found.spec
    assert spec is not None
    if table is None or str(table) not in spec:
        return spec
    content = table.read_bytes()
    kept = cache_folder() / "tables" / f"{hashlib.sha256(content).hexdigest()[:16]}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(content)
    return spec.replace(str(table), str(kept))
