"""Every kind of head learns a text by heart, and then drafts it: training and decoding mean the same positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, PreTrainedConfig

from specdec.api import generate
from specdec.drafters.load import load_drafter
from specdec.errors import BadRecipe
from specdec.heads.medusa import MedusaConfig, MedusaHead
from specdec.probe import target_of
from specdec.stats import DecodeStats
from specdec.target import BEFORE_NORM
from specdec.train.batch import TrainBatch
from specdec.train.evaluate import Evaluator
from specdec.train.features import TargetFeatures
from specdec.train.kinds.dflash import DFlashTraining
from specdec.train.kinds.eagle import Eagle3Training, EagleTraining
from specdec.train.kinds.head import HeadTraining
from specdec.train.kinds.kangaroo import KangarooTraining
from specdec.train.kinds.medusa import MedusaTraining
from specdec.train.kinds.sequential import CloverTraining, HydraTraining, MLPSpeculatorTraining
from specdec.train.objective import Objective
from specdec.train.order import Piece
from specdec.train.prepared import MemoryData
from tests.families import sizes, tiny_model
from tests.tiny import make_target

PROMPT, LENGTH, TEXTS = 4, 36, 6

KINDS: dict[str, Callable[[Any], HeadTraining]] = {
    "medusa": lambda target: MedusaTraining(target, num_heads=3),
    "medusa with own matrices": lambda target: MedusaTraining(target, num_heads=3, num_layers=2, output="own"),
    "hydra": lambda target: HydraTraining(target, num_heads=3),
    "hydra++": lambda target: HydraTraining(target, num_heads=3, num_layers=2, prefix=True),
    "clover": lambda target: CloverTraining(target, num_heads=3),
    "mlp-speculator": lambda target: MLPSpeculatorTraining(target, num_heads=3, inner_size=64, tied=False),
    "dflash": lambda target: DFlashTraining(target, num_layers=1, taps=[2, 3, 4], block_size=4, anchors=3 * LENGTH),
    "dflash of a causal block": lambda target: DFlashTraining(
        target, num_layers=1, taps=[2, 3, 4], block_size=3, causal=True, sample_from_anchor=True, weights="d-pace"
    ),
    "eagle": lambda target: EagleTraining(target, steps=3, noise=0.02, law_weight=1.0, options={"depth": 3}),
    "eagle with a gate": lambda target: EagleTraining(
        target, steps=3, noise=0.0, law_weight=1.0, fusion="gate", options={"depth": 3}
    ),
    "eagle3": lambda target: Eagle3Training(target, steps=3, options={"depth": 3}),
    "kangaroo": lambda target: KangarooTraining(target, exit_layer=2, options={"depth": 3}),
}


@cache
def target() -> Any:
    """Its text does not repeat itself."""
    return target_of(make_target(seed=4))


@cache
def batch() -> TrainBatch:
    """The target's own greedy texts, two packed into a row, with features."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 100, (TEXTS, PROMPT), generator=generator)
    texts = target().model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=LENGTH - PROMPT, do_sample=False
    )
    supervised = torch.arange(LENGTH) >= PROMPT
    data = MemoryData([(text, supervised) for text in texts])
    rows = [(Piece(n, 0, LENGTH), Piece(n + 1, 0, LENGTH)) for n in range(0, TEXTS, 2)]
    laid = TrainBatch.of_rows(data, rows, [0, 1, 2], 2 * LENGTH)
    taps = tuple(range(target().num_layers + 1))
    return TargetFeatures(target(), (*taps, -1))(laid)


def learn(training: HeadTraining, steps: int = 150) -> list[float]:
    """Losses of full-batch training."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in training.module.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps) + 1e-4
        loss = torch.stack([term.total for term in training.terms(batch(), Objective("ce"))]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(training.module.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / batch().num_supervised)
    return losses


@pytest.mark.parametrize("config", [
    CohereConfig(**sizes(logit_scale=0.25, tie_word_embeddings=False)), GraniteConfig(**sizes(logits_scaling=8.0)),
], ids=["a factor", "a divisor"])  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("medusa with own matrices", lambda head: head.lm_heads[1]),
        ("hydra", lambda head: head.heads[0].lm_head),
        ("clover", lambda head: head.lm_head),
        ("eagle3", lambda head: head.lm_head),
    ],
)
def test_own_output_matrices_begin_with_the_logits_of_a_target_that_scales_them(
    kind: str, own: Callable[[Any], torch.nn.Linear], config: PreTrainedConfig
) -> None:
    torch.manual_seed(0)
    target = target_of(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    training = KINDS[kind](target)
    states = torch.randn(5, target.hidden_size)
    torch.testing.assert_close(own(training.module)(states), target.logits_of(states))


def test_medusa_heads_that_guess_chosen_tokens_learn_over_these() -> None:
    torch.manual_seed(0)
    size, vocabulary = target().hidden_size, target().vocab_size
    chosen = torch.arange(0, vocabulary, 2)
    head = MedusaHead(MedusaConfig(size, len(chosen), 2, output="own", token_map=True))
    assert head.token_map is not None
    head.token_map.copy_(chosen)
    head.begin_as_target(target().logit_weight)
    training = MedusaTraining(target(), head=head)
    first, *_, last = learn(training, steps=40)
    assert last < 0.7 * first
    term = training.terms(batch(), Objective())[0]
    laws = batch().laws(2)
    known = torch.isin(laws.argmax(-1), chosen)
    assert 0 < len(term.losses) == int(known.sum()) < len(laws)
    states = batch().taps[training.taps[0]].float()[batch().drafts(2)]
    logits = head.lm_heads[0](cast(Any, head.blocks[0])[0](states))
    alone = Objective().term(1, logits[known], laws[known][:, chosen])
    torch.testing.assert_close(term.losses, alone.losses)


def prompts() -> list[list[int]]:
    return [batch().ids[n // 2, n % 2 * LENGTH :][:PROMPT].tolist() for n in range(TEXTS)]


def assert_writes_the_targets_text(drafter: Any) -> None:
    """Greedy text of three rows of unequal length equals plain generate's."""
    rows = [prompts()[0], [*prompts()[1], 7, 9], prompts()[2][:3]]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    settings: dict[str, Any] = {"max_new_tokens": LENGTH - PROMPT, "do_sample": False}
    plain = target().model.generate(**inputs, **settings)
    stats = DecodeStats()
    written = generate(target().model, **inputs, **settings, drafter=drafter, stats=stats)
    assert torch.equal(cast(torch.Tensor, written), plain)
    assert 0 < stats.accepted < stats.drafted  # both ways of a decision were taken


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_knows_the_text_by_heart_drafts_it(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    training = KINDS[kind](target())
    evaluator = Evaluator(target().model, prompts(), max_new_tokens=LENGTH - PROMPT)
    before = evaluator.measure(training.drafter()).tau
    losses = learn(training, 80 if kind.startswith("dflash") else 150)  # all slots of a block learn at once
    assert losses[-1] < 0.5 * losses[0]
    after = evaluator.measure(training.drafter()).tau
    assert after > 2.9 > 2.0 > before, f"tau went from {before:.2f} to {after:.2f}"
    training.save(tmp_path / "drafter")
    loaded = load_drafter(tmp_path / "drafter", target().model)  # drafts with the options of the validation
    assert evaluator.measure(loaded).tau == after
    # A trained head changes what is proposed, never what is written: rows of a left-padded batch, and accepted drafts.
    assert_writes_the_targets_text(loaded)


@pytest.mark.parametrize("kind", KINDS)
def test_terms_look_at_supervised_tokens_of_one_document_alone(kind: str) -> None:
    torch.manual_seed(2)
    terms = KINDS[kind](target()).terms(batch(), Objective())
    drafts = [term for term in terms if term.depth]
    ahead = 0 if kind == "kangaroo" else 1
    for term in drafts:
        supervised = int(batch().drafts(term.depth + ahead).sum())
        if kind.startswith("dflash"):  # a block begins with the last token of a prompt at the earliest
            supervised = TEXTS * (LENGTH - PROMPT - term.depth + 1)
        assert term.losses.numel() == supervised > 0
    assert [term.depth for term in drafts] == list(range(1, len(drafts) + 1))


@pytest.mark.parametrize("kind", ["hydra++", "clover", "dflash", "eagle", "eagle3", "kangaroo"])
def test_heads_with_attention_do_not_look_into_the_neighbouring_document(kind: str) -> None:
    torch.manual_seed(2)
    training = KINDS[kind](target())
    if kind == "eagle":
        training.noise = 0.0  # type: ignore[attr-defined]
    data = MemoryData([(row[start : start + LENGTH], torch.arange(LENGTH) >= PROMPT)
                       for row in batch().ids for start in (0, LENGTH)])  # fmt: skip
    alone = TrainBatch.of_rows(data, [(Piece(n, 0, LENGTH),) for n in range(TEXTS)], list(range(TEXTS)), LENGTH)
    alone = TargetFeatures(target(), tuple(batch().taps))(alone)
    packed, separate = training.terms(batch(), Objective()), training.terms(alone, Objective())
    for one, other in zip(packed, separate, strict=True):
        assert one.losses.shape == other.losses.shape
        assert (one.losses - other.losses).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2-sliding", "cohere2-sliding"])
def test_heads_that_share_the_targets_output_matrix_share_its_scale_and_cap(family: str) -> None:
    model = tiny_model(family, "eager", layers=2)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # far into the cap
    shared = target_of(model)
    training = MedusaTraining(shared, num_heads=1)  # fresh heads say what the target says
    ids = torch.arange(5, 15)[None]
    output = shared.call((shared.num_layers,), input_ids=ids)
    hidden = output.taps[shared.num_layers][0]
    drafter = cast(Any, training.drafter())
    for got in (training.target_logits(hidden), drafter.head(hidden, shared.logits_of, 1)[:, 0]):
        assert (got - output.logits[0]).abs().max() < 1e-3
    raw = shared.lm_head(hidden)
    assert ((raw - output.logits[0]).abs().max() > 0.1) == (family != "llama")  # the bare matrix would be noticed


def test_eagle3_fuses_the_taps_that_it_is_told_and_refuses_others() -> None:
    layers = target().num_layers
    assert Eagle3Training(target(), taps=[0, 1, layers]).taps == (0, 1, BEFORE_NORM)
    for wrong in ([0, 1], [0, 1, layers + 1], [0, 1, True]):
        with pytest.raises(BadRecipe, match=f"3 of the target's hidden states 0 to {layers}"):
            Eagle3Training(target(), taps=wrong)
