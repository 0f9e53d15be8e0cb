"""`specdec info`: what a directory holds, whether it can be a target, and which target a drafter or head fits."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from specdec import demo, formats
from specdec.cli.console import out
from specdec.cli.model import DEMO_MODELS, load_model
from specdec.cli.options import Json
from specdec.drafters.directory import read_drafter_json
from specdec.drafters.load import load_drafter
from specdec.errors import SpecdecError, UnsupportedModel
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.probe import probe
from specdec.target import Target


def info(
    path: Annotated[
        str,
        typer.Argument(
            help="A model, a drafter or a draft head in any format; or [bold]demo[/bold], "
            "[bold]demo-draft[/bold] or another word of what ships.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option("--target", help="Also say whether it fits this target as a drafter.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a model, drafter or draft head is: its size, whether it verifies trees, which target it fits.

    Example: specdec info demo-draft --target demo
    """
    facts = {"path": path, **describe(path)}
    if target is not None:
        facts["fits_target"] = _fit(path, target)
    if as_json:
        print(json.dumps(facts))
    else:
        out.print(_table(facts))


def describe(name: str) -> dict[str, Any]:
    """Facts about a drafter directory, a draft head, a model, or what lies together in one directory."""
    folder = demo.HEADS.get(name, Path(name).expanduser())
    facts: dict[str, Any] = {}
    if name not in DEMO_MODELS and folder.exists() and formats.detect(folder) is not None:
        checkpoint = formats.read(folder)
        facts["head"] = describe_head(checkpoint)
        if checkpoint.base is None:
            return facts | {"fits": _fits_target(checkpoint.target)}
        facts["fits"] = "the model in this directory, and no other"
    if name not in DEMO_MODELS and (folder / "drafter.json").is_file():
        drafter = read_drafter_json(folder)
        facts["drafter"] = {"kind": drafter.kind, "options": drafter.options, "target": drafter.target}
        facts["fits"] = _fits_target(drafter.target)
        if not (folder / "config.json").is_file():
            return facts
    model = load_model(name, device="cpu")
    facts["model"] = describe_model(model)
    facts["target"] = _form(model)
    vocabulary = facts["model"]["vocabulary"]
    facts.setdefault("fits", f"as a draft model, targets with the same tokenizer ({vocabulary} tokens)")
    return facts


def describe_head(checkpoint: HeadCheckpoint) -> dict[str, Any]:
    """What a draft head is, from its files alone."""
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()})
    return {
        "kind": checkpoint.kind,
        "format": checkpoint.format,
        "parameters": checkpoint.num_parameters,
        "dtypes": dtypes,
        "config": asdict(checkpoint.config),
        "target": checkpoint.target,
    }


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """Sizes of a model from its config and parameters."""
    config = model.config.get_text_config(decoder=True)
    return {
        "class": type(model).__name__,
        "type": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": getattr(config, "num_attention_heads", None),
        "key_value_heads": getattr(config, "num_key_value_heads", None),
        "vocabulary": config.vocab_size,
        "positions": getattr(config, "max_position_embeddings", None),
        "sliding_window": getattr(config, "sliding_window", None),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _form(model: PreTrainedModel) -> dict[str, str]:
    """What the probe says of this model as a target."""
    try:
        found = probe(Target(model))
    except UnsupportedModel as error:
        return {"form": "refused", "reason": str(error)}
    return {"form": "refused" if found.form == "refuse" else found.form, "reason": found.reason}


def _fits_target(target: dict[str, Any]) -> str:
    if not target:
        return "any target"
    compared = ", ".join(f"{key} {value}" for key, value in target.items() if key != "name")
    made_for = f"made for {target['name']}; " if target.get("name") else ""
    return f"{made_for}targets with {compared}" if compared else made_for.rstrip("; ")


def _fit(path: str, target: str) -> dict[str, Any]:
    """Whether the drafter can be loaded for this target, and why not."""
    model = load_model(target, device="cpu")
    try:
        load_drafter(path, model)
    except SpecdecError as error:
        return {"target": target, "fits": False, "reason": str(error)}
    return {"target": target, "fits": True}


def _table(facts: dict[str, Any]) -> Table:
    """Two columns that fold on a narrow terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for label, value in [("path", facts["path"]), *_drafter_rows(facts), *_head_rows(facts), *_model_rows(facts)]:
        table.add_row(label, Text(value))
    table.add_row("fits", Text(facts["fits"]))
    if "fits_target" in facts:
        fit = facts["fits_target"]
        table.add_row(f"fits {fit['target']}", Text("yes" if fit["fits"] else f"no: {fit['reason']}"))
    return table


def _drafter_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if "drafter" not in facts:
        return []
    options = ", ".join(f"{key}={value}" for key, value in facts["drafter"]["options"].items())
    return [("drafter", facts["drafter"]["kind"]), ("options", options or "defaults")]


def _head_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if "head" not in facts:
        return []
    head = facts["head"]
    return [
        ("head", head["kind"]),
        ("format", head["format"]),
        ("parameters", f"{head['parameters']:,}"),
        ("dtype", ", ".join(head["dtypes"])),
        *_config_rows(head["config"]),
    ]


def _config_rows(config: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    """One row for each field, those of a nested configuration under its name."""
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        label = f"{above}{key.replace('_', ' ')}"
        rows += _config_rows(value, f"{label}: ") if isinstance(value, dict) and value else [(label, _shown(value))]
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) if len(value) <= 16 else f"{len(value)} values"
    return "-" if value is None or value == {} else str(value)


def _model_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if "model" not in facts:
        return []
    model = facts["model"]
    key_value = model["key_value_heads"]
    heads = f"{model['heads']}" + (f", {key_value} for keys and values" if key_value else "")
    window = f"{model['positions'] or 'unlimited'} positions"
    window += f", sliding window of {model['sliding_window']}" if model["sliding_window"] else ""
    return [
        ("model", f"{model['class']} ({model['type']})"),
        ("layers", str(model["layers"])),
        ("hidden size", str(model["hidden_size"])),
        ("heads", heads),
        ("vocabulary", f"{model['vocabulary']} tokens"),
        ("window", window),
        ("parameters", f"{model['parameters'] / 1e6:.2f} million"),
        ("dtype", model["dtype"]),
        ("as target", f"{facts['target']['form']}: {facts['target']['reason']}"),
    ]
