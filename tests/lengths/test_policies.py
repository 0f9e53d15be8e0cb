"""Each policy's arithmetic against numbers worked out by hand, brute force, or the code it comes from."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from specdec.costs.table import CostTable, DraftPoint, VerifyPoint
from specdec.errors import SpecdecError, UnknownDrafter
from specdec.grow.stopping import Level
from specdec.lengths import goodput as goodput_module
from specdec.lengths.acceptance_head import (
    AcceptanceHead,
    AcceptanceLength,
    AcceptanceRecorder,
    features,
    fit_acceptance_head,
)
from specdec.lengths.adaedl import AdaedlLength
from specdec.lengths.confidence import AdaptiveConfidenceLength, ConfidenceLength, best_threshold
from specdec.lengths.constant import ConstantLength
from specdec.lengths.costs import MeasuredCosts
from specdec.lengths.goodput import FIRST_WAIT, GoodputLength
from specdec.lengths.heuristic import HeuristicLength
from specdec.lengths.policy import LengthPolicy, Row, Step
from specdec.lengths.survival import AcceptanceByDepth, expected_tokens
from specdec.lengths.thompson import ThompsonLength


def row(drafted: int, accepted: int) -> Row:
    """A chain of `drafted` levels of which the first ones were accepted."""
    return Row(drafted, accepted, min(accepted + 1, drafted))


def step(*rows: Row | None, draft: float = 0.0, verify: float = 0.0) -> Step:
    most = max((r.drafted for r in rows if r is not None), default=0)
    return Step(list(rows), most, most, draft, verify)


def level(shares: list[float], paths: list[float] | None = None, entropies: list[float] | None = None) -> Level:
    """One row of live nodes at depth 1."""
    count = len(shares)
    places = torch.zeros(1, count, dtype=torch.long)
    traits = torch.zeros(1, count, 3)
    below = None if entropies is None else torch.tensor([[[entropy, 0.0, 0.0] for entropy in entropies]])
    return Level(
        places + 1, places, places == 0, torch.tensor([shares]), torch.tensor([paths or shares]), traits, below
    )


def simulate(policy: LengthPolicy, rates: list[float], steps: int, most: int = 8, seed: int = 0) -> list[int]:
    """Lengths that a policy takes on chains whose level d is accepted with `rates[d]`."""
    chance, lengths = random.Random(seed), []
    policy.begin(1)
    for _ in range(steps):
        length = policy.limits(1, most)[0]
        accepted = next((d for d in range(length) if chance.random() >= rates[min(d, len(rates) - 1)]), length)
        policy.observe(step(row(length, accepted)))
        lengths.append(length)
    return lengths


# --- Constant and heuristic ---------------------------------------------------------------------------------


def test_a_constant_length_keeps_to_what_there_is_room_for():
    assert ConstantLength(levels=3).limits(2, 5) == [3, 3]
    assert ConstantLength(levels=3).limits(2, 1) == [1, 1]
    assert ConstantLength(levels=0).limits(1, 5) == [0]


@pytest.mark.parametrize("start", [1, 3, 20])
def test_the_heuristic_is_that_of_transformers(start: int):
    """Against transformers' own code, called with what it looks at."""
    config = SimpleNamespace(num_assistant_tokens_schedule="heuristic", assistant_confidence_threshold=0.0)
    theirs: Any = SimpleNamespace(assistant_generation_config=config, num_assistant_tokens=start)
    ours, chance = HeuristicLength(start=start), random.Random(start)
    ours.begin(1)
    for _ in range(60):
        length = ours.limits(1, 1000)[0]
        assert length == theirs.num_assistant_tokens
        accepted = chance.choice([length, length, chance.randint(0, length)])
        AssistedCandidateGenerator.update_candidate_strategy(
            theirs, torch.LongTensor(1, 5), torch.zeros(1, length + 1, 2), accepted
        )
        ours.observe(step(row(length, accepted)))


def test_the_heuristic_never_waits_for_lengths_that_cannot_be_drafted():
    policy = HeuristicLength(start=3)
    policy.begin(1)
    for _ in range(10):
        drafted = policy.limits(1, 4)[0]
        policy.observe(step(row(drafted, drafted)))
    assert policy.lengths == [4]
    policy.observe(step(row(4, 2)))
    assert policy.limits(1, 4) == [3]


def test_the_heuristic_keeps_rows_apart_and_follows_those_that_go_on():
    policy = HeuristicLength(start=4)
    policy.begin(3)
    policy.limits(3, 20)
    policy.observe(step(row(4, 4), row(4, 1), None))
    assert policy.limits(3, 20) == [6, 3, 4]  # nothing was learned of the third row
    policy.select([2, 1])
    assert policy.limits(2, 20) == [4, 3]


@pytest.mark.parametrize(("carry_over", "first"), [(False, 5), (True, 7)])
def test_what_the_heuristic_learned_stays_only_when_asked(carry_over: bool, first: int):
    policy = HeuristicLength(start=5, carry_over=carry_over)
    policy.begin(1)
    policy.limits(1, 20)
    policy.observe(step(row(5, 5)))
    policy.begin(2)
    assert policy.limits(2, 20) == [first, first]


# --- Confidence ---------------------------------------------------------------------------------------------


def test_a_confidence_asks_the_last_token_or_the_path():
    nodes = level([0.6, 0.5, 0.2], [0.3, 0.45, 0.2])
    assert ConfidenceLength(stop_below=0.5).before(nodes).tolist() == [[True, True, False]]
    assert ConfidenceLength(stop_below=0.4, of="path").before(nodes).tolist() == [[False, True, False]]


def test_the_best_threshold_by_hand():
    """At 0.5 one of two rejected tokens is kept and no accepted one missed: 1/2. At 0.7 one of four is missed as well:
    1/2 + 3/4. At 0.8 two are missed and nothing is kept: 3/2. At 0.3 both rejected ones are kept: 1."""
    seen = [(0.9, True), (0.8, True), (0.7, False), (0.7, True), (0.5, True), (0.3, False)]
    assert best_threshold(seen) == 0.5
    assert best_threshold(seen[:5]) is None, "too few"
    assert best_threshold([(0.5, True)] * 9) is None, "nothing was rejected"


@pytest.mark.parametrize("seed", range(20))
def test_the_best_threshold_is_that_of_a_full_search(seed: int):
    chance = random.Random(seed)
    seen = [(chance.choice([0.1, 0.3, 0.5, 0.7, 0.9]), chance.random() < 0.6) for _ in range(30)]
    accepted = [share for share, fate in seen if fate]
    rejected = [share for share, fate in seen if not fate]

    def cost(t: float) -> float:
        return sum(s >= t for s in rejected) / len(rejected) + 3 * sum(s < t for s in accepted) / len(accepted)

    best = best_threshold(seen)
    assert best is not None
    assert cost(best) == pytest.approx(min(cost(share) for share, _ in seen))


@pytest.mark.parametrize("seed", range(5))
def test_the_best_threshold_is_that_of_a_roc_curve(seed: int):
    metrics = pytest.importorskip("sklearn.metrics")
    chance = random.Random(seed)
    seen = [(chance.random(), chance.random() < 0.6) for _ in range(40)]
    false, true, thresholds = metrics.roc_curve([fate for _, fate in seen], [share for share, _ in seen])
    assert best_threshold(seen) == pytest.approx(thresholds[(false + 3 * (1 - true)).argmin()])


def test_an_adapted_confidence_takes_the_tokens_that_were_tried():
    policy = AdaptiveConfidenceLength(stop_below=0.4)
    shares = [0.9, 0.8, 0.6, 0.2, 0.1, 0.05]
    nodes = level([1.0, *shares])
    fates = tuple((node, node <= 3) for node in range(1, 7))
    policy.observe(Step([Row(6, 3, 4, fates)], 6, 6, tokens=nodes))
    assert policy.threshold == pytest.approx(0.6)  # parts accepted from rejected
    policy.begin(1)
    assert policy.threshold == 0.4
    assert not policy.seen


# --- AdaEDL -------------------------------------------------------------------------------------------------


def test_the_entropy_bound_by_hand():
    policy = AdaedlLength(stop_below=0.5, scale=0.2)
    entropies = [0.0, 1.0, 1.25, 1.26, math.log(100)]
    bounds = policy.bound(torch.tensor(entropies))
    torch.testing.assert_close(bounds, torch.tensor([1.0, 0.552786, 0.5, 0.498004, 0.040297]), atol=1e-5, rtol=0)
    nodes = level([0.5] * 5, entropies=entropies)
    assert policy.after(nodes).tolist() == [[True, True, True, False, False]]


def test_the_threshold_moves_towards_the_aim_by_hand():
    policy = AdaedlLength(stop_below=0.3, aim=0.8)
    policy.observe(step(row(4, 4)))  # rate 0.5 * 0.8 + 0.5 * 1 = 0.9: not below 0.8
    assert policy.rate == pytest.approx(0.9)
    assert policy.threshold == pytest.approx(0.9 * 0.3 + 0.1 * 0.29)
    policy.observe(step(row(4, 1)))  # rate 0.45 + 0.125 = 0.575
    assert policy.rate == pytest.approx(0.575)
    assert policy.threshold == pytest.approx(0.299 + 0.001)
    policy.observe(step(row(0, 0), None))  # nothing was drafted: nothing to learn
    assert policy.threshold == pytest.approx(0.3)


def test_without_an_aim_the_threshold_stays():
    policy = AdaedlLength(stop_below=0.3, aim=0.0)
    policy.observe(step(row(4, 0)))
    assert policy.threshold == 0.3


# --- Thompson and acceptance by depth -----------------------------------------------------------------------


def test_acceptance_is_counted_by_depth_and_forgotten_by_halves():
    counts = AcceptanceByDepth(memory=4)
    counts.learn(row(3, 1))  # level 1 accepted, level 2 rejected, level 3 not tried
    assert [counts.at(d) for d in range(3)] == [(1, 0), (0, 1), (0, 0)]
    for _ in range(3):
        counts.learn(row(1, 1))
    assert counts.at(0) == (4, 0)
    counts.learn(row(1, 0))
    assert counts.at(0) == (2, 0.5)


def test_expected_tokens_by_hand():
    assert expected_tokens([0.5, 0.4]) == pytest.approx([1.0, 1.5, 1.7])


def test_the_product_of_rates_is_the_share_of_rows_that_get_there_though_rows_differ():
    counts = AcceptanceByDepth(memory=10**6)
    for _ in range(100):
        counts.learn(row(3, 3))  # a row that is always right
        counts.learn(row(3, 0))  # one that is always wrong
    rates = [counts.rate(d, belief=0.0) for d in range(3)]
    assert rates == pytest.approx([0.5, 1.0, 1.0])
    assert expected_tokens(rates)[-1] == pytest.approx(0.5 * 4 + 0.5 * 1)


def test_thompson_draws_from_the_posteriors_of_its_counts():
    policy = ThompsonLength(draft_cost=0.2, seed=3)
    policy.begin(1)
    for _ in range(5):
        policy.observe(step(row(3, 1)))
    twin = random.Random(3)
    for _ in range(20):
        rates = [twin.betavariate(6, 1), twin.betavariate(1, 6), twin.betavariate(1, 1)]
        values, reach, tokens = [1.0], 1.0, 1.0
        for depth, rate in enumerate(rates, 1):
            reach *= rate
            tokens += reach
            values.append(tokens / (1 + 0.2 * depth))
        assert policy.limits(1, 3) == [values.index(max(values))]


def test_thompson_finds_the_best_length_and_goes_on_trying():
    """Acceptance 0.9, 0.9, 0.1: with cost 0.1 two levels give 2.71 / 1.2, three 2.79 / 1.3, one 1.9 / 1.1."""
    lengths = simulate(ThompsonLength(draft_cost=0.1, memory=1000), [0.9, 0.9, 0.1, 0.1], 400)
    late = lengths[200:]
    assert sum(length == 2 for length in late) > 0.8 * len(late)
    assert len(set(lengths)) > 2


def test_thompson_starts_again_from_its_seed_and_leaves_other_generators_alone():
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    policy = ThompsonLength(seed=5)
    assert simulate(policy, [0.7], 50) == simulate(policy, [0.7], 50)
    assert simulate(ThompsonLength(seed=6), [0.7], 50) != simulate(policy, [0.7], 50)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


# --- Goodput ------------------------------------------------------------------------------------------------


def table(slope: float, draft: float) -> CostTable:
    """Verification 1 + slope for each token of the batch, drafting `draft` for each level."""
    verify = [VerifyPoint(b, 0, n, 1.0 + slope * b * n) for b in (1, 64) for n in (1, 17)]
    return CostTable(tuple(verify), tuple(DraftPoint("fixed", k, k, 1, draft * k) for k in (1, 2, 8)), per_step=0.05)


def goodput(slope: float, draft: float = 0.1) -> GoodputLength:
    policy = GoodputLength()
    policy.costs = table(slope, draft)
    return policy


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("slope", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("rate", [0.2, 0.6, 0.95])
def test_the_length_is_the_best_of_all_by_brute_force(rows: int, slope: float, rate: float):
    policy = goodput(slope)
    policy.begin(rows)
    for _ in range(400):
        policy.acceptance.learn(row(8, 8))
    for d in range(8):
        policy.acceptance.hits[d], policy.acceptance.misses[d] = 1e6 * rate, 1e6 * (1 - rate)
    best, best_value = 0, 0.0
    for k in range(9):
        tokens = sum(rate**i for i in range(k + 1))
        seconds = 0.1 * k + 1.0 + slope * rows * (k + 1) + 0.05
        if tokens / seconds > best_value + 1e-9:
            best, best_value = k, tokens / seconds
    assert policy.limits(rows, 8) == [best] * rows


def test_wide_batches_decode_plainly_where_verification_is_dear():
    few, many = goodput(0.1), goodput(0.1)
    assert few.limits(1, 8)[0] > 0
    assert many.limits(64, 8) == [0] * 64


def test_plain_decoding_is_left_when_probes_find_that_drafting_pays():
    policy = goodput(0.1)
    wrong = simulate(policy, [0.0], 300)
    assert wrong[-1] == 0 or wrong[-2] == 0
    probes = [at for at, length in enumerate(wrong) if length]
    assert 4 < len([at for at in probes if at > 50]) < 20, "two steps now and then"
    policy.carry_over = True
    right = simulate(policy, [0.95], 300)
    assert all(right[-50:]), "it recovers"


def test_probes_become_rare_where_they_do_not_help():
    lengths = simulate(goodput(0.5), [0.1], 1000)
    starts = [at for at in range(1, 1000) if lengths[at] and not lengths[at - 1]]
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert gaps[0] == 2 * FIRST_WAIT + goodput_module.PROBE
    assert gaps == sorted(gaps)
    assert gaps[-1] == goodput_module.LONGEST_WAIT + goodput_module.PROBE


def test_measured_costs_are_medians_that_never_fall():
    costs = MeasuredCosts()
    assert not costs.knows()
    for seconds in (1.0, 1.2, 50.0):
        costs.learn(4, 3, seconds, 0.3)
    costs.learn(1, 0, 1.1, 0.0)
    costs.learn(2, 1, 0.9, None)  # a probe that digested first
    assert costs.knows()
    assert costs.verify(1) == costs.verify(2) == 1.1
    assert costs.verify(2, batch=2) == 1.2
    assert costs.draft(0, 0) == 0.0
    assert costs.draft(2, 2) == pytest.approx(0.2)


def test_costs_are_measured_by_trying_two_lengths_and_stay_for_the_next_generation():
    policy = GoodputLength()
    policy.begin(1)
    lengths = []
    for _ in range(4):
        length = policy.limits(1, 8)[0]
        lengths.append(length)
        policy.observe(step(row(length, length), draft=0.01 * length, verify=1.0))
    assert lengths[:3] == [8, 4, 8]
    assert lengths[3] == 8  # drafting costs next to nothing, and all was accepted
    policy.begin(1)
    assert policy.costs.draft(8, 8) == pytest.approx(0.08)
    assert policy.acceptance.at(0) == (0.0, 0.0)


def test_a_cost_table_is_read_from_a_file(tmp_path: Path):
    file = tmp_path / "costs.json"
    table(0.0, 0.1).save(file)
    assert GoodputLength(costs=str(file)).costs.verify(3) == pytest.approx(1.0)
    file.write_text("{}")
    with pytest.raises(SpecdecError, match=r"costs\.json"):
        GoodputLength(costs=str(file))


# --- Acceptance head ----------------------------------------------------------------------------------------


def records(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens whose acceptance is their draft probability."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(count, generator=generator).clamp(min=0.01)
    nodes = level(shares.tolist())
    return features(nodes)[0], shares


def test_a_head_learns_what_acceptance_depends_on():
    inputs, labels = records(2000)
    head = fit_acceptance_head(inputs, labels, rejection_weight=1.0, steps=300)
    test_inputs, test_labels = records(500, seed=1)
    assert float((head(test_inputs).sigmoid() - test_labels).abs().mean()) < 0.05
    cautious = fit_acceptance_head(inputs, labels, steps=300)
    assert float(cautious(test_inputs).sigmoid().mean()) < float(head(test_inputs).sigmoid().mean()) - 0.1


def test_training_is_reproducible_and_leaves_the_global_generator_alone():
    inputs, labels = records(100)
    before = torch.get_rng_state()
    heads = [fit_acceptance_head(inputs, labels, steps=5) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads[0](inputs), heads[1](inputs))


def test_nothing_recorded_is_nothing_to_learn_from():
    with pytest.raises(UnknownDrafter, match="no tokens were recorded"):
        fit_acceptance_head(*AcceptanceRecorder().records)


def test_a_saved_head_is_the_same_head(tmp_path: Path):
    inputs, labels = records(100)
    head = fit_acceptance_head(inputs, labels, steps=5, width=7)
    head.save(tmp_path / "head.safetensors")
    before = torch.get_rng_state()
    loaded = AcceptanceHead.load(tmp_path / "head.safetensors")
    assert torch.equal(torch.get_rng_state(), before), "a name with a head may be loaded inside a seeded generate"
    assert torch.equal(loaded(inputs), head(inputs))


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_files_that_are_no_head_are_named(tmp_path: Path, content: bytes):
    file = tmp_path / "head.safetensors"
    with pytest.raises(UnknownDrafter, match=r"head\.safetensors"):
        AcceptanceLength(weights=str(file))
    file.write_bytes(content)
    with pytest.raises(UnknownDrafter, match=r"head\.safetensors"):
        AcceptanceLength(weights=str(file))


class Promised(AcceptanceHead):
    """Predicts the draft probability itself."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.logit(inputs[..., 0].exp(), eps=1e-9)


def test_a_path_ends_where_a_rejection_on_it_becomes_too_likely():
    policy = AcceptanceLength(weights=Promised(), stop_above=0.5)
    first = level([0.9, 0.6])
    assert policy.before(first).tolist() == [[True, True]]
    places = torch.tensor([[0, 0, 1]])
    second = Level(places * 0 + 2, places, places >= 0, torch.tensor([[0.9, 0.5, 0.9]]), torch.ones(1, 3),
                   torch.zeros(1, 3, 3))  # fmt: skip
    assert policy.before(second).tolist() == [[True, False, True]]  # 0.81, 0.45, 0.54
    assert policy.before(first).tolist() == [[True, True]], "a new tree begins anew"


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConstantLength(levels=-1), lambda: HeuristicLength(start=-1), lambda: ConfidenceLength(stop_below=2),
        lambda: ConfidenceLength(of="tree"), lambda: AdaptiveConfidenceLength(window=3), lambda: AdaedlLength(scale=-1),
        lambda: AdaedlLength(aim=2), lambda: AdaedlLength(stop_below=1.5), lambda: ThompsonLength(draft_cost=-0.1),
        lambda: ThompsonLength(memory=0), lambda: GoodputLength(memory=0), AcceptanceLength,
        lambda: AcceptanceLength(weights=Promised(), stop_above=2), lambda: GoodputLength(costs="/nowhere/costs.json"),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_in_one_line(make: Any):
    with pytest.raises(SpecdecError) as refused:
        make()
    assert "\n" not in str(refused.value)
