"""Cached features: what the target computes on prepared data, once, on disk.

    features.json              data, target, taps, dtype, row length, shards
    shard-00000.safetensors    tap-2 [T, D], ..., before-norm [T, D], ids int32 [T], starts int64 [documents + 1]

The last layer's output is kept before the final norm; logits and the states after the norm are recomputed from it,
which costs one matrix instead of V numbers for each token. Documents longer than a row were computed in the pieces
that training cuts them into, so the row length belongs to the cache.

Opening reads one small file. Shards are mapped when a piece of theirs is needed, and every piece that is read is
compared with the prepared data's ids.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.drafters.directory import fingerprint
from specdec.errors import BadData
from specdec.json_lines import write_text
from specdec.target import BEFORE_NORM, Target
from specdec.train.batch import Document, TrainBatch
from specdec.train.features import TargetFeatures, stored_taps
from specdec.train.order import Piece, Row, fill, pieces_of
from specdec.train.prepared import PreparedData, check_tokenizer

FORMAT_VERSION = 1
INDEX = "features.json"
SHARD_BYTES = 1 << 30
OPEN_SHARDS = 64


@dataclass(frozen=True)
class Shard:
    """Documents [first, first + documents) and their number of tokens."""

    file: str
    first: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class FeaturePlan:
    """Everything that decides what a cache holds; its JSON is the index.

    Attributes:
        data: `sha256` of the prepared data's manifest.
        target: fingerprint.
        taps: by `hidden_states` index, BEFORE_NORM among them where logits or the tap after the norm are wanted.
        dtype, hidden_size: of every tap.
        row_length: longer documents are computed in pieces of this length.
        packed: whether documents shared rows.
        shards: of about equal size.
    """

    data: str
    target: dict[str, Any]
    taps: tuple[int, ...]
    dtype: str
    hidden_size: int
    row_length: int
    packed: bool
    documents: int
    tokens: int
    shards: tuple[Shard, ...]
    format_version: int = FORMAT_VERSION

    @property
    def bytes_per_token(self) -> int:
        """On disk, ids included."""
        return len(self.taps) * self.hidden_size * _dtype(self.dtype).itemsize + 4

    @property
    def bytes(self) -> int:
        """On disk, but for headers."""
        return self.tokens * self.bytes_per_token

    def size_of(self, shard: Shard) -> int:
        """Bytes of a shard's tensors."""
        return shard.tokens * self.bytes_per_token + 8 * (shard.documents + 1)


def plan_features(
    data: PreparedData,
    target: Target,
    taps: Iterable[int],
    *,
    row_length: int,
    packed: bool = True,
    needs_logits: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> FeaturePlan:
    """What caching these taps would write. Nothing is computed.

    Args:
        data: prepared for this target.
        target: whose states are cached.
        taps: what training reads, by `hidden_states` index or BEFORE_NORM.
        row_length: of the training recipe.
        packed: compute several documents in one row; see `check_packing`.
        needs_logits: whether training reads the target's logits.
        shard_bytes: of one file, about.

    Raises:
        BadData: another tokenizer's data, or a tap that the target does not have.
    """
    check_tokenizer(data.manifest, target.model)
    chosen = tuple(taps)
    wrong = [tap for tap in chosen if tap != BEFORE_NORM and not 0 <= tap <= target.num_layers]
    if wrong:
        raise BadData(f"the target has the taps 0 to {target.num_layers} and before-norm, got {wrong[0]}")
    stored = tuple(sorted(stored_taps(target, chosen, needs_logits=needs_logits)))
    if not stored:
        raise BadData("there is nothing to cache: no tap, and no logits")
    plan = FeaturePlan(
        data=str(data.manifest.get("sha256")),
        target=fingerprint(target.model),
        taps=stored,
        dtype=str(target.dtype).removeprefix("torch."),
        hidden_size=target.hidden_size,
        row_length=row_length,
        packed=packed,
        documents=len(data.lengths),
        tokens=sum(data.lengths),
        shards=(),
    )
    return replace(plan, shards=_shards(data.lengths, max(1, shard_bytes // plan.bytes_per_token)))


def _shards(lengths: tuple[int, ...], tokens_of_one: int) -> tuple[Shard, ...]:
    shards: list[Shard] = []
    first = tokens = 0
    for number, length in enumerate(lengths, start=1):
        tokens += length
        if tokens >= tokens_of_one or number == len(lengths):
            shards.append(Shard(f"shard-{len(shards):05d}.safetensors", first, number - first, tokens))
            first, tokens = number, 0
    return tuple(shards)


def write_features(
    plan: FeaturePlan,
    data: PreparedData,
    target: Target,
    path: Path,
    *,
    rows_at_once: int = 8,
    tell: Callable[[int], None] = lambda _tokens: None,
) -> int:
    """Compute what is missing in `path`, a shard at a time; returns the number of tokens that were computed.

    A killed run goes on behind its last whole shard.

    Args:
        plan: of `plan_features`.
        data, target: what the plan was made for.
        path: of the cache; created, or one of the same plan.
        rows_at_once: rows of one forward.
        tell: hears of tokens as they are done, those that were there already first.

    Raises:
        BadData: `path` holds a cache of something else, the disk is too small, or a state is no number.
    """
    _begin(plan, path)
    missing = [shard for shard in plan.shards if not _is_whole(path / shard.file, plan.size_of(shard))]
    needed, free = sum(plan.size_of(shard) for shard in missing), shutil.disk_usage(path).free
    if needed > free:
        raise BadData(f"the features need {needed:,} bytes more, {path} has {free:,} free; cache fewer taps")
    tell(plan.tokens - sum(shard.tokens for shard in missing))
    for shard in missing:
        _save(path / shard.file, _computed(plan, shard, data, target, rows_at_once, tell))
    return sum(shard.tokens for shard in missing)


def _begin(plan: FeaturePlan, path: Path) -> None:
    names = [entry.name for entry in path.iterdir()] if path.exists() else []
    if INDEX not in names and [name for name in names if not name.startswith(".")]:
        raise BadData(f"{path} holds something else than cached features; choose another --out")
    path.mkdir(parents=True, exist_ok=True)
    for left in path.glob(".unfinished-*"):
        left.unlink()
    if (path / INDEX).is_file():
        there = read_index(path)
        differing = [name for name, value in asdict(plan).items() if asdict(there)[name] != value]
        if differing:
            raise BadData(
                f"{path} holds features of something else ({', '.join(differing)} differ); choose another --out"
            )
        return
    write_text(path / INDEX, json.dumps(asdict(plan), indent=2) + "\n")


def _is_whole(file: Path, size: int) -> bool:
    """A safetensors file begins with the length of its header; nothing else is read."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    return file.stat().st_size == 8 + header + size


@torch.no_grad()
def _computed(
    plan: FeaturePlan, shard: Shard, data: PreparedData, target: Target, rows_at_once: int, tell: Callable[[int], None]
) -> dict[str, Tensor]:
    """The tensors of one shard."""
    lengths = data.lengths[shard.first : shard.first + shard.documents]
    starts = [0, *accumulate(lengths)]
    shape = (shard.tokens, plan.hidden_size)
    tensors = {name_of(tap): torch.zeros(shape, dtype=_dtype(plan.dtype)) for tap in plan.taps}
    whole = [Piece(number, 0, length) for number, length in enumerate(lengths, start=shard.first)]
    tensors["ids"] = torch.cat([data.piece(piece).ids for piece in whole]).int()
    tensors["starts"] = torch.tensor(starts)
    features = TargetFeatures(target, plan.taps, needs_logits=False)
    every = _rows(plan, shard, lengths)
    for rows in (every[first : first + rows_at_once] for first in range(0, len(every), rows_at_once)):
        batch = features(TrainBatch.of_rows(data, rows, [0] * len(rows), plan.row_length))
        for place, row in enumerate(rows):
            for piece, columns in _columns(row):
                start = starts[piece.document - shard.first]
                span = slice(start + piece.start, start + piece.stop)
                for tap in plan.taps:
                    tensors[name_of(tap)][span] = _finite(batch.taps[tap][place, columns], tap, piece).cpu()
        tell(sum(piece.stop - piece.start for row in rows for piece in row))
    return tensors


def _rows(plan: FeaturePlan, shard: Shard, lengths: tuple[int, ...]) -> list[Row]:
    pieces = [
        piece
        for number, length in enumerate(lengths, start=shard.first)
        for piece in pieces_of(number, length, plan.row_length)
    ]
    return fill(pieces, plan.row_length) if plan.packed else [(piece,) for piece in pieces]


def _columns(row: Row) -> Iterator[tuple[Piece, slice]]:
    column = 0
    for piece in row:
        end = column + piece.stop - piece.start
        yield piece, slice(column, end)
        column = end


def _finite(states: Tensor, tap: int, piece: Piece) -> Tensor:
    if not bool(states.isfinite().all()):
        raise BadData(
            f"the target's {name_of(tap)} of document {piece.document}, tokens {piece.start} to {piece.stop}, holds "
            "values that are no numbers; try --dtype float32"
        )
    return states


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    unfinished = file.with_name(f".unfinished-{file.name}")
    save_file(tensors, unfinished)
    with unfinished.open("rb") as opened:
        os.fsync(opened.fileno())
    unfinished.replace(file)


def name_of(tap: int) -> str:
    """The word for a tap: its number, or before-norm."""
    return "before-norm" if tap == BEFORE_NORM else f"tap-{tap}"


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise BadData(f"{name!r} is no number format of torch")
    return dtype


# --- Reading -----------------------------------------------------------------------------------------------


class CachedData:
    """Prepared data whose documents come with taps.

    Args:
        data: the prepared data.
        path: of its cache.
        target: whose states are in it.
        taps: what training reads.
        row_length: of the training recipe.
        needs_logits: whether training reads logits.

    Raises:
        BadData: another data's, target's, dtype's or row length's features, missing taps or shards, or states that
            the target does not compute today.
    """

    def __init__(
        self,
        data: PreparedData,
        path: Path,
        target: Target,
        taps: Iterable[int],
        *,
        row_length: int,
        needs_logits: bool = True,
    ) -> None:
        self.texts, self.path = data, path
        self.lengths = data.lengths
        self.plan = read_index(path)
        self.taps = tuple(sorted(stored_taps(target, taps, needs_logits=needs_logits)))
        self._first = [shard.first for shard in self.plan.shards]
        self._open: OrderedDict[str, tuple[Any, Tensor]] = OrderedDict()
        self._check(target, row_length)
        self._check_sample(target)

    def piece(self, piece: Piece) -> Document:
        """Tokens [start, stop) of one document, with taps.

        Raises:
            BadData: the cache holds other ids there.
        """
        document = self.texts.piece(piece)
        shard = self.plan.shards[bisect_right(self._first, piece.document) - 1]
        file, starts = self._opened(shard)
        start = int(starts[piece.document - shard.first])
        span = slice(start + piece.start, start + piece.stop)
        try:
            ids = file.get_slice("ids")[span].long()
            taps = {tap: file.get_slice(name_of(tap))[span] for tap in self.taps}
        except SafetensorError as error:
            raise BadData(f"{self.path / shard.file} cannot be read: {error}") from error
        if not torch.equal(ids, document.ids):
            raise BadData(
                f"{self.path / shard.file} holds other ids than the prepared data for document {piece.document}; "
                "compute the features again"
            )
        return replace(document, taps=taps)

    def supervised(self, piece: Piece) -> Tensor:
        """Bool [stop - start]: which tokens of the piece are supervised."""
        return self.texts.supervised(piece)

    def _opened(self, shard: Shard) -> tuple[Any, Tensor]:
        if shard.file in self._open:
            self._open.move_to_end(shard.file)
            return self._open[shard.file]
        file = self.path / shard.file
        try:
            opened = safe_open(file, framework="pt")
            starts = opened.get_tensor("starts")
            shapes = {tap: tuple(opened.get_slice(name_of(tap)).get_shape()) for tap in self.taps}
        except (OSError, SafetensorError) as error:
            raise BadData(f"{file} cannot be read: {error}; remove it and run `specdec data features` again") from error
        lengths = tuple(starts.diff().tolist())
        expected = (shard.tokens, self.plan.hidden_size)
        if lengths != self.lengths[shard.first : shard.first + shard.documents] or {*shapes.values()} != {expected}:
            raise BadData(f"{file} holds documents of other lengths than the prepared data; compute it again")
        self._open[shard.file] = opened, starts
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return opened, starts

    def _check(self, target: Target, row_length: int) -> None:
        plan, data = self.plan, self.texts
        same_cuts = row_length == plan.row_length or max(data.lengths) <= min(row_length, plan.row_length)
        found = {
            "data": (str(data.manifest.get("sha256")), plan.data),
            "number of documents": (len(data.lengths), plan.documents),
            "number of tokens": (sum(data.lengths), plan.tokens),
            "target": (fingerprint(target.model), plan.target),
            "dtype": (str(target.dtype).removeprefix("torch."), plan.dtype),
            "row length": (plan.row_length if same_cuts else row_length, plan.row_length),
        }
        for name, (ours, cached) in found.items():
            if ours != cached:
                raise BadData(f"{self.path} was computed for another {name}: {cached}, this run has {ours}")
        missing = [name_of(tap) for tap in self.taps if tap not in plan.taps]
        if missing:
            raise BadData(f"{self.path} lacks {', '.join(missing)}; it holds {', '.join(map(name_of, plan.taps))}")
        for shard in plan.shards:
            if not _is_whole(self.path / shard.file, plan.size_of(shard)):
                raise BadData(
                    f"{self.path / shard.file} is missing or not whole; run the same `specdec data features` command "
                    "again, it computes what is missing"
                )

    def _check_sample(self, target: Target) -> None:
        """The first piece of the first and of the last shard, computed again.

        Other weights in a model of the same shape are found by nothing else. Packing changes rounding, so a relative
        difference of the root of the dtype's precision is allowed.
        """
        for shard in {self.plan.shards[0], self.plan.shards[-1]}:
            numbers = range(shard.first, shard.first + shard.documents)
            number = next((number for number in numbers if self.lengths[number] > 1), None)
            if number is None:
                continue
            piece = pieces_of(number, self.lengths[number], self.plan.row_length)[0]
            cached = self.piece(piece)
            alone = TrainBatch.of_rows(self.texts, [(piece,)], [0], piece.stop)
            fresh = TargetFeatures(target, self.taps, needs_logits=False)(alone).taps
            for tap in self.taps:
                ours, theirs = fresh[tap][0].float().cpu(), cached.taps[tap].float()
                difference = float((ours - theirs).norm() / ours.norm().clamp(min=1e-9))
                if not difference <= math.sqrt(torch.finfo(target.dtype).eps):
                    raise BadData(
                        f"{self.path} holds other states than the target computes: {name_of(tap)} of document {number} "
                        f"differs by {difference:.1%}; it was computed with other weights, compute it again"
                    )


def read_index(path: Path) -> FeaturePlan:
    """The index of a cache.

    Raises:
        BadData: there is none, or a damaged one.
    """
    file = path / INDEX
    try:
        raw = json.loads(file.read_text())
        if raw["format_version"] != FORMAT_VERSION:
            raise BadData(f"{file} has format version {raw['format_version']}; this specdec reads {FORMAT_VERSION}")
        shards = tuple(Shard(**shard) for shard in raw.pop("shards"))
        return FeaturePlan(**{**raw, "taps": tuple(raw["taps"]), "shards": shards})
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadData):
            raise
        raise BadData(f"{path} holds no cached features: {file} cannot be read ({error})") from error
