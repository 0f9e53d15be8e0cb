"""Text that models write inside the loop: whose it is, where it begins and ends; a resumed run writes it again."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from specdec.api import generate
from specdec.errors import BadRecipe
from specdec.probe import target_of
from specdec.train.batch import PADDING, Document
from specdec.train.distill import DEFAULT_RECIPE, train_draft_model
from specdec.train.kinds.draft_model import DraftModelTraining
from specdec.train.on_policy import MixedSource, TextShares, Writing, beginning, continued, write
from specdec.train.order import Order
from specdec.train.prepared import MemoryData
from specdec.train.recipe import Recipe
from tests.tiny import make_target, perturbed, shared_target

ROW = 40


@cache
def documents() -> MemoryData:
    """Random texts of 8 to 24 tokens; all but the first four tokens are supervised."""
    generator = torch.Generator().manual_seed(6)
    sizes = torch.randint(8, 25, (24,), generator=generator).tolist()
    return MemoryData(
        [(torch.randint(3, 100, (size,), generator=generator), torch.arange(size) >= 4) for size in sizes]
    )


def training(amount: float = 0.03) -> DraftModelTraining:
    return DraftModelTraining(target_of(shared_target()), perturbed(shared_target(), amount))


def source(shares: TextShares, pens: DraftModelTraining | None = None, **writing: Any) -> MixedSource:
    return MixedSource(documents(), Order(documents().lengths, ROW, 1), shares, pens or training(), Writing(**writing))


def recipe(steps: int, **text: float) -> Recipe:
    return DEFAULT_RECIPE.changed(
        {
            "loop": {"steps": steps, "rows_per_step": 4, "rows_at_once": 2, "warmup": 0, "learning_rate": 1e-3,
                     "save_every": 1},
            "data": {"row_length": ROW},
            "head": {"text": text},
        }
    )  # fmt: skip


def test_shares_decide_row_by_row_in_proportion() -> None:
    shares = TextShares(fixed=1, target=2, draft=1)
    counts = Counter(shares.writer(0, row) for row in range(4000))
    # Each count is binomial; 5 standard deviations (137 and 158) are exceeded once in two million runs of new seeds.
    assert abs(counts["fixed"] - 1000) < 137
    assert abs(counts["draft"] - 1000) < 137
    assert abs(counts["target"] - 2000) < 158
    assert {TextShares(draft=1, fixed=0).writer(0, row) for row in range(50)} == {"draft"}
    assert TextShares(2, 4, 2).writer(0, 17) == shares.writer(0, 17)


@pytest.mark.parametrize("shares", [(0, 0, 0), (-1, 1, 1)])
def test_shares_that_are_none_are_refused(shares: tuple[float, float, float]) -> None:
    with pytest.raises(BadRecipe, match="shares of text"):
        TextShares(*shares)


def test_a_beginning_is_the_prompt_or_the_first_tokens_of_plain_text() -> None:
    def document(length: int, first: int) -> Document:
        return Document(torch.zeros(length, dtype=torch.long), torch.arange(length) >= first)

    assert beginning(document(50, 9), prompt_tokens=4) == beginning(document(50, 9), prompt_tokens=32) == 9
    assert beginning(document(50, 1), prompt_tokens=32) == 25
    assert beginning(document(100, 1), prompt_tokens=32) == 32
    assert beginning(document(3, 0), prompt_tokens=1) == 1
    assert beginning(document(9, 9), prompt_tokens=4) == 9  # nothing is supervised, nothing is written


def test_fixed_rows_are_the_datas_own() -> None:
    fixed = source(TextShares())([0, 1])
    order = Order(documents().lengths, ROW, 1)
    expected = [token for piece in order.row(0) for token in documents().piece(piece).ids.tolist()]
    assert fixed.ids[0, : len(expected)].tolist() == expected
    assert fixed.row_numbers == (0, 1)


@pytest.mark.parametrize(("writer", "speculative"), [("target", False), ("target", True), ("draft", False)])
def test_greedy_rows_are_what_the_writer_says_after_the_datas_beginnings(writer: str, speculative: bool) -> None:
    pens = training()
    shares = TextShares(**{"fixed": 0.0, writer: 1.0})  # type: ignore[arg-type]
    written = source(shares, pens, temperature=0.0, prompt_tokens=4, speculative=speculative)([0, 1, 2])
    model: Any = pens.target.model if writer == "target" else pens.module.eval()
    order = Order(documents().lengths, ROW, 1)
    for row in range(3):
        column = 0
        for number, piece in enumerate(order.row(row)):
            given = documents().piece(piece).ids
            kept = beginning(documents().piece(piece), 4)
            length = len(given)
            expected: Any = model.generate(given[None, :kept], max_new_tokens=length - kept, do_sample=False)[0]
            span = slice(column, column + length)
            assert written.ids[row, span].tolist() == expected.tolist()
            assert written.documents[row, span].tolist() == [number] * length
            assert written.supervised[row, span].tolist() == [i >= kept for i in range(length)]
            column += length
        assert (written.documents[row, column:] == PADDING).all()


def test_a_text_that_ends_leaves_padding_and_learns_its_end() -> None:
    plain = torch.arange(10, 16)
    answer = shared_target().generate(plain[None], max_new_tokens=12, do_sample=False)[0, 6:].tolist()
    end = next(token for token in answer[2:] if token not in answer[:2])
    model = make_target()
    model.generation_config.eos_token_id = end
    (text,) = continued(
        model, [Document(torch.cat([plain, torch.zeros(12).long()]), torch.arange(18) >= 6)], Writing(0.0), 0
    )
    stop = answer.index(end)
    assert text.ids.tolist() == [*plain.tolist(), *answer[: stop + 1]]
    assert text.supervised.tolist() == [False] * 6 + [True] * (stop + 1)


def test_many_documents_are_written_in_groups_as_each_would_be_alone() -> None:
    texts = [documents().piece(piece) for row in range(8) for piece in Order(documents().lengths, ROW, 1).row(row)]
    texts = (texts * 3)[:40]
    assert len(texts) > 32
    together = continued(shared_target(), texts, Writing(0.0, 4), 0)
    for text, written in zip(texts, together, strict=True):
        (alone,) = continued(shared_target(), [text], Writing(0.0, 4), 0)
        assert written.ids.tolist() == alone.ids.tolist()


def test_sampled_rows_depend_on_row_seed_and_weights_alone() -> None:
    pens = training()
    first = source(TextShares(0, 0, 1), pens)([4, 5])
    torch.manual_seed(99)
    torch.rand(7)
    again = source(TextShares(0, 0, 1), pens)([4, 5])
    assert torch.equal(first.ids, again.ids)
    other = source(TextShares(0, 0, 1), training(0.06))([4, 5])
    assert not torch.equal(first.ids, other.ids)
    assert not torch.equal(first.ids, source(TextShares(0, 0, 1), pens)([6, 7]).ids)


def test_what_the_target_writes_does_not_depend_on_the_draft() -> None:
    shares = TextShares(0, 1, 0)
    assert torch.equal(source(shares, training())([4, 5]).ids, source(shares, training(0.06))([4, 5]).ids)


def test_writing_leaves_the_global_random_numbers_and_the_gradients_alone() -> None:
    pens = training()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    batch = source(TextShares(0, 1, 1), pens)([0, 1, 2, 3])
    assert torch.equal(torch.rand(3), expected)
    assert not batch.ids.is_inference()
    assert all(p.requires_grad and not p.is_inference() for p in pens.module.parameters())


def test_sampled_text_follows_the_law_of_the_writer() -> None:
    model = make_target(vocab_size=12, initializer_range=0.4)
    prompt = torch.tensor([3, 7, 5])
    answers = write(model, [prompt] * 3000, [1] * 3000, 1.0, torch.Generator().manual_seed(0), None)
    with torch.no_grad():
        law = model(input_ids=prompt[None]).logits[0, -1].double().softmax(-1)
    counts = torch.stack(answers)[:, 0].bincount(minlength=12).double()
    kept = law * 3000 >= 5
    statistic = ((counts - 3000 * law).square() / (3000 * law))[kept].sum()
    assert float(statistic) < 36.1  # chi-square of at most 11 degrees: above that in 1.6 of 10,000 fresh seeds
    uniform = ((counts - 250).square() / 250).sum()
    assert float(uniform) > 36.1  # a flat writer would be noticed


def test_beginnings_without_a_position_left_are_refused() -> None:
    model = make_target(max_position_embeddings=6)
    with pytest.raises(BadRecipe, match="no position to write in"):
        write(model, [torch.arange(3, 9)], [4], 0.0, torch.Generator(), None)


@pytest.mark.parametrize(
    ("text", "speculative"), [({"draft": 1.0}, False), ({"fixed": 0.4, "target": 0.3, "draft": 0.3}, True)]
)
def test_a_run_that_writes_its_own_text_resumes_to_the_same_bytes(
    tmp_path: Path, text: dict[str, float], speculative: bool
) -> None:
    def run(out: Path, heard: list[Any], stop_after: int = 0) -> None:
        def report(step: Any) -> None:
            heard.append(step)
            if len(heard) == stop_after:
                raise KeyboardInterrupt

        writing = {"head": {"writing": {"speculative": speculative}}}
        train_draft_model(
            recipe(6, **text).changed(writing),
            shared_target(),
            documents(),
            out,
            draft=perturbed(shared_target(), 0.03),
            report=report,
        )

    whole: list[Any] = []
    run(tmp_path / "whole", whole)
    broken: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", broken, stop_after=4)
    rest: list[Any] = []
    run(tmp_path / "broken", rest)
    assert [r.loss for r in whole[3:]] == [r.loss for r in rest]
    assert [r.supervised for r in whole[3:]] == [r.supervised for r in rest]
    ours, theirs = (load_file(tmp_path / name / "step-000006" / "training.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_on_policy_training_raises_acceptance_on_the_drafts_own_text(tmp_path: Path) -> None:
    heard: list[Any] = []
    train_draft_model(
        recipe(60, draft=1.0), shared_target(), documents(), tmp_path, draft=perturbed(shared_target(), 0.03),
        report=heard.append,
    )  # fmt: skip
    first, last = (sum(r.alpha[0] for r in part) / 5 for part in (heard[:5], heard[-5:]))
    assert last > first + 0.05, f"alpha went from {first:.3f} to {last:.3f}"


def test_the_loops_own_generate_writes_the_text() -> None:
    prompt = torch.arange(10, 16)
    (answer,) = write(shared_target(), [prompt], [8], 1.0, torch.Generator().manual_seed(4), None)
    torch.manual_seed(0)
    expected = generate(
        shared_target(), prompt[None], attention_mask=torch.ones(1, 6), drafter=None, max_new_tokens=8, do_sample=True,
        top_k=0, generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    assert isinstance(expected, torch.Tensor)
    assert answer.tolist() == expected[0, 6:].tolist()
