"""Kangaroo's published directory: six tensors and a Llama config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec import formats
from specdec.errors import BadCheckpoint
from specdec.heads.kangaroo import KangarooConfig
from specdec.heads.layer import LayerConfig
from tests.formats.published import configs_in, random_tensors, same_bytes, save, tensors_in

D, V, HEADS, GROUPS, SIZE = 16, 40, 4, 2, 4
SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.self_attn.q_proj.weight": (HEADS * SIZE, D),
    "layers.0.self_attn.k_proj.weight": (GROUPS * SIZE, D),
    "layers.0.self_attn.v_proj.weight": (GROUPS * SIZE, D),
    "layers.0.self_attn.o_proj.weight": (D, HEADS * SIZE),
    "layers.0.input_layernorm.weight": (D,),
    "norm.weight": (D,),
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": D,
    "intermediate_size": 24,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": 1,
    "num_key_value_heads": GROUPS,
    "rms_norm_eps": 1e-06,
    "vocab_size": V,
}


def published(folder: Path, file: str = "pytorch_model.bin", **fields: Any) -> Path:
    return save(folder, {**CONFIG, **fields}, file, random_tensors(SHAPES, dtype=torch.float16))


def test_a_published_directory_is_recognised_and_read(tmp_path: Path) -> None:
    checkpoint = formats.read(published(tmp_path / "a"))
    assert (checkpoint.format, checkpoint.kind) == ("kangaroo", "kangaroo")
    assert checkpoint.config == KangarooConfig(LayerConfig(D, 24, HEADS, GROUPS, SIZE), exit_layer=2)
    assert checkpoint.target == {"hidden_size": D, "vocab_size": V}
    assert same_bytes(checkpoint.tensors, tensors_in(tmp_path / "a"))


def test_published_adapters_rotate_with_base_10000_whatever_their_config_says(tmp_path: Path) -> None:
    layer = formats.read(published(tmp_path / "a", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})).config
    assert (layer.layer.rope_theta, layer.layer.rope_scaling) == (10_000.0, None)


def test_the_larger_published_target_is_left_after_three_layers(tmp_path: Path) -> None:
    shapes = {name: tuple(5120 if size == D else size for size in shape) for name, shape in SHAPES.items()}
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    tensors["layers.0.self_attn.q_proj.weight"] = torch.zeros(HEADS * SIZE, 5120, dtype=torch.float16)
    tensors["layers.0.self_attn.o_proj.weight"] = torch.zeros(5120, HEADS * SIZE, dtype=torch.float16)
    config = {**CONFIG, "hidden_size": 5120, "head_dim": SIZE}
    assert formats.read(save(tmp_path / "a", config, "pytorch_model.bin", tensors)).config.exit_layer == 3


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_what_is_written_reads_the_same_and_is_written_the_same(file: str, tmp_path: Path) -> None:
    first = formats.read(published(tmp_path / "original", file))
    formats.write(first, tmp_path / "one", "kangaroo")
    assert (tmp_path / "one" / file).is_file()
    second = formats.read(tmp_path / "one")
    formats.write(second, tmp_path / "two", "kangaroo")
    assert replace(second, tensors={}) == replace(first, tensors={})
    assert same_bytes(tensors_in(tmp_path / "original"), tensors_in(tmp_path / "one"))
    assert same_bytes(tensors_in(tmp_path / "one"), tensors_in(tmp_path / "two"))
    assert configs_in(tmp_path / "one") == configs_in(tmp_path / "two")


def test_positions_and_exit_layer_of_our_own_adapters_survive(tmp_path: Path) -> None:
    read = formats.read(published(tmp_path / "a"))
    scaling = {"rope_type": "linear", "factor": 4.0}
    config = KangarooConfig(replace(read.config.layer, rope_theta=5e5, rope_scaling=scaling), exit_layer=5)
    formats.write(replace(read, config=config), tmp_path / "b", "kangaroo")
    assert formats.read(tmp_path / "b").config == config


def test_the_buffer_that_old_versions_of_torch_wrote_is_known(tmp_path: Path) -> None:
    tensors = random_tensors(SHAPES) | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    checkpoint = formats.read(save(tmp_path / "a", CONFIG, "pytorch_model.bin", tensors))
    assert checkpoint.tensors.keys() == SHAPES.keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("layers.0.self_attn.o_proj.weight", None), "layers.0.self_attn.o_proj.weight is missing"),
        (("layers.1.self_attn.q_proj.weight", (D, D)), "layers.1.self_attn.q_proj.weight is unexpected"),
        (("lm_head.weight", (V, D)), "lm_head.weight is unexpected"),
        (("layers.0.self_attn.k_proj.weight", (D, D)), r"has shape \[16, 16\], expected \[8, 16\]"),
    ],
    ids=["missing", "second layer", "extra", "wrong shape"],
)
def test_missing_extra_and_wrong_shaped_tensors_are_named(
    change: tuple[str, tuple[int, ...] | None], said: str, tmp_path: Path
) -> None:
    name, shape = change
    named = {key: value for key, value in {**SHAPES, name: shape}.items() if value is not None}
    with pytest.raises(BadCheckpoint, match=said):
        formats.read(save(tmp_path / "a", CONFIG, "pytorch_model.bin", random_tensors(named)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kangaroo_config": 3}, "expected an object"),
        ({"kangaroo_config": {"exit_layer": "two"}}, "exit_layer is 'two', expected int"),
        ({"kangaroo_config": {"exit_layer": 0}}, "exit_layer is at least 1"),
        ({"num_attention_heads": "four"}, "does not describe a layer"),
    ],
)
def test_a_config_that_makes_no_sense_gets_one_line(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=said) as caught:
        formats.read(published(tmp_path / "a", **fields))
    assert "\n" not in str(caught.value)
