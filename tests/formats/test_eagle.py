"""EAGLE-1's published files: read as they are, rewritten as they were, refused when they are not what they say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec import formats
from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.heads.eagle import EagleConfig, EagleHead
from specdec.heads.layer import LayerConfig, causal_mask
from tests.formats.published import configs_in, random_tensors, same_bytes, save, tensors_in
from tests.heads.plain import Weights, with_random_weights
from tests.heads.test_eagle import recomputed

D, V, HEADS, GROUPS, SIZE, MLP = 16, 40, 4, 2, 4, 24
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": D,
    "intermediate_size": MLP,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "float16",
    "vocab_size": V,
}
"""As SafeAILab has it: the bias of fc is not mentioned where there is one."""
LAYER = LayerConfig(D, MLP, HEADS, GROUPS, SIZE, rms_norm_eps=1e-5)


def shapes(
    *, layers: int = 1, bias: bool = True, embedding: bool = True, gate: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names and shapes as published."""
    named: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (V, D)} if embedding else {}
    if gate:
        named |= {
            "W_1": (D, D),
            "W_2": (D, D),
            "W_z": (2 * D, D),
            "input_layernorm.weight": (D,),
            "lm_head.weight": (V, D),
        }
    else:
        named |= {"fc.weight": (D, 2 * D)} | ({"fc.bias": (D,)} if bias else {})
    for i in range(layers):
        prefix = f"layers.{i}."
        named |= {
            f"{prefix}self_attn.q_proj.weight": (HEADS * SIZE, D),
            f"{prefix}self_attn.k_proj.weight": (GROUPS * SIZE, D),
            f"{prefix}self_attn.v_proj.weight": (GROUPS * SIZE, D),
            f"{prefix}self_attn.o_proj.weight": (D, HEADS * SIZE),
            f"{prefix}mlp.gate_proj.weight": (MLP, D),
            f"{prefix}mlp.up_proj.weight": (MLP, D),
            f"{prefix}mlp.down_proj.weight": (D, MLP),
            f"{prefix}post_attention_layernorm.weight": (D,),
        } | ({f"{prefix}input_layernorm.weight": (D,)} if i else {})  # fmt: skip
    return named


def with_biases(named: dict[str, tuple[int, ...]], *projections: str) -> dict[str, tuple[int, ...]]:
    extra = {
        name.replace("weight", "bias"): (shape[0],)
        for name, shape in named.items()
        if any(f"{projection}_proj" in name for projection in projections)
    }
    return named | extra


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "vicuna": ({}, shapes(), {"own_embedding": True}),
    "llama 3": ({"bias": False}, shapes(bias=False), {"own_embedding": True, "fc_bias": False}),
    "without embedding": ({}, shapes(embedding=False), {}),
    "three layers": ({"num_hidden_layers": 3}, shapes(layers=3), {"own_embedding": True, "num_layers": 3}),
    "qwen2": ({"qkv_bias": True}, with_biases(shapes(), "q", "k", "v"),
              {"own_embedding": True, "layer": replace(LAYER, attention_bias=True)}),
    "all biases": ({"attention_bias": True}, with_biases(shapes(), "q", "k", "v", "o"),
                   {"own_embedding": True, "layer": replace(LAYER, attention_bias=True, output_bias=True)}),
    "a gate": ({}, shapes(gate=True), {"own_embedding": True, "fusion": "gate", "fc_bias": False}),
    "a gate, two layers": ({}, shapes(gate=True, layers=2), {"own_embedding": True, "fusion": "gate", "fc_bias": False,
                                                             "num_layers": 2}),
}  # fmt: skip
"""Fields of config.json, tensors, and what is read from both."""


def published(folder: Path, name: str, file: str = "model.safetensors", dtype: torch.dtype = torch.float16) -> Path:
    fields, named, _ = VARIANTS[name]
    return save(folder, {**CONFIG, **fields}, file, random_tensors(named, dtype=dtype))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_published_directory_is_recognised_and_read(name: str, tmp_path: Path) -> None:
    checkpoint = formats.read(published(tmp_path / "a", name))
    assert (checkpoint.format, checkpoint.kind) == ("eagle", "eagle")
    assert checkpoint.config == EagleConfig(**{"layer": LAYER, "vocab_size": V, **VARIANTS[name][2]})
    assert checkpoint.target == {"vocab_size": V, "hidden_size": D}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_reads_the_same_and_is_written_the_same(name: str, file: str, tmp_path: Path) -> None:
    original = published(tmp_path / "original", name, file)
    first = formats.read(original)
    formats.write(first, tmp_path / "one", "eagle")
    second = formats.read(tmp_path / "one")
    formats.write(second, tmp_path / "two", "eagle")
    assert replace(second, tensors={}) == replace(first, tensors={})
    assert (tmp_path / "one" / file).is_file()
    expected = tensors_in(original)
    if "gate" in name:
        del expected["lm_head.weight"]  # a copy of the target's
    assert same_bytes(expected, tensors_in(tmp_path / "one"))
    assert same_bytes(tensors_in(tmp_path / "one"), tensors_in(tmp_path / "two"))
    assert configs_in(tmp_path / "one") == configs_in(tmp_path / "two")


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_the_head_that_was_read_computes_what_its_file_says(name: str, tmp_path: Path) -> None:
    """Recomputed from the raw tensors of the file; matrices of the gate multiply from the left there."""
    original = published(tmp_path / "a", name, dtype=torch.float32)
    checkpoint = formats.read(original)
    head = EagleHead(checkpoint.config).eval()
    head.load_state_dict(checkpoint.tensors)
    embeddings, features = torch.randn(2, 1, 5, D, generator=torch.Generator().manual_seed(2))
    got = head(embeddings, features, torch.arange(5)[None], causal_mask(5, features))
    raw = tensors_in(original)
    if "gate" in name:
        raw = {"fuse.feature.weight": raw["W_1"].T, "fuse.embedding.weight": raw["W_2"].T,
               "fuse.gate.weight": raw["W_z"].T, "fuse.norm.weight": raw["input_layernorm.weight"], **raw}  # fmt: skip
    expected = recomputed(Weights(raw), checkpoint.config, embeddings[0], features[0])
    torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=1e-5)


def test_the_bias_is_always_said(tmp_path: Path) -> None:
    """Absent means true to SafeAILab and nothing to vLLM."""
    for name, bias in (("vicuna", True), ("llama 3", False)):
        formats.write(formats.read(published(tmp_path / f"{bias}", name)), tmp_path / f"{bias}-again", "eagle")
        assert json.loads((tmp_path / f"{bias}-again" / "config.json").read_text())["bias"] is bias


def test_the_fields_of_a_published_config_keep_their_values(tmp_path: Path) -> None:
    formats.write(formats.read(published(tmp_path / "a", "vicuna")), tmp_path / "b", "eagle")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {key: written[key] for key in CONFIG} == CONFIG


def test_a_head_of_our_own_survives_the_way_through_the_format(tmp_path: Path) -> None:
    config = EagleConfig(replace(LAYER, rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 2.0}), V)
    head = with_random_weights(EagleHead(config), 0)
    formats.write(HeadCheckpoint("eagle", config, head.state_dict()), tmp_path / "a", "eagle")
    checkpoint = formats.read(tmp_path / "a")
    assert checkpoint.config == config
    assert same_bytes(checkpoint.tensors, head.state_dict())
    formats.write(checkpoint, tmp_path / "b")
    assert formats.read(tmp_path / "b").config == config


def test_stored_rotary_frequencies_are_not_needed(tmp_path: Path) -> None:
    tensors = random_tensors(shapes()) | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    assert formats.read(save(tmp_path, CONFIG, "pytorch_model.bin", tensors)).kind == "eagle"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("layers.0.mlp.up_proj.weight", None), "layers.0.mlp.up_proj.weight is missing"),
        (("norm.weight", (D,)), "norm.weight is unexpected"),
        (("fc.weight", (D, D)), r"fc.weight has shape \[16, 16\], expected \[16, 32\]"),
        (("layers.0.self_attn.k_proj.weight", (D, D)), "layers.0.self_attn.k_proj.weight has shape"),
    ],
    ids=["missing", "extra", "wrong fusion", "wrong groups"],
)
def test_missing_extra_and_wrong_shaped_tensors_are_named(
    change: tuple[str, tuple[int, ...] | None], said: str, tmp_path: Path
) -> None:
    named = {key: value for key, value in {**shapes(), change[0]: change[1]}.items() if value is not None}
    with pytest.raises(BadCheckpoint, match=said):
        formats.read(save(tmp_path, CONFIG, "model.safetensors", random_tensors(named)))


def test_a_bias_that_the_config_promises_is_missed(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"fc.bias is missing"):
        formats.read(save(tmp_path, {**CONFIG, "bias": True}, "model.safetensors", random_tensors(shapes(bias=False))))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_key_value_heads": 3}, "do not form groups"),
    ],
)
def test_a_config_that_makes_no_sense_gets_one_line(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = {key: value for key, value in {**CONFIG, **fields}.items() if value is not None}
    with pytest.raises(BadCheckpoint, match=said) as caught:
        formats.read(save(tmp_path, config, "model.safetensors", random_tensors(shapes())))
    assert "\n" not in str(caught.value)


def test_norms_of_heads_have_no_place(tmp_path: Path) -> None:
    config = EagleConfig(replace(LAYER, qk_norm=True), V)
    checkpoint = HeadCheckpoint("eagle", config, EagleHead(config).state_dict())
    with pytest.raises(BadCheckpoint, match="queries and keys are not normed"):
        formats.write(checkpoint, tmp_path / "a", "eagle")
