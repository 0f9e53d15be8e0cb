"""Cutting a model: what stays computes as before, what contributes nothing can go, what matters least goes first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specdec.errors import BadCheckpoint, BadRecipe, UnsupportedModel
from specdec.train.distill import DEFAULT_RECIPE, DraftSettings, starting_draft, train_draft_model
from specdec.train.importance import calibration_rows, chosen, cut_by_importance, measure_importance
from specdec.train.prepared import MemoryData
from specdec.train.prune import Sizes, cut, everything
from specdec.train.recipe import Recipe
from tests.tiny import make_target

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen2 with a window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}


def make(family: str) -> Any:
    """Random in every tensor, norms and biases included."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5 if "norm" in name else torch.randn_like(parameter))
    return model


def ids(rows: int = 2, length: int = 14) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=ids()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_cut_the_logits_are_the_same_to_the_bit(family: str) -> None:
    model = make(family)
    same = cut(model, everything(model))
    assert same is not model
    assert torch.equal(logits(same), logits(model))
    assert same.config.tie_word_embeddings == model.config.tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_what_adds_nothing_can_go_without_changing_anything(family: str, tmp_path: Path) -> None:
    model = make(family)
    size = model.model.layers[0].self_attn.head_dim
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, [3, 17, 30]] = 0  # units without an effect
            layer.self_attn.o_proj.weight[:, : 2 * size] = 0  # group 0: its two query heads
        for projection in (model.model.layers[1].mlp.down_proj, model.model.layers[1].self_attn.o_proj):
            projection.weight.zero_()  # layer 1 passes its input through
            if projection.bias is not None:
                projection.bias.zero_()
        for name, parameter in model.named_parameters():  # channels 5 and 11 are never written
            if "embed_tokens" in name or name == "lm_head.weight":
                parameter[:, [5, 11]] = 0
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[[5, 11]] = 0
            if name.endswith(("o_proj.bias", "down_proj.bias")):
                parameter[[5, 11]] = 0
    smaller = cut_by_importance(model, Sizes(2, 37, 1, 30), list(ids(4)))
    assert smaller.config.num_hidden_layers == 2
    assert smaller.config.num_attention_heads == 2
    assert torch.allclose(logits(smaller), logits(model), atol=2e-4, rtol=1e-4)
    smaller.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path).eval()), logits(smaller))


@pytest.mark.parametrize("sizes", [Sizes(num_layers=2), Sizes(0, 30), Sizes(0, 0, 1), Sizes(0, 0, 0, 24)])
def test_cutting_what_matters_would_be_noticed(sizes: Sizes) -> None:
    model = make("llama")
    assert not torch.allclose(logits(cut_by_importance(model, sizes, list(ids()))), logits(model), atol=0.05)


def test_a_layer_is_as_important_as_the_angle_that_it_turns_states_by() -> None:
    model = make("llama, tied")
    with torch.no_grad():
        states = model(input_ids=ids(), output_hidden_states=True).hidden_states
        last: list[Tensor] = []
        hook = model.model.layers[-1].register_forward_hook(lambda _m, _i, output: last.append(output))
        model(input_ids=ids())
        hook.remove()
    expected = []
    for before, after in zip(states[:3], (*states[1:3], last[0]), strict=True):
        cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
        expected.append(float(cosine.arccos().mean() / torch.pi))
    measured = measure_importance(model, list(ids()))
    assert measured.layers.tolist() == pytest.approx(expected, abs=1e-6)


def test_units_groups_and_channels_are_measured_by_what_they_contribute() -> None:
    model = make("llama")
    entering: dict[str, Tensor] = {}
    layer = model.model.layers[1]
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args: entering.__setitem__("mlp", args[0])),
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: entering.__setitem__("attention", args[0])),
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    measured = measure_importance(model.requires_grad_(False), list(ids()))
    unit = entering["mlp"][..., 7, None] * layer.mlp.down_proj.weight[:, 7]
    assert float(measured.units[1, 7]) == pytest.approx(float(unit.square().sum(-1).mean().sqrt()), rel=1e-4)
    group = entering["attention"][..., 16:] @ layer.self_attn.o_proj.weight[:, 16:].T
    assert float(measured.groups[1, 1]) == pytest.approx(float(group.square().sum(-1).mean().sqrt()), rel=1e-4)
    assert measured.channels.shape == (32,)
    assert not model.training


def test_the_largest_stay_in_their_old_order() -> None:
    measured = measure_importance(make("llama"), list(ids()))
    given = replace(
        measured,
        layers=torch.tensor([0.3, 0.1, 0.2]),
        groups=torch.tensor([[1.0, 2.0], [5.0, 5.0], [4.0, 3.0]]),
    )
    kept = chosen(given, Sizes(num_layers=2, num_key_value_heads=1))
    assert kept.layers == (0, 2)
    assert kept.groups == ((1,), (0,))
    assert kept.channels == tuple(range(32))
    assert chosen(given, Sizes(num_key_value_heads=1)).groups[1] == (0,)  # a tie goes to the lower one


def test_what_cannot_be_cut_is_refused_in_one_line() -> None:
    other: Any = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModel, match="GPT2LMHeadModel cannot be cut: only the families llama"):
        cut_by_importance(other, Sizes(1), list(ids()))
    model = make("llama")
    with pytest.raises(BadRecipe, match="num_layers of a cut is at most the model's 3, got 4"):
        cut_by_importance(model, Sizes(4), list(ids()))
    with pytest.raises(BadRecipe, match="there is none"):
        cut_by_importance(model, Sizes(1), [])
    whole = everything(model)
    with pytest.raises(BadRecipe, match="equally many"):
        cut(model, replace(whole, units=(whole.units[0][:3], *whole.units[1:])))
    with pytest.raises(BadRecipe, match="ascending"):
        cut(model, replace(whole, channels=whole.channels[::-1]))


def test_calibration_takes_beginnings_from_all_over_the_data() -> None:
    data = MemoryData([(torch.full((n + 2,), n), torch.ones(n + 2) > 0) for n in range(20)])
    rows = calibration_rows(data, 5, 4)
    assert [int(row[0]) for row in rows] == [0, 5, 10, 15]
    assert max(map(len, rows)) == 5


def texts() -> MemoryData:
    generator = torch.Generator().manual_seed(3)
    return MemoryData([(torch.randint(3, 100, (20,), generator=generator), torch.arange(20) > 3) for _ in range(16)])


def cutting(*, draft: object = "target", steps: int = 1, **head: Any) -> Recipe:
    """The recipe of a run that begins with a cut."""
    return DEFAULT_RECIPE.changed(
        {
            "loop": {"steps": steps, "rows_per_step": 4, "rows_at_once": 4, "warmup": 0, "learning_rate": 3e-3},
            "data": {"row_length": 40},
            "head": {"draft": str(draft), **head},
        }
    )


def test_a_draft_cut_from_its_target_is_kept_for_a_resumed_run_and_learns(tmp_path: Path) -> None:
    model, data = make_target(seed=2), texts()
    recipe = cutting(steps=30, cut={"num_layers": 2, "intermediate_size": 48})
    heard: list[Any] = []
    loop = train_draft_model(recipe, model, data, tmp_path, report=heard.append)
    draft: Any = loop.trainable.module
    assert (draft.config.num_hidden_layers, draft.config.intermediate_size) == (2, 48)
    assert heard[-1].loss < 0.7 * heard[0].loss
    again = starting_draft(DraftSettings.of(recipe), model, MemoryData([]), tmp_path, recipe)  # needs no text any more
    assert again.config.num_hidden_layers == 2
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("draft", ["target", "larger"])
def test_a_cut_that_nothing_has_learned_from_is_made_again(tmp_path: Path, draft: str) -> None:
    model, data = make_target(seed=2), texts()
    make_target(seed=2, num_hidden_layers=6).save_pretrained(tmp_path / "larger")
    first = cutting(cut={"num_layers": 2})
    starting_draft(DraftSettings.of(first), model, data, tmp_path / "run", first)
    other = cutting(draft=draft if draft == "target" else tmp_path / draft, cut={"num_layers": 3})
    again = starting_draft(DraftSettings.of(other), model, data, tmp_path / "run", other)
    alone = starting_draft(DraftSettings.of(other), model, data, tmp_path / "other", other)
    assert again.config.num_hidden_layers == 3
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), alone.parameters(), strict=True))


def test_a_cut_that_a_checkpoint_rests_on_stays_and_another_one_is_refused(tmp_path: Path) -> None:
    model, data, out = make_target(seed=2), texts(), tmp_path / "run"
    for name, seed in (("draft", 3), ("moved", 3), ("unlike", 4)):
        make_target(seed=seed).save_pretrained(tmp_path / name)
    train_draft_model(cutting(draft=tmp_path / "draft", cut={"num_layers": 2}), model, data, out)
    before = {file: file.read_bytes() for file in (out / "start").iterdir()}
    for name, layers in (("draft", 3), ("unlike", 2)):
        other = cutting(draft=tmp_path / name, cut={"num_layers": layers})
        with pytest.raises(
            BadCheckpoint, match=rf"start was cut from .*draft to .*2.*asks for .*{name} and .*{layers}"
        ):
            train_draft_model(other, model, data, out)
    train_draft_model(cutting(draft=tmp_path / "moved", cut={"num_layers": 2}), model, data, out)  # the same weights
    assert {file: file.read_bytes() for file in (out / "start").iterdir()} == before


def test_a_checkpoint_of_the_filters_reference_keeps_the_cut(tmp_path: Path) -> None:
    def stop(_report: Any) -> None:
        raise KeyboardInterrupt

    model, data = make_target(seed=2), texts()
    filtered = {"keep_share": 0.5, "cut": {"num_layers": 2}}
    with pytest.raises(KeyboardInterrupt):
        train_draft_model(cutting(**filtered), model, data, tmp_path, report=stop)
    with pytest.raises(BadCheckpoint, match="start was cut from target"):
        train_draft_model(cutting(cut={"num_layers": 3}), model, data, tmp_path)
    assert train_draft_model(cutting(**filtered), model, data, tmp_path).step == 1
