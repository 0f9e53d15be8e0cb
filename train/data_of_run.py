"""Data of a run as somebody names it: prepared already, or text that is prepared into the run's own directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from specdec.errors import BadData
from specdec.train.encoding import Encoder
from specdec.train.prepare import SETTINGS, TRAIN, prepare
from specdec.train.prepared import MANIFEST


def is_prepared(path: Path) -> bool:
    """Whether `specdec data prepare` made this directory, or one part of it."""
    return (path / MANIFEST).is_file() or (path / TRAIN / MANIFEST).is_file()


def prepared_for(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_name: str,
    into: Path,
    *,
    tell: Callable[[str], None] = lambda _text: None,
) -> Path:
    """The directory of prepared data, which is made where it is not there yet.

    Args:
        name: of prepared data, or of a source as in `read_source`.
        tokenizer: the target's.
        tokenizer_name: the target's directory or hub id, for the record.
        into: where to prepare a source.
        tell: hears of what was prepared, and of warnings.

    Raises:
        BadData: nothing of that name, unusable rows, or data of another source in `into`.
    """
    path = Path(name).expanduser()
    if is_prepared(path):
        return path
    if path.is_dir() and (path / SETTINGS).is_file():
        raise BadData(f"{path} holds {SETTINGS} but no {TRAIN}/{MANIFEST}: it is damaged; prepare it again")
    if into.exists():
        return _found(into, name, tokenizer)
    there = into.parent.exists()
    try:
        counts = prepare([name], Encoder(tokenizer), into, tokenizer_name=tokenizer_name)
    except BaseException:
        if not there and into.parent.is_dir() and not any(into.parent.iterdir()):
            into.parent.rmdir()
        raise
    tell(f"prepared {counts.documents} documents into {into}, {counts.held_out} more are held out")
    for warning in counts.warnings:
        tell(warning)
    return into


def _found(into: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> Path:
    """What an earlier start of the same run prepared."""
    try:
        settings = json.loads((into / SETTINGS).read_text())
        sources, vocabulary = settings["sources"], settings["tokenizer"]["vocabulary"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadData(f"{into} is in the way and was not prepared here ({error}); choose another --out") from error
    if sources != [name]:
        raise BadData(
            f"{into} was prepared from {', '.join(sources)}, the command names {name}; use {into} itself as data, "
            "or choose another --out"
        )
    if vocabulary != Encoder(tokenizer).vocabulary:
        raise BadData(f"{into} was prepared with another tokenizer than this target's; choose another --out")
    return into
