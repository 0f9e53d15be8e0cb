"""Reports of one run or several: report.md and a self-contained report.html with the same numbers."""

from specdec.bench.report.write import write_report

__all__ = ["write_report"]
