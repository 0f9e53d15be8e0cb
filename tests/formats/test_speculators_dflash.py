"""DFlash in the speculators library's format; that the library agrees is what scripts/check_speculators.py shows."""

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
from specdec.heads.dflash import DFlashConfig, DFlashHead
from specdec.heads.layer import LayerConfig
from tests.formats.published import configs_in, random_tensors, same_bytes, save, tensors_in
from tests.formats.test_dflash import CHOSEN, GROUPS, HEADS, MLP, SIZE, D, V, shapes, vocabulary

CONFIG: dict[str, Any] = {
    "aux_hidden_state_layer_ids": [2, 5, 8],
    "architectures": ["DFlashDraftModel"],
    "block_size": 8,
    "draft_vocab_size": V,
    "dtype": "float32",
    "mask_token_id": 39,
    "sample_from_anchor": False,
    "sliding_window_non_causal": False,
    "speculators_config": {
        "algorithm": "dflash",
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 7, "verifier_accept_k": 1}
        ],
        "verifier": {"architectures": ["Qwen3ForCausalLM"], "name_or_path": "Qwen/Qwen3-8B"},
    },
    "speculators_model_type": "dflash",
    "speculators_version": "0.9.0",
    "transformer_layer_config": {
        "head_dim": SIZE, "hidden_size": D, "intermediate_size": MLP, "layer_types": ["full_attention"] * 2,
        "max_position_embeddings": 40960, "model_type": "qwen3", "num_attention_heads": HEADS,
        "num_hidden_layers": 2, "num_key_value_heads": GROUPS,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "vocab_size": V,
    },
}  # fmt: skip
"""As the library saves one."""


def published(folder: Path, **fields: Any) -> Path:
    return save(folder, {**CONFIG, **fields}, "model.safetensors", random_tensors(shapes(), dtype=torch.bfloat16))


def layer_with(**fields: Any) -> dict[str, Any]:
    return {"transformer_layer_config": {**CONFIG["transformer_layer_config"], **fields}}


def test_a_saved_directory_is_recognised_and_read(tmp_path: Path) -> None:
    checkpoint = formats.read(published(tmp_path / "a"))
    assert (checkpoint.format, checkpoint.kind) == ("speculators_dflash", "dflash")
    layer = LayerConfig(D, MLP, HEADS, GROUPS, SIZE, qk_norm=True, rope_theta=1e6, max_position_embeddings=40960)
    assert checkpoint.config == DFlashConfig(layer, 2, (2, 5, 8), 8, 39, V)
    assert checkpoint.target == {"vocab_size": V, "hidden_size": D, "name": "Qwen/Qwen3-8B"}
    assert same_bytes(checkpoint.tensors, tensors_in(tmp_path / "a"))


def test_the_two_formats_name_the_same_taps_by_different_numbers(tmp_path: Path) -> None:
    formats.write(formats.read(published(tmp_path / "a")), tmp_path / "b", "dflash")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["dflash_config"]["target_layer_ids"] == [1, 4, 7]
    assert formats.read(tmp_path / "b").config == formats.read(tmp_path / "a").config


@pytest.mark.parametrize("fields", [
    {},
    {"sample_from_anchor": True, "block_size": 7},
    {**layer_with(layer_types=["sliding_attention"] * 2, sliding_window=5, use_sliding_window=True),
     "sliding_window_non_causal": True},
    {**layer_with(layer_types=["full_attention", "sliding_attention"], sliding_window=5, use_sliding_window=True)},
], ids=["plain", "from anchor", "sliding both ways", "mixed"])  # fmt: skip
def test_what_is_written_reads_the_same_and_is_written_the_same(fields: dict[str, Any], tmp_path: Path) -> None:
    first = formats.read(published(tmp_path / "original", **fields))
    formats.write(first, tmp_path / "one", "speculators_dflash")
    second = formats.read(tmp_path / "one")
    formats.write(second, tmp_path / "two", "speculators_dflash")
    assert replace(second, tensors={}) == replace(first, tensors={})
    assert same_bytes(tensors_in(tmp_path / "original"), tensors_in(tmp_path / "one"))
    assert same_bytes(tensors_in(tmp_path / "one"), tensors_in(tmp_path / "two"))
    assert configs_in(tmp_path / "one") == configs_in(tmp_path / "two")
    written = json.loads((tmp_path / "one" / "config.json").read_text())
    differ = {key for key, value in {**CONFIG, **fields}.items() if written[key] != value}
    assert differ == {"transformer_layer_config"}, "which states more than the library does"


def test_a_reduced_vocabulary_is_read_and_written(tmp_path: Path) -> None:
    tensors = random_tensors(shapes()) | vocabulary()
    tensors["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill(0, CHOSEN, True)
    config = {**CONFIG, "draft_vocab_size": len(CHOSEN)}
    checkpoint = formats.read(save(tmp_path / "a", config, "model.safetensors", tensors))
    assert checkpoint.config.draft_vocab_size == len(CHOSEN)
    formats.write(checkpoint, tmp_path / "b", "speculators_dflash")
    assert same_bytes(tensors_in(tmp_path / "b"), tensors)


def test_a_reduced_vocabulary_without_d2t_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(shapes()) | {"lm_head.weight": vocabulary()["lm_head.weight"]}
    config = {**CONFIG, "draft_vocab_size": len(CHOSEN)}
    with pytest.raises(BadCheckpoint, match="d2t is missing"):
        formats.read(save(tmp_path / "a", config, "model.safetensors", tensors))


def test_copies_of_the_target_s_own_tensors_are_left_out(tmp_path: Path) -> None:
    copies = {name: (V, D) for name in ("embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight")}
    tensors = random_tensors({**shapes(), **copies, "verifier_norm.weight": (D,)})
    checkpoint = formats.read(save(tmp_path / "a", CONFIG, "model.safetensors", tensors))
    assert checkpoint.tensors.keys() == shapes().keys()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"transformer_layer_config": None}, "no config of a layer"),
        ({"transformer_layer_config": {"hidden_size": D}}, "no config of a layer"),
        ({"aux_hidden_state_layer_ids": "all"}, "taps is 'all'"),
        ({"mask_token_id": None}, "mask_token_id is None"),
        ({"draft_vocab_size": 7}, "lm_head.weight is missing; lm_head|d2t is missing"),
        ({"speculators_config": {}}, "does not name a verifier"),
        (layer_with(layer_types=["sliding_attention"] * 2), "sliding_window is None"),
        (layer_with(num_key_value_heads=3), "do not form groups"),
    ],
)
def test_a_config_that_makes_no_sense_gets_one_line(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=said) as caught:
        formats.read(published(tmp_path / "a", **fields))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"embedding_scale": 2.0}, "scaled embeddings or logits"),
        ({"logit_softcap": 30.0}, "scaled embeddings or logits"),
        ({"causal": True}, "causal blocks"),
        ({"taps": (2, 5, 10)}, "the tap after the target's final norm, 10"),
    ],
)
def test_what_the_library_would_compute_differently_is_refused(
    fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config = replace(formats.read(published(tmp_path / "a")).config, **fields)
    checkpoint = HeadCheckpoint("dflash", config, DFlashHead(config).state_dict(), {"num_layers": 10})
    with pytest.raises(BadCheckpoint, match=said):
        formats.write(checkpoint, tmp_path / "b", "speculators_dflash")
