"""Prepared text on disk: token ids and loss mask in sharded safetensors, with a manifest that says what they are.

    manifest.json              version, tokenizer, counts, hashes, shards, how it was made
    shard-00000.safetensors    ids int32 [T], supervised uint8 [T], starts int64 [documents + 1]

Opening reads the starts alone; pieces are read from mapped files when they are needed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from specdec.errors import BadData
from specdec.train.batch import Document
from specdec.train.checkpoint import flush
from specdec.train.order import Piece
from specdec.vocabulary import model_vocabulary_sha256, vocab_size

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
        file, span = self._place(piece)
        return Document(file.get_slice("ids")[span].long(), file.get_slice("supervised")[span].bool())

    def supervised(self, piece: Piece) -> torch.Tensor:
        """Bool [stop - start]: which tokens of the piece are supervised."""
        file, span = self._place(piece)
        return file.get_slice("supervised")[span].bool()

    def _place(self, piece: Piece) -> tuple[Any, slice]:
        shard = bisect_right(self._first, piece.document) - 1
        start = self._starts[shard][piece.document - self._first[shard]]
        return self._files[shard], slice(start + piece.start, start + piece.stop)


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

    def supervised(self, piece: Piece) -> torch.Tensor:
        """Bool [stop - start]: which tokens of the piece are supervised."""
        return self.documents[piece.document][1][piece.start : piece.stop].bool()


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
    with unfinished_folder(path) as folder:
        writer = PreparedWriter(folder)
        for ids, supervised in documents:
            writer.add(ids, supervised)
        return writer.finish(description)


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """A neighbour of `path` to write into; it is flushed and becomes `path` in one move, or vanishes on an error.

    What an earlier process left that was killed is removed.
    """
    for left in path.parent.glob(".unfinished-*"):
        named = re.fullmatch(rf"\.unfinished-{re.escape(path.name)}-(\d+)", left.name)
        if named and not _others_work(int(named[1])):
            shutil.rmtree(left, ignore_errors=True)
    unfinished = path.with_name(f".unfinished-{path.name}-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _others_work(pid: int) -> bool:
    """Whether another process of this number runs; a folder of our own number is from one that had it before us."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


class PreparedWriter:
    """Writes documents into a folder, a shard at a time."""

    def __init__(self, folder: Path, shard_tokens: int = SHARD_TOKENS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.shard_tokens = folder, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self.documents = 0
        self._clear()

    def _clear(self) -> None:
        self._ids, self._supervised, self._starts = array("i"), bytearray(), array("q", [0])

    def add(self, ids: list[int], supervised: list[bool]) -> None:
        """Append a document.

        Raises:
            BadData: ids and mask differ in length.
        """
        if len(ids) != len(supervised):
            raise BadData(f"document {self.documents} has {len(ids)} ids and a mask of {len(supervised)}")
        self._ids.extend(ids)
        self._supervised.extend(supervised)
        self._starts.append(len(self._ids))
        self.documents += 1
        if len(self._ids) >= self.shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        if len(self._starts) == 1:
            return
        tensors = {
            "ids": torch.frombuffer(self._ids, dtype=torch.int32),
            "supervised": torch.frombuffer(self._supervised, dtype=torch.uint8),
            "starts": torch.frombuffer(self._starts, dtype=torch.int64),
        }
        file = self.folder / f"shard-{len(self.shards):05d}.safetensors"
        save_file(tensors, file)
        self.shards.append(
            {
                "file": file.name,
                "documents": len(self._starts) - 1,
                "tokens": len(self._ids),
                "supervised": sum(self._supervised),
                "sha256": content_sha256(tensors),
            }
        )
        self._clear()

    def finish(self, description: dict[str, Any]) -> dict[str, Any]:
        """Write what is left and the manifest, which is returned.

        Raises:
            BadData: nothing at all is supervised.
        """
        self._close_shard()
        counts = {name: sum(shard[name] for shard in self.shards) for name in ("documents", "tokens", "supervised")}
        if not counts["supervised"]:
            raise BadData(
                "no token of this data is supervised: every loss mask is all zeros. Look at `specdec data preview`"
            )
        together = hashlib.sha256("".join(shard["sha256"] for shard in self.shards).encode()).hexdigest()
        manifest = {
            "format_version": FORMAT_VERSION, **description, **counts, "sha256": together, "shards": self.shards,
        }  # fmt: skip
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        return manifest


def content_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of a shard's ids, mask and starts."""
    digest = hashlib.sha256()
    for name in ("ids", "supervised", "starts"):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_tokenizer(manifest: dict[str, Any], model: PreTrainedModel) -> None:
    """Refuse data that was prepared with another tokenizer than this target's.

    Vocabularies are compared where both are known, for tokenizer files of the same content may differ; ids that the
    target has no embedding for are refused in any case.

    Raises:
        BadData: they differ.
    """
    tokenizer = manifest.get("tokenizer") or {}
    ours, theirs = tokenizer.get("vocabulary"), model_vocabulary_sha256(model)
    if ours is not None and theirs is not None and ours != theirs:
        raise BadData(
            f"the data was prepared with the tokenizer of {tokenizer.get('name', 'another model')} (vocabulary "
            f"{ours[:12]}), the target {model.name_or_path} has another one (vocabulary {theirs[:12]}); prepare it "
            f"again with --tokenizer {model.name_or_path}"
        )
    largest = manifest.get("largest_id", -1)
    if largest >= vocab_size(model):
        raise BadData(
            f"the data holds the token id {largest}, the target has {vocab_size(model)} tokens; prepare the data with "
            "the target's own tokenizer"
        )


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
