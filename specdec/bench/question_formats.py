"""From a record to a question: the formats that question files come in, one function for each.

    spec-bench    question_id, category (one of Spec-Bench's 13), turns, reference (optional)
    mt-bench      the same with MT-bench's 8 categories, which are the first 8 of the 13
    turns         the same with any categories; those that Spec-Bench does not have are columns of their own
    speed-bench   question_id, category, and turns or messages; its 11 categories are columns of their own
    humaneval     task_id, prompt, canonical_solution (optional)
    gsm8k         question, answer (optional)
    text          plain text: blocks between blank lines

Further keys are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from typing import Any

from specdec.bench.question import MT_BENCH_CATEGORIES, SPEC_BENCH_COLUMNS, Question
from specdec.bench.question_file import Record, shown
from specdec.errors import BadQuestions

SPEED_BENCH_ONLY = {"sub_category", "src_id", "difficulty", "multiturn", "messages"}
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"
"""How a turn of SPEED-Bench begins whose text its licence keeps elsewhere."""


def question_of(record: Record, format: str) -> Question:
    """The question that a record holds.

    Args:
        record: one entry of the file.
        format: one of FORMATS.

    Raises:
        BadQuestions: a key is missing, a value has the wrong type or says nothing.
    """
    return FORMATS[format](record)


def detect(records: Sequence[Record]) -> str:
    """The format of a file that is not plain text, told from the keys of its first record.

    Where those are Spec-Bench's, the categories of all records decide: all of MT-bench, at least one of Spec-Bench,
    or none of them. So one misspelt category does not turn a Spec-Bench file into something else.

    Raises:
        BadQuestions: no format has such keys.
    """
    keys = records[0].fields.keys()
    if {"task_id", "prompt"} <= keys:
        return "humaneval"
    if {"question", "answer"} <= keys:
        return "gsm8k"
    if keys & SPEED_BENCH_ONLY:
        return "speed-bench"
    if not keys & {"turns", "category", "question_id"}:
        expected = "question_id, category and turns; task_id and prompt; or question and answer"
        raise records[0].bad(f"no known format has the keys {shown(sorted(keys))}; expected {expected}")
    found = {category for record in records if isinstance(category := record.fields.get("category"), str)}
    if found and found.issubset(MT_BENCH_CATEGORIES):
        return "mt-bench"
    return "spec-bench" if found & SPEC_BENCH_COLUMNS.keys() else "turns"


def check_format(format: str) -> None:
    """Refuse a word that names no format.

    Raises:
        BadQuestions: the word is not in FORMATS.
    """
    if format not in FORMATS:
        raise BadQuestions(
            f"no question format {format!r}{_meant(format, FORMATS)}; choose one of {', '.join(FORMATS)}"
        )


def _spec_bench(record: Record) -> Question:
    return _turns_of_categories(record, SPEC_BENCH_COLUMNS, "Spec-Bench")


def _mt_bench(record: Record) -> Question:
    return _turns_of_categories(record, MT_BENCH_CATEGORIES, "MT-bench")


def _turns_of_categories(record: Record, known: Collection[str], owner: str) -> Question:
    question = _turns(record)
    if question.category not in known:
        advice = f"expected one of {', '.join(known)}; to take any category, say format turns"
        meant = _meant(question.category, known)
        raise record.bad(f"category {shown(question.category)} is none of {owner}'s {len(known)}{meant}; {advice}")
    return question


def _turns(record: Record, own_column: bool = False) -> Question:
    return Question(
        id=_identity(record, "question_id"),
        category=_text(record, "category", _required(record, "category")),
        turns=_texts(record, "turns"),
        references=_references(record, "reference"),
        line=record.line,
        own_column=own_column,
    )


def _speed_bench(record: Record) -> Question:
    if record.fields.get("messages") is None:
        return _turns(record, own_column=True)
    turns = [_user_message(record, message) for message in _nonempty_list(record, "messages")]
    return _turns(Record(record.file, record.line, {**record.fields, "turns": turns}), own_column=True)


def _humaneval(record: Record) -> Question:
    turns, references = _texts(record, "prompt"), _references(record, "canonical_solution")
    return Question(_identity(record, "task_id"), "humaneval", turns, references, record.line, own_column=True)


def _gsm8k(record: Record) -> Question:
    turns, references = _texts(record, "question"), _references(record, "answer")
    return Question(record.line, "gsm8k", turns, references, record.line, own_column=True)


def _plain_text(record: Record) -> Question:
    return Question(record.line, "text", _texts(record, "text"), (), record.line, own_column=True)


FORMATS: dict[str, Callable[[Record], Question]] = {
    "spec-bench": _spec_bench,
    "mt-bench": _mt_bench,
    "turns": _turns,
    "speed-bench": _speed_bench,
    "humaneval": _humaneval,
    "gsm8k": _gsm8k,
    "text": _plain_text,
}


def _required(record: Record, key: str) -> Any:
    if key not in record.fields:
        raise record.bad(f"{key} is missing; got the keys {shown(sorted(record.fields))}")
    return record.fields[key]


def _identity(record: Record, key: str) -> int | str:
    value = _required(record, key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise record.bad(f"{key} is {shown(value)}; expected a whole number or a text")
    return value


def _texts(record: Record, key: str) -> tuple[str, ...]:
    """A text, or a list of at least one."""
    if isinstance(_required(record, key), str) and key != "turns":
        return (_text(record, key, record.fields[key]),)
    values = _nonempty_list(record, key)
    return tuple(_text(record, f"{key}[{index}]", value) for index, value in enumerate(values))


def _nonempty_list(record: Record, key: str) -> list[Any]:
    value = _required(record, key)
    if not isinstance(value, list):
        raise record.bad(f"{key} is {shown(value)}; expected a list")
    if not value:
        raise record.bad(f"{key} is empty; expected at least one")
    return value


def _text(record: Record, what: str, value: object) -> str:
    if not isinstance(value, str):
        raise record.bad(f"{what} is {shown(value)}; expected a text")
    if not value.strip():
        raise record.bad(f"{what} is blank; expected a text")
    if value.startswith(PLACEHOLDER):
        raise record.bad(f"{what} is SPEED-Bench's placeholder; run its preparation script, which fetches the text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise record.bad(f"{what} has half a character (character {error.start}); expected Unicode text") from error
    return value


def _references(record: Record, key: str) -> tuple[str, ...]:
    """None, one, or a list, in which a list stands for equally right answers, as in Spec-Bench's category rag.

    Unlike turns they may be blank: nobody sends them to a model.
    """
    value = record.fields.get(key)
    entries = [] if value is None else value if isinstance(value, list) else [value]
    texts = [text for entry in entries for text in (entry if isinstance(entry, list) else [entry])]
    if not all(isinstance(text, str) for text in texts):
        raise record.bad(f"{key} is {shown(value)}; expected a text or a list of texts")
    return tuple(texts)


def _user_message(record: Record, message: object) -> object:
    if not isinstance(message, dict) or message.get("role") != "user":
        raise record.bad(f"messages holds {shown(message)}; expected messages with the role user alone")
    return message.get("content")


def _meant(word: str, known: Collection[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
