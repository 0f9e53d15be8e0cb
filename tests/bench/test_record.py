"""Records survive what may happen to a process that writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specdec.bench.record import RECORDS_FILE, Batch, RecordWriter, read_records, write_json
from specdec.errors import SpecdecError
from tests.bench.runs import record


def written(folder: Path, count: int = 3) -> Path:
    path = folder / RECORDS_FILE
    with RecordWriter(path) as writer:
        for number in range(count):
            writer.append([record(question_id=number, sequence=number)])
    return path


def test_records_come_back_as_they_were_written(tmp_path: Path):
    written(tmp_path)
    assert read_records(tmp_path) == [record(question_id=number, sequence=number) for number in range(3)]


@pytest.mark.parametrize("lost", [1, 2, 50, 200])
def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_writer(tmp_path: Path, lost: int):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-lost])
    assert [r["question_id"] for r in read_records(tmp_path)] == [0, 1]
    with RecordWriter(path) as writer:
        assert len(writer.records) == 2
        writer.append([record(question_id="new", sequence=2)])
    assert [r["question_id"] for r in read_records(tmp_path)] == [0, 1, "new"]


def test_a_whole_last_line_is_kept(tmp_path: Path):
    path = written(tmp_path)
    before = path.read_bytes()
    RecordWriter(path).__exit__(None, None, None)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [b"{not json", b"[1, 2]", b'{"method": "plain"}', b"", b"\xff\xfe"])
def test_a_damaged_line_before_the_last_is_named_with_file_and_number(tmp_path: Path, damage: bytes):
    path = written(tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines[1] = damage
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(SpecdecError, match=rf"{RECORDS_FILE}, line 2: not a record"):
        read_records(tmp_path)
    with pytest.raises(SpecdecError, match="line 2"):
        RecordWriter(path)
    assert path.read_bytes() == b"\n".join(lines), "a refused file is left as it is"


def test_a_record_that_is_there_twice_is_refused(tmp_path: Path):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(SpecdecError, match="line 4: a second record of plain, 0, 0, 0"):
        read_records(tmp_path)


def test_a_batch_of_which_rows_are_missing_is_cut_off(tmp_path: Path):
    path = tmp_path / RECORDS_FILE
    rows = [record(question_id=number, sequence=7, batch=Batch(size=3, row=number, id=0)) for number in range(3)]
    with RecordWriter(path) as writer:
        writer.append([record(question_id="before", sequence=6)])
        writer.append(rows)
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    with RecordWriter(path) as writer:
        assert [r["question_id"] for r in writer.records] == ["before"]
        writer.append(rows)
    assert path.read_bytes() == whole


def test_nobody_else_may_write_meanwhile(tmp_path: Path):
    path = written(tmp_path)
    with RecordWriter(path), pytest.raises(SpecdecError, match="another process is writing"):
        RecordWriter(path)
    RecordWriter(path).__exit__(None, None, None)


def test_a_directory_without_a_run_is_named(tmp_path: Path):
    with pytest.raises(SpecdecError, match=f"holds no run: no {RECORDS_FILE}"):
        read_records(tmp_path)


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]
