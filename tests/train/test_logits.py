"""Logits that are made again in the backward pass give the losses and gradients of those that are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specdec.train import logits as logits_module
from specdec.train.bucket import BucketObjective
from specdec.train.kinds.draft_model import DraftModelTraining
from specdec.train.kinds.eagle import Eagle3Training
from specdec.train.kinds.head import HeadTraining
from specdec.train.logits import Logits, compared
from specdec.train.objective import Objective, Term
from specdec.train.run import keep_less
from specdec.train.stored_laws import StoredLaws
from tests.tiny import make_target, perturbed
from tests.train.test_kinds import KINDS, batch, target

torch.set_num_threads(1)


def eagle3_of_some_tokens(target: Any) -> Eagle3Training:
    training = Eagle3Training(target, steps=2, draft_vocab_size=40)
    training.choose_vocabulary(Counter(batch().ids.flatten().tolist()))
    return training


MORE_KINDS: dict[str, Callable[[Any], HeadTraining]] = {**KINDS, "eagle3 of some tokens": eagle3_of_some_tokens}


@pytest.fixture(autouse=True)
def _few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows of the tiny vocabulary: several parts, and a last one that is shorter."""
    monkeypatch.setattr(logits_module, "ELEMENTS_AT_ONCE", 7 * target().vocab_size + 1)


def learned(training: Any, objective: Objective) -> tuple[list[Term], list[Tensor]]:
    """Terms and gradients."""
    torch.manual_seed(5)
    terms = training.terms(batch(), objective)
    torch.stack([term.total for term in terms]).sum().backward()
    return terms, [p.grad for p in training.module.parameters() if p.grad is not None]


def assert_same(kept: Any, again: Any, objective: Objective) -> None:
    (terms, gradients), (other_terms, other_gradients) = learned(kept, objective), learned(again, objective)
    assert [term.name for term in terms] == [term.name for term in other_terms]
    for one, other in zip(terms, other_terms, strict=True):
        torch.testing.assert_close(one.losses, other.losses, atol=1e-5, rtol=1e-5)
        assert one.weight == other.weight
        for name in ("alpha", "hits", "position_weights"):
            theirs = getattr(one, name)
            assert theirs is None or torch.allclose(theirs.float(), getattr(other, name).float(), atol=1e-5), name
    assert len(gradients) == len(other_gradients) > 0
    for one, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-2, "nothing was learned"


@pytest.mark.parametrize("kind", MORE_KINDS)
@pytest.mark.parametrize(
    "objective", [Objective(), Objective("jsd:0.3", decay=0.7, temperature=1.5)], ids=["kl", "jsd"]
)
def test_a_head_learns_the_same(kind: str, objective: Objective) -> None:
    def fresh() -> HeadTraining:
        torch.manual_seed(2)
        return MORE_KINDS[kind](target())

    again = fresh()
    keep_less(again)
    assert_same(fresh(), again, objective)


@pytest.mark.parametrize("settings", [{}, {"learns": "tokens"}, {"reference": 0.02, "keep_share": 0.5}], ids=str)
def test_a_draft_model_learns_the_same(settings: dict[str, Any]) -> None:
    def fresh(*, recompute: bool) -> DraftModelTraining:
        more = dict(settings)
        if "reference" in more:
            more["reference"] = perturbed(make_target(), more["reference"])
        return DraftModelTraining(target(), perturbed(make_target(), 0.05), recompute=recompute, **more)

    assert_same(fresh(recompute=False), fresh(recompute=True), Objective())


def random_logits(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3


def as_made(tensor: Tensor) -> Logits:
    return Logits(tensor, lambda some: some * 1.0, tensor.shape[1])


def test_rows_tokens_and_favourites_are_those_of_the_tensor() -> None:
    whole = random_logits(40, 11, 0)
    made, some, columns = as_made(whole), torch.arange(40) % 3 > 0, torch.tensor([7, 1, 4])
    assert torch.equal(made.argmax(-1), whole.argmax(-1))
    chosen = made[some][:, columns]
    assert len(chosen) == int(some.sum())
    assert torch.equal(chosen.make(chosen.states), whole[some][:, columns])
    assert torch.equal(made[:, :5].argmax(-1), whole[:, :5].argmax(-1))


def test_no_positions_are_a_term_of_nothing() -> None:
    nothing = random_logits(0, 11, 0).requires_grad_()
    for draft, law in ((nothing, nothing), (as_made(nothing), as_made(nothing))):
        term = Objective().term(1, draft, law)
        assert term.losses.shape == (0,)
        assert float(term.total.detach()) == 0


def test_laws_of_which_the_top_is_known_are_compared_part_by_part() -> None:
    draft, law = random_logits(30, 20, 1), StoredLaws.of(random_logits(30, 20, 2), 5).dense()
    for objective in (BucketObjective(), BucketObjective("ce"), BucketObjective("tv")):
        whole, parts = objective.term(1, draft, law), objective.term(1, as_made(draft), as_made(law))
        torch.testing.assert_close(whole.losses, parts.losses)
        assert torch.equal(whole.hits, parts.hits)  # type: ignore[arg-type]


def kept_bytes(compute: Callable[[], Tensor], outside: list[Tensor]) -> int:
    """Of tensors that a graph keeps for its backward pass, those made outside aside."""
    known = {tensor.untyped_storage().data_ptr() for tensor in outside}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_what_is_kept_does_not_grow_with_the_vocabulary() -> None:
    """Of 256 positions: for 8,192 tokens 12 bytes of each law, or the states and nothing else."""
    states, places = torch.randn(256, 16), torch.arange(256)[:, None]
    for width in (1024, 8192):
        head, target_logits = nn.Linear(16, width, bias=False), random_logits(256, width, 3).bfloat16()
        outside = [states, places, target_logits, head.weight]

        def whole() -> Tensor:
            return Objective().term(1, head(states), target_logits).losses  # noqa: B023

        def parts() -> Tensor:
            draft = Logits(states, head, width)  # noqa: B023
            return Objective().term(1, draft, Logits(places, lambda at: target_logits[at[:, 0]], width)).losses  # noqa: B023

        assert kept_bytes(whole, outside) >= 8 * 256 * width
        assert kept_bytes(parts, outside) <= 64 * 256
        torch.testing.assert_close(whole(), parts())


def test_weights_inside_get_their_gradient_through_what_is_made_again() -> None:
    states, wanted = torch.randn(50, 6), random_logits(50, 15, 4)
    one, other = nn.Linear(6, 15), nn.Linear(6, 15)
    other.load_state_dict(one.state_dict())
    Objective().term(1, one(states), wanted).total.backward()
    Objective().term(1, Logits(states, other, 15), as_made(wanted)).total.backward()
    torch.testing.assert_close(one.weight.grad, other.weight.grad)
    frozen = replace(Logits(states, other, 15), make=lambda some: other(some).detach())
    assert not Objective().term(1, frozen, as_made(wanted)).losses.requires_grad


def test_parts_cover_every_row_once() -> None:
    rows = Logits(torch.arange(23)[:, None].float(), lambda some: some, target().vocab_size)
    parts = [part for (part,) in compared(lambda one, _other: (one,), rows, rows)]
    assert [len(part) for part in parts] == [7, 7, 7, 2]
    assert torch.equal(torch.cat(parts), rows.states)
