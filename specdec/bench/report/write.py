"""From run directories to report.md and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specdec.bench.measured_run import read_run
from specdec.bench.report.comparison import comparison_document
from specdec.bench.report.html import html
from specdec.bench.report.markdown import markdown
from specdec.bench.report.single import run_document
from specdec.bench.summary import summary_of
from specdec.errors import SpecdecError
from specdec.json_lines import write_text

MARKDOWN_FILE, HTML_FILE = "report.md", "report.html"


def write_report(run_dirs: Sequence[Path], out: Path) -> list[Path]:
    """Report one run, or several side by side, aligned by method and question.

    Args:
        run_dirs: directories that `specdec bench` wrote; the first of several is what the others are compared with.
        out: directory for report.md and report.html; made where it is missing.

    Returns:
        The two files.

    Raises:
        SpecdecError: a directory without a run, a damaged one, or the same one twice.
    """
    if not run_dirs:
        raise SpecdecError("no run to report: give one directory or more that specdec bench wrote")
    resolved = [path.resolve() for path in run_dirs]
    if len(set(resolved)) < len(resolved):
        raise SpecdecError("a run is named twice; give each directory once")
    runs = [read_run(path) for path in run_dirs]
    document = run_document(summary_of(runs[0])) if len(runs) == 1 else comparison_document(runs)
    files = [out / MARKDOWN_FILE, out / HTML_FILE]
    for file, text in zip(files, (markdown(document), html(document)), strict=True):
        write_text(file, text)
    return files
