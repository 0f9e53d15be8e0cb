"""The report of one run."""

from __future__ import annotations

from specdec.bench.report.document import Document
from specdec.bench.report.drafting import acceptance_section, tokens_per_step_section
from specdec.bench.report.exact import exactness_section
from specdec.bench.report.headline import headline, overview
from specdec.bench.report.provenance import conventions_section, reproduce_section
from specdec.bench.report.speed import columns_section, itself_section, slowest_section, spec_bench_section
from specdec.bench.report.times import cost_section, latency_section, steps_section
from specdec.bench.report.words import Summary


def run_document(summary: Summary) -> Document:
    """Everything that is known of a run, the verdict first."""
    target = (summary["manifest"].get("target") or {}).get("name") or "target not recorded"
    document = Document(f"specdec bench: {target}")
    for section in (
        headline,
        overview,
        columns_section,
        exactness_section,
        acceptance_section,
        tokens_per_step_section,
        steps_section,
        cost_section,
        latency_section,
        slowest_section,
        itself_section,
        spec_bench_section,
        conventions_section,
        reproduce_section,
    ):
        document.add(*section(summary))
    return document
