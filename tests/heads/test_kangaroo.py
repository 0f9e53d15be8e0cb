"""Kangaroo's adapter computes what its equation says, and has the published size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from specdec.cache import KVCache
from specdec.heads.kangaroo import KangarooConfig, KangarooHead
from specdec.heads.layer import LayerConfig, causal_mask
from tests.heads import raw

D, E, S = 16, 6, 7
CONFIG = KangarooConfig(LayerConfig(D, 24, 4, 2, E, rope_theta=1000.0))


@pytest.fixture
def head() -> KangarooHead:
    torch.manual_seed(0)
    made = KangarooHead(CONFIG)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return made


@pytest.fixture
def states() -> Tensor:
    return torch.randn(1, S, D, generator=torch.Generator().manual_seed(1))


def whole(head: KangarooHead, states: Tensor) -> Tensor:
    return head(states, torch.arange(states.shape[1])[None], causal_mask(states.shape[1], states))


@torch.no_grad()
def test_a_sequence_is_what_the_raw_tensors_say(head: KangarooHead, states: Tensor) -> None:
    tensors = dict(head.state_dict())
    x = states[0]
    normed = raw.rms_norm(x, tensors["layers.0.input_layernorm.weight"])
    mixed = raw.attention(
        tensors, "layers.0.self_attn", normed, normed, list(range(S)), lambda query, key: key <= query,
        head_dim=E, theta=1000.0,
    )  # fmt: skip
    expected = raw.rms_norm(x + mixed, tensors["norm.weight"])
    torch.testing.assert_close(whole(head, states)[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_token_by_token_with_a_cache_is_the_same(head: KangarooHead, states: Tensor) -> None:
    cache = KVCache(1)
    steps = [head(states[:, i : i + 1], torch.tensor([[i]]), None, cache) for i in range(S)]
    torch.testing.assert_close(torch.cat(steps, 1), whole(head, states), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_states_that_are_injected_leave_the_same_past_as_states_that_draft(head: KangarooHead, states: Tensor) -> None:
    cache = KVCache(1)
    head.inject(states[:, :4], torch.arange(4)[None], cache)
    head.inject(states[:, 4:6], torch.arange(4, 6)[None], cache)
    last = head(states[:, 6:], torch.tensor([[6]]), None, cache)
    torch.testing.assert_close(last, whole(head, states)[:, 6:], atol=1e-5, rtol=1e-5)


def test_the_adapter_for_a_7b_target_has_67_1_million_parameters() -> None:
    layer = LayerConfig.of({"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32})
    with torch.device("meta"):
        adapter = KangarooHead(KangarooConfig(layer))
    assert sum(p.numel() for p in adapter.parameters()) == 4 * 4096**2 + 2 * 4096 == 67_117_056


def test_its_tensors_have_the_published_names(head: KangarooHead) -> None:
    assert set(head.state_dict()) == {
        *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
        "layers.0.input_layernorm.weight",
        "norm.weight",
    }


def test_a_target_with_biases_and_norms_of_heads_gets_an_adapter_without() -> None:
    target = SimpleNamespace(
        model_type="qwen3", hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, attention_bias=True, rope_theta=5e5,
    )  # fmt: skip
    config = KangarooConfig.of(target, exit_layer=3)
    assert config == KangarooConfig(LayerConfig(32, 48, 4, 2, 8, rope_theta=5e5), exit_layer=3)


def test_an_exit_before_the_first_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="exit_layer is at least 1"):
        KangarooConfig(CONFIG.layer, exit_layer=0)


def test_gradients_reach_every_parameter(head: KangarooHead, states: Tensor) -> None:
    whole(head, states).square().sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
