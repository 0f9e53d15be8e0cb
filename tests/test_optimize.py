"""specdec.optimize: the same function, taken back without a trace."""

from __future__ import annotations

import copy

import pytest
import torch

import specdec
from specdec import packed
from specdec.demo.padded import cost_padded
from specdec.packed import FOLDED, PackedForward, is_packed
from specdec.probe import target_of
from specdec.tree import TokenTree
from specdec.verifier import Verifier
from tests.tiny import make_target, prompt


@pytest.fixture
def model():
    return make_target(0, num_attention_heads=4, num_key_value_heads=1)


def logits(model):
    with torch.no_grad():
        return model(**prompt(2)).logits


def test_logits_stay_up_to_rounding_and_layers_are_packed(model):
    before = logits(model)
    specdec.optimize(model, min_elements=0)
    assert is_packed(model)
    assert model.config._attn_implementation == FOLDED
    assert torch.allclose(logits(model), before, atol=1e-4)
    assert model.lm_head.forward._packed is not None, "the packed product was really used"


@pytest.mark.parametrize("drafter", ["recycling", "suffix", "early-exit:layer=2,budget=7"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_speculation_on_an_optimized_model_is_exact(model, drafter, batch_size):
    specdec.optimize(model, min_elements=0)
    inputs = prompt(batch_size)
    plain = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    ours = specdec.generate(model, **inputs, drafter=drafter, max_new_tokens=32, do_sample=False)
    assert isinstance(ours, torch.Tensor)
    assert torch.equal(ours, plain)


def test_deoptimize_restores_everything(model):
    before, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    specdec.deoptimize(specdec.optimize(model, min_elements=0))
    assert not is_packed(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_twice_is_once_and_state_dict_keys_stay(model):
    keys = set(model.state_dict())
    specdec.optimize(specdec.optimize(model, min_elements=0), min_elements=0)
    assert set(model.state_dict()) == keys
    specdec.deoptimize(model)
    assert not is_packed(model)


def test_changed_weights_are_packed_anew(model):
    specdec.optimize(model, min_elements=0)
    logits(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    twice = logits(model)
    specdec.deoptimize(model)
    assert torch.allclose(twice, logits(model), atol=1e-4)


def test_another_dtype_and_copies_keep_working(model):
    specdec.optimize(model, min_elements=0)
    before = logits(model)
    copied = copy.deepcopy(model)
    assert torch.allclose(logits(copied), before, atol=1e-4)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert torch.allclose(logits(model), before), "a copy's weights are its own"
    assert logits(model.bfloat16()).dtype == torch.bfloat16


def test_training_goes_through_the_ordinary_product(model):
    specdec.optimize(model, min_elements=0)
    inputs = prompt(2)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_small_float32_weights_are_left_alone(model):
    specdec.optimize(model)
    assert not is_packed(model)


def test_bfloat16_weights_are_packed_where_the_cpu_takes_them():
    """Others end in an error inside oneDNN: there the ordinary product serves, also after a move to bfloat16."""
    packs = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    model = specdec.optimize(make_target(0).bfloat16())
    assert isinstance(model.lm_head.__dict__.get("forward"), PackedForward) == packs
    assert logits(model).dtype == torch.bfloat16


def test_a_cpu_without_bfloat16_products_decodes_bfloat16_models(model, monkeypatch):
    plain = logits(copy.deepcopy(model).bfloat16())
    monkeypatch.setattr(packed, "_takes_bfloat16", lambda: False)
    specdec.optimize(model, min_elements=0)  # packed as float32, and bfloat16 afterwards
    assert torch.equal(logits(model.bfloat16()), plain)
    assert not is_packed(specdec.optimize(make_target(0).bfloat16()))


@pytest.mark.parametrize("extra_layers", [0, 2])
def test_a_cost_padded_target_computes_the_same_for_more(extra_layers):
    small = make_target(0)
    large = cost_padded(small, parameters=300_000, extra_layers=extra_layers)
    assert sum(p.numel() for p in large.parameters()) >= 300_000
    assert large.config.num_hidden_layers == small.config.num_hidden_layers + extra_layers
    assert torch.allclose(logits(large), logits(small), atol=1e-5)


def test_slow_widths_are_padded_only_where_the_product_is_not_packed(model):
    """Two and three rows become four in fp32; scores of the tree's own nodes stay."""

    def widths(model):
        verifier = Verifier(target_of(model))
        verifier.prefill(torch.tensor([[5, 6, 7]]), model.generation_config, {"use_cache": True})
        scored = verifier.score(TokenTree.of_chains(torch.tensor([8]), [[9, 10]])).logits
        return scored.shape[1], scored[0, :3]

    with torch.no_grad():
        num_nodes, plain = widths(model)
        packed_nodes, packed = widths(specdec.optimize(model, min_elements=0))
    assert (num_nodes, packed_nodes) == (4, 3)
    assert torch.allclose(plain, packed, atol=1e-4)
