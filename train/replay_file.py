"""A replay buffer as one safetensors file: all passages end to end, and where each begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.errors import BadCheckpoint
from specdec.train.passage import Passage
from specdec.train.replay import ReplayBuffer
from specdec.train.stored_laws import StoredLaws


def write_replay(buffer: ReplayBuffer, file: Path) -> None:
    """Write what is in the buffer, those that wait last."""
    passages = [*buffer.learned, *buffer.waiting]
    tensors: dict[str, Tensor] = {}
    for name, parts in _columns(passages).items():
        tensors[name] = torch.cat(parts) if parts else torch.zeros(0)
    about = {
        "passages": [[len(p), p.first_position, p.start, len(p.laws)] for p in passages],
        "topics": [passage.topic for passage in passages],
        "keys": [buffer.key_of(passage) for passage in passages],
        "waiting": len(buffer.waiting),
        "added": buffer.added,
        "vocab_size": passages[0].laws.vocab_size if passages else 0,
    }
    save_file(tensors, file, {"replay": json.dumps(about)})


def read_replay(buffer: ReplayBuffer, file: Path) -> None:
    """Put what was written in place of what is in the buffer.

    Raises:
        BadCheckpoint: the file is no replay buffer.
    """
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["replay"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        passages = _passages(about, tensors)
    except Exception as error:
        raise BadCheckpoint(f"{file} cannot be read as a replay buffer: {error}") from error
    buffer.put_back(passages, about["keys"], waiting=about["waiting"], added=about["added"])


def _columns(passages: list[Passage]) -> dict[str, list[Tensor]]:
    """Tensors of all passages by name."""
    columns: dict[str, list[Tensor]] = {}
    for passage in passages:
        laws = passage.laws
        parts: dict[str, Any] = {"ids": passage.ids, "rejected": passage.rejected, "log_p": laws.log_p}
        parts |= {"tokens": laws.tokens, "log_rest": laws.log_rest}
        parts |= {f"tap.{tap}": states for tap, states in passage.taps.items()}
        for name, part in parts.items():
            if part is not None:
                columns.setdefault(name, []).append(part)
    return columns


def _passages(about: dict[str, Any], tensors: dict[str, Tensor]) -> list[Passage]:
    sizes = about["passages"]
    texts = [size for size, _, _, _ in sizes]
    counts = [count for _, _, _, count in sizes]
    lengths = {"ids": texts, "rejected": counts, "log_p": counts, "tokens": counts, "log_rest": counts}
    taps = [name for name in tensors if name.startswith("tap.")]
    lengths |= {name: [size - 1 for size in texts] for name in taps}
    cut = {name: [part.clone() for part in tensor.split(lengths[name])] for name, tensor in tensors.items()}
    passages = []
    for number, (_, first_position, start, _) in enumerate(sizes):
        part = {name: parts[number] for name, parts in cut.items()}
        laws = StoredLaws(part["log_p"], part.get("tokens"), part.get("log_rest"), about["vocab_size"])
        states = {int(name.removeprefix("tap.")): part[name] for name in taps}
        topic = about["topics"][number]
        passages.append(Passage(part["ids"], first_position, start, laws, part["rejected"], states, topic))
    return passages
