"""A target's tokenizer beside a draft model, file by file, so that its hash stays what it was."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


def copy_tokenizer(model: PreTrainedModel, to: Path) -> None:
    """Copy the tokenizer files of a model's directory, or of its cached download; none where there are none."""
    to.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        found = _file(str(model.name_or_path), name)
        if found is not None:
            shutil.copyfile(found, to / name)


def _file(name_or_path: str, file: str) -> Path | None:
    if not name_or_path:
        return None
    local = Path(name_or_path) / file
    if local.is_file():
        return local
    if Path(name_or_path).exists() or name_or_path.count("/") > 1 or name_or_path.startswith("."):
        return None
    cached = try_to_load_from_cache(name_or_path, file)
    return Path(cached) if isinstance(cached, str) else None
