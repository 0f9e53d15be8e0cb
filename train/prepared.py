"""Prepared text on disk: token ids and loss mask in sharded safetensors, with a manifest that says what they are.

    manifest.json              version, tokenizer, counts, shards, how it was made
    shard-00000.safetensors    ids int32 [T], supervised uint8 [T], starts int64 [documents + 1]

Opening reads the starts alone; pieces are read from mapped files when they are needed.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from specdec.errors import BadData
from specdec.train.batch import Document
from specdec.train.checkpoint import flush
from specdec.train.order import Piece

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 24


class PreparedData:
    """Documents of a directory that `write_prepared` made.

    Raises:
        BadData: missing, truncated or inconsistent files; the message names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = _read_manifest(path)
        self._files: list[Any] = []
        self._starts: list[list[int]] = []
        self._first: list[int] = []
        lengths: list[int] = []
        for shard in self.manifest["shards"]:
            file, starts = _open_shard(path / shard["file"], shard)
            self._first.append(len(lengths))
            self._files.append(file)
            self._starts.append(starts)
            lengths += [stop - start for start, stop in itertools.pairwise(starts)]
        if len(lengths) != self.manifest["documents"]:
            raise BadData(
                f"{path / MANIFEST} speaks of {self.manifest['documents']} documents, there are {len(lengths)}"
            )
        self.lengths = tuple(lengths)

    def piece(self, piece: Piece) -> Document:
        """Tokens [start, stop) of one document."""
        shard = bisect_right(self._first, piece.document) - 1
        start = self._starts[shard][piece.document - self._first[shard]]
        span = slice(start + piece.start, start + piece.stop)
        file = self._files[shard]
        return Document(file.get_slice("ids")[span].long(), file.get_slice("supervised")[span].bool())


@dataclass
class MemoryData:
    """Documents in memory: (ids, supervised) of each."""

    documents: list[tuple[torch.Tensor, torch.Tensor]]
    lengths: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = tuple(len(ids) for ids, _ in self.documents)

    def piece(self, piece: Piece) -> Document:
        """Tokens [start, stop) of one document."""
        ids, supervised = self.documents[piece.document]
        return Document(ids[piece.start : piece.stop].long(), supervised[piece.start : piece.stop].bool())


def write_prepared(
    path: Path, documents: Iterable[tuple[list[int], list[bool]]], description: dict[str, Any]
) -> dict[str, Any]:
    """Write documents of (ids, supervised) and return the manifest.

    Nothing is left behind when it fails; a finished directory appears in one move.

    Raises:
        BadData: the directory exists, or nothing at all is supervised.
    """
    if path.exists():
        raise BadData(f"{path} exists already; prepared data is never overwritten")
    unfinished = path.with_name(f".unfinished-{path.name}-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        shards = _write_shards(unfinished, documents)
        supervised = sum(shard["supervised"] for shard in shards)
        if not supervised:
            raise BadData(
                "no token of this data is supervised: every loss mask is all zeros. Look at `specdec data preview`"
            )
        manifest = {
            "format_version": FORMAT_VERSION,
            **description,
            "documents": sum(shard["documents"] for shard in shards),
            "tokens": sum(shard["tokens"] for shard in shards),
            "supervised": supervised,
            "shards": shards,
        }
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        flush(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return manifest


def _write_shards(folder: Path, documents: Iterable[tuple[list[int], list[bool]]]) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = []
    ids: list[int] = []
    supervised: list[bool] = []
    starts = [0]

    def close() -> None:
        name = f"shard-{len(shards):05d}.safetensors"
        mask = torch.tensor(supervised, dtype=torch.uint8)
        save_file(
            {"ids": torch.tensor(ids, dtype=torch.int32), "supervised": mask, "starts": torch.tensor(starts)},
            folder / name,
        )
        shards.append({"file": name, "documents": len(starts) - 1, "tokens": len(ids), "supervised": int(mask.sum())})

    for text, mask in documents:
        if len(text) != len(mask):
            raise BadData(f"document {len(starts) - 1} has {len(text)} ids and a mask of {len(mask)}")
        ids += text
        supervised += mask
        starts.append(len(ids))
        if len(ids) >= SHARD_TOKENS:
            close()
            ids, supervised, starts = [], [], [0]
    if len(starts) > 1:
        close()
    return shards


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadData(f"{path} is no prepared data: {file} cannot be read ({error})") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise BadData(f"{file} has format version {version}; this specdec reads version {FORMAT_VERSION}")
    if not isinstance(manifest.get("shards"), list) or not isinstance(manifest.get("documents"), int):
        raise BadData(f"{file} lists no shards or no number of documents")
    return manifest


def _open_shard(file: Path, described: dict[str, Any]) -> tuple[Any, list[int]]:
    try:
        opened = safe_open(file, framework="pt")
        starts = opened.get_tensor("starts").tolist()
        tokens = opened.get_slice("ids").get_shape()[0]
        masks = opened.get_slice("supervised").get_shape()[0]
    except (OSError, SafetensorError) as error:
        raise BadData(f"{file} cannot be read: {error}") from error
    if not starts[0] == 0 <= starts[-1] == tokens == masks == described["tokens"]:
        raise BadData(f"{file} holds {tokens} tokens, the manifest says {described['tokens']}")
    return opened, starts
