"""Summaries and reports of whole runs: the same numbers everywhere, hostile texts harmless, differences said."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from specdec.bench.report import write_report
from specdec.bench.report.document import Document, Paragraph
from specdec.bench.report.markdown import escaped, markdown
from specdec.bench.report.provenance import command_line
from specdec.bench.report.words import interval, milliseconds
from specdec.bench.summary import summarize, write_summary
from specdec.errors import SpecdecError
from tests.bench.synthetic import MANIFEST, chain_steps, random_run, record, verdict, write_run

HOSTILE = "<script>alert('x')</script>|`*_[a](http://b)&\x00\ud800\n# heading"


class Page(HTMLParser):
    """What a browser would make of a file: tags, attributes and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data


def two_methods(path: Path, seed: int = 0, **options: Any) -> Path:
    return write_run(path, random_run(seed, {"plain": (0, 0), "lookup": (0.95, 5)}, questions=12, **options))


def reported(path: Path) -> tuple[str, Page]:
    write_report([path], path)
    return (path / "report.md").read_text(), Page(path / "report.html")


def test_a_summary_of_two_prompts_by_hand(tmp_path: Path):
    steps = chain_steps([2], [2])
    records = [
        record("plain", 1, total=4.0, steps={"emitted": [1] * 3, "total": [1.0] * 3}),
        record("plain", 2, total=9.0, category="rag", steps={"emitted": [1] * 3, "total": [1.0] * 3}),
        record("lookup", 1, total=2.0, steps=steps),
        record("lookup", 2, total=1.0, category="rag", steps=steps),
    ]
    summary = summarize(write_run(tmp_path, records))
    lookup = summary["methods"]["lookup"]
    assert list(summary["methods"]) == ["plain", "lookup"]
    assert lookup["overall"]["speedup"]["geometric_mean"]["value"] == pytest.approx(18**0.5)
    assert lookup["columns"]["Question Answering"]["speedup"]["geometric_mean"]["value"] == pytest.approx(2)
    assert lookup["categories"]["rag"]["speedup"]["total_time_ratio"]["value"] == pytest.approx(9)
    assert lookup["overall"]["acceptance"]["tau"]["value"] == 3
    assert lookup["overall"]["exactness"]["questions"]["exact"] == 2
    assert lookup["columns"]["Question Answering"]["exactness"]["questions"]["exact"] == 1
    assert lookup["overall"]["throughput"]["tokens_per_second"] == pytest.approx(8 / 3)
    assert lookup["vllm"]["spec_decode_acceptance_length"] == 3
    assert summary["methods"]["plain"]["overall"]["speedup"] == {}


def test_a_summary_survives_json_and_brings_a_profile_for_each_drafting_method(tmp_path: Path):
    summary = summarize(two_methods(tmp_path))
    files = write_summary(summary, tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in files] == [
        "summary.json",
        "profiles/lookup/speculation_profile.json",
    ]
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(summary))
    assert json.loads(files[1].read_text())["validation"]["mean_consistency"]["passed"]


def test_a_batched_run_counts_its_time_once(tmp_path: Path):
    timed: dict[str, float | None] = {"ttft": 1.0}
    rows = [
        record(method, question, total=total, batch=(2, row, 0), seconds=timed, steps=chain_steps([0] * 3, [0] * 3))
        for method, total in (("plain", 9.0), ("none", 5.0))
        for row, question in enumerate((1, 2))
    ]
    summary = summarize(write_run(tmp_path, rows))
    assert summary["methods"]["plain"]["overall"]["throughput"]["seconds"] == pytest.approx(9)
    assert summary["methods"]["none"]["overall"]["speedup"]["geometric_mean"]["value"] == pytest.approx(9 / 5)
    assert summary["methods"]["none"]["overall"]["prediction"] == {}
    write_report([tmp_path], tmp_path)


def test_the_verdict_stands_at_the_top_with_interval_and_exactness(tmp_path: Path):
    text, page = reported(two_methods(tmp_path))
    estimate = summarize(tmp_path)["methods"]["lookup"]["overall"]["speedup"]["geometric_mean"]
    line = f"{estimate['value']:.2f}x plain generation (95 % interval {estimate['low']:.2f} to {estimate['high']:.2f})"
    assert f"lookup: {line}, 12/12 exact." in page.words
    assert page.words.index(line) < page.words.index("Overview")
    assert f"lookup: {line}, 12/12 exact." in text


def test_markdown_and_html_hold_the_same_tables(tmp_path: Path):
    text, page = reported(two_methods(tmp_path))
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.strip("|").split("|")]
    plain = [re.sub(r"\\(.)", r"\1", cell) for cell in cells if not re.fullmatch(r"-+:?", cell)]
    assert len(plain) > 100
    assert [cell for cell in plain if cell not in page.words] == []


def test_a_report_is_one_file_without_scripts_and_without_anything_from_elsewhere(tmp_path: Path):
    _, page = reported(two_methods(tmp_path))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("svg") == 5
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    source = (tmp_path / "report.html").read_text()
    assert "http" not in source
    assert "url(" not in source
    assert "@import" not in source


def test_hostile_names_and_errors_are_text(tmp_path: Path):
    records = random_run(0, {"plain": (0, 0), HOSTILE: (0.9, 3)}, categories=[HOSTILE], questions=3)
    records.append(record(HOSTILE, 99, category=HOSTILE, tokens=0, error=HOSTILE))
    write_run(tmp_path, records, manifest={"target": {"name": HOSTILE}, "command": ["specdec", HOSTILE]})
    text, page = reported(tmp_path)
    assert json.loads(write_summary(summarize(tmp_path), tmp_path)[0].read_text())["methods"][HOSTILE]["records"] == 4
    assert "script" not in page.tags
    assert "<script>alert('x')</script>" in page.words
    assert "\x00" not in text
    outside_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<script>" not in outside_code
    assert "\n# heading" not in outside_code
    widths = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| column")}
    assert len(widths) == 1


def test_wrong_answers_of_a_lossless_method_are_shouted_and_those_of_a_lossy_one_are_marked(tmp_path: Path):
    records = random_run(0, {"plain": (0, 0), "a": (0.9, 3), "b": (0.9, 3)}, questions=12, lossy=["b"])
    judged = [verdict(entry, "wrong" if entry["question_id"] == 3 else "exact") for entry in records]
    write_run(tmp_path, records, judged)
    text, page = reported(tmp_path)
    assert "a is lossless by design, but 1 question came out wrong." in page.words
    assert "b is lossless by design" not in page.words
    assert "11/12, 1 wrong" in page.words
    rows = [line for line in text.splitlines() if line.startswith("| b")]
    assert len(rows) > 5
    assert all("lossy: typical" in row for row in rows)


def test_one_question_has_values_and_no_interval(tmp_path: Path):
    _, page = reported(write_run(tmp_path, random_run(0, {"plain": (0, 0), "lookup": (0.9, 3)}, questions=1)))
    assert "too few prompts for an interval" in page.words
    assert "Only 1 question: there are no intervals." in page.words


def test_a_run_in_which_everything_failed_is_still_reported(tmp_path: Path):
    records = [record(method, 1, tokens=0, error="out of memory") for method in ("plain", "lookup")]
    summary = summarize(write_run(tmp_path, records))
    assert summary["methods"]["lookup"]["errors"]["count"] == 1
    assert summary["methods"]["lookup"]["overall"]["throughput"]["tokens_per_second"] is None
    _, page = reported(tmp_path)
    assert "lookup: 1 of 1 records failed and is left out; the first, question 1: out of memory" in page.words
    assert "Without answers of the baseline there are no speed-ups." in page.words


def test_a_run_in_which_nothing_was_accepted_is_reported(tmp_path: Path):
    _, page = reported(write_run(tmp_path, random_run(0, {"plain": (0, 0), "lookup": (0.0, 3)}, questions=12)))
    assert "0.0 %" in page.words
    assert "100.0 %" in page.words


def test_an_unfinished_run_says_so(tmp_path: Path):
    records = random_run(0, {"plain": (0, 0), "lookup": (0.9, 3)}, questions=2)
    _, page = reported(write_run(tmp_path, records, manifest={"finished": None}))
    assert "The run is not finished" in page.words


def test_runs_of_one_machine_are_divided_by_each_other(tmp_path: Path):
    runs = [two_methods(tmp_path / name, seed) for seed, name in enumerate(("first", "second"))]
    write_report(runs, tmp_path / "out")
    page = Page(tmp_path / "out" / "report.html")
    assert "Same target, questions, settings, machine and versions." in page.words
    assert "Run over run, relative to A: first" in page.words


def test_runs_of_two_machines_are_never_divided_by_each_other(tmp_path: Path):
    first = two_methods(tmp_path / "first")
    other = random_run(1, {"plain": (0, 0), "lookup": (0.9, 5)}, questions=12)
    second = write_run(tmp_path / "second", other, manifest={"hardware": {"cpu": "another machine", "threads": 2}})
    write_report([first, second], tmp_path / "out")
    page = Page(tmp_path / "out" / "report.html")
    assert "The runs differ in machine: no times are compared across them" in page.words
    assert "Run over run" not in page.words
    assert "another machine" in page.words


def test_runs_are_compared_on_the_questions_they_share(tmp_path: Path):
    first = two_methods(tmp_path / "first")
    fewer = [entry for entry in random_run(0, {"plain": (0, 0), "lookup": (0.95, 5)}, questions=12)
             if int(entry["question_id"]) < 5]  # fmt: skip
    second = write_run(tmp_path / "second", fewer)
    write_report([first, second], tmp_path / "out")
    page = Page(tmp_path / "out" / "report.html")
    assert "All numbers are of the 5 questions that the runs share; A: first has 12, B: second has 5." in page.words
    values = re.findall(
        r"^\| lookup \| ([\d.]+) \\\[.*?\| ([\d.]+)", (tmp_path / "out" / "report.md").read_text(), re.M
    )
    assert values
    assert values[0][0] == values[0][1]  # the same records, once restricted and once whole


def test_runs_without_a_common_prompt_are_not_compared(tmp_path: Path):
    first = two_methods(tmp_path / "first")
    others = random_run(0, {"plain": (0, 0)}, questions=3)
    for entry in others:
        entry["prompt"]["sha256"] = "another template"
    second = write_run(tmp_path / "second", others)
    write_report([first, second], tmp_path / "out")
    page = Page(tmp_path / "out" / "report.html")
    assert "no question with the same prompt in common: nothing is compared" in page.words
    assert "Speed-up over plain" not in page.words


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "holds no run"),
        ({"records.jsonl": ""}, "a run without records"),
        ({"records.jsonl": json.dumps(record()) + "\n", "manifest.json": "{"}, "manifest.json is not JSON"),
        ({"records.jsonl": json.dumps(record()) + "\n", "manifest.json": "[]"}, "expected a JSON object"),
    ],
)
def test_a_directory_that_holds_no_run_is_refused_in_one_line(tmp_path: Path, files: dict[str, str], complaint: str):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SpecdecError, match=complaint) as caught:
        write_report([tmp_path], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_run_or_one_named_twice_is_refused(tmp_path: Path):
    with pytest.raises(SpecdecError, match="give one directory or more"):
        write_report([], tmp_path)
    run = two_methods(tmp_path)
    with pytest.raises(SpecdecError, match="named twice"):
        write_report([run, run / "."], tmp_path)


def test_methods_come_as_the_manifest_lists_them_with_the_baseline_first(tmp_path: Path):
    records = random_run(0, {name: (0.5, 2) for name in ("z", "a", "none", "plain")}, questions=2)
    listed = [{"name": name} for name in ("none", "z", "a", "plain", "never ran")]
    summary = summarize(write_run(tmp_path, records, manifest=MANIFEST | {"methods": listed}))
    assert list(summary["methods"]) == ["plain", "none", "z", "a"]


def test_columns_come_in_spec_benchs_order_and_then_others(tmp_path: Path):
    categories = ["rag", "poems", "math", "writing", "translation"]
    records = random_run(0, {"plain": (0, 0)}, categories=categories, questions=1)
    summary = summarize(write_run(tmp_path, records))
    columns = ["Multi-turn Conversation", "Translation", "Retrieval-aug. Generation", "poems"]
    assert summary["columns"] == columns
    assert summary["categories"] == ["writing", "math", "translation", "rag", "poems"]


def test_words_of_numbers():
    assert interval({"value": 1.834, "low": 1.79, "high": 1.881}) == "1.83 [1.79, 1.88]"
    assert interval({"value": 1.834, "low": None, "high": None}) == "1.83"
    assert [milliseconds(s) for s in (None, 0.00123, 0.0456, 1.2345)] == ["-", "1.23", "45.6", "1,234"]
    assert command_line(["/usr/bin/specdec", "bench", "a b"]) == "specdec bench 'a b'"
    assert escaped("a|b\n<c> *d*") == r"a\|b \<c\> \*d\*"
    assert markdown(Document("t", [Paragraph("x_y")])) == "x\\_y\n"
