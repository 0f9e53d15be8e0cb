"""What was sent: prompts of a run by the hash of their ids, in a file of their own beside the records."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from specdec.bench.prompts import Prompt

PROMPTS_FILE = "prompts.jsonl"


def ids_sha256(ids: list[int]) -> str:
    """Of the ids as decimal numbers with spaces between."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


class SentPrompts:
    """Prompts of a run, each kept once: kind, text and ids.

    A prompt is on disk before a record names it. A torn last line is dropped: no record can name it yet.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / PROMPTS_FILE
        data = self._path.read_bytes() if self._path.is_file() else b""
        whole = data[: data.rfind(b"\n") + 1]
        self._ids: dict[str, list[int]] = {}
        for line in whole.splitlines():
            entry = json.loads(line)
            self._ids[entry["sha256"]] = entry["token_ids"]
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))

    def add(self, prompt: Prompt) -> str:
        """Keep a prompt; returns its hash."""
        digest = ids_sha256(prompt.input_ids)
        if digest not in self._ids:
            entry = {"sha256": digest, "kind": prompt.kind, "text": prompt.text, "token_ids": prompt.input_ids}
            with self._path.open("ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._ids[digest] = prompt.input_ids
        return digest

    def ids(self, digest: str) -> list[int]:
        """The ids of a prompt that was kept."""
        return self._ids[digest]
