"""Cost tables are kept in the user's cache folder, one file for each target, drafter and circumstances."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from specdec.costs.table import CostTable
from specdec.environment import hardware, versions
from specdec.packed import is_packed
from specdec.probe import cache_folder
from specdec.target import Target

MAX_AGE = 30 * 24 * 3600.0
"""Seconds after which costs are measured anew: drivers, kernels and neighbours change."""


def described(target: Target, drafter: str = "") -> dict[str, Any]:
    """Everything that costs depend on: configuration, dtype, attention, optimisation, device, threads, versions.

    Args:
        target: whose forwards are measured.
        drafter: what proposes, in words that change when it does; "" for the target alone.
    """
    config = target.model.config.to_json_string(use_diff=False)
    machine = hardware(target.device)
    return {
        "target": type(target.model).__name__,
        "parameters": sum(parameter.numel() for parameter in target.model.parameters()),
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "attention": target.attention,
        "form": target.form,
        "dtype": str(target.dtype).removeprefix("torch."),
        "packed": is_packed(target.model),
        "device": target.device.type,
        "hardware": {key: machine[key] for key in ("cpu", "cores", "threads", "gpu")},
        "versions": versions(),
        "drafter": drafter,
    }


def fingerprint(target: Target, drafter: str = "") -> str:
    """A hash of `described`; another one means that costs must be measured anew."""
    return hashlib.sha256(json.dumps(described(target, drafter), sort_keys=True).encode()).hexdigest()


def read(key: str, now: float | None = None) -> CostTable | None:
    """The table kept under this fingerprint; None where there is none, or it is damaged or older than MAX_AGE."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        table = CostTable.of_dict(json.loads(_file(key).read_text(encoding="utf-8")))
        age = (time.time() if now is None else now) - table.measured_at
        return table if 0 <= age <= MAX_AGE else None
    return None


def write(key: str, table: CostTable) -> None:
    """Keep a table; a reader sees it whole or not at all."""
    with suppress(OSError):  # a read-only home only means that the next process measures again
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{key}.{os.getpid()}")
        table.save(partial)
        partial.replace(file)


def _file(key: str) -> Path:
    return cache_folder() / "costs" / f"{key}.json"
