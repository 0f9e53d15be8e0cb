"""The probe tells models that decode trees from those that decode chains only and those that decode neither."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers import AutoModelForCausalLM

import specdec
from specdec import probe as probing
from specdec.errors import UnsupportedModel
from specdec.probe import Probe, cache_folder, probe, probed, tolerance
from specdec.target import Target
from tests.families import FAMILIES, VOCAB, model_of, perturbed, reference, sizes, tiny_model

CHAIN_ONLY = {
    # ALiBi by cache column; position_ids are not among its arguments.
    "bloom": tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, tie_word_embeddings=False),
    "mpt": tf.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, use_cache=True),
    # Local attention from a buffer by cache column, far longer than a dozen tokens.
    "gpt-neo": tf.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, window_size=40,
        max_position_embeddings=256, attention_types=[[["global", "local"], 1]],
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No answers from other tests, neither in memory nor on disk."""
    monkeypatch.setattr(probing, "_known", {})
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_attention_models_with_positions_decode_trees(family: str) -> None:
    answer = probe(Target(tiny_model(family)))
    assert answer.form == "tree"
    assert answer.difference < 1e-4


@pytest.mark.parametrize("name", list(CHAIN_ONLY))
def test_models_that_place_keys_by_column_decode_chains(name: str) -> None:
    model = model_of(CHAIN_ONLY[name])
    answer = probe(Target(model))
    assert answer.form == "chain"
    assert answer.reason.startswith("chain only: ")
    for lengths in ([12], [12, 7, 9]):
        told = reference(model, lengths, 40)
        for drafter in ("recycling:budget=8", perturbed(model)):
            output: Any = specdec.generate(
                model, **told.prompts.inputs, drafter=drafter, max_new_tokens=40, return_dict_in_generate=True
            )
            assert output.sequences.tolist() == told.sequences.tolist()
            assert 0 < output.stats.accepted < output.stats.drafted


def test_a_model_that_ignores_positions_is_not_called_a_tree() -> None:
    model = tiny_model("llama")
    honest = model.forward

    def forward(input_ids: Tensor, position_ids: Tensor | None = None, past_key_values: Any = None, **kwargs: Any):
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        columns = torch.arange(past, past + input_ids.shape[1]).expand_as(input_ids)
        return honest(input_ids=input_ids, position_ids=columns, past_key_values=past_key_values, **kwargs)

    model.forward = forward
    answer = probe(Target(model))
    assert answer.form == "chain"
    assert "a tree forward differs" in answer.reason


def test_a_model_that_ignores_the_mask_is_not_called_a_tree() -> None:
    model = tiny_model("llama")
    honest = model.forward
    model.forward = lambda attention_mask=None, position_ids=None, **kwargs: honest(
        position_ids=position_ids, attention_mask=None, **kwargs
    )
    assert probe(Target(model)).form != "tree"


def test_noise_of_the_model_s_own_excuses_no_difference() -> None:
    model = tiny_model("llama")
    honest = model.forward

    def forward(past_key_values: Any = None, use_cache: bool = True, **kwargs: Any) -> Any:
        output = honest(past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        if not use_cache:
            output.logits = output.logits + 3.0 * torch.randn_like(output.logits)
        elif kwargs["input_ids"].shape[1] == 1:
            output.logits = output.logits.roll(1, -1)
        return output

    # Signature of the real forward, so that positions are still passed.
    forward.__signature__ = inspect.signature(honest)  # type: ignore[attr-defined]
    model.forward = forward
    assert probe(Target(model)).form == "refuse"
    assert tolerance(torch.float32, noise=1.0, scale=1.0) < 0.01


@pytest.mark.parametrize("name", ["mistral-sliding", "gemma3-sliding", "llama4-chunked"])
def test_windows_far_longer_than_the_probe_are_probed_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = copy.deepcopy(FAMILIES[name])
    field = "attention_chunk_size" if name == "llama4-chunked" else "sliding_window"
    setattr(config, field, 4096)
    model = model_of(config)
    assert probe(Target(model)).form == "tree"
    assert getattr(model.config, field) == 4096, "the config is as before"
    monkeypatch.setattr("specdec.visibility.Reach.is_limited", False)
    assert probe(Target(model)).form != "tree"


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("gemma3-sliding").train()
    config = model.config.to_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target = Target(model)
    probe(target)
    assert model.training
    assert target.form == "tree"
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_answer_is_kept_on_disk_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Target] = []
    right = probing.probe
    monkeypatch.setattr(probing, "probe", lambda target: (calls.append(target), right(target))[1])
    probed(Target(tiny_model("llama")))
    assert len(calls) == 1
    files = list((cache_folder() / "probes").iterdir())
    assert len(files) == 1
    assert json.loads(files[0].read_text())["form"] == "tree"
    probing._known.clear()
    assert probed(Target(tiny_model("llama"))).form == "tree"
    assert len(calls) == 1, "read from disk"
    probing._known.clear()
    files[0].write_text(json.dumps({"form": "chain", "reason": "as written", "difference": 0.0, "noise": 0.0}))
    assert probed(Target(tiny_model("llama"))).form == "chain"
    probed(Target(tiny_model("llama", "sdpa")))
    assert len(calls) == 2, "another attention implementation is another question"


@pytest.mark.parametrize("content", ["", "{not json", "[]", '{"form": "tree"}', '{"form": "tree", "surprise": 1}'])
def test_a_broken_file_is_ignored_and_replaced(content: str) -> None:
    target = Target(tiny_model("llama"))
    probed(target)
    probing._known.clear()
    (file,) = (cache_folder() / "probes").iterdir()
    file.write_text(content)
    assert probed(Target(tiny_model("llama"))).form == "tree"
    assert json.loads(file.read_text())["form"] == "tree"


def test_a_cache_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file"))
    assert probed(Target(tiny_model("llama"))).form == "tree"


def test_what_fails_the_probe_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = Probe("refuse", "a chain forward differs", float("nan"), 0.0)
    monkeypatch.setattr(probing, "probe", lambda target: refusal)
    with pytest.raises(UnsupportedModel, match=r"a chain forward differs.*plain model\.generate\(\)"):
        probed(Target(tiny_model("llama")))


@pytest.mark.parametrize(
    "config",
    [
        tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4),
        tf.Lfm2Config(**sizes(num_hidden_layers=2, layer_types=["conv", "full_attention"])),
        tf.Qwen3NextConfig(
            **sizes(
                num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], num_experts=4,
                num_experts_per_tok=2, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
                linear_value_head_dim=8, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            )
        ),
    ],
    ids=["mamba", "lfm2", "qwen3-next"],
)  # fmt: skip
def test_recurrent_and_hybrid_models_are_refused_with_a_way_out(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        UnsupportedModel, match=r"running state .* plain model\.generate\(\), or an attention-only model"
    ):
        specdec.generate(model, torch.tensor([[3, 4, 5]]), drafter="lookup", max_new_tokens=4)


def test_encoder_decoder_models_are_refused_with_a_way_out() -> None:
    config = tf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    model = tf.T5ForConditionalGeneration(config)
    with pytest.raises(UnsupportedModel, match=r"encoder-decoder .* plain model\.generate\(\)"):
        specdec.generate(model, torch.tensor([[3, 4, 5]]), drafter="lookup", max_new_tokens=4)


def test_a_model_without_a_head_is_refused_with_a_way_out() -> None:
    model = tf.AutoModel.from_config(FAMILIES["llama"])
    with pytest.raises(UnsupportedModel, match="AutoModelForCausalLM"):
        Target(model)
