"""Preparing data: from sources to token ids with loss masks, a part of them held out.

OUT/train/         prepared data (train.prepared)
OUT/held-out/      the same, of rows that training does not see
OUT/prompts.jsonl  the beginnings of held-out rows, for validation by decoding
OUT/prepare.json   every setting and every number
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from specdec.drafters.directory import tokenizer_hash
from specdec.errors import BadData
from specdec.train.encoding import Encoded, Encoder
from specdec.train.example import example_of
from specdec.train.order import derived_seed
from specdec.train.prepared import MANIFEST, PreparedData, PreparedWriter, unfinished_folder
from specdec.train.source import SourceRow, read_source

TRAIN, HELD_OUT, PROMPTS, SETTINGS = "train", "held-out", "prompts.jsonl", "prepare.json"

FEW = 0.01
"""A share of supervised tokens below which something is probably wrong."""

WAITING = 1000
"""Rows that begin like the first one and wait with it, at most."""

Told = Callable[[int], None]


@dataclass
class Prepared:
    """What preparing came to.

    Attributes:
        rows: read; `bad` of them were passed over because they were asked to be, `first_bad` says why the first was.
        documents, held_out: written to either part.
        tokens, supervised: of both parts.
        cut: documents longer than the limit, of which `cut_answers` were cut within supervised text.
        lost: tokens cut off.
        silent: documents left out because nothing in them can be learned.
        turns: rows that became several documents because the chat template rewrites history.
        forms: documents by what they came from.
        warnings: one line each.
    """

    rows: int = 0
    bad: int = 0
    first_bad: str | None = None
    documents: int = 0
    held_out: int = 0
    tokens: int = 0
    supervised: int = 0
    cut: int = 0
    cut_answers: int = 0
    lost: int = 0
    silent: int = 0
    turns: int = 0
    largest_id: int = -1
    forms: dict[str, int] = field(default_factory=dict)
    chat_tokens: int = 0
    chat_supervised: int = 0
    warnings: list[str] = field(default_factory=list)


def prepare(
    sources: list[str | Path],
    encoder: Encoder,
    out: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    holdout: float = 0.02,
    split: str = "train",
    skip_bad: bool = False,
    tokenizer_name: str = "",
    tell: Told = lambda _rows: None,
) -> Prepared:
    """Prepare sources into a new directory, which appears whole or not at all.

    Args:
        sources: see `read_source`.
        encoder: of the target's tokenizer.
        out: the new directory.
        limit: rows to read at most.
        seed: decides which rows are held out: by their beginning, so that rows that begin alike stay together.
        holdout: their share; both parts have a row, if two begin differently, unless it is 0.
        split: of sources that have splits.
        skip_bad: pass over rows that cannot be used and lines that cannot be read, and count them.
        tokenizer_name: for the manifest.
        tell: hears of the rows read so far.

    Raises:
        BadData: a row that cannot be used, with file and line; nothing supervised; or `out` exists.
    """
    if out.exists():
        raise BadData(f"{out} exists already; prepared data is never overwritten")
    if not 0 <= holdout < 1:
        raise BadData(f"a share of {holdout:g} cannot be held out; expected 0 or more and less than 1")
    counts = Prepared()
    read = (read_source(source, split=split, keep_unreadable=True) for source in sources)
    rows = islice((row for source in read for row in source), limit)
    encoded = _encoded(rows, encoder, counts, skip_bad, tell)
    with unfinished_folder(out) as folder:
        train, held_out = PreparedWriter(folder / TRAIN), PreparedWriter(folder / HELD_OUT)
        with (folder / PROMPTS).open("w", encoding="utf-8") as prompts:
            for documents, held in _divided(encoded, holdout, seed):
                for document in documents:
                    (held_out if held else train).add(document.ids, document.supervised)
                if held and documents[0].prompt:
                    prompts.write(json.dumps(_prompt(documents[0], encoder.tokenizer)) + "\n")
        counts.documents, counts.held_out = train.documents, held_out.documents
        _check(counts, encoder, holdout)
        settings = _settings(sources, encoder, tokenizer_name, max_length=encoder.max_length, limit=limit, seed=seed)
        settings |= {"holdout": holdout, "split": split, "largest_id": counts.largest_id}
        train.finish({**settings, "part": TRAIN})
        if held_out.documents:
            held_out.finish({**settings, "part": HELD_OUT})
        else:
            (folder / HELD_OUT).rmdir()
        (folder / SETTINGS).write_text(json.dumps({**settings, "counts": asdict(counts)}, indent=2) + "\n")
    return counts


def open_prepared(path: Path, part: str = TRAIN) -> PreparedData:
    """Prepared data by the directory that `prepare` made, or by that of one part.

    Raises:
        BadData: nothing of the kind there.
    """
    return PreparedData(path if (path / MANIFEST).is_file() else path / part)


def held_out_prompts(path: Path) -> list[list[int]]:
    """Ids of the held-out prompts of a directory that `prepare` made; none when nothing was held out.

    Raises:
        BadData: damaged.
    """
    file = (path if (path / PROMPTS).is_file() else path.parent) / PROMPTS
    if not file.is_file():
        return []
    return [list(row.fields["ids"]) for row in read_source(file)]


def _encoded(
    rows: Iterable[SourceRow], encoder: Encoder, counts: Prepared, skip_bad: bool, tell: Told
) -> Iterator[tuple[str, list[Encoded]]]:
    """Beginning and documents of every usable row."""
    for row in rows:
        counts.rows += 1
        try:
            example = example_of(row)
            documents = _encode(row, encoder, example)
        except BadData as error:
            if not skip_bad:
                raise BadData(f"{error} (--skip-bad passes over such rows)") from error
            counts.bad += 1
            counts.first_bad = counts.first_bad or str(error)
            continue
        finally:
            tell(counts.rows)
        useful = [document for document in documents if document.teaches]
        _count(counts, documents, useful)
        if useful:
            yield example.beginning, useful


def _encode(row: SourceRow, encoder: Encoder, example: Any) -> list[Encoded]:
    try:
        return encoder.encode(example)
    except BadData as error:
        raise row.bad(error) from error


def _count(counts: Prepared, documents: list[Encoded], useful: list[Encoded]) -> None:
    counts.silent += len(documents) - len(useful)
    counts.turns += len(documents) > 1 and documents[0].form == "chat"
    for document in documents:
        counts.cut += document.lost > 0
        counts.cut_answers += document.cut_answer
        counts.lost += document.lost
        marks = sum(document.supervised)
        if document.form == "chat":
            counts.chat_tokens += len(document.ids)
            counts.chat_supervised += marks
    for document in useful:
        counts.tokens += len(document.ids)
        counts.supervised += sum(document.supervised)
        counts.largest_id = max(counts.largest_id, *document.ids)
        counts.forms[document.form] = counts.forms.get(document.form, 0) + 1


def _divided(
    encoded: Iterable[tuple[str, list[Encoded]]], holdout: float, seed: int
) -> Iterator[tuple[list[Encoded], bool]]:
    """Documents of each row with whether it is held out.

    The first row waits, with those that begin like it, for a part that has no other row in the end.
    """
    first: str | None = None
    waiting: list[list[Encoded]] = []
    parts: set[bool] = set()
    waits = True
    for beginning, documents in encoded:
        first = beginning if first is None else first
        waits = waits and len(parts) < 2 and len(waiting) < WAITING
        if waits and beginning == first:
            waiting.append(documents)
            continue
        held = _is_held(beginning, holdout, seed)
        parts.add(held)
        yield documents, held
    if first is not None:
        decides = waits and len(parts) < 2
        held = holdout > 0 and parts == {False} if decides else _is_held(first, holdout, seed)
        yield from ((documents, held) for documents in waiting)


def _is_held(beginning: str, holdout: float, seed: int) -> bool:
    return derived_seed(seed, "held out", beginning) < holdout * (1 << 63)


def _prompt(document: Encoded, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids = document.prompt
    return {"ids": ids, "text": tokenizer.decode(ids)}


def _check(counts: Prepared, encoder: Encoder, holdout: float) -> None:
    """Refuse masks that are certainly wrong, and warn of those that probably are."""
    if not counts.rows:
        raise BadData("the data is empty: there is not a single row")
    if not counts.supervised:
        raise BadData(
            f"no token of {counts.rows - counts.bad} usable rows is supervised ({counts.silent} documents have a loss "
            f"mask of zeros, {counts.bad} rows were passed over{_because(counts)}). Look at `specdec data preview`"
            + (f"; {counts.cut} documents were cut at {encoder.max_length} tokens" if counts.cut else "")
        )
    if counts.chat_tokens and counts.chat_supervised == counts.chat_tokens:
        raise BadData(
            f"every one of the {counts.chat_tokens} tokens of the conversations is supervised, the questions among "
            "them: the chat template marks everything as the assistant's"
        )
    if not counts.documents:
        raise BadData(f"all {counts.held_out} documents are held out, so nothing is left to train on; lower --holdout")
    if holdout and not counts.held_out and counts.rows - counts.bad > 1:
        counts.warnings.append("nothing is held out: all rows begin alike")
    share = counts.supervised / counts.tokens
    if share < FEW:
        counts.warnings.append(
            f"only {counts.supervised} of {counts.tokens} tokens ({share:.2%}) are supervised; look at the preview"
        )
    if counts.cut_answers:
        counts.warnings.append(
            f"{counts.cut_answers} answers were cut off at {encoder.max_length} tokens; --max-length keeps more"
        )
    if counts.silent:
        counts.warnings.append(f"{counts.silent} documents were left out: nothing in them can be learned")
    if counts.bad:
        counts.warnings.append(f"{counts.bad} of {counts.rows} rows were passed over{_because(counts)}")


def _because(counts: Prepared) -> str:
    return f", the first because of {counts.first_bad}" if counts.first_bad else ""


def _settings(sources: list[str | Path], encoder: Encoder, tokenizer_name: str, **settings: Any) -> dict[str, Any]:
    template = encoder.template if encoder.template_sha256 else None
    return {
        "sources": [str(source) for source in sources],
        "tokenizer": {
            "name": tokenizer_name,
            "sha256": tokenizer_hash(Path(tokenizer_name)) if tokenizer_name else None,
            "vocabulary": encoder.vocabulary,
        },
        "template": None
        if template is None
        else {
            "sha256": template.sha256,
            "options": template.options,
            "marks_answers": template.marks_answers,
            "today": template.today.date().isoformat(),
        },
        **settings,
    }
