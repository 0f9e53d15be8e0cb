"""Question sets that have a name: shipped with specdec, or downloaded from a pinned commit and verified.

None of the downloaded ones may be shipped: their texts come from others, under terms of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specdec.bench.download import Download, downloaded

SHIPPED = Path(__file__).parent / "data"
GITHUB = "https://raw.githubusercontent.com"
SPEC_BENCH = Download(
    url=f"{GITHUB}/hemingkx/Spec-Bench/fd2c1cd7d2201ef71db4c5f4e455008f017967bf/data/spec_bench/question.jsonl",
    sha256="4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04",
    size=698_768,
)
HUMANEVAL = Download(
    url=f"{GITHUB}/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz",
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    size=44_877,
)
GSM8K = Download(
    url=f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/test.jsonl",
    sha256="3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    size=749_738,
)


@dataclass(frozen=True)
class NamedQuestions:
    """Where the questions of a name are, and how to read them.

    Attributes:
        name: what a user says.
        format: one of question_formats.FORMATS.
        about: one line for people.
        file: where it lies, or what to download.
        first: only so many of the file's records; None for all.
    """

    name: str
    format: str
    about: str
    file: Path | Download
    first: int | None = None

    @property
    def url(self) -> str | None:
        """Where it is downloaded from, if it is."""
        return self.file.url if isinstance(self.file, Download) else None

    def locate(self) -> Path:
        """The file on this machine, downloaded now if need be.

        Raises:
            BadQuestions: the download failed, or is not what was expected.
        """
        return downloaded(self.name, self.file) if isinstance(self.file, Download) else self.file


NAMED: dict[str, NamedQuestions] = {
    named.name: named
    for named in (
        NamedQuestions("six", "spec-bench", "30 questions in Spec-Bench's six columns; ships", SHIPPED / "six.jsonl"),
        NamedQuestions("demo-code", "turns", "24 beginnings of Python code; ships", SHIPPED / "demo-code.jsonl"),
        NamedQuestions("spec-bench", "spec-bench", "Spec-Bench's 480 questions; downloaded", SPEC_BENCH),
        NamedQuestions(
            "mt-bench", "mt-bench", "MT-bench's 80 questions of two turns; downloaded", SPEC_BENCH, first=80
        ),
        NamedQuestions("humaneval", "humaneval", "HumanEval's 164 functions; downloaded", HUMANEVAL),
        NamedQuestions("gsm8k", "gsm8k", "GSM8K's 1319 test problems; downloaded", GSM8K),
    )
}
"""Every name that `load_questions` knows."""
