"""Lean steps give the logits of the model's own forward, follow its weights, and are only for models they fit."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import specdec
from specdec import demo
from specdec.context import Context, Runner
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.joined import Joined
from specdec.lean import LeanModel, Norm, NotLean, agrees, lean
from specdec.probe import target_of
from specdec.target import Target
from tests.tiny import VOCAB, make_target, perturbed, prompt, shared_draft, shared_target

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **more}}


LEAN: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama, biases and one key head": LlamaConfig(
        **{**SIZES, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}
    ),
    "llama, tied, other activation": LlamaConfig(**SIZES, tie_word_embeddings=True, hidden_act="gelu"),
    "llama, linear rope": LlamaConfig(**SIZES, **rope("linear")),
    "llama, llama3 rope": LlamaConfig(
        **SIZES, **rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    ),
    "llama, yarn": LlamaConfig(**SIZES, **rope("yarn", original_max_position_embeddings=64)),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
}
NOT_LEAN: dict[str, PreTrainedConfig] = {
    "dynamic rope": LlamaConfig(**SIZES, **rope("dynamic")),
    "a sliding window": MistralConfig(**SIZES, sliding_window=8),
    "norms that add one": GemmaConfig(**SIZES, head_dim=8),
    "norms after attention": Gemma2Config(**SIZES, head_dim=8, sliding_window=8),
    "norms in another place": Olmo2Config(**SIZES),
    "joined projections": Phi3Config(**SIZES),
    "learned positions": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4),
    "factors between the parts": GraniteConfig(
        **SIZES, residual_multiplier=0.5, attention_multiplier=0.2, embedding_multiplier=3.0
    ),
}


def built(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))  # norms of ones and biases of zeros hide mistakes
    return model


@torch.no_grad()
def steps(runner: Runner, seed: int) -> list[Tensor]:
    """Logits of random trees after random prompts, some nodes of each kept."""
    rng, context = random.Random(seed), Context(runner)
    rows = rng.randint(1, 3)
    context.prefill([[rng.randrange(3, VOCAB) for _ in range(rng.randint(2, 9))] for _ in range(rows)])
    found = []
    for _ in range(4):
        width = rng.randint(1, 9)
        tokens = torch.tensor([[rng.randrange(3, VOCAB) for _ in range(width)] for _ in range(rows)])
        sees, depths, parents = torch.eye(width).bool().repeat(rows, 1, 1), torch.zeros(rows, width).long(), []
        for row in range(rows):
            parents.append([rng.randrange(-1, node) for node in range(width)])
            for node, parent in enumerate(parents[row]):
                if parent >= 0:
                    sees[row, node] |= sees[row, parent]
                    depths[row, node] = depths[row, parent] + 1
        found.append(context.run(tokens, depths, sees, keep_logits=rng.choice([0, 1, 2])).logits)
        context.keep([torch.nonzero(sees[row, rng.randrange(width)])[:, 0].tolist() for row in range(rows)])
    return found


@pytest.mark.parametrize("name", LEAN)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_lean_steps_give_the_models_own_logits(name: str, attention: str) -> None:
    model = built(LEAN[name])
    model.set_attn_implementation(attention)
    target = target_of(model)
    runner = lean(target)
    assert isinstance(runner, LeanModel)
    for seed in range(6):
        for ours, theirs in zip(steps(runner, seed), steps(target, seed), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-5), (torch.bfloat16, 0.3)])
def test_lean_steps_in_other_dtypes(dtype: torch.dtype, within: float) -> None:
    """Angles are float32 for every dtype, as in the model's own forward."""
    target = target_of(built(LEAN["qwen3"], dtype))
    runner = lean(target)
    assert isinstance(runner, LeanModel)
    assert runner.dtype == dtype
    for ours, theirs in zip(steps(runner, 1), steps(target, 1), strict=True):
        torch.testing.assert_close(ours, theirs, atol=within, rtol=0)


@pytest.mark.parametrize("name", NOT_LEAN)
def test_models_with_other_parts_or_other_maths_run_as_they_are(name: str) -> None:
    target = target_of(built(NOT_LEAN[name]))
    assert lean(target) is target


def test_same_parts_with_other_maths_are_found_by_their_logits() -> None:
    """Granite has the parts of Llama under the same names; what differs is between them."""
    target = target_of(built(NOT_LEAN["factors between the parts"]))
    assert not agrees(LeanModel(target), target)


def test_the_demo_draft_runs_lean_and_drafts_the_same() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo.draft_path(), dtype=torch.float32).eval()
    specdec.optimize(model)  # its large matrices are packed then
    target = target_of(model)
    assert isinstance(lean(target), LeanModel)
    assert agrees(LeanModel(target), target)


def test_greedy_text_and_number_of_steps_are_those_of_the_models_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded() -> Any:
        drafter = DraftModelDrafter(target_of(shared_draft()), depth=4, budget=10)
        return specdec.generate(
            shared_target(), **prompt(3), drafter=drafter, max_new_tokens=40, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip

    ours = decoded()
    monkeypatch.setattr("specdec.drafters.draft_model.lean", lambda target: target)
    theirs = decoded()
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.stats.accepted == theirs.stats.accepted > 0


# --- What may change --------------------------------------------------------------------------------------------------


def distance(model: Any, runner: Runner) -> float:
    pairs = zip(steps(runner, 2), steps(Target(model), 2), strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_steps_follow_weights_that_change(name: str) -> None:
    model = built(LEAN[name])
    runner = lean(target_of(model))
    before = steps(runner, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(steps(runner, 2)[0], before[0])
    assert distance(model, runner) < 2e-5
    model.load_state_dict(built(LEAN[name]).state_dict())
    for ours, at_first in zip(steps(runner, 2), before, strict=True):
        torch.testing.assert_close(ours, at_first)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight = nn.Parameter(layer.self_attn.v_proj.weight.detach() * 2)  # another tensor
    assert not torch.allclose(steps(runner, 2)[0], before[0])
    assert distance(model, runner) < 2e-5


class Doubled(nn.Module):
    """What an adapter does to a layer, roughly."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.out_features = inner, inner.out_features

    def forward(self, states: Tensor) -> Tensor:
        return 2 * self.inner(states)


def test_a_part_that_is_replaced_watched_or_packed_later_is_called_as_it_is() -> None:
    model = built(LEAN["llama"])
    runner = lean(target_of(model))
    steps(runner, 2)
    attention = model.model.layers[1].self_attn
    attention.k_proj = Doubled(attention.k_proj)
    assert distance(model, runner) < 2e-5
    heard: list[int] = []
    hook = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: heard.append(1))
    steps(runner, 2)
    assert len(heard) >= 4
    hook.remove()
    specdec.optimize(model, min_elements=0)
    assert distance(model, runner) < 2e-5
    specdec.deoptimize(model)
    assert distance(model, runner) < 2e-5


def watched(model: Any) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda *_: None)


def dispatched(model: Any) -> None:
    model.model.layers[2].self_attn.q_proj._hf_hook = object()  # what accelerate leaves on such a model


def compiled(model: Any) -> None:
    model.model.layers[0].compile()


def compiled_part(model: Any) -> None:
    model.model.layers[0] = torch.compile(model.model.layers[0])


def patched(model: Any) -> None:
    model.model.layers[3].mlp.forward = lambda states: states


@pytest.mark.parametrize("alter", [watched, dispatched, compiled, compiled_part, patched])
def test_what_somebody_did_to_a_model_is_not_passed_over(alter: Callable[[Any], None]) -> None:
    model = make_target(1)
    LeanModel(target_of(model))
    target = target_of(model)
    alter(model)
    with pytest.raises(NotLean, match="watched, compiled or patched"):
        LeanModel(target)
    assert lean(target) is target


def test_parameters_that_the_parts_do_not_have_are_not_left_out() -> None:
    model = make_target(2)
    model.model.layers[0].extra = nn.Parameter(torch.ones(3))
    with pytest.raises(NotLean, match="leave out"):
        LeanModel(target_of(model))


def test_a_model_is_compared_once_and_again_after_it_moved_and_can_go(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[torch.dtype] = []
    monkeypatch.setattr("specdec.lean.agrees", lambda model, _: (compared.append(model.dtype), True)[1])
    model = make_target(4)
    for _ in range(3):
        assert isinstance(lean(target_of(model)), LeanModel)
    assert compared == [torch.float32]
    model.double()
    lean(target_of(model))
    assert compared == [torch.float32, torch.float64]
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- Parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 64, 1024])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_the_norm_is_that_of_the_paper(size: int, scale: float) -> None:
    """Root mean square (arXiv 1910.07467) in float64, beside the layer norm over a vector and its negative."""
    holder = nn.Module()
    holder.norm = nn.RMSNorm(size, eps=1e-6)
    states = torch.randn(2, 5, size, generator=torch.Generator().manual_seed(size)) * scale + scale
    with torch.no_grad():
        holder.norm.weight.normal_()
        ours = Norm.of(holder, "norm")(states)
        exact = states.double() / (states.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * holder.norm.weight
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False)])
def test_joined_layers_are_the_layers_side_by_side(biases: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    owner: Any = nn.ModuleDict({"a": nn.Linear(6, 4, bias=biases[0]), "b": nn.Linear(6, 7, bias=biases[1])})
    joined, states = Joined(owner, ("a", "b")), torch.randn(2, 3, 6)

    def apart() -> Tensor:
        return torch.cat([owner["a"](states), owner["b"](states)], -1)

    with torch.no_grad():
        torch.testing.assert_close(joined(states), apart())
        before = joined(states)
        owner["b"].weight.add_(1.0)
        assert not torch.allclose(joined(states), before)
        torch.testing.assert_close(joined(states), apart())
        if owner["a"].bias is not None:
            owner["a"].bias.data = owner["a"].bias.data + 1.0
            torch.testing.assert_close(joined(states), apart())
        owner["a"] = nn.Linear(6, 5)
        assert joined(states).shape[-1] == 12
        torch.testing.assert_close(joined(states), apart())


def test_large_layers_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.joined.MOST_ELEMENTS", 20)
    owner = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)})
    joined = Joined(owner, ("a", "b"))
    with torch.no_grad():
        assert joined(torch.ones(1, 6)).shape == (1, 8)
    assert joined._weight is None


def test_a_perturbed_draft_is_not_taken_for_its_model() -> None:
    """The comparison sees differences far smaller than those of another model."""
    ours, theirs = target_of(make_target(5)), target_of(perturbed(make_target(5), 0.003))
    assert not agrees(LeanModel(ours), theirs)


@pytest.mark.parametrize("largest", [0, 1 << 18], ids=["each by itself", "joined"])
def test_parts_come_apart_as_they_were(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    monkeypatch.setattr("specdec.joined.MOST_ELEMENTS", largest)
    owner = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 4), "b": torch.nn.Linear(6, 9, bias=False)})
    joined, states = Joined(owner, ("a", "b")), torch.randn(2, 3, 6)
    with torch.no_grad():
        whole, parts = joined(states), joined.apart(states)
        assert [part.shape[-1] for part in parts] == [4, 9]
        for part, name in zip(parts, ("a", "b"), strict=True):
            torch.testing.assert_close(part, owner[name](states))
        torch.testing.assert_close(torch.cat(list(parts), -1), whole)
    assert bool(joined._sizes) == (largest > 0)
