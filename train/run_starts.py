"""OUT/run.json: under which circumstances a run was started, each time that it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import accelerate
import torch

from specdec.environment import git_commit, hardware, now, versions
from specdec.train.checkpoint import write_whole

RUN = "run.json"


def add_start(file: Path, about: dict[str, Any], start: dict[str, Any]) -> None:
    """Add one start, and say anew what the run is about."""
    starts = read_run(file).get("starts", [])
    write_whole(file, json.dumps({**about, "starts": [*starts, start]}, indent=2) + "\n")


def read_run(file: Path) -> dict[str, Any]:
    """What was written there; nothing where there is no such file, or a damaged one."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("starts"), list) else {}


def circumstances(command: tuple[str, ...], device: torch.device) -> dict[str, Any]:
    """Command, versions, commit and hardware of this process."""
    return {
        "started": now(),
        "command": list(command or sys.argv),
        "versions": {**versions(), "accelerate": accelerate.__version__},
        "git_commit": git_commit(),
        "hardware": hardware(device),
    }
