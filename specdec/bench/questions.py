"""Question sets: by name, shipped or downloaded and verified, or by path, in any format that is known.

load_questions("six")                                  ships with specdec
load_questions("spec-bench")                           downloaded once, verified, cached
load_questions("questions.jsonl")                      format told from the file
load_questions(path, format="turns").limited(4)        four questions of each report column
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path

from specdec.bench.named_questions import NAMED
from specdec.bench.question import SPEC_BENCH_COLUMNS, Question
from specdec.bench.question_file import Record, records_of
from specdec.bench.question_formats import check_format, detect, question_of
from specdec.errors import BadQuestions

__all__ = ["SPEC_BENCH_COLUMNS", "Question", "QuestionSet", "load_questions"]


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one file, in its order.

    Attributes:
        name: one of NAMED, or the file's name up to its first dot.
        format: one of question_formats.FORMATS.
        sha256: of the whole file as it lies on disk, however few of its questions are taken.
        source: where it came from, a path or a URL.
        questions: at least one.
    """

    name: str
    format: str
    sha256: str
    source: str
    questions: tuple[Question, ...]

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def categories(self) -> tuple[str, ...]:
        """Raw categories, in order of first appearance."""
        return tuple(dict.fromkeys(question.category for question in self.questions))

    @property
    def columns(self) -> tuple[str, ...]:
        """Report columns: Spec-Bench's in its leaderboard's order, then others by first appearance."""
        found = dict.fromkeys(question.column for question in self.questions)
        known = [column for column in dict.fromkeys(SPEC_BENCH_COLUMNS.values()) if column in found]
        return tuple(dict.fromkeys([*known, *found]))

    def limited(
        self, per_category: int | None = None, categories: Sequence[str] | None = None, seed: int | None = None
    ) -> QuestionSet:
        """Fewer of the same questions, in the same order.

        Args:
            per_category: at most so many of each report column, spread evenly over the raw categories that make it
                up: 4 of Spec-Bench's "Multi-turn Conversation" are one each of writing, roleplay, reasoning, math.
            categories: only these raw categories or report columns.
            seed: choose at random instead of taking the first ones; what is chosen in a column depends on the
                seed and on that column alone.

        Raises:
            BadQuestions: a limit below 1, no categories, or one that the set does not have.
        """
        if per_category is not None and per_category < 1:
            raise BadQuestions(f"a limit of {per_category} questions for each category; expected at least 1")
        kept = self._in_categories(categories)
        if per_category is not None:
            by_column = {
                column: [question for question in kept if question.column == column] for column in self.columns
            }
            kept = [q for column, few in by_column.items() for q in _spread(few, per_category, column, seed)]
        taken = {question.id for question in kept}
        return replace(self, questions=tuple(question for question in self.questions if question.id in taken))

    def _in_categories(self, names: Sequence[str] | None) -> list[Question]:
        if names is None:
            return list(self.questions)
        known = list(dict.fromkeys([*self.categories, *self.columns]))
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None or not names:
            got = "no category given" if unknown is None else f"no category {unknown!r}{_meant(unknown, known)}"
            raise BadQuestions(f"{got}; {self.name} has {', '.join(known)}")
        return [question for question in self.questions if {question.category, question.column} & set(names)]


def load_questions(name_or_path: str | Path, *, format: str | None = None) -> QuestionSet:
    """Read a set by name, or a file by path; `./six` is a path where `six` is a name.

    Args:
        name_or_path: one of NAMED, or a file of JSON lines, plain text (.txt) or Parquet, gzipped or not.
        format: one of question_formats.FORMATS; told from the file when it is None.

    Raises:
        BadQuestions: no such name or file, a download that failed or is not what was expected, a file that cannot be
            read or has something wrong in it. One line, with file and line number where there is one.
    """
    if format is not None:
        check_format(format)
    if isinstance(name_or_path, str) and name_or_path in NAMED:
        named = NAMED[name_or_path]
        path = named.locate()
        return _read(path, named.name, named.url or str(path), format or named.format, named.first)
    path = Path(name_or_path).expanduser()
    text = ".txt" in path.suffixes[-2:]  # .txt or .txt.gz
    return _read(path, path.name.split(".")[0] or path.name, str(path), format or ("text" if text else None))


def _read(path: Path, name: str, source: str, format: str | None, first: int | None = None) -> QuestionSet:
    data = _bytes_of(path)
    records = records_of(str(path), data, text=format == "text")[:first]
    format = format or detect(records)
    questions = tuple(question_of(record, format) for record in records)
    _refuse_duplicates(records, questions)
    return QuestionSet(name, format, hashlib.sha256(data).hexdigest(), source, questions)


def _bytes_of(path: Path) -> bytes:
    if path.is_dir():
        raise BadQuestions(f"{path} is a directory; give the question file inside it")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        meant = _meant(str(path), list(NAMED))
        raise BadQuestions(f"no question file {path}{meant}; give a path or one of {', '.join(NAMED)}") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise BadQuestions(f"cannot read {str(path)!r}: {error}") from error


def _refuse_duplicates(records: Sequence[Record], questions: Sequence[Question]) -> None:
    seen: dict[str, int] = {}
    for record, question in zip(records, questions, strict=True):
        earlier = seen.setdefault(str(question.id), record.line)
        if earlier != record.line:
            raise record.bad(f"the id {question.id} is already on line {earlier}; every question needs its own")


def _spread(questions: Sequence[Question], limit: int, column: str, seed: int | None) -> list[Question]:
    """At most `limit` questions of one column: the first of each raw category, then the second of each, ..."""
    categories = dict.fromkeys(question.category for question in questions)
    piles = [[question for question in questions if question.category == category] for category in categories]
    if seed is not None:
        chance = random.Random(f"{seed} {column}")
        for pile in [*piles, piles]:
            chance.shuffle(pile)
    return [question for round in zip_longest(*piles) for question in round if question is not None][:limit]


def _meant(word: str, known: Sequence[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
