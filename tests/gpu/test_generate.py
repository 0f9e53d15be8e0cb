"""Text and law on a device: greedy identity in fp32, near ties in bf16, samples of the target's own law."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specdec
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.grow.shape import Shape, chain, shape_of
from specdec.probe import probed
from specdec.target import Target
from tests.families import model_of, perturbed, prompts, reference, sizes, tiny_model
from tests.law.chi_square import SIGNIFICANCE, chi_square
from tests.law.test_samples import NEW_TOKENS as SAMPLED
from tests.law.test_samples import PROMPT, TEMPERATURE, TOP_K, model_law, tiny_llama
from tests.test_identity import FAMILIES, _ties_at_first_difference

NEW_TOKENS = 48
BATCHES = {"batch-1": [13], "batch-3": [13, 6, 10]}
WORDS = {
    "none": None,
    "lookup chain": "lookup:ngram=2,tokens=4",
    "suffix chain": "suffix:branches=1,budget=4",
    "suffix tree": "suffix:branches=3,budget=8",
    "recycling chain": "recycling:successors=1,budget=4,depth=4",
    "recycling tree": "recycling:budget=8,depth=4",
    "early-exit chain": "early-exit:layer=1,depth=2",
    "early-exit tree": "early-exit:layer=1,depth=2,budget=4",
}
DRAFTS: dict[str, dict[str, Any]] = {
    "draft chain": {"depth": 3},
    "draft tree": {"depth": 3, "budget": 6},
    "draft best-first": {"depth": 3, "budget": 6, "grow": "best-first"},
}


def greedy(model: Any, inputs: dict[str, Any], drafter: Any) -> Any:
    return specdec.generate(
        model, **inputs, drafter=drafter, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3-sliding"])
def test_fp32_text_is_that_of_plain_generate(device: torch.device, family: str, attention: str) -> None:
    model = tiny_model(family, attention, layers=2)
    draft = probed(Target(perturbed(model).to(device)))
    model = model.to(device)
    drafters = WORDS | {name: DraftModelDrafter(draft, **options) for name, options in DRAFTS.items()}
    took = refused = 0
    for lengths in BATCHES.values():
        told = reference(model, lengths, NEW_TOKENS)
        for name, drafter in drafters.items():
            output = greedy(model, told.prompts.inputs, drafter)
            assert output.sequences.device.type == device.type
            assert output.sequences.tolist() == told.sequences.tolist(), f"{name}, {lengths}"
            took += output.stats.accepted
            refused += output.stats.drafted - output.stats.accepted
    assert took > 0, "nothing was accepted: no test"
    assert refused > 0, "nothing was rejected: no test"


@pytest.mark.parametrize(
    "drafter", ["lookup", "suffix:branches=3,budget=8", "recycling", "early-exit:layer=1,budget=4"]
)
def test_bf16_text_differs_at_most_where_the_two_best_tokens_tie(device: torch.device, drafter: str) -> None:
    model = model_of(FAMILIES["llama"], "sdpa").bfloat16().to(device)
    asked = prompts([13]).to(device)
    plain: Any = model.generate(
        **asked.inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    ours = greedy(model, asked.inputs, drafter).sequences
    assert _ties_at_first_difference(plain, ours, 13)


@pytest.mark.parametrize(
    ("children", "shape"),
    [("drawn", chain(2)), ("drawn", shape_of([(0,), (1,), (0, 0)])), ("chosen", shape_of([(0,), (1,), (0, 0)]))],
    ids=["drawn chain", "drawn tree", "top-k tree"],
)
def test_samples_have_the_targets_law(device: torch.device, children: str, shape: Shape) -> None:
    """First three of four new tokens of 3000 rows against the law of full forwards on the CPU.

    Each of these three fails on correct code for one seed in a million; the seed is fixed.
    """
    law = model_law(tiny_llama(1, 2), PROMPT, 3)
    target, draft = tiny_llama(1, 2).to(device), tiny_llama(2, 1).to(device)  # type: ignore[arg-type]
    drafter = DraftModelDrafter(Target(draft), children=children, shape=shape)  # type: ignore[arg-type]
    generator = torch.Generator(device).manual_seed(8)
    rows = torch.tensor([PROMPT] * 500, device=device)
    samples: list[tuple[int, ...]] = []
    for _ in range(6):
        output: Any = specdec.generate(
            target, rows, attention_mask=torch.ones_like(rows), drafter=drafter, generator=generator, do_sample=True,
            temperature=TEMPERATURE, top_k=TOP_K, top_p=1.0, max_new_tokens=SAMPLED,
        )  # fmt: skip
        samples += [tuple(row) for row in output[:, len(PROMPT) : len(PROMPT) + 3].tolist()]
    assert chi_square(samples, law).p_value > SIGNIFICANCE
    assert chi_square(samples, model_law(tiny_llama(3, 2), PROMPT, 3)).p_value < SIGNIFICANCE


def test_the_same_seed_gives_the_same_samples(device: torch.device) -> None:
    model = model_of(FAMILIES["llama"], "sdpa").to(device)
    asked = prompts([9]).to(device)
    options: dict[str, Any] = {"drafter": "recycling", "do_sample": True, "max_new_tokens": 24}
    generators = [torch.Generator(device).manual_seed(seed) for seed in (3, 3, 4)]
    texts: list[Any] = [specdec.generate(model, **asked.inputs, **options, generator=each) for each in generators]
    assert texts[0].tolist() == texts[1].tolist()
    assert texts[0].tolist() != texts[2].tolist()


def test_a_vocabulary_that_is_no_power_of_two_is_exact(device: torch.device) -> None:
    """Kernels on a GPU have other paths for odd sizes."""
    config = FAMILIES["llama"].__class__(**sizes(vocab_size=131, num_key_value_heads=1))
    model = model_of(config, "sdpa").to(device)
    told = reference(model, BATCHES["batch-3"], 24)
    output: Any = specdec.generate(
        model, **told.prompts.inputs, drafter="early-exit:layer=1,depth=3,budget=6", max_new_tokens=24, do_sample=False
    )
    assert output.tolist() == told.sequences.tolist()
