"""EAGLE's head is its published equations, whole or in steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.cache import KVCache
from specdec.heads.eagle import EagleConfig, EagleHead
from specdec.heads.layer import LayerConfig, causal_mask
from tests.heads.plain import Weights, attention, mlp, rms_norm, rotated, with_random_weights

torch.set_num_threads(1)

D, VOCAB = 32, 50
LAYER = LayerConfig(D, 48, 4, 2, 8, rms_norm_eps=1e-5, rope_theta=1e4)
CONFIGS = {
    "linear": EagleConfig(LAYER, VOCAB),
    "linear without bias": EagleConfig(LAYER, VOCAB, fc_bias=False),
    "three layers": EagleConfig(LAYER, VOCAB, num_layers=3),
    "gate": EagleConfig(LAYER, VOCAB, fusion="gate", fc_bias=False),
    "gate, five layers": EagleConfig(LAYER, VOCAB, num_layers=5, fusion="gate", fc_bias=False),
    "attention with biases": EagleConfig(replace(LAYER, attention_bias=True, output_bias=True), VOCAB),
}


def head_of(config: EagleConfig, seed: int = 0) -> EagleHead:
    return with_random_weights(EagleHead(config), seed)


def recomputed(w: Weights, config: EagleConfig, embeddings: Tensor, features: Tensor) -> Tensor:
    """From the raw tensors, one sequence [S, D] at a time, without any module."""
    layer = config.layer
    if config.fusion == "gate":
        one = features @ w["fuse.feature.weight"].T
        two = rms_norm(embeddings, w["fuse.norm.weight"], layer.rms_norm_eps) @ w["fuse.embedding.weight"].T
        two = two / (1 + (-two).exp())
        share = 1 / (1 + (-(torch.cat([one, two], -1) @ w["fuse.gate.weight"].T)).exp())
        x = share * one + (1 - share) * two
    else:
        x = torch.cat([embeddings, features], -1) @ w["fc.weight"].T + w.get("fc.bias", torch.zeros(layer.hidden_size))
    for index in range(config.num_layers):
        part = w.under(f"layers.{index}.")
        normed = x if index == 0 else rms_norm(x, part["input_layernorm.weight"], layer.rms_norm_eps)
        x = x + attention(part, layer, normed, rotated(layer))
        x = x + mlp(part, rms_norm(x, part["post_attention_layernorm.weight"], layer.rms_norm_eps))
    return x


def inputs(rows: int = 2, length: int = 9, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings, features = torch.randn(2, rows, length, D, generator=generator)
    return embeddings, features, torch.arange(length).expand(rows, -1)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_head_equals_a_recomputation_from_its_tensors(name: str) -> None:
    config = CONFIGS[name]
    head = head_of(config)
    embeddings, features, positions = inputs()
    got = head(embeddings, head.encode(features), positions, causal_mask(9, features))
    for row in range(2):
        expected = recomputed(Weights(head), config, embeddings[row], features[row])
        torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_embedding_and_feature_are_not_exchanged() -> None:
    """Else the comparison above could hold for a head that has both orders wrong."""
    head = head_of(CONFIGS["linear"])
    embeddings, features, positions = inputs()
    mask = causal_mask(9, features)
    one, other = head(embeddings, features, positions, mask), head(features, embeddings, positions, mask)
    assert (one - other).abs().max() > 0.1
    first_half = head.fc.weight[:, :D]
    torch.testing.assert_close(head.fc(torch.cat([embeddings, features * 0], -1)) - head.fc.bias,
                               embeddings @ first_half.T, atol=1e-5, rtol=1e-5)  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_steps_with_a_cache_equal_the_whole_sequence(name: str) -> None:
    config = CONFIGS[name]
    head, cache = head_of(config), KVCache(config.num_layers)
    embeddings, features, positions = inputs()
    whole = head(embeddings, features, positions, causal_mask(9, features))
    mask, parts = causal_mask(9, features), []
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        cut = slice(begin, end)
        parts.append(head(embeddings[:, cut], features[:, cut], positions[:, cut], mask[:, :, cut, :end], cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_the_first_layer_has_no_norm_before_attention_and_nothing_follows_the_last() -> None:
    names = set(head_of(CONFIGS["three layers"]).state_dict())
    assert "layers.0.input_layernorm.weight" not in names
    assert {"layers.1.input_layernorm.weight", "layers.2.input_layernorm.weight"} <= names
    assert not any(name.startswith(("norm.", "lm_head.", "embed_tokens.")) for name in names)


def test_the_published_7b_size_on_the_meta_device() -> None:
    """LLaMA-2 7B's head: fc of 2 D x D and bias, one layer, and the copy of the target's embedding."""
    layer = LayerConfig(4096, 11008, 32, 32, 128)
    with torch.device("meta"):
        head = EagleHead(EagleConfig(layer, 32000, own_embedding=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    assert shapes["fc.weight"] == (4096, 8192)
    trained = sum(p.numel() for name, p in head.named_parameters() if not name.startswith("embed_tokens"))
    assert trained == 4096 * 8192 + 4096 + 4 * 4096**2 + 3 * 4096 * 11008 + 4096  # 0.24 B, the paper's number
    assert round(trained / 1e9, 2) == 0.24


@torch.no_grad()
def test_an_own_embedding_is_held_and_the_targets_matrix_makes_the_logits() -> None:
    head = head_of(replace(CONFIGS["linear"], own_embedding=True))
    assert head.embed_tokens is not None
    assert head.embed_tokens.weight.shape == (VOCAB, D)
    states, matrix = torch.randn(3, D), torch.randn(VOCAB, D)
    assert torch.equal(head.logits(states, lambda s: F.linear(s, matrix)), states @ matrix.T)
    assert head.guessed == VOCAB


@pytest.mark.parametrize(
    ("changes", "said"), [({"num_layers": 0}, "at least 1"), ({"fusion": "gate"}, "gate has no bias")]
)
def test_sizes_that_contradict_each_other_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(CONFIGS["linear"], **changes)
