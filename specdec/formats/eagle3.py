"""EAGLE-3 heads in the layout of SafeAILab, SpecForge and SGLang (vLLM reads it, too): the first layer is `midlayer`.

SGLang does not know `norm_before_residual` and would compute something else without a word, so such heads are not
written here.
"""

from __future__ import annotations

from pathlib import Path

from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.eagle3_json import MADE_ANEW, head_json, read_head, refuse
from specdec.formats.eagle_tensors import eagle3_names, take_eagle3_tensors
from specdec.formats.folder import Folder, write_json, write_tensors
from specdec.formats.layer_json import rest_of_config

NAME = "eagle3"
KINDS = ("eagle3",)
FIRST = "midlayer"


def matches(folder: Folder) -> bool:
    """By the name of the first layer."""
    return "speculators_model_type" not in folder.config and folder.has(f"{FIRST}.hidden_norm.weight")


def read(folder: Folder) -> HeadCheckpoint:
    """Sizes from config.json, variants from it and from the names of tensors."""
    config = read_head(folder, FIRST)
    tensors = take_eagle3_tensors(folder, config, FIRST)
    target = {"vocab_size": config.vocab_size, "hidden_size": config.feature_size}
    extra = rest_of_config(folder, MADE_ANEW)
    if folder.files[0].suffix != ".safetensors":
        extra["weights"] = "bin"
    return HeadCheckpoint("eagle3", config, tensors, target, NAME, {NAME: extra} if extra else {})


def write(checkpoint: HeadCheckpoint, path: Path) -> None:
    """As safetensors, or as the pickle that it was read from."""
    config = checkpoint.config
    losses = {
        "norm_before_residual": config.norm_before_residual,
        "more than one layer": config.num_layers > 1,
        "norms of query and key heads": config.layer.qk_norm,
        "a sliding window": config.sliding_window is not None,
    }
    refuse(NAME, losses, "write vllm_eagle3 or native")
    extra = dict(checkpoint.extra.get(NAME, {}))
    pickled = extra.pop("weights", None) == "bin"
    write_json(path / "config.json", {**extra, **head_json(checkpoint, "LlamaForCausalLMEagle3", NAME)})
    file = path / ("pytorch_model.bin" if pickled else "model.safetensors")
    write_tensors(file, eagle3_names(checkpoint.tensors, FIRST))
