"""Held-out prompts that validation decodes: those of the prepared data, or a file of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from specdec.errors import BadData
from specdec.train.chat_template import readable
from specdec.train.source import SourceRow, read_source

COLUMNS = ("ids", "prompt", "text")


def read_prompts(file: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[list[int]]:
    """Ids of every prompt of a file: JSON lines with `ids`, `prompt` or `text`; or text, one prompt a line.

    Raises:
        BadData: no such file, an unusable line, an id that the target does not have, or no prompt at all.
    """
    if not file.is_file():
        raise BadData(f"no prompts at {file}: there is no such file")
    if file.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        prompts = [_ids(row, tokenizer) for row in read_source(file)]
    else:
        lines = [line for line in _text(file).splitlines() if line.strip()]
        prompts = [list(tokenizer(line)["input_ids"]) for line in lines]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise BadData(f"{file} holds no prompt")
    largest = max(max(prompt) for prompt in prompts)
    if largest >= vocab_size:
        raise BadData(f"{file} holds the token id {largest}, the target has {vocab_size} tokens")
    return prompts


def fitting(prompts: list[list[int]], new_tokens: int, max_positions: int | None) -> list[list[int]]:
    """The prompts that leave room for so many new tokens in what the target was made for."""
    room = None if max_positions is None else max_positions - new_tokens
    return [prompt for prompt in prompts if room is None or len(prompt) <= room]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadData(f"the prompts in {file} cannot be read: {error}") from error


def _ids(row: SourceRow, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    column = next((name for name in COLUMNS if name in row.fields), None)
    if column is None:
        raise row.bad(f"no prompt; expected one of the columns {', '.join(COLUMNS)}, got {', '.join(row.fields)}")
    value: Any = row.fields[column]
    if column == "ids":
        if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
            raise row.bad("ids is a list of token ids")
        return value
    if not isinstance(value, str):
        raise row.bad(f"{column} is text")
    try:
        return list(tokenizer(readable(value))["input_ids"])
    except BadData as error:
        raise row.bad(error) from error
