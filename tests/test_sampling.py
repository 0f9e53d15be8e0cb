"""The draft law's truncation, draws without replacement, and choices by halves."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as lp

from specdec.draws import drawn_by_race, drawn_on_a_line
from specdec.sampling import SamplingParams
from tests.law.chi_square import chi_square
from tests.law.enumeration import law_of, successive_law

SIGNIFICANCE = 1e-6
Draw = Callable[[Tensor, int, torch.Generator | None], Tensor]


def warped_by_transformers(logits: Tensor, params: SamplingParams) -> Tensor:
    warpers: list[lp.LogitsProcessor] = [lp.TemperatureLogitsWarper(params.temperature)]
    warpers += [lp.TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [lp.TopPLogitsWarper(params.top_p)] if params.top_p is not None and params.top_p < 1 else []
    warpers += [lp.MinPLogitsWarper(params.min_p)] if params.min_p is not None else []
    for warper in warpers:
        logits = warper(None, logits)  # type: ignore[arg-type]
    return logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), list(itertools.product((None, 1, 7, 5000), (None, 0.3, 0.95), (None, 0.0, 0.05)))
)
def test_the_draft_law_is_truncated_as_transformers_truncates_the_targets(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """One cut-off for each law against one pass for each warper; flat laws, where top-p keeps most, and sharp ones."""
    params = SamplingParams(True, temperature, top_k, top_p, min_p)
    scales = torch.tensor([0.1, 1.0, 4.0, 20.0], dtype=torch.float64)
    logits = scales[:, None] * torch.randn(4, 1500, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert torch.equal(params.warp(logits), warped_by_transformers(logits, params))
    assert torch.equal(params.warp(logits.view(2, 2, -1)), params.warp(logits).view(2, 2, -1))


LOG_LAWS = {
    "unequal": torch.tensor([2.0, 0.5, 0.0, -1.0, 1.0]),
    "one token without mass": torch.tensor([0.3, -torch.inf, 1.0, -0.5]),
    "steep, so that some draws take several rounds": torch.tensor([9.0, 3.0, 0.0, 5.0]),
}


@pytest.mark.parametrize("draw", [drawn_by_race, drawn_on_a_line])
@pytest.mark.parametrize("log_law", [pytest.param(law, id=name) for name, law in LOG_LAWS.items()])
def test_both_ways_to_draw_without_replacement_have_the_successive_law(draw: Draw, log_law: Tensor) -> None:
    """20 000 ordered draws. A false alarm has odds of 1 in a million."""
    drawn = draw(log_law.expand(20_000, -1), 3, torch.Generator().manual_seed(2))
    assert chi_square(map(tuple, drawn.tolist()), successive_law(log_law, 3)).p_value > SIGNIFICANCE


def test_laws_of_one_batch_are_drawn_each_by_itself_whatever_rounds_they_take() -> None:
    """A sure law, a flat one over a vocabulary that no block divides, one with too few tokens; 1 in a million."""
    size = 77
    laws = torch.full((3, size), -torch.inf)
    laws[0, :3] = torch.tensor([12.0, 1.0, 0.0])
    laws[1] = 0.0
    laws[2, [5, 76]] = torch.tensor([0.0, 1.0])
    generator = torch.Generator().manual_seed(3)
    drawn = drawn_on_a_line(laws.repeat(4000, 1), 3, generator).view(4000, 3, 3)
    second = [(int(token),) for token in drawn[:, 0, 1] if token]
    assert chi_square(second, {(1,): 1 / (1 + torch.e**-1), (2,): 1 - 1 / (1 + torch.e**-1)}).p_value > SIGNIFICANCE
    first = [(int(token),) for token in drawn[:, 1, 0]]
    assert chi_square(first, {(token,): 1 / size for token in range(size)}).p_value > SIGNIFICANCE
    assert all(set(row[:2]) == {5, 76} and row[2] not in (5, 76) for row in drawn[:, 2].tolist())
    assert all(len(set(row)) == 3 for law in drawn.unbind(1) for row in law.tolist())


def test_one_of_several_is_chosen_by_its_share() -> None:
    """Also where some have no share, and for any number of entries."""
    for count in range(1, 10):
        chances = torch.rand(2, count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
        chances[0, 1::3] = 0.0
        law = law_of(lambda chooser, chances=chances: tuple(chooser.one_of(chances).tolist()))
        for pair in itertools.product(range(count), repeat=2):
            shares = chances / chances.sum(1, keepdim=True)
            expected = float(shares[0, pair[0]] * shares[1, pair[1]])
            assert law.get(pair, 0.0) == pytest.approx(expected, abs=1e-12)
