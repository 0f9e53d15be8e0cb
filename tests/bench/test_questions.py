"""Question sets: every format, what ships, downloads that leave nothing half-written, and files that are wrong."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specdec.bench import named_questions
from specdec.bench.download import Download, downloaded
from specdec.bench.named_questions import NAMED, NamedQuestions
from specdec.bench.question import MULTI_TURN, SPEC_BENCH_COLUMNS
from specdec.bench.question_formats import FORMATS
from specdec.bench.questions import Question, QuestionSet, load_questions
from specdec.errors import BadQuestions, SpecdecError

COLUMNS = [
    "Multi-turn Conversation",
    "Translation",
    "Summarization",
    "Question Answering",
    "Mathematical Reasoning",
    "Retrieval-aug. Generation",
]
GOOD = {"question_id": 1, "category": "qa", "turns": ["Why?"]}


def lines(*rows: dict[str, Any] | str) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def file_of(folder: Path, content: str | bytes, name: str = "questions.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def spec_bench_like(each: int = 2) -> list[dict[str, Any]]:
    """A file of Spec-Bench's shape: 13 categories, ids from 81, references on some, two turns in the first eight."""
    rows: list[dict[str, Any]] = []
    for place, category in enumerate(SPEC_BENCH_COLUMNS):
        for number in range(each):
            turns = [f"{category} {number}?", "And then?"] if place < 8 else [f"{category} {number}?"]
            reference = {"reference": [f"{category} {number}."]} if number % 2 else {}
            rows.append({"question_id": 81 + len(rows), "category": category, "turns": turns, **reference})
    return rows


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert isinstance(error.value, SpecdecError)
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


# --- Formats ---------------------------------------------------------------------------------------------------


def test_the_thirteen_categories_of_spec_bench_become_its_six_columns(tmp_path: Path) -> None:
    path = file_of(tmp_path, lines(*spec_bench_like()))
    questions = load_questions(path)
    assert questions.format == "spec-bench"
    assert questions.name == "questions"
    assert questions.source == str(path)
    assert questions.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert questions.categories == tuple(SPEC_BENCH_COLUMNS)
    assert list(questions.columns) == COLUMNS
    assert Counter(q.column for q in questions.questions) == {MULTI_TURN: 16, **dict.fromkeys(COLUMNS[1:], 2)}
    assert questions.questions[1] == Question(82, "writing", ("writing 1?", "And then?"), ("writing 1.",), line=2)
    assert [q.line for q in questions.questions] == list(range(1, 27))


def test_references_may_list_equally_right_answers(tmp_path: Path) -> None:
    for reference, expected in {("a",): ("a",), "a": ("a",), None: (), (("a", "b"),): ("a", "b"), (): ()}.items():
        (question,) = load_questions(file_of(tmp_path, lines({**GOOD, "reference": reference}))).questions
        assert question.references == expected


def test_an_mt_bench_file_is_told_from_its_categories(tmp_path: Path) -> None:
    path = file_of(tmp_path, lines(*spec_bench_like()[:16]))
    questions = load_questions(path)
    assert questions.format == "mt-bench"
    assert questions.columns == (MULTI_TURN,)
    assert all(len(question.turns) == 2 for question in questions.questions)


def test_speed_bench_categories_are_columns_of_their_own_even_where_spec_bench_has_the_name(tmp_path: Path) -> None:
    common = {"sub_category": "x", "source": "y", "src_id": "z", "difficulty": "low", "multiturn": False}
    rows = [
        {"question_id": "a", "category": "math", "turns": ["1+1?"], **common},
        {"question_id": "b", "category": "multilingual", "turns": ["Hallo?"], **common},
    ]
    questions = load_questions(file_of(tmp_path, lines(*rows)))
    assert questions.format == "speed-bench"
    assert questions.columns == ("math", "multilingual")
    assert [question.id for question in questions.questions] == ["a", "b"]


def test_speed_bench_as_messages_has_the_same_turns(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "First?"}, {"role": "user", "content": "Second?"}]
    row = {"question_id": "a", "category": "qa", "messages": messages}
    (question,) = load_questions(file_of(tmp_path, lines(row))).questions
    assert question.turns == ("First?", "Second?")
    assert question.column == "qa"


def test_speed_bench_comes_as_parquet_too(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"question_id": f"q{n}", "category": "qa", "turns": [f"{n}?"], "multiturn": False} for n in range(3)]
    path = tmp_path / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    questions = load_questions(path)
    assert questions.format == "speed-bench"
    assert [(question.id, question.turns, question.line) for question in questions.questions] == [
        ("q0", ("0?",), 1),
        ("q1", ("1?",), 2),
        ("q2", ("2?",), 3),
    ]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadQuestions, match=r"test\.parquet: damaged Parquet") as error:
        load_questions(path)
    message_of(error)


def test_humaneval_prompts_keep_every_character(tmp_path: Path) -> None:
    prompt = 'def add(a, b):\n    """Add."""\n'
    row = {"task_id": "HumanEval/0", "prompt": prompt, "canonical_solution": "    return a + b\n", "test": "assert 1"}
    for path in (
        file_of(tmp_path, lines(row)),
        file_of(tmp_path, gzip.compress(lines(row).encode()), "humaneval.jsonl.gz"),
    ):
        questions = load_questions(path)
        assert questions.format == "humaneval"
        (question,) = questions.questions
        assert (question.id, question.column, question.turns) == ("HumanEval/0", "humaneval", (prompt,))
        assert question.references == ("    return a + b\n",)


def test_gsm8k_problems_are_numbered_by_their_lines(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "answer": "2\n#### 2"}, {"question": "2+2?", "answer": "#### 4"}]
    questions = load_questions(file_of(tmp_path, lines(*rows)))
    assert questions.format == "gsm8k"
    assert [(q.id, q.category, q.turns, q.references) for q in questions.questions] == [
        (1, "gsm8k", ("1+1?",), ("2\n#### 2",)),
        (2, "gsm8k", ("2+2?",), ("#### 4",)),
    ]


def test_plain_text_is_one_prompt_for_each_block(tmp_path: Path) -> None:
    path = file_of(tmp_path, "\nOnce upon\n  a time\n\n \t\n\nThe end\r\nof it", "stories.txt")
    questions = load_questions(path)
    assert questions.format == "text"
    assert [(question.id, question.turns) for question in questions.questions] == [
        (2, ("Once upon\n  a time",)),
        (7, ("The end\nof it",)),
    ]


def test_other_categories_are_columns_of_their_own(tmp_path: Path) -> None:
    rows = [{**GOOD, "category": "songs"}, {**GOOD, "question_id": "b", "category": "jokes"}]
    questions = load_questions(file_of(tmp_path, lines(*rows)))
    assert questions.format == "turns"
    assert questions.columns == ("songs", "jokes")


def test_a_forced_format_wins_over_what_the_file_looks_like(tmp_path: Path) -> None:
    path = file_of(tmp_path, lines(GOOD, {**GOOD, "question_id": 2, "category": "jokes"}))
    with pytest.raises(BadQuestions, match="jokes"):
        load_questions(path)
    assert load_questions(path, format="turns").columns == ("Question Answering", "jokes")
    assert len(load_questions(path, format="text")) == 1
    with pytest.raises(BadQuestions, match="prompt is missing"):
        load_questions(path, format="humaneval")


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"
    path = file_of(tmp_path, json.dumps({**GOOD, "turns": [text]}, ensure_ascii=False) + "\r\n")
    assert load_questions(path).questions[0].turns == (text,)


# --- What ships ------------------------------------------------------------------------------------------------


def test_six_has_five_questions_in_each_column_and_second_turns() -> None:
    questions = load_questions("six")
    assert list(questions.columns) == COLUMNS
    assert Counter(question.column for question in questions.questions) == dict.fromkeys(COLUMNS, 5)
    for question in questions.questions:
        assert len(question.turns) == (2 if question.column == MULTI_TURN else 1)
        if question.column in ("Summarization", "Retrieval-aug. Generation"):
            assert 250 < len(question.turns[0].split()) < 400
            assert question.references


def test_demo_code_suits_the_demo_pair() -> None:
    from transformers import AutoTokenizer

    from specdec.demo import target_path

    tokenizer = AutoTokenizer.from_pretrained(target_path())
    questions = load_questions("demo-code")
    assert questions.columns == ("functions", "classes", "docstrings", "tests", "imports", "scripts")
    assert set(Counter(question.category for question in questions.questions).values()) == {4}
    for question in questions.questions:
        (code,) = question.turns
        assert 60 <= len(tokenizer(code)["input_ids"]) <= 250
        assert code == code.strip(" \n"), "a blank at the end would be a token of its own, that no code has there"


@pytest.mark.parametrize("name", ["six", "demo-code"])
def test_what_ships_is_in_its_place(name: str) -> None:
    file = NAMED[name].file
    assert isinstance(file, Path)
    assert file.parent == named_questions.SHIPPED
    assert load_questions(name) == replace(load_questions(file), name=name)


# --- Fewer questions -------------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path: Path) -> QuestionSet:
    return load_questions(file_of(tmp_path, lines(*spec_bench_like(each=5))))


def test_a_limit_counts_by_column_and_is_spread_over_raw_categories(questions: QuestionSet) -> None:
    few = questions.limited(4)
    assert Counter(question.column for question in few.questions) == dict.fromkeys(COLUMNS, 4)
    assert [q.category for q in few.questions if q.column == MULTI_TURN] == ["writing", "roleplay", "reasoning", "math"]
    assert [q.turns[0] for q in few.questions if q.category == "qa"] == [f"qa {n}?" for n in range(4)]
    uneven = Counter(question.category for question in questions.limited(9).questions)
    assert (uneven["writing"], uneven["roleplay"], uneven["qa"]) == (2, 1, 5)


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_a_limited_set_keeps_order_and_identity(questions: QuestionSet, seed: int | None) -> None:
    few = questions.limited(3, seed=seed)
    kept = [question.line for question in few.questions]
    assert kept == sorted(kept)
    assert set(few.questions) <= set(questions.questions)
    assert (few.sha256, few.name, few.source) == (questions.sha256, questions.name, questions.source)
    assert questions.limited() == questions
    assert questions.limited(1000, seed=seed) == questions


def test_a_seed_decides_and_each_column_by_itself(questions: QuestionSet) -> None:
    once, again, other = (questions.limited(2, seed=seed) for seed in (1, 1, 2))
    assert once == again
    assert once != other
    assert once != questions.limited(2)
    alone = questions.limited(2, categories=["rag"], seed=1)
    assert alone.questions == tuple(question for question in once.questions if question.category == "rag")


def test_categories_are_raw_names_or_columns(questions: QuestionSet) -> None:
    assert questions.limited(categories=["writing", "Translation"]).categories == ("writing", "translation")
    assert len(questions.limited(categories=[MULTI_TURN])) == 40


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"categories": ["sumarization"]}, "did you mean 'summarization'"),
        ({"categories": []}, "no category given"),
        ({"per_category": 0}, "at least 1"),
        ({"per_category": -3}, "at least 1"),
    ],
)
def test_a_limit_that_leaves_nothing_is_refused(questions: QuestionSet, arguments: Any, says: str) -> None:
    with pytest.raises(BadQuestions, match=says) as error:
        questions.limited(**arguments)
    message_of(error)


# --- Files with something wrong --------------------------------------------------------------------------------

BAD_FILES: dict[str, tuple[str | bytes, int, str]] = {
    "not JSON": (lines(GOOD, "{'question_id': 2}"), 2, "not JSON"),
    "a line cut off": (lines(GOOD) + '{"question_id": 2, "turns": ["Wh', 2, "not JSON"),
    "a list": (lines(GOOD, "[1, 2]"), 2, "one JSON object"),
    "a JSON array over all": ("[\n" + lines(GOOD) + "]", 1, "not JSON"),
    "nested without end": (lines(GOOD, "[" * 100_000), 2, "not usable JSON"),
    "a number without end": (lines(GOOD, '{"question_id": ' + "1" * 5000 + "}"), 2, "not usable JSON"),
    "a key given twice": (lines('{"question_id": 1, "turns": ["a"], "category": "qa", "turns": ["b"]}'), 1, "twice"),
    "no turns": (lines(GOOD, {"question_id": 2, "category": "qa"}), 2, "turns is missing"),
    "no turns at once": (lines({"question_id": 2, "category": "qa"}), 1, "turns is missing"),
    "empty turns": (lines({**GOOD, "turns": []}), 1, "turns is empty"),
    "turns as a text": (lines({**GOOD, "turns": "Why?"}), 1, "expected a list"),
    "turns as null": (lines({**GOOD, "turns": None}), 1, "expected a list"),
    "a turn that is a number": (lines({**GOOD, "turns": ["Why?", 3]}), 1, "turns[1] is 3; expected a text"),
    "a blank turn": (lines({**GOOD, "turns": ["Why?", " \n"]}), 1, "turns[1] is blank"),
    "half a character": (lines('{"question_id": 1, "category": "qa", "turns": ["\\ud83d"]}'), 1, "half a character"),
    "no category": (lines({"question_id": 1, "turns": ["Why?"]}), 1, "category is missing"),
    "a category that is a number": (lines({**GOOD, "category": 3}), 1, "category is 3; expected a text"),
    "an unknown category": (
        lines(GOOD, {**GOOD, "question_id": 2, "category": "translaton"}), 2, "did you mean 'translation'"
    ),
    "an unknown category first": (lines({**GOOD, "category": "poems"}, {**GOOD, "question_id": 2}), 1, "'poems'"),
    "no id": (lines({"category": "qa", "turns": ["Why?"]}), 1, "question_id is missing"),
    "an id that is null": (lines({**GOOD, "question_id": None}), 1, "question_id is None"),
    "an id that is a truth value": (lines({**GOOD, "question_id": True}), 1, "question_id is True"),
    "an id that is a fraction": (lines({**GOOD, "question_id": 1.5}), 1, "question_id is 1.5"),
    "an id twice": (lines(GOOD, {**GOOD, "question_id": 2}, GOOD), 3, "the id 1 is already on line 1"),
    "an id twice as number and text": (lines(GOOD, {**GOOD, "question_id": "1"}), 2, "already on line 1"),
    "a reference that is a number": (lines({**GOOD, "reference": 4}), 1, "reference is 4"),
    "a reference with a number": (lines({**GOOD, "reference": ["a", ["b", 4]]}), 1, "expected a text or a list"),
    "other keys": (lines({"text": "Why?", "label": 3}), 1, "no known format has the keys"),
    "no keys": (lines({}), 1, "no known format has the keys"),
    "an empty file": ("", 1, "the file is empty"),
    "blank lines only": ("\n \n", 1, "the file is empty"),
    "a blank line": (lines(GOOD, "", {**GOOD, "question_id": 2}), 2, "blank line"),
    "a blank line at the end": (lines(GOOD, ""), 2, "blank line"),
    "a byte order mark": (b"\xef\xbb\xbf" + lines(GOOD).encode(), 1, "byte order mark of UTF-8"),
    "UTF-16": (lines(GOOD).encode("utf-16"), 1, "byte order mark of UTF-16"),
    "Latin-1": (lines(GOOD).encode() + '{"turns": ["für"]}'.encode("latin-1"), 2, "not UTF-8"),
    "no text at all": (bytes(range(128, 256)), 1, "not UTF-8"),
    "half a question of HumanEval": (lines({"task_id": "a", "prompt": ""}), 1, "prompt is blank"),
    "half a question of GSM8K": (lines({"question": ["a", 1], "answer": "b"}), 1, "question[1] is 1"),
    "placeholders of SPEED-Bench": (
        lines({**GOOD, "src_id": "1", "turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"]}),
        1,
        "preparation script",
    ),
    "messages of an assistant": (
        lines({"question_id": 1, "category": "qa", "messages": [{"role": "assistant", "content": "So."}]}),
        1,
        "role user alone",
    ),
    "messages without content": (
        lines({"question_id": 1, "category": "qa", "messages": [{"role": "user"}]}), 1, "turns[0] is None"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path: Path, name: str) -> None:
    content, line, says = BAD_FILES[name]
    path = file_of(tmp_path, content)
    with pytest.raises(BadQuestions) as error:
        load_questions(path)
    message = message_of(error)
    assert message.startswith(f"{path}:{line}: ")
    assert says in message
    assert len(message) < len(str(path)) + 400


def test_the_file_that_the_bad_ones_were_made_from_is_good(tmp_path: Path) -> None:
    assert len(load_questions(file_of(tmp_path, lines(GOOD)))) == 1
    assert len(load_questions(file_of(tmp_path, lines(GOOD).rstrip("\n")))) == 1


def test_a_forced_mt_bench_refuses_spec_benchs_other_categories(tmp_path: Path) -> None:
    path = file_of(tmp_path, lines(*spec_bench_like()))
    with pytest.raises(BadQuestions, match=r":17: category 'translation' is none of MT-bench's 8"):
        load_questions(path, format="mt-bench")


def test_places_without_a_question_file_are_named(tmp_path: Path) -> None:
    for place, says in {
        str(tmp_path): "is a directory",
        str(tmp_path / "nothing.jsonl"): "no question file",
        "spec-bech": "did you mean 'spec-bench'",
        "a\0b": "cannot read",
    }.items():
        with pytest.raises(BadQuestions, match=says) as error:
            load_questions(place)
        message_of(error)
    with pytest.raises(BadQuestions, match=r"no question format 'specbench' .did you mean 'spec-bench'"):
        load_questions("six", format="specbench")


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(lines(*spec_bench_like()).encode())
    for content in (whole[:-30], whole[:60] + bytes(20) + whole[80:]):
        with pytest.raises(BadQuestions, match=r"q\.jsonl\.gz: damaged gzip file") as error:
            load_questions(file_of(tmp_path, content, "q.jsonl.gz"))
        message_of(error)


def test_a_name_is_a_name_and_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file_of(tmp_path, lines(GOOD), "six")
    assert len(load_questions("six")) == 30
    assert len(load_questions("./six")) == 1
    assert len(load_questions(Path("six"))) == 1


# --- Downloads -------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache" / "questions"


def offered(folder: Path, content: bytes) -> Download:
    """A download of this content, from a file: URL."""
    path = file_of(folder, content, "question.jsonl")
    return Download(path.as_uri(), hashlib.sha256(content).hexdigest(), len(content))


CONTENT = lines(*spec_bench_like(each=10)).encode()


def test_a_download_is_verified_cached_and_read_by_name(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = offered(tmp_path, CONTENT)
    monkeypatch.setitem(NAMED, "spec-bench", replace(NAMED["spec-bench"], file=offer))
    monkeypatch.setitem(NAMED, "mt-bench", replace(NAMED["mt-bench"], file=offer))
    questions = load_questions("spec-bench")
    assert (questions.name, questions.source, questions.sha256) == ("spec-bench", offer.url, offer.sha256)
    assert len(questions) == 130
    assert [path.name for path in cache.iterdir()] == [offer.path.name]
    (tmp_path / "question.jsonl").unlink()  # from here on the network is gone
    assert load_questions("spec-bench") == questions
    first = load_questions("mt-bench")
    assert first.questions == questions.questions[:80]
    assert (first.format, first.columns) == ("mt-bench", (MULTI_TURN,))


@pytest.mark.parametrize("change", ["another file", "shorter", "longer", "empty"])
def test_a_wrong_download_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path, change: str) -> None:
    offer = offered(tmp_path, CONTENT)
    wrong = {"another file": CONTENT[::-1], "shorter": CONTENT[:-1], "longer": CONTENT + b"\n", "empty": b""}[change]
    file_of(tmp_path, wrong, "question.jsonl")
    with pytest.raises(BadQuestions, match="nothing was kept") as error:
        downloaded("spec-bench", offer)
    message = message_of(error)
    assert offer.url in message
    assert offer.sha256 in message
    assert list(cache.iterdir()) == []


def test_a_damaged_copy_in_the_cache_is_fetched_again_and_never_read(tmp_path: Path, cache: Path) -> None:
    offer = offered(tmp_path, CONTENT)
    assert downloaded("spec-bench", offer) == offer.path
    offer.path.write_bytes(CONTENT[:1000])
    assert downloaded("spec-bench", offer).read_bytes() == CONTENT
    offer.path.write_bytes(CONTENT[:1000])
    (tmp_path / "question.jsonl").unlink()
    with pytest.raises(BadQuestions, match="cannot download") as error:
        downloaded("spec-bench", offer)
    message_of(error)
    assert [path.name for path in cache.iterdir()] == [offer.path.name]


def test_without_a_network_one_line_says_what_to_do(cache: Path) -> None:
    offer = Download("http://127.0.0.1:9/data/question.jsonl", "0" * 64, 10)  # nobody listens at the discard port
    with pytest.raises(BadQuestions, match=r"cannot download spec-bench from http://127\.0\.0\.1:9/") as error:
        downloaded("spec-bench", offer)
    message = message_of(error)
    assert "give its path" in message
    assert str(offer.path) in message
    assert list(cache.iterdir()) == []


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server that promises all of CONTENT and hangs up half-way, or says 404."""

    class Half(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/missing":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[: len(CONTENT) // 2])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Half) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["half", "missing"])
def test_a_download_that_breaks_off_leaves_nothing(server: str, cache: Path, path: str) -> None:
    offer = Download(f"{server}/{path}", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))
    with pytest.raises(BadQuestions) as error:
        downloaded("spec-bench", offer)
    assert offer.url in message_of(error)
    assert list(cache.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        assert len(list(cache.iterdir())) == 1, "the temporary file is there at this moment"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        downloaded("spec-bench", offered(tmp_path, CONTENT))
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(file_of(tmp_path, "a file where a folder should be", "cache")))
    with pytest.raises(BadQuestions, match="cannot download") as error:
        downloaded("spec-bench", offered(tmp_path, CONTENT))
    message_of(error)


def test_downloads_name_a_commit_and_every_name_has_a_format() -> None:
    for named in NAMED.values():
        assert isinstance(named, NamedQuestions)
        assert named.format in FORMATS
        if isinstance(named.file, Download):
            commit = named.file.url.split("/")[5]
            assert len(commit) == 40
            assert len(named.file.sha256) == 64
            assert set(commit + named.file.sha256) <= set("0123456789abcdef")


@pytest.mark.skipif("SPECDEC_SPEC_BENCH" not in os.environ, reason="SPECDEC_SPEC_BENCH names no copy of Spec-Bench")
def test_the_real_spec_bench_file_is_read_whole() -> None:
    questions = load_questions(os.environ["SPECDEC_SPEC_BENCH"])
    offer = named_questions.SPEC_BENCH
    assert (questions.sha256, Path(questions.source).stat().st_size) == (offer.sha256, offer.size)
    assert [question.id for question in questions.questions] == list(range(81, 561))
    assert Counter(question.column for question in questions.questions) == dict.fromkeys(COLUMNS, 80)
    assert sum(len(question.turns) for question in questions.questions) == 560
    assert sum(bool(question.references) for question in questions.questions) == 359
    assert len(questions.limited(8).categories) == 13


def test_the_page_on_benchmarking_names_every_set_and_every_format() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarking.md").read_text()
    missing = [word for word in (*NAMED, *FORMATS) if f"| `{word}` |" not in page]
    assert not missing, f"docs/benchmarking.md does not say what {missing} are"
