"""Draft heads from files: read once for each target, checked against it, on its device and in its dtype."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from specdec import formats
from specdec.drafters.directory import check_target
from specdec.errors import DrafterMismatch
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.heads.kinds import HEADS

_heads: WeakKeyDictionary[PreTrainedModel, dict[tuple[Any, ...], tuple[str, nn.Module]]] = WeakKeyDictionary()


def head_for(path: Path, model: PreTrainedModel) -> tuple[str, nn.Module]:
    """Kind and module of the head in `path`, ready to draft for this target.

    Kept as long as the target lives, so that a call of `generate` by name does not read it anew; changed files are.

    Raises:
        BadCheckpoint: the files are not what they claim.
        DrafterMismatch: made for another target.
    """
    found = path.iterdir() if path.is_dir() else [path]
    files = tuple(sorted((file.name, file.stat().st_mtime_ns) for file in found))
    key = (path.resolve(), files, model.dtype, model.device)
    kept = _heads.setdefault(model, {})
    if key not in kept:
        checkpoint = formats.read(path)
        check_target(checkpoint.target, path, model)
        _require_its_own_base(checkpoint, path, model)
        kept[key] = (checkpoint.kind, build_head(_fitted(checkpoint, path, model), model.dtype).to(model.device))
    return kept[key]


def build_head(checkpoint: HeadCheckpoint, dtype: torch.dtype) -> nn.Module:
    """The module with the checkpoint's tensors, in evaluation mode.

    Only what is stored is converted: buffers that the module computes, rotary frequencies above all, stay in float32.
    Tensors are copied: those of the checkpoint may still lie in its file, which others may write to.
    """
    with init_empty_weights(include_buffers=False):
        head = HEADS[checkpoint.kind].head(checkpoint.config)
    stored = checkpoint.tensors.items()
    tensors = {name: t.to(dtype, copy=True) if t.is_floating_point() else t.clone() for name, t in stored}
    head.load_state_dict(tensors, strict=True, assign=True)
    return head.eval().requires_grad_(False)


def _fitted(checkpoint: HeadCheckpoint, path: Path, model: PreTrainedModel) -> HeadCheckpoint:
    """With what the files leave open as it is in the target."""
    fitted_to = getattr(checkpoint.config, "fitted_to", None)
    if fitted_to is None:
        return checkpoint
    try:
        return replace(checkpoint, config=fitted_to(model.config.get_text_config(decoder=True)))
    except ValueError as error:
        raise DrafterMismatch(f"the drafter in {path} was made for another target: {error}") from error


def _require_its_own_base(checkpoint: HeadCheckpoint, path: Path, model: PreTrainedModel) -> None:
    """Heads that were trained together with their target fit the weights beside them and no others."""
    if checkpoint.base is None:
        return
    loaded_from = model.name_or_path or ""
    if not loaded_from or Path(loaded_from).resolve() != checkpoint.base.resolve():
        raise DrafterMismatch(
            f"{path} holds heads together with the model that they were trained with; the target is that model: "
            f"load it with AutoModelForCausalLM.from_pretrained({str(checkpoint.base)!r}), got {loaded_from!r}"
        )
