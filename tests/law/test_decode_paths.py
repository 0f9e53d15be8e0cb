"""The whole decode loop has the target's law exactly: models, caches, drafters, prefill, several steps.

Target and draft are tiny GPT-2 models of three tokens in float64, which has no float32 inside. All paths of complete
generations are replayed, so that a decision used twice, or a stale cache column, shows.
"""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as lp
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from specdec.acceptance import Rule
from specdec.decode import decode
from specdec.drafter import Drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.early_exit import EarlyExitDrafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.lookup import LookupDrafter
from specdec.emitter import Emitter, apply
from specdec.grow.shape import shape_of
from specdec.sampling import Chooser, SamplingParams
from specdec.stats import DecodeStats
from specdec.target import Target
from specdec.verifier import Verifier
from tests.law.enumeration import Law, law_of, total_variation

EXACT = 1e-12
EOS = 2
PARAMS = SamplingParams(do_sample=True, temperature=0.8, top_k=2)
WARPERS = [lp.TemperatureLogitsWarper(0.8), lp.TopKLogitsWarper(2)]
PROMPT = torch.tensor([[2, 0, 1, 0]])


def tiny(seed: int, layers: int) -> Target:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=3, n_positions=16, n_embd=8, n_layer=layers, n_head=2, initializer_range=0.5, bos_token_id=0,
        eos_token_id=EOS, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return Target(GPT2LMHeadModel(config).double().eval())


TARGET, DRAFT = tiny(6, 2), tiny(2, 1)
TREE = shape_of([(0,), (1,), (0, 0)])


def processors(*more: lp.LogitsProcessor) -> LogitsProcessorList:
    return LogitsProcessorList([*more, *WARPERS])


@torch.no_grad()
def target_law(prompt: list[int], length: int, processing: LogitsProcessorList, new: tuple[int, ...] = ()) -> Law:
    """The model's own joint law of the new tokens, without any of our code."""
    if len(new) == length or EOS in new:
        return {new: 1.0}
    ids = torch.tensor([[*prompt, *new]])
    p = apply(processing, ids, TARGET.model(ids).logits[:, -1]).softmax(-1)[0].tolist()
    law: Law = {}
    for token, probability in enumerate(p):
        if probability > 0:
            for sequence, rest in target_law(prompt, length, processing, (*new, token)).items():
                law[sequence] = law.get(sequence, 0.0) + probability * rest
    return law


@torch.no_grad()
def generate(
    chooser: Chooser,
    drafter: Drafter,
    ids: torch.Tensor,
    length: int,
    processing: LogitsProcessorList,
    rule: Rule = "auto",
    params: SamplingParams = PARAMS,
    mask: torch.Tensor | None = None,
) -> tuple[tuple[int, ...], ...]:
    """New tokens of every row up to its end of text."""
    criteria = StoppingCriteriaList([MaxLengthCriteria(ids.shape[1] + length), EosTokenCriteria(EOS)])
    emitter = Emitter(ids, processing, criteria, params, pad_token=0, chooser=chooser)
    verifier = Verifier(TARGET, drafter.taps, 32)
    kwargs: dict[str, object] = {"attention_mask": mask, "use_cache": True}
    if mask is not None:
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in decode(verifier, drafter, emitter, ids, GenerationConfig(), kwargs, DecodeStats(), rule=rule):
        pass
    return tuple(tuple(emitter.ids(row)[ids.shape[1] :].tolist()) for row in range(ids.shape[0]))


def draft_model(children: str, shape) -> Drafter:
    return DraftModelDrafter(DRAFT, children=children, shape=shape)


CHAIN = shape_of([(0,), (0, 0)])
WIDE = shape_of([(0,), (1,), (2,), (0, 0), (2, 0)])
DRAFTERS = {
    "drawn chain, block": (lambda: draft_model("drawn", CHAIN), "block"),
    "drawn chain, recursive": (lambda: draft_model("drawn", CHAIN), "recursive"),
    "drawn tree, traversal": (lambda: draft_model("drawn", TREE), "traversal"),
    "drawn tree, walk": (lambda: draft_model("drawn", TREE), "walk"),
    "top-k tree": (lambda: draft_model("chosen", TREE), "auto"),
    "early exit, drawn tree": (lambda: EarlyExitDrafter(TARGET, layer=1, depth=2, budget=3, children="drawn"), "auto"),
    "early exit, more children than tokens with mass": (
        lambda: EarlyExitDrafter(TARGET, layer=1, depth=1, budget=3, children="drawn"),
        "auto",
    ),
    "drawn tree below a child without mass": (lambda: draft_model("drawn", WIDE), "traversal"),
    "the target drafts for itself": (lambda: DraftModelDrafter(TARGET, children="drawn", shape=TREE), "auto"),
    "early exit, top-k chain": (lambda: EarlyExitDrafter(TARGET, layer=1, depth=2), "auto"),
    "lookup": (LookupDrafter, "auto"),
    "dyspec": (lambda: DraftModelDrafter(DRAFT, depth=2, budget=3, width=2, grow="dyspec"), "traversal"),
    "early exit, dyspec": (
        lambda: EarlyExitDrafter(TARGET, layer=1, depth=2, budget=2, width=2, grow="dyspec"),
        "auto",
    ),
    "eagle2": (lambda: DraftModelDrafter(DRAFT, depth=3, budget=4, width=2, grow="eagle2"), "auto"),
    "early exit, opt-tree": (
        lambda: EarlyExitDrafter(TARGET, layer=1, depth=3, budget=3, width=2, grow="opt-tree", threshold=0.3),
        "auto",
    ),
    "calibrated": (
        lambda: DraftModelDrafter(DRAFT, depth=2, budget=2, width=2, grow="calibrated", children="drawn"),
        "auto",
    ),
    "lookup, then drawn children": (
        lambda: HybridDrafter(LookupDrafter(tokens=2), draft_model("drawn", CHAIN)),
        "auto",
    ),
}


@pytest.mark.parametrize(("make", "rule"), [pytest.param(*case, id=name) for name, case in DRAFTERS.items()])
def test_a_whole_generation_has_the_targets_law(make, rule: Rule) -> None:
    """Prefill, a step of depth 2, and further steps up to four tokens or the end of text."""
    # A drafter of its own for every path: what one learned must not reach another.
    law = law_of(lambda chooser: generate(chooser, make(), PROMPT, 4, processors(), rule)[0])
    expected = target_law(PROMPT[0].tolist(), 4, processors())
    assert len(expected) > 8
    assert total_variation(law, expected) < EXACT


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
def test_a_whole_generation_with_a_repetition_penalty_has_the_targets_law(shape) -> None:
    processing = processors(lp.RepetitionPenaltyLogitsProcessor(1.7))
    drafter = draft_model("drawn", shape)
    law = law_of(lambda chooser: generate(chooser, drafter, PROMPT, 4, processing)[0])
    expected = target_law(PROMPT[0].tolist(), 4, processing)
    assert total_variation(law, expected) < EXACT
    assert total_variation(expected, target_law(PROMPT[0].tolist(), 4, processors())) > 0.01


def test_rows_of_unequal_length_that_end_at_different_times_are_exact_and_independent() -> None:
    """Two left-padded rows in one batch: the joint law is the product of the rows' own."""
    ids, mask = torch.tensor([[0, 0, 1], [0, 2, 0]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    drafter = draft_model("drawn", shape_of([(0,)]))
    law = law_of(lambda chooser: generate(chooser, drafter, ids, 3, processors(), mask=mask))
    one, two = target_law([0, 1], 3, processors()), target_law([0, 2, 0], 3, processors())
    joint = {(a, b): p * q for a, p in one.items() for b, q in two.items()}
    assert total_variation(law, joint) < EXACT


def test_all_three_tokens_without_truncation_have_the_targets_law() -> None:
    drafter, processing = draft_model("drawn", TREE), LogitsProcessorList()
    law = law_of(
        lambda chooser: generate(chooser, drafter, PROMPT, 3, processing, params=SamplingParams(do_sample=True))[0]
    )
    expected = target_law(PROMPT[0].tolist(), 3, processing)
    assert len(expected) == 1 + 2 + 4 * 3
    assert total_variation(law, expected) < EXACT


def test_a_cache_that_loses_accepted_columns_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Verifier.commit
    monkeypatch.setattr(Verifier, "commit", lambda self, paths: commit(self, [[] for _ in paths]))
    law = law_of(lambda chooser: generate(chooser, draft_model("drawn", CHAIN), PROMPT, 4, processors())[0])
    assert total_variation(law, target_law(PROMPT[0].tolist(), 4, processors())) > 1e-5
