"""A draft model in training: what it learns from, what it leaves alone, and what comes out."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.drafters.load import load_drafter
from specdec.errors import BadCheckpoint, BadRecipe, DrafterMismatch
from specdec.probe import target_of
from specdec.train.batch import TrainBatch
from specdec.train.distill import DEFAULT_RECIPE, DraftSettings, train_draft_model
from specdec.train.evaluate import Evaluator
from specdec.train.features import TargetFeatures
from specdec.train.kinds.draft_model import DraftModelTraining, kept_weights
from specdec.train.objective import Objective
from specdec.train.order import Piece
from specdec.train.prepared import MemoryData
from specdec.train.recipe import Recipe
from specdec.train.report import Score
from tests.tiny import make_target, perturbed, prompt, shared_target

LENGTH, PROMPT, TEXTS = 24, 4, 48


@cache
def texts() -> MemoryData:
    """What the target writes at temperature 1."""
    torch.manual_seed(3)
    ids = torch.randint(3, 100, (TEXTS, PROMPT))
    written = shared_target().generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH - PROMPT, do_sample=True
    )
    return MemoryData([(row, torch.arange(LENGTH) >= PROMPT) for row in written])


def batch(per_row: int = 2, padding: int = 0) -> TrainBatch:
    """The first dozen of texts, so many in a row."""
    rows = [tuple(Piece(n + i, 0, LENGTH) for i in range(per_row)) for n in range(0, 12, per_row)]
    laid = TrainBatch.of_rows(texts(), rows, list(range(len(rows))), per_row * LENGTH + padding)
    return TargetFeatures(target_of(shared_target()), ())(laid)


def training(draft: Any = None, **options: Any) -> DraftModelTraining:
    return DraftModelTraining(target_of(shared_target()), draft or perturbed(shared_target(), 0.03), **options)


def recipe(steps: int = 60, **head: Any) -> Recipe:
    changes = {"loop": {"steps": steps, "rows_per_step": 4, "rows_at_once": 4, "warmup": 0, "learning_rate": 1e-3},
               "data": {"row_length": 2 * LENGTH, "validation_tokens": 24}, "head": head}  # fmt: skip
    return DEFAULT_RECIPE.changed(changes)


def held_out() -> list[list[int]]:
    return prompt(6, 4, seed=8)["input_ids"].masked_fill(prompt(6, 4, seed=8)["attention_mask"] == 0, 7).tolist()


def test_a_perturbed_copy_of_the_target_is_distilled_back_and_loads_as_it_was_trained(tmp_path: Path) -> None:
    evaluator = Evaluator(shared_target(), held_out(), max_new_tokens=24)
    draft = perturbed(shared_target(), 0.02)
    before = evaluator.measure(load_drafter(copy.deepcopy(draft), shared_target())).tau
    scores: list[Score] = []
    loop = train_draft_model(
        recipe(100), shared_target(), texts(), tmp_path, draft=draft, prompts=held_out(),
        report=lambda heard: scores.append(heard) if isinstance(heard, Score) else None,
    )  # fmt: skip
    assert loop.step == 100
    after = scores[-1].value
    assert after > before + 0.3, f"tau went from {before:.2f} to {after:.2f}"
    loaded = load_drafter(str(tmp_path / "best" / "drafter"), shared_target())
    assert evaluator.measure(loaded).tau == after


def test_a_saved_draft_keeps_its_options_and_names_its_target(tmp_path: Path) -> None:
    training(options={"depth": 2}).save(tmp_path / "drafter")
    loaded: Any = load_drafter(str(tmp_path / "drafter"), shared_target())
    assert loaded.policy.depth == 2
    with pytest.raises(DrafterMismatch, match="num_layers 3"):
        load_drafter(str(tmp_path / "drafter"), make_target(num_hidden_layers=3))


def test_only_the_draft_learns() -> None:
    learner = training()
    term = learner.terms(batch(), Objective())[0]
    term.total.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in learner.module.parameters())
    assert all(p.grad is None and not p.requires_grad for p in shared_target().parameters())


def test_every_supervised_token_counts_once_and_is_compared_with_the_law_it_was_drawn_from() -> None:
    learner, rows = training(copy.deepcopy(shared_target())), batch()
    term = learner.terms(rows, Objective())[0]
    assert term.losses.numel() == rows.num_supervised == 12 * (LENGTH - PROMPT)
    assert float(term.losses.detach().abs().max()) < 1e-5  # the target against itself, position for position
    assert term.alpha is not None
    assert float(term.alpha.min()) > 1 - 1e-4
    shifted = replace(rows, logits=None if rows.logits is None else rows.logits.roll(1, 1))
    assert float(learner.terms(shifted, Objective())[0].losses.detach().mean()) > 0.1


def test_packed_and_separate_documents_give_the_same_losses() -> None:
    learner = training()
    packed = learner.terms(batch(2, padding=5), Objective())[0].losses
    alone = learner.terms(batch(1), Objective())[0].losses
    assert torch.allclose(packed, alone, atol=1e-4)


def test_positions_that_do_not_start_again_would_be_noticed() -> None:
    learner, rows = training(), batch(2)
    running = replace(rows, positions=torch.arange(2 * LENGTH).expand_as(rows.positions))
    assert not torch.allclose(
        learner.terms(running, Objective())[0].losses, learner.terms(rows, Objective())[0].losses, atol=1e-2
    )


def test_learning_tokens_is_cross_entropy_on_the_text_without_the_target() -> None:
    learner = training(learns="tokens")
    assert not learner.needs_logits
    rows = replace(batch(1), logits=None)
    (term,) = learner.terms(rows, Objective())
    logits = learner.module(input_ids=rows.ids, use_cache=False).logits[:, PROMPT - 1 : -1]
    expected = F.cross_entropy(logits.flatten(0, 1), rows.ids[:, PROMPT:].flatten(), reduction="none")
    assert torch.allclose(term.losses, expected, atol=1e-5)


def test_the_filter_keeps_where_the_draft_lags_behind_its_reference_and_the_rows_weight() -> None:
    losses = torch.tensor([3.0, 1.0, 5.0, 2.0, 4.0])
    reference = torch.tensor([0.5, 0.9, 4.9, 0.0, 1.0])  # behind by 2.5, 0.1, 0.1, 2.0, 3.0
    assert kept_weights(losses, reference, 0.4).tolist() == [2.5, 0.0, 0.0, 0.0, 2.5]
    assert kept_weights(losses, reference, 0.6).tolist() == pytest.approx([5 / 3, 0, 0, 5 / 3, 5 / 3])
    assert kept_weights(losses, reference, 1.0).tolist() == [1.0] * 5
    assert kept_weights(losses, reference, 0.01).tolist() == [0.0, 0.0, 0.0, 0.0, 5.0]
    assert kept_weights(torch.zeros(0), torch.zeros(0), 0.4).numel() == 0


def test_the_filter_chooses_within_each_row_whatever_shares_its_batch() -> None:
    reference = perturbed(shared_target(), 0.02, seed=5)
    learner = training(reference=reference, keep_share=0.25)
    rows = batch(2)
    together = learner.terms(rows, Objective())[0].losses
    each = batch_rows(rows)
    apart = torch.cat([learner.terms(row, Objective())[0].losses for row in each])
    assert torch.allclose(together, apart, atol=1e-4)
    plain = training(learner.module).terms(rows, Objective())[0].losses
    known = training(copy.deepcopy(reference)).terms(rows, Objective())[0].losses
    expected: list[Tensor] = []
    for ours, theirs in zip(plain.split(2 * (LENGTH - PROMPT)), known.split(2 * (LENGTH - PROMPT)), strict=True):
        count = round(0.25 * len(ours))
        best = sorted(range(len(ours)), key=lambda i: float((theirs[i] - ours[i]).detach()))[:count]
        expected.append(torch.tensor([i in best for i in range(len(ours))]))
    assert torch.equal(together != 0, torch.cat(expected))
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())


def batch_rows(rows: TrainBatch) -> list[TrainBatch]:
    """Each row as a batch of its own."""
    assert rows.logits is not None
    names = ("ids", "positions", "documents", "supervised", "logits")
    return [replace(rows, row_numbers=(n,), **{name: getattr(rows, name)[n : n + 1] for name in names})
            for n in range(len(rows.ids))]  # fmt: skip


def test_a_bf16_target_is_learned_in_fp32_and_drafted_for_in_bf16(tmp_path: Path) -> None:
    target = make_target().bfloat16()
    draft = perturbed(make_target(), 0.03).bfloat16()
    learner = DraftModelTraining(target_of(target), draft)
    assert {p.dtype for p in learner.module.parameters()} == {torch.float32}
    served = learner.served()
    assert served is not learner.module
    assert {p.dtype for p in served.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in served.buffers()} == {torch.float32}  # rotary frequencies
    weight = next(iter(learner.module.parameters()))
    with torch.no_grad():
        weight.add_(0.25)
    assert learner.served() is served
    assert torch.equal(next(iter(served.parameters())), weight.bfloat16())
    learner.save(tmp_path / "drafter")
    assert load_drafter(str(tmp_path / "drafter"), target) is not None
    term = learner.terms(TargetFeatures(target_of(target), ())(batch(1)), Objective())[0]
    assert term.losses.dtype == torch.float32


def test_in_the_targets_dtype_validation_uses_the_learning_weights_themselves() -> None:
    learner = training()
    learner.module.train()
    drafter: Any = learner.drafter()
    assert drafter.model.model is learner.module
    assert not learner.module.training


def test_dropout_is_off_unless_asked_for() -> None:
    def losses(dropout: bool) -> list[Tensor]:
        draft = perturbed(make_target(attention_dropout=0.3), 0.03)
        learner = training(draft, dropout=dropout)
        learner.module.train()
        return [learner.terms(batch(), Objective())[0].losses for _ in range(2)]

    still, noisy = losses(False), losses(True)
    assert torch.equal(*still)
    assert not torch.equal(*noisy)


def test_recomputed_layers_give_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        learner = training(perturbed(make_target(attention_dropout=0.3), 0.03), recompute=recompute)
        learner.terms(batch(), Objective())[0].total.backward()
        grads.append(torch.cat([p.grad.flatten() for p in learner.module.parameters()]))
        assert len(learner.recomputed) == (4 if recompute else 0)
    assert torch.allclose(*grads, atol=1e-4)


def test_a_wider_padding_of_the_same_vocabulary_is_left_out_of_both_laws() -> None:
    learner = training()
    rows = batch(1)
    assert rows.logits is not None
    wide = replace(rows, logits=F.pad(rows.logits, (0, 28), value=-30.0))
    assert torch.allclose(
        learner.terms(wide, Objective())[0].losses, learner.terms(rows, Objective())[0].losses, atol=1e-6
    )


def test_what_cannot_be_a_draft_model_of_this_target_is_refused() -> None:
    with pytest.raises(DrafterMismatch, match="vocabulary of 90 tokens, the target one of 100"):
        training(make_target(vocab_size=90))
    with pytest.raises(DrafterMismatch, match="the target itself"):
        training(shared_target())
    with pytest.raises(BadRecipe, match="'law' or 'tokens'"):
        training(learns="words")  # type: ignore[arg-type]
    with pytest.raises(BadRecipe, match="keep_share"):
        training(reference=perturbed(shared_target()), keep_share=0.0)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"depth": 3}, "no setting 'depth'"),
        ({"text": {"teacher": 1.0}}, "no setting 'teacher'"),
        ({"text": {"draft": -1.0}}, "shares of text"),
        ({"writing": {"temperature": -1.0}}, "temperature"),
        ({"cut": {"num_layers": -2}}, "num_layers"),
        ({"keep_share": 0.0}, "keep_share"),
        ({"keep_share": 0.5, "learns": "tokens"}, "compares laws"),
        ({"reference": "somewhere"}, "token filter"),
        ({"draft": 3}, "of type str"),
    ],
)
def test_settings_that_make_no_sense_are_named(head: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecipe, match=message):
        DraftSettings.of(recipe(**head))


def test_a_run_without_a_draft_or_with_too_long_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match="begins with a model"):
        train_draft_model(recipe(), shared_target(), texts(), tmp_path)
    with pytest.raises(BadRecipe, match="cannot be its draft model"):
        train_draft_model(recipe(draft="target"), shared_target(), texts(), tmp_path)
    short = make_target(max_position_embeddings=16)
    with pytest.raises(BadRecipe, match="48 tokens are longer than the target's 16"):
        train_draft_model(recipe(), short, texts(), tmp_path, draft=perturbed(short))


def test_the_filters_reference_is_distilled_first_and_a_stopped_run_goes_on(tmp_path: Path) -> None:
    def run(steps_heard: list[Any], stop_after: int = 0) -> Any:
        def report(heard: Any) -> None:
            steps_heard.append(heard)
            if len(steps_heard) == stop_after:
                raise KeyboardInterrupt

        filtered = recipe(4, keep_share=0.5).changed({"loop": {"save_every": 1}})
        draft = perturbed(shared_target(), 0.03)
        return train_draft_model(filtered, shared_target(), texts(), folder, draft=draft, report=report,
                                 report_reference=report)  # fmt: skip

    folder = tmp_path / "whole"
    whole: list[Any] = []
    loop = run(whole)
    assert len(whole) == 8  # four steps of the reference, four of the draft
    assert loop.trainable.reference is not None  # type: ignore[union-attr]
    assert (folder / "reference" / "latest" / "drafter" / "drafter.json").is_file()
    folder = tmp_path / "broken"
    first: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        run(first, stop_after=6)
    rest: list[Any] = []
    again = run(rest)
    assert [r.loss for r in rest] == [r.loss for r in whole[-len(rest) :]]
    for ours, theirs in zip(loop.trainable.module.parameters(), again.trainable.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_draft_cannot_continue_a_run(tmp_path: Path) -> None:
    train_draft_model(recipe(2), shared_target(), texts(), tmp_path, draft=perturbed(shared_target(), 0.03))
    with pytest.raises(BadCheckpoint, match=r"draft\.weights"):
        train_draft_model(recipe(2), shared_target(), texts(), tmp_path, draft=perturbed(shared_target(), 0.03, seed=7))
