"""Question files as records: lines of JSON, blocks of text, rows of Parquet, each with where it stands.

A file is read strictly. What would be skipped, repaired or misread in silence elsewhere (blank lines, a byte order
mark, a key given twice, half a character) is an error here that names file and line.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import reprlib
import zlib
from dataclasses import dataclass
from typing import Any

from specdec.errors import BadQuestions

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
"""First bytes of a compressed and of a Parquet file."""

MARKS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""Byte order marks, and the encoding that each one announces."""


@dataclass(frozen=True)
class Record:
    """One entry of a question file.

    Attributes:
        file: for messages.
        line: where it begins, from 1.
        fields: its keys and values, unchecked.
    """

    file: str
    line: int
    fields: dict[str, Any]

    def bad(self, what: str) -> BadQuestions:
        """An error that begins with file and line."""
        return BadQuestions(f"{self.file}:{self.line}: {what}")


def records_of(file: str, data: bytes, *, text: bool = False) -> list[Record]:
    """Every record of a file, at least one.

    Args:
        file: its name, for messages.
        data: its bytes; gzip and Parquet are recognised by how they begin.
        text: blocks of plain text rather than lines of JSON.

    Raises:
        BadQuestions: nothing in it, or something that cannot be read.
    """
    data = _decompressed(file, data)
    if data.startswith(PARQUET):
        found = _parquet_rows(file, data)
    elif text:
        found = _text_blocks(file, _decoded(file, data))
    else:
        found = _json_lines(file, _decoded(file, data))
    if not found:
        raise BadQuestions(f"{file}:1: the file is empty; it needs at least one question")
    return found


def shown(value: object) -> str:
    """A value as a message shows it: short, and on one line."""
    return " ".join(reprlib.repr(value).split())


def _decompressed(file: str, data: bytes) -> bytes:
    if not data.startswith(GZIP):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise BadQuestions(f"{file}: damaged gzip file ({error}); fetch it again") from error


def _decoded(file: str, data: bytes) -> str:
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            advice = "save it as UTF-8 without one"
            raise BadQuestions(f"{file}:1: the file begins with a byte order mark of {encoding}; {advice}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadQuestions(
            f"{file}:{line}: not UTF-8 text ({error.reason}, byte {error.start} of the file); save it as UTF-8"
        ) from error


def _json_lines(file: str, text: str) -> list[Record]:
    # Not str.splitlines(): it also breaks at U+2028 and the like, which may stand inside a JSON string.
    lines = text.removesuffix("\n").split("\n") if text.strip() else []
    return [_json_line(file, number, line) for number, line in enumerate(lines, start=1)]


def _json_line(file: str, number: int, line: str) -> Record:
    empty = Record(file, number, {})
    if not line.strip():
        raise empty.bad("blank line; every line holds one JSON object, so remove it")
    try:
        fields = json.loads(line, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        raise empty.bad(f"not JSON ({error.msg} at column {error.colno}); every line holds one JSON object") from error
    except (ValueError, RecursionError) as error:
        raise empty.bad(f"not usable JSON ({error}); every line holds one plain JSON object") from error
    if not isinstance(fields, dict):
        raise empty.bad(f'got {shown(fields)}; every line holds one JSON object such as {{"turns": [...]}}')
    return Record(file, number, fields)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(n for n in names if names.count(n) > 1))} is given twice")
    return fields


def _text_blocks(file: str, text: str) -> list[Record]:
    lines = enumerate(text.replace("\r\n", "\n").split("\n"), start=1)
    blocks = [list(block) for filled, block in itertools.groupby(lines, lambda line: bool(line[1].strip())) if filled]
    return [Record(file, block[0][0], {"text": "\n".join(line for _, line in block)}) for block in blocks]


def _parquet_rows(file: str, data: bytes) -> list[Record]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.lib.ArrowException, OSError, ValueError) as error:
        raise BadQuestions(f"{file}: damaged Parquet file ({shown(str(error))}); fetch it again") from error
    return [Record(file, number, row) for number, row in enumerate(rows, start=1)]
