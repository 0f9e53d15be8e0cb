"""Do a draft model's token ids mean what the target's mean?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.errors import DrafterMismatch


def check_vocabulary(draft: PreTrainedModel, target: PreTrainedModel) -> None:
    """Refuse a draft model whose token ids mean something else than the target's.

    Where both come with a tokenizer.json, the tokens themselves are compared. Then the widths of the two heads may
    differ: families pad them differently beyond the tokenizer's last id. Otherwise the widths must be equal.

    Raises:
        DrafterMismatch: the tokens or the widths differ.
    """
    ours, theirs = vocab_size(draft), vocab_size(target)
    tokens = [_tokens(Path(model.name_or_path)) if model.name_or_path else None for model in (draft, target)]
    if tokens[0] is not None and tokens[1] is not None:
        if tokens[0] != tokens[1]:
            raise DrafterMismatch(
                f"the draft model's vocabulary ({len(tokens[0])} tokens) is another one than the target's "
                f"({len(tokens[1])} tokens). Drafter and target must share one tokenizer; choose a draft model of the "
                "same family."
            )
    elif ours != theirs:
        raise DrafterMismatch(
            f"the draft model has a vocabulary of {ours} tokens, the target one of {theirs}. "
            "Drafter and target must share one tokenizer; choose a draft model of the same family."
        )


def vocab_size(model: PreTrainedModel) -> int:
    """Width of the model's head."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def vocabulary_sha256(tokens: Mapping[str, int]) -> str:
    """A hash of which id each token text has; the same whichever file or library the vocabulary came from."""
    listed = json.dumps(sorted(tokens.items(), key=lambda pair: (pair[1], pair[0])))
    return hashlib.sha256(listed.encode()).hexdigest()


def model_vocabulary_sha256(model: PreTrainedModel) -> str | None:
    """`vocabulary_sha256` of the tokenizer.json beside a model; None without a readable one."""
    tokens = _tokens(Path(model.name_or_path)) if model.name_or_path else None
    return None if tokens is None else vocabulary_sha256(tokens)


def fit_logits(logits: Tensor, width: int) -> Tensor:
    """Draft logits [..., V] at the target's width: surplus ids are cut, missing ones have no mass."""
    if logits.shape[-1] == width:
        return logits
    if logits.shape[-1] > width:
        return logits[..., :width]
    missing = logits.new_full((*logits.shape[:-1], width - logits.shape[-1]), -torch.inf)
    return torch.cat([logits, missing], -1)


def _tokens(folder: Path) -> dict[str, int] | None:
    """Token texts and ids of a model folder's tokenizer.json; None without a readable one."""
    file = folder / "tokenizer.json"
    return _read_tokens(file, file.stat().st_mtime_ns) if file.is_file() else None


@lru_cache(maxsize=8)
def _read_tokens(file: Path, _changed: int) -> dict[str, int] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        pairs = vocab.items() if isinstance(vocab, dict) else ((piece[0], i) for i, piece in enumerate(vocab))
        return dict(pairs) | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (ValueError, KeyError, TypeError, IndexError):
        return None
