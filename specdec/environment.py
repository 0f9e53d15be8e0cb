"""What a record of a run says of its circumstances: hardware, versions, specdec's own commit, which weights, when."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from specdec.version import __version__

SAMPLED_WEIGHTS = 64
"""Elements of each weight that go into a model's hash."""


def hardware(device: torch.device) -> dict[str, Any]:
    """What the run ran on."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {"name": properties.name, "memory_bytes": properties.total_memory, **_driver(device)}
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver(device: torch.device) -> dict[str, Any]:
    command = [
        "nvidia-smi",
        "--query-gpu=driver_version,power.limit",
        "--format=csv,noheader",
        f"--id={device.index or 0}",
    ]
    if shutil.which("nvidia-smi") is None:
        return {"driver": None, "power_limit": None}
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    driver, _, power = answer.partition(",")
    return {"driver": driver.strip() or None, "power_limit": power.strip() or None}


def versions() -> dict[str, Any]:
    """Of what decodes."""
    return {
        "specdec": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
    }


def git_commit() -> str | None:
    """The commit of specdec's own checkout, None when it is installed without one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def weights_sample(model: nn.Module) -> str:
    """A hash of the first elements of every weight: tells fine-tuned copies apart at no cost."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(name.encode())
        digest.update(weight.detach().reshape(-1)[:SAMPLED_WEIGHTS].float().cpu().numpy().tobytes())
    return digest.hexdigest()
