"""Every number of the statistics against values worked out by hand on records of a few tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest

from specdec.bench.statistics.acceptance import acceptance, check_steps
from specdec.bench.statistics.budget import plain_step, prediction, step_budget
from specdec.bench.statistics.cost import verify_cost
from specdec.bench.statistics.exactness import exactness
from specdec.bench.statistics.latency import distribution, latency
from specdec.bench.statistics.nvidia import acceptance_rate, speculation_profile
from specdec.bench.statistics.sample import Sample, failures, samples_of, units_of
from specdec.bench.statistics.speedup import geometric_mean, pair_up, ratio_of_means, speedup, total_time_ratio
from specdec.bench.statistics.throughput import peak_memory, throughput
from specdec.bench.statistics.vllm import vllm_keys
from specdec.errors import SpecdecError
from tests.bench.synthetic import chain_steps, record, verdict


def two_prompts() -> tuple[list[Sample], list[Sample]]:
    """plain takes 4 s and 9 s for 4 tokens, the method 2 s and 1 s: ratios 2 and 9."""
    base = samples_of([record("plain", 1, total=4.0), record("plain", 2, total=9.0)])
    method = samples_of([record("lookup", 1, total=2.0), record("lookup", 2, total=1.0)])
    return base, method


def test_the_geometric_mean_weighs_prompts_and_the_total_time_ratio_weighs_seconds():
    base, method = two_prompts()
    pairs, units = pair_up(base, method), units_of(base)
    assert geometric_mean(pairs, units).value == pytest.approx(math.sqrt(18))
    assert total_time_ratio(pairs, units).value == pytest.approx(13 / 3)
    # Spec-Bench: mean of 2 and 4 tokens/s over mean of 1 and 4/9 tokens/s
    assert ratio_of_means(pairs, units).value == pytest.approx(3 / (13 / 18))


def test_a_speed_up_counts_faster_and_slower_prompts_and_names_the_slowest():
    base = samples_of([record("plain", n, total=4.0) for n in range(1, 4)])
    method = samples_of([record("lookup", n, total=seconds) for n, seconds in ((1, 2.0), (2, 8.0), (3, 4.0))])
    found = speedup(pair_up(base, method), units_of(base))
    assert (found["prompts"], found["prompts_faster"], found["prompts_slower"]) == (3, 1, 1)
    assert [entry["question_id"] for entry in found["slowest"]] == ["2", "3", "1"]
    assert found["tenth_percentile"] == pytest.approx(0.6)  # a fifth of the way from 0.5 to 1


def test_answers_of_different_length_are_compared_by_time_per_token():
    base = samples_of([record("plain", 1, tokens=10, total=10.0)])
    method = samples_of([record("lookup", 1, tokens=5, total=2.5)])
    (pair,) = pair_up(base, method)
    assert pair.ratio == pytest.approx(2)
    assert speedup([pair], {1: 0})["prompts_of_other_length"] == 1


def test_repeats_are_averaged_before_prompts_are_compared():
    base = samples_of([record("plain", 1, total=seconds, repeat=i) for i, seconds in enumerate((3.0, 5.0))])
    method = samples_of([record("lookup", 1, total=2.0)])
    (pair,) = pair_up(base, method)
    assert pair.ratio == pytest.approx(2)  # mean of 3 and 5 over 2, and not a mean of ratios over three records


def test_turns_of_a_question_belong_to_one_prompt_and_only_common_turns_count():
    base = samples_of([record("plain", 1, total=4.0), record("plain", 1, total=6.0, turn=1)])
    method = samples_of([record("lookup", 1, total=1.0), record("lookup", 1, total=4.0, turn=1)])
    assert pair_up(base, method)[0].ratio == pytest.approx(10 / 5)
    assert pair_up(base, method[:1])[0].ratio == pytest.approx(4)


def test_a_prompt_without_an_answer_of_either_method_is_not_paired():
    base, method = two_prompts()
    assert [pair.question for pair in pair_up(base[:1], method)] == [1]
    assert pair_up(base, samples_of([record("lookup", 1, tokens=0)])) == []
    assert speedup([], {}) == {}


def test_failed_records_are_left_out_and_counted():
    records = [record("lookup", 1), record("lookup", 2, error="boom", tokens=0)]
    assert [sample.question for sample in samples_of(records)] == [1]
    assert [entry["question_id"] for entry in failures(records)] == [2]


def batch_of_two(method: str, total: float) -> list[Sample]:
    """3 tokens and 1 token in one timed call; the first row runs for two steps, the second for none."""
    timed = {"prefill": 1.0, "draft": 0.5, "verify": 2.0, "accept": 0.25, "ttft": 1.0}
    long = {"emitted": [1, 1], "total": [(total - 1) / 2] * 2}
    return samples_of(
        [
            record(method, 1, tokens=3, total=total, batch=(2, 0, 7), seconds=timed, steps=long),
            record(method, 2, tokens=1, total=total, batch=(2, 1, 7), seconds=timed),
        ]
    )


def test_the_time_of_a_batch_counts_once():
    rows = batch_of_two("none", 8.0)
    assert [row.share for row in rows] == [0.75, 0.25]
    assert throughput(rows)["seconds"] == pytest.approx(8)
    assert throughput(rows)["tokens_per_second"] == pytest.approx(0.5)
    assert throughput(rows)["decode_tokens_per_second"] == pytest.approx(2 / 7)
    assert step_budget(rows)["steps"] == pytest.approx(2)
    assert step_budget(rows)["per_step"] == pytest.approx(
        {"draft": 0.25, "verify": 1.0, "accept": 0.125, "other": (7 - 2.75) / 2, "total": 3.5}
    )
    assert plain_step(rows) is not None
    assert (plain_step(rows) or rows[0]).__dict__ == pytest.approx({"seconds": 3.5, "tokens": 1.0, "method": "none"})


def test_prompts_of_one_batch_are_one_unit():
    base, method = batch_of_two("plain", 8.0), batch_of_two("lookup", 4.0)
    units = units_of(base)
    assert units[1] == units[2]
    estimate = geometric_mean(pair_up(base, method), units)
    assert estimate.value == pytest.approx(2)
    assert (estimate.units, estimate.low, estimate.high) == (1, None, None)


def chain_samples() -> list[Sample]:
    """Question 1: five drafted, 2, 0 and 2 accepted; question 2: one drafted, one accepted.

    Accepted 2, 0, 2, 1 of drafted 2, 2, 2, 1; emitted 3, 1, 3, 2; tried 2, 1, 2, 1.
    """
    first = record("lookup", 1, tokens=8, steps=chain_steps([2, 2, 2], [2, 0, 2]))
    return samples_of([first, record("lookup", 2, tokens=3, steps=chain_steps([1], [1]))])


def test_acceptance_by_hand():
    found = acceptance(chain_samples(), {1: 1, 2: 2})
    assert found["tau"]["value"] == pytest.approx(9 / 4)
    assert found["tau_per_request"] == pytest.approx((7 / 3 + 2) / 2)
    assert (found["drafted"], found["accepted"], found["steps"]) == (7, 5, 4)
    assert found["acceptance_rate"] == pytest.approx(5 / 7)
    assert found["wasted_share"] == pytest.approx(2 / 7)
    assert found["nodes_per_step"] == pytest.approx(7 / 4)
    assert found["marginal"] == pytest.approx([3 / 4, 2 / 4])
    assert found["conditional"] == pytest.approx([3 / 4, 2 / 2])  # depth 2 was within reach in two steps only
    assert found["tokens_per_step"] == {"1": 1, "2": 1, "3": 2}
    assert found["tau"]["value"] == pytest.approx(1 + sum(found["marginal"]))
    assert found["chain"] is True


def test_a_step_that_ends_inside_the_draft_enters_the_identity():
    steps = chain_steps([3, 3], [3, 2]) | {"emitted": [4, 2]}
    found = acceptance(samples_of([record("lookup", 1, tokens=7, steps=steps)]), {1: 1})
    assert found["ended_inside"] == 1
    assert found["tau"]["value"] == pytest.approx(3) == 1 + sum(found["marginal"]) - 1 / 2


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"emitted": [3, 2, 3]}, "step 1: 2 tokens emitted, 0 of 2 drafted ones accepted"),
        ({"emitted": [2, 1, 3]}, "step 0: 2 tokens emitted"),  # ends inside, but not at the end
        ({"emitted": [3, 1, 0], "accepted": [2, 0, 0]}, "step 2: 0 tokens emitted"),
        ({"accepted": [2, 0, 3], "emitted": [3, 1, 4]}, "step 2: 4 tokens emitted, 3 of 2 drafted ones accepted"),
        ({"tried": [2, 1, 1]}, "step 2: 3 tokens emitted, 2 of 2 drafted ones accepted, depth 1 tried"),
        ({"drafted": [2, 2]}, "its steps have 2 of drafted, 3 of accepted"),
        ({"verify": [0.1]}, "1 of verify"),
    ],
)
def test_a_record_that_breaks_the_identity_is_named(change: dict[str, Any], complaint: str):
    broken = record("lookup", 7, turn=1, tokens=8, steps=chain_steps([2, 2, 2], [2, 0, 2]) | change)
    with pytest.raises(SpecdecError, match=complaint) as caught:
        acceptance(samples_of([broken]), {7: 1})
    assert "record of lookup, question 7, turn 1, repeat 0" in str(caught.value)


def test_a_whole_chain_passes_the_check():
    for sample in chain_samples():
        check_steps(sample)


def test_nothing_accepted_is_a_rate_of_zero_and_nothing_drafted_is_no_rate():
    nothing = acceptance(samples_of([record("lookup", 1, steps=chain_steps([2, 2], [0, 0]))]), {1: 1})
    assert (nothing["tau"]["value"], nothing["acceptance_rate"], nothing["wasted_share"]) == (1, 0, 1)
    assert (nothing["marginal"], nothing["conditional"]) == ([0], [0])
    none = acceptance(samples_of([record("none", 1, steps=chain_steps([0, 0], [0, 0]))]), {1: 1})
    assert (none["acceptance_rate"], none["wasted_share"], none["marginal"]) == (None, None, [])


def test_a_method_that_tells_only_what_it_emitted_has_a_tau_and_no_rates():
    found = acceptance(samples_of([record("plain", 1, steps={"emitted": [1, 1], "total": [1.0, 1.0]})]), {1: 1})
    assert found["tau"]["value"] == 1
    assert "marginal" not in found
    assert acceptance(samples_of([record("plain", 1)]), {1: 1}) == {}


def test_latencies_by_hand():
    steps = chain_steps([2, 2], [1, 0], total=[0.4, 0.3])
    (sample,) = samples_of([record("lookup", 1, tokens=4, total=1.0, seconds={"ttft": 0.25}, steps=steps)])
    found = latency([sample])
    assert found["ttft"]["mean"] == 0.25
    assert found["gap"]["mean"] == pytest.approx(0.35)
    assert found["token"]["mean"] == pytest.approx((0.2 + 0.2 + 0.3) / 3)
    assert found["token"]["p50"] == pytest.approx(0.2)
    assert found["tpot"]["mean"] == pytest.approx(0.25)
    assert found["request"]["p99"] == 1.0


def test_percentiles_interpolate_between_values():
    found = distribution([1.0, 2.0, 3.0, 4.0])
    assert found == pytest.approx({"mean": 2.5, "std": math.sqrt(1.25), "p50": 2.5, "p90": 3.7, "p99": 3.97})
    assert distribution([]) is None


def test_a_row_that_ends_before_its_batch_has_its_own_latency():
    timed = {"ttft": 1.0}
    rows = samples_of(
        [
            record("none", 1, tokens=3, total=8.0, batch=(2, 0, 7), seconds=timed, steps=chain_steps([0, 0], [0, 0])),
            record("none", 2, tokens=2, total=8.0, batch=(2, 1, 7), seconds=timed, steps=chain_steps([0], [0])),
        ]
    )
    assert [row.latency for row in rows] == [3.0, 2.0]


def test_a_method_that_does_not_time_its_first_token_has_no_decode_speed():
    (sample,) = samples_of([record("plain", 1)])
    assert throughput([sample])["decode_tokens_per_second"] is None
    assert (latency([sample])["ttft"], latency([sample])["tpot"]) == (None, None)
    assert plain_step([sample]) is None


def test_the_prediction_is_tau_over_the_cost_of_drafting_and_verifying():
    base = samples_of([record("plain", 1, tokens=11, total=11.0, seconds={"ttft": 1.0}, steps={"emitted": [1] * 10})])
    timed = {"prefill": 1.0, "draft": 2.0, "verify": 3.0, "accept": 0.5, "ttft": 1.0}
    method = samples_of([record("lookup", 1, tokens=11, total=7.0, seconds=timed, steps=chain_steps([4, 4], [4, 4]))])
    budget = step_budget(method)
    assert budget["per_step"] == pytest.approx(
        {"draft": 1.0, "verify": 1.5, "accept": 0.25, "other": 0.25, "total": 3.0}
    )
    assert budget["share"]["verify"] == pytest.approx(0.5)
    assert (budget["per_token"], budget["prefill"]) == (pytest.approx(0.6), pytest.approx(1.0))
    found = prediction(budget, plain_step(base), 5 / 3)
    assert found["plain_step_seconds"] == pytest.approx(1.0)
    assert found["predicted_decode"] == pytest.approx(5 / 2.5)
    assert found["measured_decode"] == pytest.approx(5 / 3)
    assert prediction({}, plain_step(base), 1.0) == {}
    assert prediction(budget, None, 1.0) == {}


def test_verification_cost_is_the_median_of_each_width_met_often_enough():
    steps = chain_steps([2] * 5 + [4], [0] * 6, verify=[1.0, 2.0, 3.0, 4.0, 50.0, 9.0])
    rows = samples_of([record("lookup", 1, steps=steps)])
    assert verify_cost(rows) == {"3": {"seconds": 3.0, "steps": 5}}
    assert verify_cost(samples_of([record("lookup", 1, steps=steps, batch=(2, 0, 1))])) == {}


def test_peak_memory_is_the_largest_known():
    rows = samples_of([record("a", n, peak_memory_bytes=peak) for n, peak in enumerate((5, None, 9))])
    assert peak_memory(rows) == 9
    assert peak_memory(rows[1:2]) is None


def test_a_question_is_as_exact_as_its_worst_record():
    rows = [record("lookup", question, turn=turn) for question in (1, 2, 3) for turn in (0, 1)]
    kinds = ["exact", "exact", "near-tie", "not-compared", "exact", "wrong"]
    entries = [verdict(row, kind, gap=0.25, position=3) for row, kind in zip(rows, kinds, strict=True)]
    found = exactness(entries)
    assert found["questions"] == {"exact": 1, "near-tie": 1, "wrong": 1, "not-compared": 0}
    assert found["records"] == {"exact": 3, "near-tie": 1, "wrong": 1, "not-compared": 1}
    assert found["widest_near_tie"] == 0.25
    assert [entry["question_id"] for entry in found["differences"]] == [3, 2]
    half = exactness([verdict(rows[0]), verdict(rows[1], "not-compared", reason="the method failed")])
    assert half["questions"] == {"exact": 0, "near-tie": 0, "wrong": 0, "not-compared": 1}
    assert half["reasons"] == ["the method failed"]


def test_vllm_keys_divide_by_the_steps_that_drafted():
    steps = chain_steps([2, 0, 2, 1], [2, 0, 1, 0], total=[0.1, 0.2, 0.3, 0.4])
    rows = samples_of([record("lookup", 1, tokens=8, total=2.0, seconds={"ttft": 0.5}, steps=steps)])
    keys = vllm_keys(rows, 3, acceptance(rows, {1: 1}))
    assert keys["spec_decode_num_drafts"] == 3
    assert keys["spec_decode_acceptance_length"] == pytest.approx(1 + 3 / 3)
    assert keys["spec_decode_acceptance_rate"] == pytest.approx(60)
    assert keys["spec_decode_per_position_acceptance_rates"] == pytest.approx([2 / 3, 1 / 3])
    assert (keys["spec_decode_draft_tokens"], keys["spec_decode_accepted_tokens"]) == (5, 3)
    assert (keys["completed"], keys["failed"], keys["total_input_tokens"]) == (1, 3, 10)
    assert keys["output_throughput"] == pytest.approx(4)
    assert keys["median_itl_ms"] == pytest.approx(250)
    assert keys["mean_ttft_ms"] == pytest.approx(500)
    assert "spec_decode_num_drafts" not in vllm_keys(rows, 0, {})


def test_nvidias_rates_follow_from_emitted_lengths():
    rows = chain_samples()
    found = acceptance_rate(rows, acceptance(rows, {1: 1, 2: 2}))
    assert found["Acceptance_Length_Histogram"] == {"1": 1, "2": 1, "3": 2}
    assert found["Joint_Acceptance_Rate"] == pytest.approx({"1": 1, "2": 3 / 4, "3": 2 / 4})
    assert found["Conditional_Acceptance_Rate"] == pytest.approx({"1": 1, "2": 3 / 4, "3": 2 / 3})
    assert found["Average_AL"] == pytest.approx(13 / 6)
    assert found["Category_AL"] == pytest.approx({"qa": 13 / 6})


def test_the_speculation_profile_passes_its_own_checks_and_says_what_k_can_be_derived():
    rows = chain_samples()
    profile = speculation_profile("lookup", rows, acceptance(rows, {1: 1, 2: 2}), {"target": {"name": "demo"}})
    assert profile["schema_version"] == "1.0"
    assert profile["num_speculative_tokens"] == 2
    assert profile["marginal_accept_rates"] == pytest.approx([3 / 4, 2 / 4])
    assert profile["mean_accept_length"] == pytest.approx(9 / 4)
    assert profile["validation"]["mean_consistency"]["passed"]
    assert profile["validation"]["marginal_monotonicity"] == {"passed": True, "violations": []}
    assert profile["accept_length_model"] == "chain_analytic"
    trees = samples_of([record("t", 1, chain=False, steps=chain_steps([6], [2]) | {"tried": [2]})])
    tree = speculation_profile("t", trees, acceptance(trees, {1: 1}), {})
    assert tree["accept_length_model"] == "measured_per_k"
    nothing = samples_of([record("none", 1, steps=chain_steps([0], [0]))])
    assert speculation_profile("none", nothing, acceptance(nothing, {1: 1}), {}) == {}
