"""Where training text comes from, read as a stream: what does not fit in memory is no special case.

    FILE.jsonl, FILE.ndjson    one JSON object a line
    FILE.json                  the same, or one array of objects
    FILE.parquet               a row group at a time
    FILE.csv, .tsv, .arrow     through datasets
    any other file             UTF-8 text: one document, a large file several
    FOLDER                     saved by `Dataset.save_to_disk`; or the JSON files in it; or what `datasets.load_dataset`
                               takes (Parquet, CSV, Arrow); or else all text files below it
    OWNER/NAME                 a data set of the hub, streamed

JSON files and text may be compressed with gzip (`.gz`).

A null that JSON writes within a column is kept. In Parquet and in whatever comes through datasets, fields without a
value are left out at every depth: Arrow gives all structs of a column the same fields, whether their rows have them or
not.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from specdec.errors import BadData

TEXT_PIECE = 1 << 20
"""Characters of a text file that make one row; a longer file is cut behind a line break."""

CHUNK = 1 << 16
ROWS_AT_ONCE = 256

KINDS = {".parquet": "Parquet", ".csv": "CSV", ".tsv": "CSV", ".arrow": "Arrow"}
"""What `datasets.load_dataset` reads in a folder."""

COLUMNS = frozenset(("messages", "conversations", "prompt", "turns", "text", "content"))
"""By one of these a .json file in a folder is known to be data, and no settings of a programme."""

SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Words in names of files, and the splits that datasets knows them by."""


@dataclass(frozen=True)
class SourceRow:
    """One row of a source.

    Attributes:
        place: file and line (or item, or row), for messages.
        fields: its columns, unchecked; columns without a value are left out.
        unreadable: why it could not be read and has no fields; None of all others.
    """

    place: str
    fields: dict[str, Any]
    unreadable: str | None = None

    def bad(self, what: object) -> BadData:
        """An error that begins with the place."""
        return BadData(f"{self.place}: {what}")


def read_source(name: str | Path, *, split: str = "train", keep_unreadable: bool = False) -> Iterator[SourceRow]:
    """The rows of one source, in order.

    Args:
        name: a file, a folder, or a data set of the hub.
        split: of sources that have splits.
        keep_unreadable: go on behind a line that cannot be read, which comes as an `unreadable` row.

    Raises:
        BadData: at once when there is nothing of that name; while reading, with file and line, for what cannot be
            read.
    """
    rows = _rows(name, split)
    return rows if keep_unreadable else _readable(rows)


def _rows(name: str | Path, split: str) -> Iterator[SourceRow]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(path, split)
    if path.is_file():
        return _file(path)
    if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _loaded(name, split, name)
    raise BadData(f"no data at {path}: there is no such file or folder")


def _readable(rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
    for row in rows:
        if row.unreadable is not None:
            raise row.bad(row.unreadable)
        yield row


def is_text(path: Path) -> bool:
    """Whether `read_source` reads this file as text, whatever is in it."""
    return path.is_file() and _suffix(path) not in READERS


def shown(value: object) -> str:
    """A value as a message shows it: short, and on one line."""
    return " ".join(reprlib.repr(value).split())


def _file(path: Path) -> Iterator[SourceRow]:
    return READERS.get(_suffix(path), _text)(path)


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


# --- JSON --------------------------------------------------------------------------------------------------


def _json_lines(path: Path) -> Iterator[SourceRow]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_row(f"{path}:{number}", line)
    except (OSError, EOFError) as error:
        raise BadData(f"{path}:{number + 1}: cannot be read ({error})") from error


def _json_row(place: str, line: bytes) -> SourceRow:
    try:
        return _row(place, json.loads(line.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        why = f"not UTF-8 text ({error.reason} at byte {error.start} of the line)"
    except json.JSONDecodeError as error:
        why = f"not JSON ({error.msg} at column {error.colno}); a line holds one JSON object"
    except (ValueError, RecursionError) as error:
        why = f"not usable JSON ({error})"
    return SourceRow(place, {}, why)


def _row(place: str, fields: Any) -> SourceRow:
    if not isinstance(fields, dict):
        why = f"got {shown(fields)}, expected one JSON object with columns such as messages or text"
        return SourceRow(place, {}, why)
    return SourceRow(place, {name: value for name, value in fields.items() if value is not None})


def _json(path: Path) -> Iterator[SourceRow]:
    """A file called .json may hold one array, or one object a line."""
    with _open(path) as file:
        start = file.read(CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n")
    return _json_array(path) if start.startswith(b"[") else _json_lines(path)


def _json_array(path: Path) -> Iterator[SourceRow]:
    """Objects of one array, decoded as they come: the array as a whole is never in memory."""
    decoder, number = json.JSONDecoder(), 0
    try:
        with _open(path) as binary:
            reader = _Text(binary)
            reader.skip(" \t\r\n\ufeff")
            reader.buffer = reader.buffer[1:]  # the opening bracket
            while True:
                reader.skip(" \t\r\n,")
                if reader.buffer.startswith("]"):
                    reader.buffer = reader.buffer[1:]
                    break
                number += 1
                yield _row(f"{path}: item {number}", reader.value(decoder))
            reader.skip(" \t\r\n")
    except json.JSONDecodeError as error:
        raise BadData(f"{path}: item {number}: not JSON ({error.msg}); the file is cut off or damaged") from error
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise BadData(f"{path}: item {number}: cannot be read ({error})") from error
    if reader.buffer:
        raise BadData(f"{path}: something follows the array: {shown(reader.buffer)}")


class _Text:
    """Characters of a file that grows in a buffer until a JSON value is complete in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = io.TextIOWrapper(file, encoding="utf-8")
        self.buffer = ""

    def skip(self, characters: str) -> None:
        """Drop these characters; afterwards the buffer is empty only at the end of the file."""
        self.buffer = self.buffer.lstrip(characters)
        while not self.buffer and self._more(""):
            self.buffer = self.buffer.lstrip(characters)

    def _more(self, kept: str, size: int = CHUNK) -> bool:
        read = self._file.read(size)
        self.buffer = kept + read
        return bool(read)

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The next value; twice as much is read each time that it turns out to be incomplete."""
        while True:
            try:
                value, end = decoder.raw_decode(self.buffer)
            except json.JSONDecodeError:
                if not self._more(self.buffer, max(CHUNK, len(self.buffer))):
                    raise
                continue
            self.buffer = self.buffer[end:]
            return value


# --- Parquet, datasets -------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[SourceRow]:
    import pyarrow.lib
    import pyarrow.parquet

    if path.suffix.lower() == ".gz":
        raise BadData(f"{path}: Parquet is compressed within; unpack this file with gunzip")
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=ROWS_AT_ONCE):
            for fields in batch.to_pylist():
                number += 1
                yield _arrow_row(f"{path}: row {number}", fields)
    except (pyarrow.lib.ArrowException, OSError, ValueError) as error:
        raise BadData(f"{path}: row {number + 1}: damaged Parquet file ({shown(str(error))})") from error


def _arrow_row(place: str, fields: Any) -> SourceRow:
    return _row(place, _unfilled(fields))


def _unfilled(value: Any) -> Any:
    """Without the nulls that fill up structs; those in lists were written on purpose."""
    if isinstance(value, dict):
        return {name: _unfilled(held) for name, held in value.items() if held is not None}
    if isinstance(value, list):
        return [_unfilled(held) if isinstance(held, dict | list) else held for held in value]
    return value


def _loaded(name: str, split: str, what: str, **files: Any) -> Iterator[SourceRow]:
    """Rows of `datasets.load_dataset`, streamed."""
    import datasets

    number = 0
    try:
        loaded: Any = datasets.load_dataset(name, split=split, streaming=True, **files)
        for number, fields in enumerate(loaded, start=1):
            yield _arrow_row(f"{what}: row {number}", dict(fields))
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadData(f"{what}: row {number + 1}: datasets cannot load it: {reason}") from error


def _csv(path: Path) -> Iterator[SourceRow]:
    extra = {"sep": "\t"} if _suffix(path) == ".tsv" else {}
    return _loaded("csv", "train", str(path), data_files=str(path), **extra)


def _arrow(path: Path) -> Iterator[SourceRow]:
    return _loaded("arrow", "train", str(path), data_files=str(path))


def _saved(path: Path, split: str) -> Iterator[SourceRow]:
    """What `save_to_disk` wrote; its files are mapped, not read."""
    import datasets

    try:
        saved: Any = datasets.load_from_disk(str(path))
        if isinstance(saved, dict) and split not in saved:
            raise BadData(f"{path} has no split {split!r}; it has {', '.join(map(str, saved))}")
        loaded: Any = saved[split] if isinstance(saved, dict) else saved
    except (OSError, ValueError) as error:
        raise error if isinstance(error, BadData) else BadData(f"{path}: {shown(str(error))}") from error
    for number, fields in enumerate(loaded, start=1):
        yield _arrow_row(f"{path}: row {number}", fields)


# --- Folders, text -----------------------------------------------------------------------------------------


def _folder(path: Path, split: str) -> Iterator[SourceRow]:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved(path, split)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _hidden(file, path)]
    json_files = _json_files(files)
    kinds = sorted(
        {KINDS[_suffix(file)] for file in files if _suffix(file) in KINDS} | ({"JSON"} if json_files else set())
    )
    if len(kinds) > 1:
        raise BadData(f"{path} holds {' and '.join(kinds)}, perhaps the same data twice; name the files to be read")
    if json_files:
        return (row for file in _of_split(json_files, path, split) for row in _file(file))
    if kinds:
        return _loaded(str(path), split, str(path))
    texts = [file for file in files if _looks_like_text(file)]
    if not texts:
        raise BadData(f"{path} holds no text: no JSON lines, no Parquet, no text file")
    return (row for file in texts for row in _text(file))


def _json_files(files: list[Path]) -> list[Path]:
    """JSON lines, and .json files that hold data; all of these where nothing but a description stands beside them."""
    known = [file for file in files if _suffix(file) in (".jsonl", ".ndjson") or _is_data(file)]
    alone = all(_suffix(file) in (".json", ".md", "") for file in files)
    return [file for file in files if _suffix(file) == ".json"] if alone and not known else known


def _is_data(file: Path) -> bool:
    """Whether it is a .json file whose first object has a column that examples are made of."""
    if _suffix(file) != ".json":
        return False
    try:
        with _open(file) as binary:
            reader = _Text(binary)
            reader.skip(" \t\r\n\ufeff[")
            first = reader.value(json.JSONDecoder())
    except (OSError, EOFError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and not COLUMNS.isdisjoint(first)


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    chosen = [file for file in files if splits[file] == SPLITS.get(split, split)]
    if not chosen:
        raise BadData(f"{folder} has no split {split!r}; it has {', '.join(sorted(set(splits.values())))}")
    return chosen


def _split_of(file: Path) -> str:
    """The last split that the path names; files that name none are for training."""
    named = [SPLITS[word] for word in re.findall("[a-z]+", str(file).lower()) if word in SPLITS]
    return named[-1] if named else "train"


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in file.relative_to(folder).parts)


def _looks_like_text(file: Path) -> bool:
    """In a folder, pictures and archives are passed over; a file that was named is not."""
    with file.open("rb") as opened:
        start = opened.read(CHUNK)
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end < len(start):  # a character that the chunk's end cuts is no damage
            return False
    return bool(start) and b"\0" not in start


def _text(path: Path) -> Iterator[SourceRow]:
    """A text file as one row, a large one in pieces of whole lines; all but the last say that more follows."""
    kept, line = "", 1
    try:
        with _open(path) as binary:
            file = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
            while read := file.read(TEXT_PIECE):
                kept += read
                end = kept.rfind("\n", 0, TEXT_PIECE) + 1 or TEXT_PIECE
                while len(kept) > TEXT_PIECE:
                    piece, kept = kept[:end], kept[end:]
                    yield SourceRow(f"{path}:{line}", {"text": piece, "finish": "length"})
                    line += piece.count("\n")
                    end = kept.rfind("\n", 0, TEXT_PIECE) + 1 or TEXT_PIECE
    except (OSError, EOFError) as error:
        raise BadData(f"{path}:{line}: cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        raise BadData(f"{path}:{line}: not UTF-8 text ({error.reason}); expected a text file") from error
    if "\0" in kept:
        raise BadData(f"{path}:{line}: holds null characters; expected a text file")
    if kept.strip():
        yield SourceRow(f"{path}:{line}", {"text": kept})


READERS: dict[str, Callable[[Path], Iterator[SourceRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _csv,
    ".arrow": _arrow,
}
