"""Costs of a machine that is only described: a roofline. Whatever comes from here is a projection.

A forward over n tokens of B rows takes as long as the slower of reading and computing, plus what does not shrink:

    reading    = weights + B * context * key-value bytes, over the bandwidth that is reached
    computing  = 2 * parameters * n + 4 * n * context * hidden * layers, over the operations that are reached
    the rest   = launch + layers * (kernel latency + 2 all-reduces where devices share a layer)

Every number is in a TOML file that ships (`machines.toml`).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.errors import SpecdecError

MACHINES = Path(__file__).parent / "machines.toml"


@dataclass(frozen=True)
class Device:
    """Peak numbers of one device, and how many of them share every layer."""

    bytes_per_second: float
    flops: float
    memory_bytes: float
    about: str = ""
    count: int = 1


@dataclass(frozen=True)
class Serving:
    """What is reached of the peaks, and seconds that do not shrink with the work; see machines.toml."""

    bandwidth_share: float
    flops_share: float
    seconds_per_layer: float
    seconds_per_forward: float
    seconds_per_step: float
    seconds_per_reduction: float
    link_bytes_per_second: float


@dataclass(frozen=True)
class ModelSize:
    """What a forward of a model reads and computes.

    Attributes:
        parameters: all of them are read in every forward, and used for every token.
        layers, hidden_size: L and D.
        key_value_size: key-value heads times head size.
        bytes_per_value: of weights, keys and values.
        about: for people.
    """

    parameters: float
    layers: int
    hidden_size: int = 0
    key_value_size: int = 0
    bytes_per_value: int = 2
    about: str = ""

    @property
    def token_bytes(self) -> float:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.key_value_size * self.bytes_per_value


@dataclass(frozen=True)
class Roofline:
    """A described machine; has the calls of `table.Costs`.

    Attributes:
        name: as it was asked for.
        device, model, draft, serving: see machines.toml.
    """

    name: str
    device: Device
    model: ModelSize
    draft_model: ModelSize
    serving: Serving

    pads = False
    """Rows of different widths are packed: the nodes of a verification may be a mean."""

    def verify(self, nodes: float, batch: int = 1, context: float | None = None) -> float:
        """Seconds of a forward over so many nodes for each row, each after so many tokens (0 for None)."""
        return self._forward(self.model, nodes * batch, batch, context or 0.0)

    def draft(self, levels: float, nodes: float, batch: int = 1, growth: str = "fixed") -> float:
        """Seconds of one forward of the drafter for each level; its keys and values are left out."""
        if not self.draft_model.parameters or not levels:
            return 0.0
        return levels * self._forward(self.draft_model, max(nodes / levels, 1.0) * batch, batch, 0.0)

    def overhead(self, tokens: float = 1.0) -> float:
        """Seconds of a step outside of forwards."""
        return self.serving.seconds_per_step

    def fits(self, batch: int, context: float) -> bool:
        """Whether weights, keys and values have room on the devices."""
        weights = sum(size.parameters * size.bytes_per_value for size in (self.model, self.draft_model))
        return weights + batch * context * self.model.token_bytes <= self.device.count * self.device.memory_bytes

    def _forward(self, size: ModelSize, tokens: float, batch: int, context: float) -> float:
        device, serving = self.device, self.serving
        read = size.parameters * size.bytes_per_value + batch * context * size.token_bytes
        compute = 2 * size.parameters * tokens + 4 * tokens * context * size.hidden_size * size.layers
        reading = read / (device.count * device.bytes_per_second * serving.bandwidth_share)
        computing = compute / (device.count * device.flops * serving.flops_share)
        reduction = 0.0
        if device.count > 1:
            sent = tokens * size.hidden_size * size.bytes_per_value / serving.link_bytes_per_second
            reduction = 2 * (serving.seconds_per_reduction + sent)
        return (
            max(reading, computing)
            + serving.seconds_per_forward
            + size.layers * (serving.seconds_per_layer + reduction)
        )


def machine_named(name: str, draft: str = "head", file: Path | None = None) -> Roofline:
    """The described machine of this name.

    Args:
        name: MODEL@DEVICE or MODEL@COUNTxDEVICE.
        draft: what drafts, a [draft] of the file.
        file: a TOML file like `machines.toml`; None for that one.

    Raises:
        SpecdecError: no such model, device or draft, or a file that is none.
    """
    content = _read(file or MACHINES)
    found = re.fullmatch(r"([^@]+)@(?:(\d+)x)?([^@]+)", name)
    if found is None:
        raise SpecdecError(f"a machine is named MODEL@DEVICE, such as 8b@h100 or 70b@4xh100, got {name!r}")
    model_name, count, device_name = found.groups()
    where = str(file or MACHINES)
    try:
        model = ModelSize(**_entry(content, "model", model_name, where))
        device = Device(**_entry(content, "device", device_name, where), count=int(count or 1))
        machine = Roofline(
            name, device, model, _draft(_entry(content, "draft", draft, where), model), Serving(**content["serving"])
        )
    except (TypeError, KeyError) as error:
        raise SpecdecError(f"{where} does not describe {name}: {error}") from error
    if device.count < 1 or min(device.bytes_per_second, device.flops, model.parameters) <= 0:
        raise SpecdecError(f"{where} describes {name} by a number that is not above 0")
    return machine


def _draft(entry: Mapping[str, Any], model: ModelSize) -> ModelSize:
    """A draft's size; a head's grows with its target."""
    entry = dict(entry)
    squared, vocabulary = entry.pop("parameters_per_hidden_squared", None), entry.pop("vocabulary", 0)
    if squared is not None:
        entry["parameters"] = squared * model.hidden_size**2 + vocabulary * model.hidden_size
    entry.setdefault("hidden_size", model.hidden_size if squared is not None else 0)
    return ModelSize(**entry)


def _entry(content: Mapping[str, Any], table: str, name: str, where: str) -> Mapping[str, Any]:
    known = content.get(table, {})
    if name not in known:
        raise SpecdecError(f"no {table} {name!r} in {where}; it has: {', '.join(known)}")
    return known[name]


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecdecError(f"cannot read the machines in {file}: {error}") from error
