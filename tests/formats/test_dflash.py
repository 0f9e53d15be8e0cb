"""z-lab's format: read as published, rewritten as it was, refused when it is not what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec import formats
from specdec.errors import BadCheckpoint
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.heads.dflash import DFlashConfig, DFlashHead
from specdec.heads.layer import LayerConfig
from tests.formats.published import configs_in, random_tensors, same_bytes, save, tensors_in

D, V, HEADS, GROUPS, SIZE, MLP, TAPS = 16, 40, 4, 2, 6, 24, 3

CONFIG: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": 16,
    "dflash_config": {"mask_token_id": 39, "target_layer_ids": [1, 4, 7]},
    "dtype": "bfloat16",
    "head_dim": SIZE,
    "hidden_act": "silu",
    "hidden_size": D,
    "intermediate_size": MLP,
    "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 40960,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "num_key_value_heads": GROUPS,
    "num_target_layers": 10,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": V,
}
"""As the first checkpoints have it: block_size at the top, positions in the older fields."""


def shapes(layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes as published."""
    named: dict[str, tuple[int, ...]] = {
        "fc.weight": (D, TAPS * D), "hidden_norm.weight": (D,), "norm.weight": (D,)
    }  # fmt: skip
    for i in range(layers):
        attention, mlp = f"layers.{i}.self_attn", f"layers.{i}.mlp"
        named |= {
            f"layers.{i}.input_layernorm.weight": (D,),
            f"layers.{i}.post_attention_layernorm.weight": (D,),
            f"{attention}.q_proj.weight": (HEADS * SIZE, D),
            f"{attention}.k_proj.weight": (GROUPS * SIZE, D),
            f"{attention}.v_proj.weight": (GROUPS * SIZE, D),
            f"{attention}.o_proj.weight": (D, HEADS * SIZE),
            f"{attention}.q_norm.weight": (SIZE,),
            f"{attention}.k_norm.weight": (SIZE,),
            f"{mlp}.gate_proj.weight": (MLP, D),
            f"{mlp}.up_proj.weight": (MLP, D),
            f"{mlp}.down_proj.weight": (D, MLP),
        }
    return named


CHOSEN = torch.tensor([0, 3, 4, 9, 17, 39])


def vocabulary() -> dict[str, Tensor]:
    """An output matrix over the CHOSEN tokens."""
    return {
        "lm_head.weight": torch.randn(len(CHOSEN), D, generator=torch.Generator().manual_seed(5)),
        "d2t": CHOSEN - torch.arange(len(CHOSEN)),
    }


def published(folder: Path, config: dict[str, Any] | None = None, dtype: torch.dtype = torch.bfloat16) -> Path:
    return save(folder, config or CONFIG, "model.safetensors", random_tensors(shapes(), dtype=dtype))


def changed(**fields: Any) -> dict[str, Any]:
    """CONFIG with other fields; None takes one out."""
    return {key: value for key, value in {**CONFIG, **fields}.items() if value is not None or key not in fields}


def test_a_published_directory_is_recognised_and_read(tmp_path: Path) -> None:
    folder = published(tmp_path / "a")
    checkpoint = formats.read(folder)
    assert (checkpoint.format, checkpoint.kind) == ("dflash", "dflash")
    layer = LayerConfig(D, MLP, HEADS, GROUPS, SIZE, qk_norm=True, rope_theta=1e6, max_position_embeddings=40960)
    assert checkpoint.config == DFlashConfig(layer, 2, (2, 5, 8), 16, 39, V)
    assert checkpoint.target == {"vocab_size": V, "hidden_size": D, "num_layers": 10}
    assert same_bytes(checkpoint.tensors, tensors_in(folder))


def test_settings_may_all_lie_in_the_nested_config_which_counts(tmp_path: Path) -> None:
    nested = {"mask_token_id": 7, "target_layer_ids": [0, 1, 2], "block_size": 8, "output_multiplier": 0.5,
              "final_logit_softcapping": 20.0, "input_embedding_scale": 4.0}  # fmt: skip
    config = formats.read(published(tmp_path / "a", changed(dflash_config=nested, mask_token_id=1))).config
    assert (config.block_size, config.mask_token_id, config.taps) == (8, 7, (1, 2, 3))
    assert (config.logit_scale, config.logit_softcap, config.embedding_scale) == (0.5, 20.0, 4.0)


def test_positions_may_lie_in_the_newer_field(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 1024}
    config = changed(rope_parameters=rope, rope_theta=None, rope_scaling=None)
    layer = formats.read(published(tmp_path / "a", config)).config.layer
    assert layer.rope_theta == 5e5
    assert layer.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("fields", "sliding", "window"),
    [
        ({"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
         (1,), 5),
        ({"use_sliding_window": True, "sliding_window": 5, "layer_types": None, "max_window_layers": 1}, (1,), 5),
        ({"use_sliding_window": True, "sliding_window": 5, "layer_types": None, "max_window_layers": None}, (), None),
        ({"use_sliding_window": False, "sliding_window": 5, "layer_types": None, "max_window_layers": 0}, (), None),
    ],
)  # fmt: skip
def test_sliding_layers_are_those_of_a_qwen3_config(
    fields: dict[str, Any], sliding: tuple[int, ...], window: int | None, tmp_path: Path
) -> None:
    config = formats.read(published(tmp_path / "a", changed(**fields))).config
    assert (config.sliding_layers, config.sliding_window) == (sliding, window)


@pytest.mark.parametrize("fields", [
    {},
    {"dflash_config": {"mask_token_id": 7, "target_layer_ids": [0, 1, 2], "block_size": 8, "causal": True,
                       "sample_from_anchor": True, "final_logit_softcapping": 3.0}},
    {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
     "is_causal": False},
], ids=["plain", "nested", "sliding"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_reads_the_same_and_is_written_the_same(
    fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    original = published(tmp_path / "original", changed(**fields), dtype)
    first = formats.read(original)
    formats.write(first, tmp_path / "one", "dflash")
    second = formats.read(tmp_path / "one")
    formats.write(second, tmp_path / "two", "dflash")
    assert replace(second, tensors={}) == replace(first, tensors={})
    assert same_bytes(tensors_in(original), tensors_in(tmp_path / "one"))
    assert same_bytes(tensors_in(tmp_path / "one"), tensors_in(tmp_path / "two"))
    assert configs_in(tmp_path / "one") == configs_in(tmp_path / "two")


def test_the_fields_of_a_published_config_keep_their_values(tmp_path: Path) -> None:
    formats.write(formats.read(published(tmp_path / "a")), tmp_path / "b", "dflash")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    nested = CONFIG["dflash_config"]
    assert {**written["dflash_config"], **nested} == written["dflash_config"]
    differ = {key for key, value in CONFIG.items() if written[key] != value} - {"dflash_config"}
    assert differ == {"tie_word_embeddings"}, "a drafter has no embedding that could be tied"


@pytest.mark.parametrize("marked", [True, False], ids=["with t2d", "without t2d"])
def test_a_vocabulary_of_its_own_is_read_and_checked(marked: bool, tmp_path: Path) -> None:
    tensors = random_tensors(shapes()) | vocabulary()
    t2d = torch.zeros(V, dtype=torch.bool).index_fill(0, CHOSEN, True)
    if marked:
        tensors["t2d"] = t2d
    checkpoint = formats.read(save(tmp_path / "a", CONFIG, "model.safetensors", tensors))
    assert checkpoint.config.draft_vocab_size == len(CHOSEN)
    assert checkpoint.tensors["t2d"].equal(t2d)
    head = DFlashHead(checkpoint.config)
    head.load_state_dict(checkpoint.tensors)
    assert head.token_ids.tolist() == CHOSEN.tolist()
    formats.write(checkpoint, tmp_path / "b", "dflash")
    assert same_bytes(tensors_in(tmp_path / "b"), tensors | {"t2d": t2d})


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"d2t": None}, "d2t is missing"),
        ({"d2t": torch.zeros(len(CHOSEN))}, "d2t holds float32, expected int numbers"),
        ({"d2t": torch.full((len(CHOSEN),), 1000)}, "d2t does not name 6 different tokens of a vocabulary of 40"),
        ({"d2t": torch.tensor([0, -1, 0, 0, 0, 0])}, "d2t does not name 6 different tokens"),
        ({"t2d": torch.ones(V, dtype=torch.bool)}, "t2d does not mark the tokens that d2t names"),
    ],
    ids=["missing", "float", "outside", "twice", "other"],
)
def test_a_wrong_vocabulary_is_named(tensors: dict[str, Any], said: str, tmp_path: Path) -> None:
    whole = {**random_tensors(shapes()), **vocabulary(), **tensors}
    kept = {name: tensor for name, tensor in whole.items() if tensor is not None}
    with pytest.raises(BadCheckpoint, match=said):
        formats.read(save(tmp_path / "a", CONFIG, "model.safetensors", kept))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("fc.weight", None), "fc.weight is missing"),
        (("layers.0.self_attn.q_norm.weight", None), "layers.0.self_attn.q_norm.weight is missing"),
        (("candidate_selector.hidden_projection.weight", (4, D)), "candidate_selector.hidden_projection.weight is une"),
        (("fc.weight", (D, 2 * D)), r"fc.weight has shape \[16, 32\], expected \[16, 48\]"),
        (("layers.1.self_attn.k_proj.weight", (D, D)), "layers.1.self_attn.k_proj.weight has shape"),
    ],
    ids=["missing", "missing norm", "a later architecture", "other taps", "wrong shape"],
)  # fmt: skip
def test_missing_extra_and_wrong_shaped_tensors_are_named(
    change: tuple[str, tuple[int, ...] | None], said: str, tmp_path: Path
) -> None:
    name, shape = change
    named = {key: value for key, value in {**shapes(), name: shape}.items() if value is not None}
    with pytest.raises(BadCheckpoint, match=said):
        formats.read(save(tmp_path / "a", CONFIG, "model.safetensors", random_tensors(named)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dflash_config": {"mask_token_id": 3}}, "lacks target_layer_ids"),
        ({"dflash_config": {"target_layer_ids": [1]}}, "lacks mask_token_id"),
        ({"dflash_config": [1]}, "expected an object"),
        ({"dflash_config": {"target_layer_ids": 3, "mask_token_id": 3}}, "expected a list"),
        ({"dflash_config": {"target_layer_ids": [1, "x", 2], "mask_token_id": 3}}, r"taps\[1\] is 'x', expected int"),
        ({"dflash_config": {"target_layer_ids": [1, 4, 7], "mask_token_id": 400}}, "mask_token_id 400 lies outside"),
        ({"block_size": 1}, "a block of 1 drafts nothing"),
        ({"block_size": "16"}, "block_size is '16'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": -4}, "hidden_size is -4"),
        ({"hidden_size": 10**15}, "which no model has"),
        ({"num_attention_heads": 0, "head_dim": None}, "does not describe a layer"),
        ({"num_key_value_heads": 3}, "do not form groups"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types is"),
        ({"layer_types": ["full_attention"]}, "layer_types is"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window is None"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope"),
        ({"vocab_size": None}, "lacks vocab_size"),
    ],
)
def test_a_config_that_makes_no_sense_gets_one_line(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=said) as caught:
        formats.read(published(tmp_path / "a", changed(**fields)))
    assert "\n" not in str(caught.value)


def test_what_the_format_has_no_place_for_is_refused(tmp_path: Path) -> None:
    read = formats.read(published(tmp_path / "a"))

    def refused(said: str, **fields: Any) -> None:
        config = replace(read.config, **fields)
        torch.manual_seed(0)
        checkpoint = HeadCheckpoint("dflash", config, DFlashHead(config).state_dict())
        with pytest.raises(BadCheckpoint, match=said):
            formats.write(checkpoint, tmp_path / "b", "dflash")

    refused("no name for the embedding", taps=(0, 2, 3))
    refused("which|not", layer=replace(read.config.layer, qk_norm=False))
    refused("biases", layer=replace(read.config.layer, attention_bias=True))


def test_the_number_of_layers_is_counted_from_the_tensors(tmp_path: Path) -> None:
    config = changed(num_hidden_layers=9, layer_types=["full_attention"] * 9)
    assert formats.read(published(tmp_path / "a", config)).config.num_layers == 2
