"""Medusa's formats: read as published, rewritten byte for byte, computed as the raw tensors say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec import formats
from specdec.drafters.head import build_head
from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from tests.formats.published import (
    V1_CONFIG,
    VLLM_CONFIG,
    D,
    K,
    V,
    block,
    configs_in,
    medusa_shapes,
    random_tensors,
    same_bytes,
    save,
    tensors_in,
    vllm_shapes,
)

LLAMA_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": D, "vocab_size": V,
                "num_hidden_layers": 2, "medusa_num_heads": K, "medusa_num_layers": 1}  # fmt: skip
TOKEN_MAP = torch.tensor([7, 0, 39, 12, 5])


def v1(folder: Path, file: str = "medusa_lm_head.pt", **sizes: Any) -> Path:
    return save(folder, V1_CONFIG, file, random_tensors(medusa_shapes(**sizes)))


def v2(folder: Path) -> Path:
    tensors = random_tensors(medusa_shapes(output=False))
    return save(folder, {**V1_CONFIG, "version": "2"}, "medusa_lm_head.safetensors", tensors)


def full(folder: Path) -> Path:
    base = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    tensors = random_tensors({**base, **medusa_shapes("medusa_head.")})
    (save(folder, LLAMA_CONFIG, "model.safetensors", tensors) / "tokenizer.json").write_text("{}")
    return folder


def vllm(folder: Path, config: dict[str, Any] | None = None, **sizes: Any) -> Path:
    tensors = random_tensors(vllm_shapes(**sizes))
    return save(folder, {**VLLM_CONFIG, **(config or {})}, "model.safetensors", tensors)


def truncated(folder: Path, rows: int = len(TOKEN_MAP)) -> Path:
    tensors = {**random_tensors(vllm_shapes(rows=rows)), "token_map": TOKEN_MAP}
    return save(folder, {**VLLM_CONFIG, "truncated_vocab_size": len(TOKEN_MAP)}, "model.safetensors", tensors)


PUBLISHED: dict[str, tuple[str, Any]] = {
    "v1 pickle": ("medusa_v1", v1),
    "v1 safetensors": ("medusa_v1", lambda folder: v1(folder, "medusa_lm_head.safetensors")),
    "v1 with two blocks": ("medusa_v1", lambda folder: v1(folder, layers=2)),
    "v2": ("medusa_v2", v2),
    "full model": ("medusa_2", full),
    "vllm": ("vllm_medusa", vllm),
    "vllm without biases": ("vllm_medusa", lambda folder: vllm(folder, {"medusa_fc_bias": False}, bias=False)),
    "vllm with one output matrix": ("vllm_medusa", lambda folder: vllm(folder, {"original_lm_head": True}, outputs=1)),
    "vllm with chosen tokens": ("vllm_medusa", truncated),
    "vllm with a logit scale": ("vllm_medusa", lambda folder: vllm(folder, {"logit_scale": 0.5})),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_writing_what_was_read_gives_the_same_bytes_and_config(name: str, tmp_path: Path) -> None:
    format_name, make = PUBLISHED[name]
    source = make(tmp_path / "source")
    once, twice = tmp_path / "once", tmp_path / "twice"
    first = formats.read(source)
    assert first.format == format_name
    formats.write(first, once, format_name)
    second = formats.read(once)
    formats.write(second, twice, format_name)
    assert same_bytes(tensors_in(once), tensors_in(twice))
    assert same_bytes(tensors_in(source), tensors_in(once))
    assert configs_in(once) == configs_in(twice)
    assert (first.kind, first.config, first.extra) == (second.kind, second.config, second.extra)


@pytest.mark.parametrize("name", [name for name, (kept_in, _) in PUBLISHED.items() if kept_in != "medusa_2"])
def test_the_detour_through_our_own_format_loses_nothing(name: str, tmp_path: Path) -> None:
    format_name, make = PUBLISHED[name]
    source = make(tmp_path / "source")
    formats.write(formats.read(source), tmp_path / "native")
    formats.write(formats.read(tmp_path / "native"), tmp_path / "back", format_name)
    formats.write(formats.read(source), tmp_path / "direct", format_name)
    assert same_bytes(tensors_in(source), tensors_in(tmp_path / "back"))
    assert configs_in(tmp_path / "back") == configs_in(tmp_path / "direct")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tensors_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = random_tensors(medusa_shapes(), dtype=dtype)
    source = save(tmp_path / "source", V1_CONFIG, "medusa_lm_head.pt", tensors)
    for format_name in ("native", "medusa_v1", "vllm_medusa"):
        formats.write(formats.read(source), tmp_path / format_name, format_name)
        assert {tensor.dtype for tensor in tensors_in(tmp_path / format_name).values()} == {dtype}


def logits_of(checkpoint: HeadCheckpoint, hidden: Tensor, lm_head: Tensor | None = None) -> Tensor:
    head: Any = build_head(checkpoint, torch.float32)
    return head(hidden, None if lm_head is None else lambda states: states @ lm_head.T)


@pytest.mark.parametrize("layers", [1, 2])
def test_our_forward_is_that_of_the_raw_tensors(layers: int, tmp_path: Path) -> None:
    raw = random_tensors(medusa_shapes(layers=layers))
    source = save(tmp_path, V1_CONFIG, "medusa_lm_head.pt", raw)
    hidden = torch.randn(5, D)
    expected = []
    for i in range(K):
        state = hidden
        for j in range(layers):
            state = block(raw, f"{i}.{j}.linear", state)
        expected.append(state @ raw[f"{i}.{layers}.weight"].T)
    assert (logits_of(formats.read(source), hidden) - torch.stack(expected, 1)).abs().max() < 1e-5


def test_heads_without_output_matrices_use_the_targets(tmp_path: Path) -> None:
    source = v2(tmp_path)
    raw, hidden, lm_head = tensors_in(source), torch.randn(2, D), torch.randn(V, D)
    expected = torch.stack([block(raw, f"{i}.0.linear", hidden) @ lm_head.T for i in range(K)], 1)
    assert (logits_of(formats.read(source), hidden, lm_head) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("outputs", [1, K])
@pytest.mark.parametrize("bias", [True, False])
def test_vllm_heads_compute_what_their_tensors_say(bias: bool, outputs: int, scale: float, tmp_path: Path) -> None:
    config = {"medusa_fc_bias": bias, "original_lm_head": outputs == 1, "logit_scale": scale}
    source = vllm(tmp_path, config, bias=bias, outputs=outputs)
    raw, hidden = tensors_in(source), torch.randn(2, D)
    expected = torch.stack(
        [
            block(raw, f"blocks.{i}.layers.0", hidden) @ raw[f"lm_heads.{min(i, outputs - 1)}.weight"].T
            for i in range(K)
        ],
        1,
    )
    assert (logits_of(formats.read(source), hidden) - scale * expected).abs().max() < 1e-5


def test_full_output_matrices_are_cut_to_the_token_map(tmp_path: Path) -> None:
    cut, whole = truncated(tmp_path / "cut"), truncated(tmp_path / "whole", rows=V)
    read = formats.read(whole)
    assert read.config.vocab_size == len(TOKEN_MAP) == formats.read(cut).config.vocab_size
    raw = tensors_in(whole)
    assert torch.equal(read.tensors["lm_heads.1.weight"], raw["lm_heads.1.weight"][TOKEN_MAP])
    assert read.target["vocab_size"] == V


def test_heads_are_counted_from_the_names_and_not_from_the_config(tmp_path: Path) -> None:
    source = v1(tmp_path / "source", heads=5)
    assert V1_CONFIG["medusa_num_heads"] == 2
    assert formats.read(source).config.num_heads == 5
    formats.write(formats.read(source), tmp_path / "out", "medusa_v1")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["medusa_num_heads"] == 5


def test_biases_are_read_even_where_the_config_forgets_them_and_the_flag_is_written(tmp_path: Path) -> None:
    source = vllm(tmp_path / "source", {"medusa_fc_bias": False}, bias=True)
    read = formats.read(source)
    assert read.config.bias
    formats.write(read, tmp_path / "out", "vllm_medusa")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["medusa_fc_bias"], written["original_lm_head"], written["logit_scale"]) == (True, False, 1.0)
    assert (written["truncated_vocab_size"], written["vocab_size"], written["num_heads"]) == (V, V, K)


def test_a_prefix_of_vllm_names_is_taken_off(tmp_path: Path) -> None:
    tensors = random_tensors(vllm_shapes("medusa_heads."))
    with_prefix = save(tmp_path / "prefix", VLLM_CONFIG, "model.safetensors", tensors)
    assert same_bytes(formats.read(with_prefix).tensors, formats.read(vllm(tmp_path / "plain")).tensors)


def test_v1_heads_become_vllm_heads_of_the_same_function_and_back(tmp_path: Path) -> None:
    source, hidden = v1(tmp_path / "source", layers=2), torch.randn(2, D)
    formats.write(formats.read(source), tmp_path / "vllm", "vllm_medusa")
    formats.write(formats.read(tmp_path / "vllm"), tmp_path / "back", "medusa_v1")
    assert same_bytes(tensors_in(source), tensors_in(tmp_path / "back"))
    assert torch.equal(logits_of(formats.read(source), hidden), logits_of(formats.read(tmp_path / "vllm"), hidden))


def test_heads_without_biases_or_with_one_output_matrix_become_v1_of_the_same_function(tmp_path: Path) -> None:
    hidden = torch.randn(2, D)
    source = vllm(tmp_path / "source", {"medusa_fc_bias": False, "original_lm_head": True}, bias=False, outputs=1)
    formats.write(formats.read(source), tmp_path / "out", "medusa_v1")
    out = formats.read(tmp_path / "out")
    assert (out.config.bias, out.config.output) == (True, "own")
    assert (logits_of(formats.read(source), hidden) - logits_of(out, hidden)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "to", "lost"),
    [
        ("v1 pickle", "medusa_v2", "output matrices"),
        ("v2", "medusa_v1", "use the target's"),
        ("v2", "vllm_medusa", "use the target's"),
        ("vllm with chosen tokens", "medusa_v1", "choice of tokens"),
        ("vllm with a logit scale", "medusa_v1", "logit scale 0.5"),
        ("vllm", "medusa_2", "say where the model is"),
        ("full model", "native", "would be lost"),
        ("full model", "medusa_v1", "would be lost"),
    ],
)
def test_a_conversion_that_loses_something_is_refused(name: str, to: str, lost: str, tmp_path: Path) -> None:
    source = PUBLISHED[name][1](tmp_path / "source")
    with pytest.raises(BadCheckpoint, match=lost) as caught:
        formats.write(formats.read(source), tmp_path / "out", to)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_full_model_is_rewritten_with_its_own_weights_tokenizer_and_config(tmp_path: Path) -> None:
    source = full(tmp_path / "source")
    formats.write(formats.read(source), tmp_path / "out", "medusa_2")
    assert configs_in(tmp_path / "out")["config.json"] == LLAMA_CONFIG
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert {"model.norm.weight", "medusa_head.0.0.linear.weight"} < tensors_in(tmp_path / "out").keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_two_formats_claim_the_same_files(name: str, tmp_path: Path) -> None:
    format_name, make = PUBLISHED[name]
    folder = formats.Folder(make(tmp_path))
    assert [known.NAME for known in formats.FORMATS if known.matches(folder)] == [format_name]
    assert formats.detect(tmp_path) is formats.format_named(format_name)


def test_an_ordinary_model_is_no_head(tmp_path: Path) -> None:
    tensors = random_tensors({"model.embed_tokens.weight": (V, D), "model.layers.0.mlp.up_proj.weight": (D, D)})
    save(tmp_path, LLAMA_CONFIG, "model.safetensors", tensors)
    assert formats.detect(tmp_path) is None
