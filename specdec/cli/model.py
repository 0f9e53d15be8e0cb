"""Models by name: the word `demo` or `demo-draft`, a local directory, or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specdec import optimize as optimized
from specdec.api import target_of
from specdec.cli.console import note
from specdec.demo import draft_path, target_path
from specdec.errors import SpecdecError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEMO_MODELS = {"demo": target_path, "demo-draft": draft_path}


def locate(name: str) -> str | Path:
    """A directory for words and paths, the name itself when it can only be a hub id.

    Raises:
        SpecdecError: a path that is not there, or a directory without a model.
    """
    if name in DEMO_MODELS:
        if not (DEMO_MODELS[name]() / "model.safetensors").is_file():
            raise SpecdecError(f"{name}: no model in {DEMO_MODELS[name]()}; install specdec again to get the demo pair")
        return DEMO_MODELS[name]()
    path = Path(name).expanduser()
    if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name.strip():
        return _model_directory(path)
    return name


def _model_directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    if not path.exists():
        raise SpecdecError(f"no model at {path}: there is no such directory")
    if path.is_file():
        raise SpecdecError(f"{path} is a file; a model is a directory with config.json and model.safetensors")
    if (path / "drafter.json").is_file():
        raise SpecdecError(f"{path} holds a drafter without a model of its own; name it with --drafter")
    raise SpecdecError(f"{path} is not a model: it has no config.json; give a directory written by save_pretrained()")


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """The causal language model of this name, in evaluation mode.

    Args:
        name: see `locate`.
        dtype: one of DTYPES, or "auto": the checkpoint's own.
        device: a torch device, or "auto": a GPU when there is one.

    Raises:
        SpecdecError: nothing there, unreadable or incomplete weights, or no causal language model.
    """
    source = locate(name)
    place = _device(device)
    wanted: Any = DTYPES.get(dtype, "auto")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, local_files_only=isinstance(source, Path), output_loading_info=True
        )
    except Exception as error:
        raise SpecdecError(f"cannot load a model from {source}: {_reason(error)}") from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise SpecdecError(f"the weights in {source} are incomplete: {shown} missing; fetch or save the model again")
    return model.eval().to(place)


def dtype_of(name: str, dtype: str) -> str:
    """The demo pair is stored in bfloat16 to be small; in float32 it is exact, and faster on a CPU."""
    return "float32" if name in DEMO_MODELS and dtype == "auto" else dtype


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model.

    Raises:
        SpecdecError: there is none.
    """
    source = locate(name)
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=isinstance(source, Path))
    except Exception as error:
        raise SpecdecError(f"cannot load a tokenizer from {source}: {_reason(error)}") from error


def load_for_timing(
    name: str, dtype: str, device: str, threads: int | None, *, optimize: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A target and its tokenizer as they are when something is timed.

    Args:
        name: see `locate`.
        dtype: see `load_model`; "auto" is float32 for the demo pair.
        device: see `load_model`.
        threads: of the CPU; None for as many as torch chooses, and for one where the target is of the demo pair.
        optimize: whether to call `specdec.optimize`.

    Raises:
        SpecdecError: as `load_model` and `load_tokenizer` do.
    """
    if threads or name in DEMO_MODELS:
        torch.set_num_threads(threads or 1)  # threads of so small a model wait for each other most of the time
    model, tokenizer = load_model(name, dtype_of(name, dtype), device), load_tokenizer(name)
    if optimize:
        optimized(model)
    return model, tokenizer


def tokens_within_limit(model: PreTrainedModel, prompt_length: int, max_new_tokens: int) -> int:
    """New tokens that fit into what the model was made for; fewer than asked for are announced.

    Raises:
        SpecdecError: the prompt alone fills it.
    """
    limit = target_of(model).max_positions
    if limit is None or prompt_length + max_new_tokens <= limit:
        return max_new_tokens
    if prompt_length >= limit:
        raise SpecdecError(
            f"the prompt has {prompt_length} tokens; this model takes at most {limit}; shorten the prompt"
        )
    room = limit - prompt_length
    note(
        f"the model takes at most {limit} tokens and the prompt has {prompt_length}: generating {room} tokens at most "
        f"instead of {max_new_tokens}"
    )
    return room


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:
        raise SpecdecError(f"device {name!r} cannot be used here ({_reason(error)}); try cpu") from error
    return device


def _reason(error: Exception) -> str:
    """The first line of an error that may explain itself at length."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(":.") if lines else type(error).__name__
