"""Greedy text equals plain `generate`, token for token, whatever proposes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import specdec
from specdec.additive_mask import AdditiveMask
from specdec.context import Context
from specdec.demo import HEADS, draft_path, prompts, target_path
from specdec.drafter import Drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.grow.named import POLICIES
from specdec.probe import probed
from specdec.target import Target
from tests.families import (
    CLEAR_GAP,
    EAGER_ONLY,
    FAMILIES,
    PICTURES_AND_TEXT,
    Reference,
    model_of,
    perturbed,
    reference,
    sizes,
    tiny_model,
)
from tests.families import (
    prompts as random_prompts,
)

NEW_TOKENS = 64
BATCHES = {"batch-1": [13], "batch-3": [13, 6, 10]}
DRAFTERS = {
    "none": None,
    "lookup-chain": "lookup:ngram=2,tokens=4",
    "suffix-chain": "suffix:branches=1,budget=4",
    "suffix-tree": "suffix:branches=3,budget=8",
    "recycling-chain": "recycling:successors=1,budget=4,depth=4",
    "recycling-tree": "recycling:budget=8,depth=4",
    "draft-chain": {"depth": 3},
    "draft-tree": {"depth": 3, "budget": 6},
    "early-exit-chain": "early-exit:layer=1,depth=2",
    "early-exit-tree": "early-exit:layer=1,depth=2,budget=4",
}
GUESSES = {name for name in DRAFTERS if name.startswith(("recycling", "draft", "early-exit"))}
"""Drafters that propose in every step, so that over a family's runs some tokens are taken and some are not."""

CASES = [(family, attention) for family in FAMILIES for attention in ("eager", "sdpa")
         if attention == "eager" or family not in EAGER_ONLY]  # fmt: skip


@cache
def _model(family: str, attention: str) -> Any:
    return tiny_model(family, attention, layers=2)


@cache
def _reference(family: str, attention: str, batch: str) -> Reference:
    return reference(_model(family, attention), BATCHES[batch], NEW_TOKENS)


@cache
def _draft_target(family: str, attention: str) -> Target:
    return probed(Target(perturbed(_model(family, attention))))


def _drafter(name: str, family: str, attention: str) -> Drafter | str | None:
    described = DRAFTERS[name]
    if isinstance(described, dict):
        return DraftModelDrafter(_draft_target(family, attention), **described)
    return described


def _speculative(model: Any, told: Reference, drafter: Any, new_tokens: int = NEW_TOKENS, **options: Any) -> Any:
    return specdec.generate(
        model, **told.prompts.inputs, drafter=drafter, max_new_tokens=new_tokens, do_sample=False,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("family", "attention"), CASES, ids=[f"{f}-{a}" for f, a in CASES])
def test_every_drafter_gives_the_text_of_plain_generate(family: str, attention: str) -> None:
    model = _model(family, attention)
    assert model.config._attn_implementation == attention
    drafted = dict.fromkeys(GUESSES, 0)
    accepted = dict.fromkeys(GUESSES, 0)
    for batch in BATCHES:
        told = _reference(family, attention, batch)
        for name in DRAFTERS:
            output = _speculative(model, told, _drafter(name, family, attention))
            assert output.sequences.tolist() == told.sequences.tolist(), f"{name}, {batch}"
            if name in GUESSES:
                drafted[name] += output.stats.drafted
                accepted[name] += output.stats.accepted
    for name in GUESSES:
        assert 0 < accepted[name] < drafted[name], f"{name} neither accepted nor rejected anything: no test"


GROWN = {
    word: (
        {"depth": 3, "budget": 6, "width": 3, "grow": word},
        f"early-exit:layer=1,depth=3,budget=5,width=3,grow={word}",
    )
    for word in set(POLICIES) - {"fixed", "sequoia"}
}


@pytest.mark.parametrize("family", ["llama", "gemma3-sliding", "llama4-chunked"])
def test_trees_that_differ_from_row_to_row_give_the_text_of_plain_generate(family: str) -> None:
    """Full attention, a window and chunks; columns that were run and dropped, in both kinds of drafter."""
    model, told = _model(family, "eager"), _reference(family, "eager", "batch-3")
    for grow, (draft, early) in GROWN.items():
        for drafter in (DraftModelDrafter(_draft_target(family, "eager"), **draft), early):
            output = _speculative(model, told, drafter)
            assert output.sequences.tolist() == told.sequences.tolist(), f"{grow}: {drafter}"
            assert 0 < output.stats.accepted < output.stats.drafted


def test_a_commit_that_keeps_the_wrong_columns_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = _model("llama", "sdpa"), _reference("llama", "sdpa", "batch-1")
    right = Context.keep

    def wrong(self: Context, nodes: list[list[int]]) -> None:
        shifted = [[row[0], *(max(node - 1, 0) for node in row[1:])] for row in nodes]
        right(self, shifted)

    monkeypatch.setattr(Context, "keep", wrong)
    output = _speculative(model, told, "recycling:budget=8,depth=4")
    assert output.stats.accepted > 0
    assert output.sequences.tolist() != told.sequences.tolist()


def test_a_boolean_mask_on_eager_attention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = _model("llama", "eager"), _reference("llama", "eager", "batch-1")
    specdec.target_of(model)  # probed with right masks
    right = AdditiveMask.of
    monkeypatch.setattr(AdditiveMask, "of", lambda self, *args: right(self, *args) == 0)
    output = _speculative(model, told, "recycling:budget=8,depth=4")
    assert output.sequences.tolist() != told.sequences.tolist()


@pytest.mark.parametrize("name", ["lookup-chain", "suffix-tree", "recycling-tree", "draft-tree", "early-exit-tree"])
def test_rows_that_end_at_different_times_end_as_in_plain_generate(name: str) -> None:
    model, told = _model("llama", "sdpa"), _reference("llama", "sdpa", "batch-3")
    new = told.sequences[:, told.prompts.ids.shape[1] :]
    ends = [row[index].item() for row, index in zip(new, (10, 25, 40), strict=True)]
    options: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": 0}
    expected = model.generate(**told.prompts.inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    lengths = {row.index(end) if (end := next((t for t in row if t in ends), None)) is not None else -1
               for row in new.tolist()}  # fmt: skip
    assert len(lengths) > 1, "rows must end at different times"
    output = _speculative(model, told, _drafter(name, "llama", "sdpa"), **options)
    assert output.sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("batch", list(BATCHES))
def test_text_that_outgrows_the_cache_stays_exact(batch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.cache.MIN_CAPACITY", 4)
    monkeypatch.setattr("specdec.api.SPARE_COLUMNS", -10_000)  # nothing is known about the final length
    grown = []
    from specdec.cache import BufferedLayer

    right = BufferedLayer._grow
    monkeypatch.setattr(BufferedLayer, "_grow", lambda self, at_least: (grown.append(at_least), right(self, at_least)))
    model = _model("gemma3-sliding", "sdpa")
    told = reference(model, BATCHES[batch], 150)
    for name in ("recycling-tree", "draft-tree", "early-exit-tree"):
        grown.clear()
        output = _speculative(model, told, _drafter(name, "gemma3-sliding", "sdpa"), 150)
        assert output.sequences.tolist() == told.sequences.tolist()
        assert len(grown) >= 3 * model.config.num_hidden_layers


def test_float64_is_exact() -> None:
    model = model_of(FAMILIES["qwen3"], "sdpa").double()
    told = reference(model, BATCHES["batch-3"], NEW_TOKENS)
    for drafter in ("recycling", "early-exit:layer=1", DraftModelDrafter(probed(Target(perturbed(model))), budget=6)):
        output = _speculative(model, told, drafter)
        assert output.sequences.tolist() == told.sequences.tolist()


def test_bfloat16_differs_at_most_where_the_two_best_tokens_tie() -> None:
    model = model_of(FAMILIES["llama"], "sdpa").bfloat16()
    asked = random_prompts([13])
    inputs: dict[str, Any] = asked.inputs
    plain: Any = model.generate(
        **asked.inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    for drafter in ("lookup", "recycling", "early-exit:layer=1", "suffix"):
        ours: Any = specdec.generate(model, **inputs, drafter=drafter, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert _ties_at_first_difference(plain, ours, asked.ids.shape[1]), drafter


def test_the_tie_rule_rejects_a_token_that_was_no_close_call() -> None:
    model = model_of(FAMILIES["llama"], "sdpa").bfloat16()
    asked = random_prompts([13])
    plain: Any = model.generate(
        **asked.inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    worst = plain.sequences.clone()
    worst[0, 15] = plain.logits[2][0].argmin()
    assert not _ties_at_first_difference(plain, worst, 13)


def _ties_at_first_difference(plain: Any, ours: torch.Tensor, prompt_length: int, ulps: int = 4) -> bool:
    """Equal, or first different where the target's logits of both tokens lie within a few ulps of each other.

    One ulp of bfloat16 at magnitude 2^k is 2^(k-7).
    """
    for step, (a, b) in enumerate(zip(plain.sequences[0, prompt_length:], ours[0, prompt_length:], strict=True)):
        if a != b:
            logits = plain.logits[step][0]
            ulp = 2.0 ** (torch.log2(logits[a].abs()).floor().item() - 7)
            return (logits[a] - logits[b]).item() <= ulps * ulp
    return True


def test_beam_search_is_refused_and_plain_generate_still_does_it() -> None:
    model, told = _model("llama", "sdpa"), _reference("llama", "sdpa", "batch-1")
    before = model.generate(**told.prompts.inputs, max_new_tokens=8, num_beams=2, do_sample=False)
    specdec.attach(model, "lookup")
    try:
        with pytest.raises(specdec.UnsupportedGeneration, match="beam search"):
            model.generate(**told.prompts.inputs, max_new_tokens=8, num_beams=2, do_sample=False)
    finally:
        specdec.detach(model)
    after = model.generate(**told.prompts.inputs, max_new_tokens=8, num_beams=2, do_sample=False)
    assert after.tolist() == before.tolist()


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_grouped_heads_and_tied_embeddings_are_exact(key_value_heads: int, tied: bool) -> None:
    config = LlamaConfig(**sizes(num_key_value_heads=key_value_heads, tie_word_embeddings=tied))
    model = model_of(config, "sdpa")
    told = reference(model, BATCHES["batch-3"], 24)
    for drafter in ("recycling:budget=8", "early-exit:layer=1,budget=4,depth=2"):
        assert _speculative(model, told, drafter, 24).sequences.tolist() == told.sequences.tolist()


@pytest.mark.parametrize("drafter", ["suffix", "recycling", "early-exit:layer=1"])
def test_a_model_that_also_sees_pictures_writes_the_same_text_without_them(drafter: str) -> None:
    model = model_of(PICTURES_AND_TEXT, "sdpa")
    told = reference(model, BATCHES["batch-3"], 24)
    assert _speculative(model, told, drafter, 24).sequences.tolist() == told.sequences.tolist()


needs_demo = pytest.mark.skipif(
    not (target_path() / "model.safetensors").is_file(), reason="the demo pair has not been trained here"
)


@needs_demo
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_demo_pair_writes_the_target_s_own_text(attention: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(target_path(), dtype=torch.float32, attn_implementation=attention)
    tokenizer: Any = AutoTokenizer.from_pretrained(target_path())
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [text[: 200 + 150 * i] for i, text in enumerate(list(prompts().values())[:3])]
    for batch in (texts[:1], texts):
        inputs = dict(tokenizer(batch, return_tensors="pt", padding=True))
        inputs.pop("token_type_ids", None)
        plain: Any = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        best = torch.stack(plain.logits).topk(2).values
        assert (best[..., 0] - best[..., 1]).min() > CLEAR_GAP, "prompts on which rounding decides; take others"
        for drafter in _demo_drafters():
            output: Any = specdec.generate(model, **inputs, drafter=drafter, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert output.tolist() == plain.sequences.tolist(), drafter


def _demo_drafters() -> list[str | None]:
    drafters = [spec for spec in DRAFTERS.values() if not isinstance(spec, dict)]
    if (draft_path() / "model.safetensors").is_file():
        drafters += ["demo-draft:depth=4", "demo-draft:depth=4,budget=10", *HEADS]
    return drafters
