"""A draft head's layer is Llama's (or Qwen3's) layer, and its rotary positions are transformers' own."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from specdec.errors import SpecdecError
from specdec.heads.layer import FEW_QUERIES, DecoderLayer, LayerConfig, RMSNorm, Rotary, causal_mask
from tests.families import FAMILIES, sizes

torch.set_num_threads(1)

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with betas, not truncated": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 128,
        "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False,
    },
    "yarn of DeepSeek": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64,
        "mscale": 1.0, "mscale_all_dim": 0.7,
    },
    "yarn with a factor for attention": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
}  # fmt: skip
LLAMA = tf.LlamaConfig(**sizes(head_dim=16, rms_norm_eps=1e-4))
BIASED = tf.LlamaConfig(**sizes(attention_bias=True, mlp_bias=True, hidden_act="gelu_pytorch_tanh"))
QWEN3 = tf.Qwen3Config(**sizes(head_dim=16))


def theirs_of(config: Any) -> Any:
    """transformers' layer with random weights, norms and biases included."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    layer: Any = Qwen3DecoderLayer if isinstance(config, tf.Qwen3Config) else LlamaDecoderLayer
    module = layer(config, 0).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return module


def ours_of(config: Any, theirs: Any) -> DecoderLayer:
    layer = DecoderLayer(LayerConfig.of(config), 0).eval()
    layer.load_state_dict(theirs.state_dict(), strict=True)
    return layer


def rotary_of(config: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    return LlamaRotaryEmbedding(config)(torch.zeros(1), positions)


def as_in_transformers(cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Without the dimension of heads, and no sine negative."""
    cos, sin = cos_sin
    half = sin.shape[-1] // 2
    return cos[:, 0], torch.cat([-sin[:, 0, :, :half], sin[:, 0, :, half:]], -1)


@pytest.fixture(params=[True, False], ids=["gradients", "no gradients"])
def gradients(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Layers compute in two ways, with and without."""
    with torch.set_grad_enabled(request.param):
        yield request.param


@pytest.mark.parametrize("length", [7, FEW_QUERIES + 3])
@pytest.mark.parametrize("config", [LLAMA, BIASED, QWEN3], ids=["llama", "biased", "qwen3"])
@pytest.mark.usefixtures("gradients")
def test_a_layer_equals_that_of_transformers_on_a_whole_sequence(config: Any, length: int) -> None:
    theirs = theirs_of(config)
    ours = ours_of(config, theirs)
    states, positions = torch.randn(2, length, 32), torch.arange(length).expand(2, -1)
    mask = causal_mask(length, states)
    expected = theirs(states, attention_mask=mask, position_embeddings=rotary_of(config, positions))
    got = ours(states, Rotary(LayerConfig.of(config))(positions), mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [LLAMA, BIASED, QWEN3], ids=["llama", "biased", "qwen3"])
@pytest.mark.usefixtures("gradients")
def test_a_layer_equals_that_of_transformers_with_a_cache_and_a_masked_column(config: Any) -> None:
    """Five tokens, then three, then one; the last of each does not see the first column of the second row."""
    theirs = theirs_of(config)
    ours = ours_of(config, theirs)
    rotary, mine, their_cache = Rotary(LayerConfig.of(config)), DynamicCache(), DynamicCache()
    states = torch.randn(2, 9, 32)
    for begin, end in ((0, 5), (5, 8), (8, 9)):
        positions = torch.arange(begin, end).expand(2, -1)
        mask = causal_mask(end, states)[:, :, begin:].repeat(2, 1, 1, 1)
        mask[1, :, -1:, 0] = torch.finfo(states.dtype).min
        part = states[:, begin:end]
        expected = theirs(
            part, attention_mask=mask, past_key_values=their_cache, position_embeddings=rotary_of(config, positions)
        )
        got = ours(part, rotary(positions), mask, mine)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    unmasked = ours(states, rotary(torch.arange(9).expand(2, -1)), causal_mask(9, states))
    assert (unmasked[1, -1] - got[1, -1]).abs().max() > 1e-3, "the hidden column made no difference"
    torch.testing.assert_close(unmasked[0, -1], got[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ROPES)
def test_rotary_positions_are_those_of_transformers(name: str) -> None:
    config = tf.LlamaConfig(**sizes(head_dim=32, max_position_embeddings=512, rope_parameters=dict(ROPES[name])))
    positions = torch.tensor([[0, 1, 2, 63, 64, 300, 511], [5, 5, 4, 3, 100, 90, 0]])
    got_of_both = as_in_transformers(Rotary(LayerConfig.of(config))(positions))
    for got, expected in zip(got_of_both, rotary_of(config, positions), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_every_scaled_rope_differs_from_the_plain_one() -> None:
    """Else the comparison above would not see a type that is ignored."""
    positions = torch.tensor([[100]])
    base = LayerConfig.of(tf.LlamaConfig(**sizes(head_dim=32)))
    seen = []
    for rope in ROPES.values():
        config = tf.LlamaConfig(**sizes(head_dim=32, max_position_embeddings=512, rope_parameters=dict(rope)))
        scaling = LayerConfig.of(config).rope_scaling
        seen.append(Rotary(replace(base, rope_scaling=scaling, max_position_embeddings=512))(positions)[0])
    for index, one in enumerate(seen):
        for other in seen[:index]:
            assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_part_of_each_head_can_be_rotated(share: float) -> None:
    config = tf.GPTNeoXConfig(**sizes(rope_parameters={"rope_type": "default", "partial_rotary_factor": share}))
    positions = torch.tensor([[0, 3, 77]])
    layer = LayerConfig.of(config)
    assert layer.partial_rotary_factor == share
    got_of_both = as_in_transformers(Rotary(layer)(positions))
    for got, expected in zip(got_of_both, GPTNeoXRotaryEmbedding(config)(torch.zeros(1), positions), strict=True):
        assert got.shape[-1] == layer.head_dim * share
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_part_that_is_not_rotated_stays_as_it_is() -> None:
    from specdec.heads.layer import rotate

    config = replace(LayerConfig.of(LLAMA), partial_rotary_factor=0.5)
    states, positions = torch.randn(1, 2, 3, 16), torch.tensor([[1, 2, 3]])
    turned = rotate(states, Rotary(config)(positions))
    assert torch.equal(turned[..., 8:], states[..., 8:])
    assert (turned[..., :8] - states[..., :8]).abs().max() > 0.1
    torch.testing.assert_close(turned.norm(dim=-1), states.norm(dim=-1))


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "something"])
def test_rope_types_that_depend_on_the_length_or_are_unknown_are_refused(kind: str) -> None:
    config = replace(LayerConfig.of(LLAMA), rope_scaling={"rope_type": kind, "factor": 2.0})
    with pytest.raises(SpecdecError, match=f"default, linear, llama3, yarn, got '{kind}'.*rope_scaling=None"):
        Rotary(config)


def test_a_rope_type_without_its_numbers_is_refused() -> None:
    with pytest.raises(SpecdecError, match="'llama3' needs 'low_freq_factor'"):
        Rotary(replace(LayerConfig.of(LLAMA), rope_scaling={"rope_type": "llama3", "factor": 2.0}))


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(SpecdecError, match="hidden_act='xielu'"):
        DecoderLayer(replace(LayerConfig.of(LLAMA), hidden_act="xielu"), 0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sizes_are_read_from_every_family_and_survive_json(family: str) -> None:
    config = LayerConfig.of(FAMILIES[family])
    assert config.hidden_size == 32
    assert config.intermediate_size in (48, 128)  # GPT-2 names no width and takes four times its hidden size
    assert config.num_attention_heads == 4
    assert config == LayerConfig(**json.loads(json.dumps(asdict(config))))
    layer = DecoderLayer(config, 0)
    states = torch.randn(1, 3, 32)
    assert layer(states, Rotary(config)(torch.arange(3)[None]), causal_mask(3, states)).shape == states.shape


def test_what_families_differ_in_is_read() -> None:
    of = {family: LayerConfig.of(config) for family, config in FAMILIES.items()}
    assert of["gpt2"].intermediate_size == 128
    assert of["gpt2"].hidden_act == "gelu_new"
    assert of["gpt2"].rms_norm_eps == 1e-5
    assert of["opt"].hidden_act == "relu"
    assert of["gemma2-sliding"].hidden_act == "gelu_pytorch_tanh"
    assert (of["qwen2"].attention_bias, of["qwen2"].output_bias) == (True, False)
    assert of["qwen3"].qk_norm
    assert not of["llama"].qk_norm
    assert of["llama"].num_key_value_heads == 2
    assert of["llama-without-gqa"].num_key_value_heads == 4
    assert of["gemma3-sliding"].rope_theta == 1e6, "the full layers' base, not the sliding ones'"
    assert of["gpt-neox"].partial_rotary_factor == 0.25


def test_an_older_config_file_gives_the_same_sizes() -> None:
    written = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 99,
        "rope_theta": 7e4, "rope_scaling": {"type": "linear", "factor": 2.0},
    }  # fmt: skip
    config = LayerConfig.of(written)
    assert config == LayerConfig(
        32, 48, 4, 2, 8, 1e-5, rope_theta=7e4, rope_scaling={"rope_type": "linear", "factor": 2.0},
        max_position_embeddings=99,
    )  # fmt: skip
    assert LayerConfig.of({**written, "rope_scaling": None}).rope_scaling is None


@torch.no_grad()
def test_a_move_to_bfloat16_leaves_the_frequencies_alone() -> None:
    rotary = Rotary(LayerConfig.of(LLAMA))
    positions = torch.tensor([[1000, 2001]])
    before = rotary(positions)
    after = rotary.to(torch.bfloat16)(positions)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_layer_can_be_made_without_memory() -> None:
    with torch.device("meta"):
        layer, rotary = DecoderLayer(LayerConfig.of(LLAMA), 0), Rotary(LayerConfig.of(LLAMA))
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert rotary(torch.tensor([[3]]))[0].isfinite().all()


@pytest.mark.usefixtures("gradients")
def test_the_norm_of_small_dtypes_is_computed_in_float32() -> None:
    norm = RMSNorm(64).bfloat16()
    states = torch.randn(5, 64).bfloat16() * 100
    expected = states.float() * torch.rsqrt(states.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(states), expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_without_gradients_is_the_norm_with_them(dtype: torch.dtype) -> None:
    norm = RMSNorm(48, 1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight)
    states = torch.randn(2, 5, 48).to(dtype) * torch.logspace(-4, 4, 10).view(2, 5, 1).to(dtype)
    slow = norm(states)
    with torch.no_grad():
        torch.testing.assert_close(norm(states), slow.detach())
        assert not torch.allclose(norm(states + 1), slow), "a mean is not taken off"


def test_what_a_layer_joined_follows_its_weights() -> None:
    """Drafting and training alternate; a copy has weights of its own."""
    config = LayerConfig.of(LLAMA)
    layer, rotary = DecoderLayer(config, 0), Rotary(config)
    states, mask = torch.randn(1, 4, 32), causal_mask(4, torch.zeros(()))

    def drafted(layer: DecoderLayer) -> Tensor:
        with torch.inference_mode():
            return layer(states, rotary(torch.arange(4)[None]), mask).clone()

    def learned(layer: DecoderLayer) -> Tensor:
        return layer(states, rotary(torch.arange(4)[None]), mask)

    first = drafted(layer)
    torch.testing.assert_close(first, learned(layer).detach())
    twin = copy.deepcopy(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    learned(layer).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(drafted(layer), learned(layer).detach())
    assert (drafted(layer) - first).abs().max() > 1e-2, "nothing was learned"
    torch.testing.assert_close(drafted(twin), first)
    with torch.no_grad():
        twin.mlp.up_proj.weight.zero_()
    assert (drafted(twin) - first).abs().max() > 1e-2
    layer.half().float()
    torch.testing.assert_close(drafted(layer), learned(layer).detach())
