"""Reading training text: every kind of file as a stream, bad rows by file and line."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pytest

from specdec.errors import BadData
from specdec.train import source
from specdec.train.example import Completion, Conversation, PlainText, example_of
from specdec.train.source import SourceRow, read_source

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
ROWS = [{"text": "first\u2028text"}, {"messages": [USER, ANSWER]}]
TEXTS = [{"text": "one"}, {"text": "two"}]


def fields(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [row.fields for row in read_source(path, **options)]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json", "rows.jsonl.gz"])
def test_json_lines_come_in_order(tmp_path: Path, name: str):
    path = lines(tmp_path / name, ROWS)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert fields(path) == ROWS


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_may_be_one_array(tmp_path: Path, indent: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source, "CHUNK", 7)  # objects lie across many reads
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert fields(path) == ROWS


def test_an_array_larger_than_memory_would_hold_is_read_as_it_comes(tmp_path: Path):
    path = tmp_path / "rows.json"
    entry = json.dumps({"text": "x" * 5000})
    path.write_text("[" + ",\n".join([entry] * 4000) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_source(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000
    assert peak < path.stat().st_size / 10


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"text": "a"}\n{"text": \n', r"rows\.jsonl:2: not JSON .*column"),
        (b'{"text": "a"}\n\n[1]\n', r"rows\.jsonl:3: got \[1\], expected one JSON object"),
        (b'{"text": "\xff"}\n', r"rows\.jsonl:1: not UTF-8"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path: Path, content: bytes, complaint: str):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadData, match=complaint):
        fields(path)


def test_an_array_that_is_cut_off_is_named_with_the_item(tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a"}, {"text": ')
    with pytest.raises(BadData, match=r"rows\.json: item 2: not JSON"):
        fields(path)
    path.write_text('[{"text": "a"}, ')
    with pytest.raises(BadData, match=r"rows\.json: item 2: not JSON"):
        fields(path)


def test_what_follows_an_array_is_not_passed_over_in_silence(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "one"}]\n\n')
    assert len(list(read_source(path))) == 1
    path.write_text('[{"text": "one"}]\n[{"text": "two"}]')
    with pytest.raises(BadData, match=r"a\.json: something follows the array: '\[\{"):
        list(read_source(path))


def test_damaged_gzip_is_named(tmp_path: Path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-20])
    with pytest.raises(BadData, match=r"rows\.jsonl\.gz:\d+: cannot be read"):
        fields(path)


def test_parquet_and_its_empty_columns(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([{**TEXTS[0], "other": None}, {**TEXTS[1], "other": "x"}]).to_parquet(str(path))
    assert fields(path) == [TEXTS[0], {**TEXTS[1], "other": "x"}]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(BadData, match=r"rows\.parquet: row 1: damaged"):
        fields(path)


@pytest.mark.parametrize("kind", ["saved", "saved dict", "parquet folder", "csv", "tsv", "csv folder"])
def test_whatever_datasets_loads(tmp_path: Path, kind: str):
    data = datasets.Dataset.from_list(TEXTS)
    path = tmp_path / "data"
    if kind == "saved":
        data.save_to_disk(str(path))
    elif kind == "saved dict":
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(path))
        assert fields(path, split="test") == TEXTS[:1]
        with pytest.raises(BadData, match="no split 'valid'; it has train, test"):
            fields(path, split="valid")
    elif kind == "parquet folder":
        path.mkdir()
        data.to_parquet(str(path / "train-00000-of-00001.parquet"))
        data.select([0]).to_parquet(str(path / "test-00000-of-00001.parquet"))
        assert fields(path, split="test") == TEXTS[:1]
    else:
        path.mkdir()
        file = path / f"rows.{kind[:3]}"
        data.to_csv(str(file), sep="\t" if kind == "tsv" else ",", index=False)
        path = path if kind == "csv folder" else file
    assert fields(path) == TEXTS


def test_a_text_file_is_one_document_and_a_large_one_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "poem.txt"
    text = "".join(f"line {number}\r\n" for number in range(50))
    path.write_bytes(text.encode())
    assert fields(path) == [{"text": text}]
    monkeypatch.setattr(source, "TEXT_PIECE", 100)
    rows = list(read_source(path))
    assert "".join(row.fields["text"] for row in rows) == text
    assert all(len(row.fields["text"]) <= 100 for row in rows)
    assert all(row.fields["text"].endswith("\n") for row in rows)
    assert [row.fields.get("finish") for row in rows] == ["length"] * (len(rows) - 1) + [None]
    assert rows[1].place == f"{path}:{rows[0].fields['text'].count(chr(10)) + 1}"


def test_a_folder_of_text_files_passes_over_what_is_no_text(tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.py").write_text("two")
    (tmp_path / "deep" / "a.txt").write_text("one é")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0\xff")
    (tmp_path / ".hidden").write_text("three")
    (tmp_path / "empty.txt").touch()
    assert fields(tmp_path) == [{"text": "two"}, {"text": "one é"}]


def test_a_folder_of_json_lines_is_read_file_by_file(tmp_path: Path):
    lines(tmp_path / "b.jsonl", TEXTS[1:])
    lines(tmp_path / "a.jsonl", TEXTS[:1])
    (tmp_path / "README.md").write_text("not data")
    assert fields(tmp_path) == TEXTS


@pytest.mark.parametrize("content", [b"\xff\xfe\0a", b"a\0b"])
def test_a_named_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    with pytest.raises(BadData, match=r"weights\.bin:1: .*expected a text file"):
        fields(path)


def test_nothing_there_is_said_at_once(tmp_path: Path):
    with pytest.raises(BadData, match="no such file or folder"):
        read_source(tmp_path / "missing.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadData, match="holds no text"):
        read_source(tmp_path / "empty")


def example(**columns: Any) -> Any:
    return example_of(SourceRow("here:7", columns))


def test_columns_decide_what_a_row_is():
    assert example(messages=[USER, ANSWER], text="x") == Conversation((USER, ANSWER))
    assert example(prompt="a", completion="b") == Completion("a", "b")
    assert example(text="a") == example(content="a") == PlainText("a")
    assert example(text="a", finish="length") == PlainText("a", cut=True)


def test_share_gpt_speakers_become_roles():
    raw = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert example(conversations=raw) == Conversation(({"role": "system", "content": "s"}, USER, ANSWER))


def test_empty_columns_of_messages_are_left_out():
    assert example(messages=[USER | {"tool_calls": None}, ANSWER]) == Conversation((USER, ANSWER))


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"question": "a"}, r"none of the known columns .*it has question"),
        ({"messages": "a"}, "expected a list of messages"),
        ({"messages": []}, "expected a list of messages"),
        ({"messages": [USER]}, "no message of the assistant"),
        ({"messages": [USER, "b"]}, "message 2 is 'b'"),
        ({"messages": [USER, {"role": "robot", "content": "b"}]}, "message 2 has the role 'robot'"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "message 2 is an empty answer"),
        ({"messages": [{"role": "user", "content": 5}, ANSWER]}, r"message 1 \(user\) has the content 5"),
        ({"conversations": [{"from": "nobody", "value": "a"}]}, "message 1 has the role 'unknown'"),
        ({"prompt": "a", "completion": ""}, "the second one not empty"),
        ({"prompt": "a", "completion": 3}, "prompt and completion are 'a' and 3"),
        ({"text": "  "}, "text is ' '"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "tools is no JSON"),
        ({"turns": [{"prompt_ids": [1], "answer_ids": [-1]}], "vocabulary": "x"}, "something else than ids"),
    ],
)
def test_a_row_that_cannot_be_used_says_where_and_why(columns: dict[str, Any], complaint: str):
    with pytest.raises(BadData, match=f"^here:7: .*{complaint}"):
        example(**columns)


def test_reading_stops_where_nobody_asks_for_more(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\nbroken\n')
    assert [row.fields["text"] for row in itertools.islice(read_source(path), 2)] == ["a", "b"]


# --- Nulls of Arrow, lines that cannot be read, folders ---------------------------------------------------


def calls(**arguments: Any) -> dict[str, Any]:
    call = {"function": {"name": "weather", "arguments": arguments}}
    return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}


def test_what_arrow_fills_in_is_no_argument_and_what_json_says_is_one(tmp_path: Path):
    """Structs of a column have all fields of all rows there."""
    rows = [calls(city="Bern"), calls(zone="CET")]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        found = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in fields(path)]
        assert found == [{"city": "Bern"}, {"zone": "CET"}]
    written = calls(city="Bern", zone=None)
    assert fields(lines(tmp_path / "rows.jsonl", [written])) == [written]


def test_lines_that_cannot_be_read_can_be_passed_over(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\nbroken\n\xff\xfe\n[1]\n{"text": "b"}\n')
    rows = list(read_source(path, keep_unreadable=True))
    assert [row.fields.get("text") for row in rows] == ["a", None, None, None, "b"]
    assert [row.unreadable is None for row in rows] == [True, False, False, False, True]
    for row in rows[1:4]:
        with pytest.raises(BadData, match=r"rows\.jsonl:[234]: "):
            example_of(row)
    with pytest.raises(BadData, match=r"rows\.jsonl:2: not JSON"):
        fields(path)


def test_json_files_of_a_folder_are_data_and_not_text(tmp_path: Path):
    (tmp_path / "chats.json").write_text(json.dumps(TEXTS))
    (tmp_path / "README.md").write_text("what this is")
    assert fields(tmp_path) == TEXTS
    lines(tmp_path / "more.jsonl", ROWS)
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    assert fields(tmp_path) == [*TEXTS, *ROWS]


def test_json_files_of_a_folder_that_hold_no_rows_are_refused_as_when_named(tmp_path: Path):
    (tmp_path / "chat.json").write_text(json.dumps({"question": "a"}, indent=2))
    with pytest.raises(BadData, match=r"chat\.json:1: not JSON"):
        fields(tmp_path)


def test_settings_among_source_code_are_text(tmp_path: Path):
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "package.json").write_text('{"name": "b"}')
    assert fields(tmp_path) == [{"text": "one"}, {"text": '{"name": "b"}'}]


def test_parquet_in_gzip_is_refused_with_what_to_do(tmp_path: Path):
    path = tmp_path / "rows.parquet.gz"
    path.write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(BadData, match="unpack this file with gunzip"):
        fields(path)


def test_a_folder_of_splits_gives_the_one_that_is_asked_for(tmp_path: Path):
    lines(tmp_path / "train.jsonl", TEXTS[:1])
    lines(tmp_path / "test.jsonl", TEXTS[1:])
    assert (fields(tmp_path), fields(tmp_path, split="test")) == (TEXTS[:1], TEXTS[1:])
    with pytest.raises(BadData, match="has no split 'validation'; it has test, train"):
        fields(tmp_path, split="validation")


def test_a_folder_of_two_kinds_is_refused(tmp_path: Path):
    lines(tmp_path / "rows.jsonl", TEXTS)
    datasets.Dataset.from_list(TEXTS).to_parquet(str(tmp_path / "rows.parquet"))
    with pytest.raises(BadData, match="holds JSON and Parquet, perhaps the same data twice"):
        fields(tmp_path)
