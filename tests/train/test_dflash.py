"""Blocks behind random anchors: what training computes at once is what drafting computes one block after the other."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed
from specdec.drafters.block import BlockDrafter
from specdec.errors import BadRecipe
from specdec.heads.dflash import DFlashConfig, DFlashHead
from specdec.probe import target_of
from specdec.target import Target
from specdec.train.batch import TrainBatch
from specdec.train.divergence import Laws, forward_kl
from specdec.train.features import TargetFeatures
from specdec.train.kinds.dflash import Blocks, DFlashTraining, draw_blocks, mask_for, published_decay
from specdec.train.objective import Objective, Term, confidence_weights
from specdec.train.order import Piece
from specdec.train.prepared import MemoryData
from specdec.train.recipe import recipe_for
from specdec.train.run import train_head
from tests.tiny import BOS, PAD, VOCAB, make_target, shared_target

LENGTHS, ROW = (9, 14, 5, 22), 32
ROWS = ((0, 1, 2), (3,))
"""Documents of each row; the second one has padding."""
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "causal, from the anchor": {"causal": True, "sample_from_anchor": True},
    "sliding": {"sliding_layers": (1,), "sliding_window": 6},
    "of few tokens": {"draft_vocab_size": 60},
}


@cache
def target() -> Target:
    return target_of(shared_target())


def documents(prompt: int = 3) -> MemoryData:
    """Random texts; all behind the first tokens is supervised."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, VOCAB, (length,), generator=generator) for length in LENGTHS]
    return MemoryData([(text, torch.arange(len(text)) >= prompt) for text in texts])


def batch(rows: tuple[tuple[int, ...], ...] = ROWS, numbers: tuple[int, ...] = (0, 1), **options: Any) -> TrainBatch:
    laid = [tuple(Piece(number, 0, LENGTHS[number]) for number in row) for row in rows]
    return TrainBatch.of_rows(documents(**options), laid, list(numbers), ROW)


def featured(plain: TrainBatch) -> TrainBatch:
    return TargetFeatures(target(), tuple(range(target().num_layers + 1)))(plain)


def training(variant: str = "as published", *, spread: float = 0.2, **options: Any) -> DFlashTraining:
    """With weights so large that every mistake shows."""
    fields = {"num_layers": 2, "block_size": 4, "mask_token_id": 1, **VARIANTS[variant]}
    torch.manual_seed(3)
    head = DFlashHead(DFlashConfig.of(target().config, **fields))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, spread)
    if head.d2t is not None and head.t2d is not None:
        chosen = torch.arange(20, 80)
        head.d2t.copy_(chosen - torch.arange(60))
        head.t2d.zero_()[chosen] = True
    return DFlashTraining(target(), head=head, **options)


def drafted_logits(drafter: BlockDrafter, text: Tensor, anchor: int, depth: int) -> Tensor:
    """Logits [K, V] that the drafter itself has when text[:anchor] is committed and text[anchor] is the root."""
    ids = text[None, :anchor]
    taps = target().call(drafter.taps, input_ids=ids, use_cache=False).taps
    context = Context(target())
    context.begin([0], anchor)
    drafter.reset(1, context)
    drafter.observe(Committed([ids[0].tolist()], taps=taps))
    drafter._digest()
    return drafter.marginals(text[anchor : anchor + 1], depth)[0]


def plain_losses(learning: DFlashTraining, anchors: dict[tuple[int, int], float], *, decay: float) -> list[Tensor]:
    """The obvious loss: one block at a time through the drafter, one number at a time; by depth, in order of anchors.

    Args:
        learning: the head and how it weighs.
        anchors: weights by document and place in it.
        decay: of the depths.
    """
    drafter = BlockDrafter(target(), learning.module.eval())  # type: ignore[arg-type]
    losses: list[list[float]] = [[] for _ in range(drafter.depth)]
    for (document, anchor), weight in anchors.items():
        text = documents().piece(Piece(document, 0, LENGTHS[document])).ids
        laws = target().call((), input_ids=text[None], use_cache=False).logits[0]
        drafted = drafted_logits(drafter, text, anchor, drafter.depth)  # a whole block, also where the text ends in it
        depth = min(drafter.depth, len(text) - 1 - anchor)
        for d in range(1, depth + 1):
            logits, law = drafted[d - 1], laws[anchor + d - 1]
            if (known := cast(DFlashHead, learning.module).t2d) is not None:
                if not known[law.argmax()]:
                    continue
                logits, law = logits[known], law[known]
            by_depth = decay ** (d - 1)
            if learning.weights == "d-pace":
                q = [float(drafted[m].softmax(-1)[text[anchor + m + 1]]) for m in range(depth)]
                reach = [math.prod(0.5 * one + 0.5 for one in q[: m + 1]) for m in range(depth)]
                by_depth = sum(reach[d - 1 :])
            losses[d - 1].append(weight * by_depth * float(forward_kl(Laws(logits[None], law[None]))))
    return [torch.tensor(one) for one in losses]


def weighted(terms: list[Term]) -> list[Tensor]:
    """What each position adds, by depth."""
    return [term.weight * term.losses * cast(Tensor, term.position_weights) for term in terms]


def places(prompt: int = 3) -> dict[tuple[int, int], float]:
    """Every anchor there can be: a supervised token behind it, and a token before it."""
    return {(n, place): 1.0 for n, length in enumerate(LENGTHS) for place in range(max(1, prompt - 1), length - 1)}


def total(terms: list[Term]) -> float:
    return float(torch.stack([term.total.detach() for term in terms]).sum())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weights", ["decay", "d-pace"])
@torch.no_grad()
def test_the_loss_of_all_blocks_at_once_is_that_of_one_after_the_other_while_drafting(
    variant: str, weights: Any
) -> None:
    learning = training(variant, weights=weights, anchors=99)
    terms = learning.terms(featured(batch()), Objective())
    expected = plain_losses(learning, places(), decay=published_decay(4))
    torch.testing.assert_close(weighted(terms), expected, atol=2e-5, rtol=1e-4)
    assert total(terms) == pytest.approx(float(torch.cat(expected).sum()), rel=1e-5)
    assert [term.depth for term in terms] == list(range(1, cast(Any, learning.module).config.max_depth + 1))


@torch.no_grad()
def test_the_text_is_not_read_one_token_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative of the test above: a mask that lets a block see its anchor's own state is another loss."""
    from specdec.train.kinds import dflash

    right = dflash.anchored_masks
    monkeypatch.setattr(
        dflash, "anchored_masks",
        lambda config, anchors, *rest, **more: right(config, anchors + 1, *rest, **more),
    )  # fmt: skip
    learning = training(anchors=99)
    got = weighted(learning.terms(featured(batch()), Objective()))
    expected = plain_losses(learning, places(), decay=published_decay(4))
    assert min(float((one - other).abs().max()) for one, other in zip(got, expected, strict=True)) > 0.01


@torch.no_grad()
def test_few_anchors_stand_for_all_places_of_their_row() -> None:
    learning = training(anchors=4)
    plain = batch()
    blocks = draw_blocks(plain, 3, 4)
    assert blocks.rows.tolist() == [0] * 4 + [1] * 4
    starts = {0: 0, 1: 9, 2: 23}
    drawn: dict[tuple[int, int], float] = {}
    counts = [sum(n in row for n, _ in places()) for row in ROWS]
    for row, column in zip(blocks.rows.tolist(), blocks.starts.tolist(), strict=True):
        document = int(plain.documents[row, column]) if row == 0 else 3
        drawn[document, column - (starts[document] if row == 0 else 0)] = counts[row] / 4
    assert drawn.keys() < places().keys()
    expected = plain_losses(learning, drawn, decay=published_decay(4))
    torch.testing.assert_close(weighted(learning.terms(featured(plain), Objective())), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_loss_of_drawn_anchors_is_that_of_all_in_expectation() -> None:
    """100 draws of 6 of about 20 places; their mean errs by less than 5 standard errors, but for 1 in 10^6."""
    learning = training(anchors=6)
    together = featured(batch())
    losses = torch.tensor(
        [total(learning.terms(replace(together, row_numbers=(2 * n, 2 * n + 1)), Objective())) for n in range(100)]
    )
    learning.anchors = 99
    everything = total(learning.terms(together, Objective()))
    assert abs(float(losses.mean()) - everything) < 5 * float(losses.std()) / 100**0.5
    assert float(losses.std()) < 0.2 * everything


def columns_of(blocks: Blocks) -> list[list[int]]:
    return [blocks.starts[blocks.rows == row].tolist() for row in range(len(blocks.columns))]


def test_anchors_belong_to_the_row_s_number_whoever_computes_it() -> None:
    first, second = columns_of(draw_blocks(batch(), 3, 5))
    assert columns_of(draw_blocks(batch(ROWS[1:], (1,)), 3, 5)) == [second]
    assert columns_of(draw_blocks(batch(ROWS[::-1], (1, 0)), 3, 5)) == [second, first]
    other, _ = columns_of(draw_blocks(batch(numbers=(7, 1)), 3, 5))
    assert other != first
    assert columns_of(draw_blocks(replace(batch(), seed=1), 3, 5)) != [first, second]
    assert len(set(first)) == len(first) == 5


def test_a_block_ends_where_supervision_does() -> None:
    """Two turns of one document: the user's words between them are guessed by nobody, nor is what follows them."""
    said = [0, 0, 1, 1, 0, 1, 1, 1]
    data = MemoryData([(torch.arange(5, 13), torch.tensor(said).bool())])
    plain = TrainBatch.of_rows(data, [(Piece(0, 0, 8),)], [0], 8)
    blocks = draw_blocks(plain, 3, 9)
    assert blocks.starts.tolist() == [1, 2, 4, 5, 6]
    assert blocks.counts.int().T.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert [blocks.tokens(plain, depth).tolist() for depth in (1, 3)] == [[7, 8, 10, 11, 12], [12]]


def test_a_row_with_nothing_to_draft_adds_nothing_and_keeps_every_gradient() -> None:
    learning = training(anchors=4)
    nothing = featured(batch(prompt=99))
    terms = learning.terms(nothing, Objective())
    assert [term.losses.numel() for term in terms] == [0, 0, 0]
    torch.stack([term.total for term in terms]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in learning.module.parameters())


def test_groups_of_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 32 tokens run 8 blocks of 4 at a time; with rows of 96 all of them run together."""
    learning = training(anchors=99)
    grouped = featured(batch())
    length = 96
    laid = [tuple(Piece(number, 0, LENGTHS[number]) for number in row) for row in ROWS]
    whole = featured(TrainBatch.of_rows(documents(), laid, [0, 1], length))
    for one, other in zip(learning.terms(grouped, Objective()), learning.terms(whole, Objective()), strict=True):
        torch.testing.assert_close(one.losses, other.losses, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("of_target", "of_head"), [(2, 1), (4, 1), (8, 2), (24, 5)])
def test_by_default_a_head_is_no_deeper_than_a_quarter_of_its_target(of_target: int, of_head: int) -> None:
    model = make_target(num_hidden_layers=of_target)
    head = cast(DFlashHead, DFlashTraining(target_of(model), mask_token_id=1, block_size=4).module)
    assert head.config.num_layers == of_head


# --- Runs ----------------------------------------------------------------------------------------------


def run(folder: Path, *, steps: int = 6, **loop: Any) -> list[float]:
    """Losses of a run of three rows in a step, each with its own number of places."""
    settings = {"steps": 6, "rows_per_step": 3, "rows_at_once": 3, "save_every": 3, "learning_rate": 5e-3, **loop}
    head = {"num_layers": 1, "block_size": 4, "anchors": 5}
    recipe = recipe_for("dflash", None, loop=settings, head=head, data={"row_length": ROW, "validation_prompts": 0})
    losses: list[float] = []

    def report(what: Any) -> None:
        losses.append(what.loss)
        if what.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)  # finishes the step and saves

    train_head(recipe, target().model, documents(), folder, report=report)
    return losses


def learned(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "latest" / "training.safetensors")


def test_a_resumed_run_draws_the_same_anchors_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    parts = run(tmp_path / "parts", steps=2), run(tmp_path / "parts")
    assert [len(part) for part in parts] == [2, 4]
    assert parts[0] + parts[1] == whole
    one, other = learned(tmp_path / "whole"), learned(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_accumulating_rows_one_by_one_equals_one_big_batch_to_rounding(tmp_path: Path) -> None:
    big, small = run(tmp_path / "big"), run(tmp_path / "small", rows_at_once=1)
    assert big == pytest.approx(small, rel=1e-5)
    one, other = learned(tmp_path / "big"), learned(tmp_path / "small")
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4


# --- Weights -------------------------------------------------------------------------------------------


def test_depths_weigh_as_published_and_as_the_objective_says() -> None:
    together = featured(batch())
    published = [term.weight for term in training(anchors=4).terms(together, Objective())]
    assert published == pytest.approx([published_decay(4) ** d for d in range(3)])
    chosen = training(anchors=4, weights="equal").terms(together, Objective(decay=0.5))
    assert [term.weight for term in chosen] == [1, 0.5, 0.25]


def test_confidence_weights_are_the_expected_length_that_an_error_costs() -> None:
    q = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.9, 0.0]])
    counts = torch.tensor([[True, True], [True, True], [True, False]])
    a, b, c = 0.9, 0.9 * 0.7, 0.9 * 0.7 * 0.95
    expected = [[a + b + c, 0.6 + 0.6 * 0.8], [b + c, 0.6 * 0.8], [c, 0.0]]
    torch.testing.assert_close(confidence_weights(q, counts), torch.tensor(expected))
    assert torch.equal(confidence_weights(q, counts, smoothing=1.0)[:, 0], torch.tensor([3.0, 2.0, 1.0]))


def test_term_means_stay_those_of_unweighted_losses() -> None:
    logits, laws = torch.randn(4, 9), torch.randn(4, 9)
    plain = Objective().term(1, logits, laws)
    weighted = Objective().term(1, logits, laws, position_weights=torch.tensor([2.0, 0.0, 1.0, 0.5]))
    assert torch.equal(plain.losses, weighted.losses)
    assert float(weighted.total) == pytest.approx(float(plain.losses @ torch.tensor([2.0, 0.0, 1.0, 0.5])))


# --- Settings ------------------------------------------------------------------------------------------


def test_the_mask_is_a_token_that_texts_do_not_go_on_from_and_never_an_embedding_of_zeros() -> None:
    assert mask_for(target(), None) == BOS  # padding's row is zero, and there is no end of text
    assert mask_for(target(), 7) == 7
    with pytest.raises(BadRecipe, match=rf"mask_token_id {PAD} has an embedding of zeros"):
        mask_for(target(), PAD)
    ended = target_of(make_target(eos_token_id=[4, 5]))
    assert mask_for(ended, None) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"anchors": 0}, "anchors is 1 or more"),
        ({"weights": "mine"}, "weights is one of decay"),
        ({"taps": [1, 5]}, r"hidden states 0 to 4, got \[1, 5\]"),
        ({"taps": []}, "one or more"),
    ],
)
def test_settings_that_do_not_fit_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRecipe, match=words):
        DFlashTraining(target(), **options)
