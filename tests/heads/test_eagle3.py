"""EAGLE-3's head is its published equations in every variant, whole or in steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.cache import KVCache
from specdec.heads.eagle3 import Eagle3Config, Eagle3Head, standard_taps
from specdec.heads.layer import LayerConfig, causal_mask
from tests.heads.plain import Weights, attention, mlp, rms_norm, rotated, with_random_weights

torch.set_num_threads(1)

D, VOCAB, DRAFT = 32, 50, 20
LAYER = LayerConfig(D, 48, 4, 2, 8, rms_norm_eps=1e-5, rope_theta=1e4)
PLAIN = Eagle3Config(LAYER, VOCAB, DRAFT)
CONFIGS = {
    "plain": PLAIN,
    "the whole vocabulary": replace(PLAIN, draft_vocab_size=VOCAB),
    "norm before residual": replace(PLAIN, norm_before_residual=True),
    "norms of each tap": replace(PLAIN, fc_norm=True),
    "norm before fc": replace(PLAIN, norm_before_fc=True),
    "norm of the output": replace(PLAIN, norm_output=True),
    "3.1": replace(PLAIN, fc_norm=True, norm_output=True, norm_before_residual=True),
    "bias of fc": replace(PLAIN, fc_bias=True),
    "two layers": replace(PLAIN, num_layers=2),
    "five taps": replace(PLAIN, num_taps=5, taps=(1, 2, 3, 4, 5), fc_norm=True),
    "a wider target": replace(PLAIN, target_hidden_size=40, own_embedding=True),
    "Qwen3's norms of heads": replace(PLAIN, layer=replace(LAYER, qk_norm=True, head_dim=16)),
}


def head_of(config: Eagle3Config, seed: int = 0) -> Eagle3Head:
    return with_random_weights(Eagle3Head(config), seed)


def recomputed(w: Weights, config: Eagle3Config, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """States [S, D] and logits [S, N] from the raw tensors, without any module."""
    layer, eps = config.layer, config.layer.rms_norm_eps
    if config.norm_before_fc:
        features = rms_norm(features, w["input_norm.weight"], eps)
    if config.fc_norm:
        parts = features.split(config.feature_size, -1)
        features = torch.cat([rms_norm(p, w[f"fc_norm.{k}.weight"], eps) for k, p in enumerate(parts)], -1)
    g = features @ w["fc.weight"].T + w.get("fc.bias", torch.zeros(layer.hidden_size))
    first = w.under("layers.0.")
    normed = rms_norm(g, first["hidden_norm.weight"], eps)
    residual = normed if config.norm_before_residual else g
    both = torch.cat([rms_norm(embeddings, first["input_layernorm.weight"], eps), normed], -1)
    x = residual + attention(first, layer, both, rotated(layer))
    x = x + mlp(first, rms_norm(x, first["post_attention_layernorm.weight"], eps))
    for index in range(1, config.num_layers):
        part = w.under(f"layers.{index}.")
        x = x + attention(part, layer, rms_norm(x, part["input_layernorm.weight"], eps), rotated(layer))
        x = x + mlp(part, rms_norm(x, part["post_attention_layernorm.weight"], eps))
    normed = rms_norm(x, w["norm.weight"], eps)
    return (normed if config.norm_output else x), normed @ w["lm_head.weight"].T


def inputs(config: Eagle3Config, rows: int = 2, length: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(rows, length, D, generator=generator)
    features = torch.randn(rows, length, config.num_taps * config.feature_size, generator=generator)
    return embeddings, features, torch.arange(length).expand(rows, -1)


def refuse(states: Tensor) -> Tensor:
    raise AssertionError("the head has an output matrix of its own")


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_head_equals_a_recomputation_from_its_tensors(name: str) -> None:
    config = CONFIGS[name]
    head = head_of(config)
    embeddings, features, positions = inputs(config)
    states = head(embeddings, head.encode(features), positions, causal_mask(9, features))
    logits = head.logits(states, refuse)
    for row in range(2):
        expected, expected_logits = recomputed(Weights(head), config, embeddings[row], features[row])
        torch.testing.assert_close(states[row], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits[row], expected_logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("flag", ["norm_before_residual", "norm_output", "fc_norm", "norm_before_fc"])
@torch.no_grad()
def test_every_flag_changes_the_result(flag: str) -> None:
    """So that a flag that is lost on the way to a file shows. norm_output changes what is fed back, not the logits."""
    head, other = head_of(PLAIN), head_of(PLAIN)
    changed = Eagle3Head(replace(PLAIN, **{flag: True})).eval()
    changed.load_state_dict(other.state_dict(), strict=False)
    embeddings, features, positions = inputs(PLAIN)
    mask = causal_mask(9, features)
    one = head(embeddings, head.encode(features), positions, mask)
    two = changed(embeddings, changed.encode(features), positions, mask)
    assert (one - two).abs().max() > 0.05
    same = torch.allclose(head.logits(one, refuse), changed.logits(two, refuse), atol=1e-5)
    assert same == (flag == "norm_output")


@pytest.mark.parametrize("name", ["plain", "two layers", "3.1"])
@torch.no_grad()
def test_steps_with_a_cache_equal_the_whole_sequence(name: str) -> None:
    config = CONFIGS[name]
    head, cache = head_of(config), KVCache(config.num_layers)
    embeddings, features, positions = inputs(config)
    states, mask, parts = head.encode(features), causal_mask(9, features), []
    whole = head(embeddings, states, positions, mask)
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        cut = slice(begin, end)
        parts.append(head(embeddings[:, cut], states[:, cut], positions[:, cut], mask[:, :, cut, :end], cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_chosen_tokens_are_offsets_and_come_back_as_ids() -> None:
    head = head_of(replace(PLAIN, draft_vocab_size=4))
    head.choose_vocabulary([49, 0, 7, 3])
    assert head.d2t is not None
    assert head.t2d is not None
    assert head.d2t.tolist() == [0, 2, 5, 46]
    assert head.to_token_ids(torch.tensor([[3, 2], [1, 0]])).tolist() == [[49, 7], [3, 0]]
    assert head.t2d.nonzero().flatten().tolist() == [0, 3, 7, 49]


@pytest.mark.parametrize("tokens", [[1, 2, 3], [1, 2, 3, 50], [-1, 2, 3, 4], [1, 1, 2, 3]])
def test_a_vocabulary_that_does_not_fit_is_refused(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="need 4 different token ids below 50"):
        head_of(replace(PLAIN, draft_vocab_size=4)).choose_vocabulary(tokens)


def test_a_head_that_guesses_every_token_has_no_map() -> None:
    head = head_of(CONFIGS["the whole vocabulary"])
    assert not {"d2t", "t2d"} & set(head.state_dict())
    guesses = torch.tensor([3, 49])
    assert torch.equal(head.to_token_ids(guesses), guesses)
    with pytest.raises(ValueError, match="guesses every token"):
        head.choose_vocabulary([1])


@torch.no_grad()
def test_without_an_own_output_matrix_the_targets_is_used_on_normed_states() -> None:
    head = head_of(replace(PLAIN, draft_vocab_size=VOCAB, own_lm_head=False))
    states, matrix = torch.randn(3, D), torch.randn(VOCAB, D)
    assert torch.equal(head.logits(states, lambda normed: normed @ matrix.T), head.norm(states) @ matrix.T)


def test_the_standard_taps() -> None:
    assert standard_taps(32) == (2, 16, 29)
    assert standard_taps(36) == (2, 18, 33)
    assert standard_taps(7) == (2, 3, 4)
    for layers in range(1, 40):
        taps = standard_taps(layers)
        assert sorted(taps) == list(taps)
        assert all(1 <= tap <= layers for tap in taps)
        assert layers == 1 or taps[-1] < layers, "the state after the last layer is what the target's own head reads"


def test_the_published_size_for_llama_3_1_8b_on_the_meta_device() -> None:
    layer = LayerConfig(4096, 14336, 32, 8, 128)
    with torch.device("meta"):
        head = Eagle3Head(Eagle3Config(layer, 128256, 32000))
    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    assert shapes["fc.weight"] == (4096, 3 * 4096)
    assert shapes["layers.0.self_attn.q_proj.weight"] == (4096, 8192)
    assert shapes["layers.0.self_attn.k_proj.weight"] == (1024, 8192)
    assert shapes["layers.0.self_attn.o_proj.weight"] == (4096, 4096)
    assert shapes["lm_head.weight"] == (32000, 4096)
    assert (shapes["d2t"], shapes["t2d"]) == ((32000,), (128256,))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"draft_vocab_size": 51}, "not within 1 and 50"),
        ({"taps": (1, 2)}, "3 taps need"),
        ({"num_taps": 4}, "4 taps need"),
        ({"fc_norm": True, "norm_before_fc": True}, "exclude each other"),
        ({"own_lm_head": False}, "output matrix of its own"),
        ({"target_hidden_size": 40}, "another size than its target"),
        ({"num_layers": 0}, "at least 1"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(PLAIN, **changes)
