"""Divergences: known identities, gradients and limits."""

from __future__ import annotations

import math

import pytest
import torch

from specdec.errors import BadRecipe
from specdec.train.divergence import (
    DIVERGENCES,
    Laws,
    acceptance,
    adaptive,
    cross_entropy,
    divergence,
    forward_kl,
    jensen_shannon,
    negative_log_alpha,
    reverse_kl,
    total_variation,
)

ROWS, VOCAB = 7, 11


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "ce"])
def test_a_draft_that_is_the_target_costs_nothing(name: str) -> None:
    p = logits(0)
    assert divergence(name)(Laws(p + 3.0, p)).abs().max() < 1e-12  # logits shifted by a constant are the same law


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_draft_that_differs_costs_something_at_every_position(name: str) -> None:
    values = divergence(name)(Laws(logits(1), logits(0)))
    assert values.shape == (ROWS,)
    assert values.min() > 1e-3


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_equal_finite_differences_and_the_target_has_none(name: str) -> None:
    draft, target = logits(1).requires_grad_(), logits(0).requires_grad_()
    weight = (
        (-3.0 * acceptance(Laws(draft, target))).exp().detach()
    )  # adaptive's lambda, which its gradient takes as constant

    def loss(q: torch.Tensor) -> torch.Tensor:
        if name == "adaptive":
            return weight * forward_kl(Laws(q, target)) + (1 - weight) * total_variation(Laws(q, target))
        return divergence(name)(Laws(q, target))

    divergence(name)(Laws(draft, target)).sum().backward()
    assert target.grad is None
    assert draft.grad is not None
    step, numeric = 1e-6, torch.zeros_like(draft)
    for row in range(ROWS):
        for token in range(VOCAB):
            shift = torch.zeros_like(draft)
            shift[row, token] = step
            with torch.no_grad():
                numeric[row, token] = (loss(draft + shift) - loss(draft - shift))[row] / (2 * step)
    assert (draft.grad - numeric).abs().max() < 1e-6


def test_forward_kl_has_the_gradient_q_minus_p() -> None:
    draft, target = logits(1).requires_grad_(), logits(0)
    forward_kl(Laws(draft, target)).sum().backward()
    assert draft.grad is not None
    assert (draft.grad - (draft.detach().softmax(-1) - target.softmax(-1))).abs().max() < 1e-12


def test_total_variation_is_one_minus_what_speculative_sampling_accepts() -> None:
    p, q = logits(0), logits(1)
    overlap = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1)
    assert (total_variation(Laws(q, p)) - (1 - overlap)).abs().max() < 1e-12
    assert (acceptance(Laws(q, p)) - overlap).abs().max() < 1e-12
    assert (negative_log_alpha(Laws(q, p)) + overlap.log()).abs().max() < 1e-12


def test_jsd_is_symmetric_at_one_half_bounded_and_tends_to_the_two_kls() -> None:
    p, q = logits(0, 9.0), logits(1, 9.0)
    assert (jensen_shannon(Laws(q, p)) - jensen_shannon(Laws(p, q))).abs().max() < 1e-12
    assert jensen_shannon(Laws(q, p)).max() <= math.log(2) + 1e-12
    p, q = logits(0), logits(1)
    assert (jensen_shannon(Laws(q, p), 1e-6) / 1e-6 - forward_kl(Laws(q, p))).abs().max() < 1e-3
    assert (jensen_shannon(Laws(q, p), 1 - 1e-6) / 1e-6 - reverse_kl(Laws(q, p))).abs().max() < 1e-3


def test_adaptive_lies_between_its_parts_and_turns_into_kl_without_decay() -> None:
    p, q = logits(0), logits(1)
    kl, tv, mixed = forward_kl(Laws(q, p)), total_variation(Laws(q, p)), adaptive(Laws(q, p))
    assert ((mixed >= torch.minimum(kl, tv) - 1e-12) & (mixed <= torch.maximum(kl, tv) + 1e-12)).all()
    assert (adaptive(Laws(q, p), decay=0.0) - kl).abs().max() < 1e-12


def test_cross_entropy_is_that_of_the_targets_most_probable_token() -> None:
    p, q = logits(0), logits(1)
    expected = -q.log_softmax(-1)[torch.arange(ROWS), p.argmax(-1)]
    assert (cross_entropy(Laws(q, p)) - expected).abs().max() < 1e-6


def test_minus_log_alpha_stays_finite_where_the_laws_share_nothing() -> None:
    p, q = torch.tensor([[60.0, -60.0]]), torch.tensor([[-60.0, 60.0]])
    assert float(negative_log_alpha(Laws(q, p))) == pytest.approx(-math.log(1e-5), rel=1e-4)


def test_tokens_that_the_target_excludes_cost_nothing_and_give_no_nan() -> None:
    p = logits(0)
    p[:, 3:] = -torch.inf
    draft = logits(1).requires_grad_()
    values = forward_kl(Laws(draft, p)) + jensen_shannon(Laws(draft, p)) + total_variation(Laws(draft, p))
    values.sum().backward()
    assert draft.grad is not None
    assert draft.grad.isfinite().all()
    assert values.isfinite().all()


@pytest.mark.parametrize("spec", ["kl", "jsd:0", "jsd:1", "jsd:x", "tv:3", "adaptive:-1", ""])
def test_a_divergence_that_does_not_exist_is_named(spec: str) -> None:
    with pytest.raises(BadRecipe):
        divergence(spec)


def test_numbers_after_a_colon_arrive() -> None:
    p, q = logits(0), logits(1)
    assert torch.equal(divergence("jsd:0.3")(Laws(q, p)), jensen_shannon(Laws(q, p), 0.3))
    assert torch.equal(divergence("adaptive:1")(Laws(q, p)), adaptive(Laws(q, p), 1.0))
