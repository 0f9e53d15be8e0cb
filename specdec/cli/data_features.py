"""`specdec data features`: a cache of what the target computes on prepared data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from specdec.api import target_of
from specdec.cli.console import FAILURE, out
from specdec.cli.model import dtype_of, load_model
from specdec.cli.options import ON_OR_OFF, Device, Dtype, DtypeOption, Json, Threads, within
from specdec.cli.progress import counting
from specdec.errors import SpecdecError
from specdec.target import BEFORE_NORM, Target
from specdec.train.feature_cache import FeaturePlan, name_of, plan_features, write_features
from specdec.train.features import check_packing
from specdec.train.joint import head_recipe
from specdec.train.prepare import open_prepared
from specdec.train.recipe import DRAFT_MODEL, Recipe, recipe_for
from specdec.train.run import make_training

PreparedFolder = Annotated[
    Path, typer.Argument(help="A directory of `specdec data prepare`.", exists=True, show_default=False)
]
TargetOption = Annotated[str, typer.Option("--target", help="The target.", show_default=False)]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Gone on with when it exists.", show_default=False)]
Taps = Annotated[
    str | None, typer.Option(help="Numbers of hidden states, such as 2,16,29 or before-norm.", show_default=False)
]
Kind = Annotated[str | None, typer.Option(help="Instead of taps: what this kind of drafter reads.", show_default=False)]
RowLength = Annotated[int, typer.Option(callback=within(4), help="Of the training recipe: documents are cut there.")]
RowsAtOnce = Annotated[int, typer.Option(callback=within(1), help="Rows of one forward.")]
Packed = Annotated[
    bool, typer.Option("--packed/--no-packed", help="Compute several documents in one row.", rich_help_panel=ON_OR_OFF)
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before writing.")]


def features(
    prepared: PreparedFolder,
    target: TargetOption,
    out_folder: OutFolder,
    taps: Taps = None,
    kind: Kind = None,
    row_length: RowLength = 512,
    rows_at_once: RowsAtOnce = 8,
    packed: Packed = True,
    yes: Yes = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Cache what the target computes on prepared data. Optional: training computes it as it goes otherwise.

    The size is told before anything is written. A run that was stopped goes on behind its last whole shard.

    Example: specdec data features data/chats --target path/to/target --kind eagle3 --out features
    """
    wanted = _wanted(taps, kind)
    if threads:
        torch.set_num_threads(threads)
    data = open_prepared(prepared)
    adapter = target_of(load_model(target, dtype_of(target, dtype), device))
    read, needs_logits = _read_by(wanted, adapter) if isinstance(wanted, Recipe) else (wanted, True)
    if packed:
        check_packing(adapter)
    plan = plan_features(data, adapter, read, row_length=row_length, packed=packed, needs_logits=needs_logits)
    if not as_json:
        _print_plan(plan)
    if not yes and not _agreed():
        raise typer.Exit(FAILURE)
    with counting("tokens", plan.tokens) as bar:
        computed = write_features(plan, data, adapter, out_folder, rows_at_once=rows_at_once, tell=bar.advance)
    _print_written(plan, computed, out_folder, as_json)


def _wanted(taps: str | None, kind: str | None) -> tuple[int, ...] | Recipe:
    """The taps, or the recipe of the kind whose training reads them."""
    if (taps is None) == (kind is None):
        raise typer.BadParameter("give either --taps or --kind")
    if kind == DRAFT_MODEL:
        raise typer.BadParameter("a draft model reads no hidden states of the target; there is nothing to cache for it")
    return _numbers(taps) if taps is not None else recipe_for(str(kind))


def _numbers(taps: str) -> tuple[int, ...]:
    words = [word.strip() for word in taps.split(",")]
    if not all(word == "before-norm" or word.isdigit() for word in words):
        raise typer.BadParameter(f"got {taps!r}, expected numbers such as 2,16,29 or before-norm", param_hint="--taps")
    return tuple(BEFORE_NORM if word == "before-norm" else int(word) for word in words)


def _read_by(recipe: Recipe, target: Target) -> tuple[tuple[int, ...], bool]:
    """The taps that a training reads, and whether it reads the target's logits."""
    training = make_training(head_recipe(recipe), target)
    return training.taps, training.needs_logits


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise SpecdecError("nobody is there to be asked; add --yes to write so much")
    return typer.confirm("Go on?", err=True)


def _print_plan(plan: FeaturePlan) -> None:
    names = ", ".join(name_of(tap) for tap in plan.taps)
    out.print(
        f"{names} of {plan.tokens:,} tokens in {plan.dtype}: {_size(plan.bytes)} ({plan.bytes_per_token:,} bytes a "
        f"token) in {len(plan.shards)} files",
        soft_wrap=True,
    )


def _print_written(plan: FeaturePlan, computed: int, folder: Path, as_json: bool) -> None:
    if as_json:
        described = {"path": str(folder), "bytes": plan.bytes, "tokens": plan.tokens, "computed": computed}
        print(json.dumps({**described, "taps": [name_of(tap) for tap in plan.taps]}))
    else:
        out.print(f"{folder}: {plan.tokens:,} tokens, {computed:,} of them computed now", soft_wrap=True)


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.1f} TiB"
