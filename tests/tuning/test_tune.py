"""Tuning on tiny models with prices by hand: the choice is the best of everything that could have been chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.drafters.directory import DrafterJson, fingerprint, read_drafter_json, write_drafter_json
from specdec.drafters.load import load_drafter
from specdec.errors import SpecdecError
from specdec.tuning import grid as grids
from specdec.tuning import tune as tuning
from specdec.tuning.choice import check_out, keep
from specdec.tuning.decoded import Decoded, Job, decode_all, overhead_of, typical, verify_ratios
from specdec.tuning.grid import full_grid, measured_grid, rounds
from specdec.tuning.pricing import Prices, expectation, expectation_of
from specdec.tuning.settings import (
    NO_SPECULATION,
    Setting,
    Subject,
    chain_settings,
    drawn_chains,
    following_settings,
    subject_of,
)
from specdec.tuning.traces import Step
from specdec.tuning.tune import Effort, Tuned, near, tune
from tests.tiny import perturbed, prompt, shared_draft, shared_target
from tests.tuning.costs import costs

EFFORT = Effort(depths=(1, 3), budgets=(2, 6), few=1, finalists=2, repeats=1)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))


def job(rows: int = 2, **fields: Any) -> Job:
    ids = prompt(rows)["input_ids"]
    prompts = tuple(tuple(row[row != 0].tolist()) for row in ids)
    return Job(shared_target(), prompts, max_new_tokens=fields.pop("max_new_tokens", 16), **fields)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    shared_draft().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found_once(draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """What tuning the draft model finds at middling prices."""
    table = costs(per_node=0.02, per_level=0.05, contexts=True)
    return tune(job(), str(draft), costs=table, effort=EFFORT, folder=tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def bad_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft model that is never right."""
    folder = tmp_path_factory.mktemp("bad")
    model = perturbed(shared_target(), 0.5)
    with torch.no_grad():
        model.lm_head.weight.copy_(-shared_target().lm_head.weight)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prices", [
    {"per_node": 0.01, "per_level": 0.05},  # nearly free: deep and wide
    {"per_node": 0.30, "per_level": 0.05},  # nodes are dear
    {"per_node": 0.01, "per_level": 0.60},  # levels are dear
])  # fmt: skip
def test_the_choice_is_the_best_of_the_whole_grid(draft: Path, prices: Any, tmp_path: Path):
    table = costs(**prices)
    found = tune(job(), str(draft), costs=table, effort=EFFORT, folder=tmp_path)
    grid = full_grid(found.subject, job(), tmp_path / tuning.TABLE_FILE, EFFORT)
    assert len(grid) > 10
    ranked = measured_grid(found, job(), [*grid, NO_SPECULATION])
    fixed = [entry for entry in ranked if entry.setting.shape is not None]
    assert found.choice.tokens_per_second >= fixed[0].tokens_per_second - 1e-9, "no fixed shape is better"
    assert found.choice.tokens_per_second >= 0.95 * ranked[0].tokens_per_second
    assert found.choice.tokens_per_second > ranked[-1].tokens_per_second, "there was something to choose"


def test_what_is_expected_is_what_decoding_with_the_choice_gives(found_once: Tuned):
    found = found_once
    assert found.projected
    assert found.measured is not None
    assert found.measured.tau == pytest.approx(found.choice.tau)
    assert found.measured.tokens_per_second == pytest.approx(found.choice.tokens_per_second)
    assert found.measured.plain_tokens_per_second == pytest.approx(found.plain.tokens_per_second)


def test_expectations_of_traced_shapes_are_those_of_decoding_them(found_once: Tuned):
    traced = [entry for entry in found_once.considered if entry.setting.shape is not None]
    runs = decode_all(job(), [found_once.subject.spec(entry.setting) for entry in traced[:4]])
    for entry, decoded in zip(traced, runs, strict=False):
        steps = [step for run in decoded for step in run.steps]
        assert entry.tau == pytest.approx(sum(s.emitted for s in steps) / len(steps))
        assert entry.nodes == pytest.approx(sum(s.nodes for s in steps) / len(steps))


def test_a_drafter_that_is_never_right_is_not_used(bad_draft: Path, tmp_path: Path):
    found = tune(job(), str(bad_draft), costs=costs(), effort=EFFORT, folder=tmp_path)
    assert found.counts is not None
    assert float(found.counts.hits.sum()) == 0
    assert not found.choice.setting.drafts
    assert found.spec is None
    assert found.choice.tau == 1.0
    assert keep(found, shared_target(), None) is None
    assert not (bad_draft / "drafter.json").exists()


def test_a_drafter_too_dear_for_its_acceptance_is_not_used(draft: Path):
    assert not tune(job(), str(draft), costs=costs(per_level=50.0), effort=EFFORT).choice.setting.drafts


def test_options_that_the_user_gives_stay(draft: Path):
    found = tune(job(), f"{draft}:depth=3,grow=fixed", costs=costs(per_level=0.01), effort=EFFORT)
    assert {entry.setting.options.get("depth", "3") for entry in found.considered} == {"3"}
    assert {entry.setting.options["grow"] for entry in found.considered} == {"fixed"}


@pytest.mark.parametrize("spec", ["lookup", "suffix:branches=1", "recycling"])
def test_text_drafters_are_tuned_by_decoding(spec: str):
    found = tune(job(1), spec, costs=costs(per_level=0, per_node=0.001), effort=EFFORT)
    assert found.choice.setting.drafts
    assert found.counts is None
    best = max(entry.tokens_per_second for entry in found.considered)
    assert found.choice.tokens_per_second == pytest.approx(best)


def test_drawn_children_are_tuned_by_decoding(draft: Path):
    found = tune(job(1, temperature=1.0), f"{draft}:children=drawn", costs=costs(per_level=0.01, per_node=0.001),
                 effort=Effort(depths=(1, 2), budgets=(4,), few=1, finalists=1))  # fmt: skip
    assert {entry.setting.growth for entry in found.considered} >= {"fixed", "dyspec", "calibrated"}
    assert found.counts is None


def test_tuning_on_this_machine_learns_prices_from_decoding(draft: Path, tmp_path: Path):
    told: list[str] = []
    small = Effort(depths=(1, 2), budgets=(4,), few=1, finalists=1, repeats=1)
    found = tune(job(1, max_new_tokens=8), str(draft), effort=small, folder=tmp_path,
                 tell=lambda what, done, total: told.append(what))  # fmt: skip
    assert not found.projected
    table: Any = found.costs
    assert table.proposals
    assert table.per_step > 0
    assert found.measured is not None
    assert found.measured.tokens_per_second > 0
    assert {"measuring verification", "measuring acceptance", "decoding with the choice"} <= set(told)


# --- The grid ----------------------------------------------------------------------------------------------


def raced(
    monkeypatch: pytest.MonkeyPatch, found: Tuned, seconds: Any, count: int, rows: int = 8
) -> tuple[list[int], list[str]]:
    """Depths of chains in the order of a race in which a chain of depth d takes seconds(d, prompt, again) a token."""
    decoded_again: list[str] = []

    def one(job: Job, spec: str, number: int, again: bool = False) -> Decoded:
        depth = int(spec.rpartition("depth=")[2].partition(",")[0])
        return Decoded((1,), (Step(1, depth, depth, 1),), (0.0,), (1.0,), (0.0,), seconds(depth, number, again))

    def everything(job: Job, specs: Any, tell: Any = None) -> Any:
        decoded_again.extend(specs)
        return [[one(job, spec, number, True) for number in range(len(job.prompts))] for spec in specs]

    monkeypatch.setattr(grids, "decode_one", one)
    monkeypatch.setattr(grids, "decode_all", everything)
    settings = list(chain_settings(found.subject, count, tuple(range(1, count + 1))))
    many = Job(shared_target(), ((1, 2),) * rows)
    ranked = measured_grid(replace(found, projected=False), many, settings)
    return [int(entry.setting.options["depth"]) for entry in ranked], decoded_again


def test_a_race_ends_with_the_fastest_and_never_drops_the_choice(monkeypatch: pytest.MonkeyPatch, found_once: Tuned):
    found = replace(found_once, choice=replace(found_once.choice, setting=next(chain_settings(found_once.subject, 1))))
    order, again = raced(monkeypatch, found, lambda depth, number, again: 1 / depth, 64)
    assert order[:4] == [64, 63, 62, 61]
    assert order[4] == 1, "the choice came along to the end, though the slowest"
    assert order[5:] == list(range(60, 1, -1)), "those that left later stand first"
    assert len(again) == 5


def test_luck_in_the_race_does_not_count_in_the_end(monkeypatch: pytest.MonkeyPatch, found_once: Tuned):
    """A setting that was lucky whenever it was measured in the race is measured once more."""
    order, _ = raced(
        monkeypatch, found_once, lambda depth, number, again: 0.001 if depth == 3 and not again else 1 / depth, 8
    )
    assert order.index(3) > 0


def test_a_race_comes_to_all_prompts_in_doubling_rounds():
    assert rounds(1) == [1]
    assert rounds(2) == [1, 2]
    assert rounds(12) == [1, 2, 4, 8, 12]


# --- Prices ------------------------------------------------------------------------------------------------


def test_an_expectation_by_hand():
    steps = [Step(10, 3, 3, 4), Step(14, 3, 3, 1)]
    setting = Setting({"depth": "3"}, None, "fixed")
    found = expectation(setting, steps, Prices(costs()))
    seconds = 2 * (0.2 * 3 + 1.0 + 0.05 * 3 + 0.01) + 0.02 * 5
    assert found.tau == 2.5
    assert found.tokens_per_second == pytest.approx(5 / seconds)


def test_learned_prices_replace_those_of_the_table():
    steps = (Step(1, 2, 0, 2), Step(3, 2, 0, 1), Step(4, 2, 0, 2))
    run = Decoded((1,), steps, (0.5, 0.5, 0.5), (2.2, 2.2, 2.2), (0.3, 0.2, 0.3), 9.0)
    setting, prices = Setting({"depth": "2"}, None, "eagle2"), Prices(costs())
    prices.learn([(setting, [run])])
    assert prices.factor_of["eagle2"] == pytest.approx(2.0)
    assert prices.step(setting, steps[0]) == pytest.approx(0.5 + 2.2 + 0.3)
    assert prices.step(setting, steps[1]) == pytest.approx(0.5 + 2.2 + 0.2)
    assert expectation_of(setting, [run], prices).tokens_per_second == pytest.approx(5 / (3 * 2.7 + 0.8))


def test_where_decoding_is_timed_here_its_own_seconds_are_what_is_expected():
    steps = tuple(Step(1, 2, 0, 2) for _ in range(40))
    drafts, verifies = (5.0, *[0.5] * 39), (*[2.0] * 39, 900.0)
    run = Decoded((1,), steps, drafts, verifies, (0.25,) * 40, 999.0)
    setting, prices = Setting({"depth": "2"}, None, "eagle2"), Prices(costs(), timed=True)
    seconds = 5.0 + 39 * 0.5 + 40 * 2.0 + 40 * 0.25  # the first step digests the prompt; 900 is a hiccup
    assert expectation_of(setting, [run], prices).tokens_per_second == pytest.approx(80 / seconds)
    assert expectation_of(setting, [], prices).tokens_per_second == 0.0


def test_the_rest_of_a_step_is_split_robustly_into_step_and_token():
    emitted = (1, 2, 3, 4) * 5
    rest = tuple(100.0 if n == 7 else 0.5 + 0.25 * count for n, count in enumerate(emitted))
    run = Decoded((), tuple(Step(1, 1, 0, count) for count in emitted), (0.0,) * 20, (1.0,) * 20, rest, 1.0)
    assert overhead_of([run]) == pytest.approx((0.5, 0.25))
    assert overhead_of([]) == (0.0, 0.0)
    assert verify_ratios([run], costs()) == pytest.approx([1 / 1.05] * 20)


def test_typical_times_ignore_a_hiccup_and_not_the_spread():
    assert typical([1.0] * 39 + [1000.0] * 1) == 1.0
    assert typical([1.0, 3.0] * 20) == 2.0
    assert typical([]) == 0.0


def test_near_takes_the_neighbours():
    assert near((1, 2, 4, 8), 5) == (2, 4, 8)
    assert near((1, 2, 4, 8), 100) == (4, 8)
    assert near((3,), 1) == (3,)


# --- What can be tuned, and where the choice goes ------------------------------------------------------------


def test_what_cannot_be_tuned_is_refused_in_one_line(draft: Path):
    with pytest.raises(SpecdecError, match="two drafters"):
        subject_of(f"suffix+{draft}", shared_target())


def tuned_for(directory: Path, tmp_path: Path, **prices: Any) -> Any:
    return tune(job(), str(directory), costs=costs(**prices), effort=EFFORT, folder=tmp_path)


def test_the_choice_is_kept_beside_the_draft_model_and_loaded_from_there(tmp_path: Path):
    folder, work = tmp_path / "draft", tmp_path / "work"
    work.mkdir()
    shared_draft().save_pretrained(folder)
    found = tuned_for(folder, work, per_node=0.01, per_level=0.02)
    kept = keep(found, shared_target(), work / tuning.TABLE_FILE)
    assert kept is not None
    assert kept.path == folder / "drafter.json"
    drafter: Any = load_drafter(kept.spec, shared_target())
    if found.choice.setting.shape is not None:
        assert drafter.policy.shape == found.choice.setting.shape
    again = decode_all(job(), [kept.spec])[0]
    assert sum(len(run.steps) for run in again) * found.choice.tau == pytest.approx(2 * 15)


def test_tuning_again_forgets_the_earlier_choice_and_keeps_other_options(tmp_path: Path):
    folder, work = tmp_path / "draft", tmp_path / "work"
    work.mkdir()
    shared_draft().save_pretrained(folder)
    (folder / "acceptance.json").write_text(json.dumps([[0], [1], [2]]))
    old = {"grow": "fixed", "depth": "1", "budget": "3", "table": "acceptance.json", "min_confidence": "0.2"}
    write_drafter_json(folder, DrafterJson("draft-model", old, fingerprint(shared_target())))
    found = tuned_for(folder, work, per_node=0.5, per_level=0.01)
    keep(found, shared_target(), work / tuning.TABLE_FILE)
    options = read_drafter_json(folder).options
    assert "min_confidence" not in options
    assert {k: v for k, v in options.items() if k != "table"} == {
        k: v for k, v in found.choice.setting.options.items() if k != "table"
    }
    drafter: Any = load_drafter(folder, shared_target())
    assert drafter is not None


def test_a_word_becomes_a_directory_with_out_and_a_specification_without(tmp_path: Path):
    found = tune(job(1), "suffix", costs=costs(per_level=0, per_node=0.001), effort=EFFORT)
    said = keep(found, shared_target(), None)
    assert said is not None
    assert said.path is None
    assert said.spec == found.spec
    kept = keep(found, shared_target(), None, tmp_path / "mine")
    assert kept is not None
    mine: Any = load_drafter(tmp_path / "mine", shared_target())
    theirs: Any = load_drafter(said.spec, shared_target())
    assert (mine.budget, mine.branches) == (theirs.budget, theirs.branches)


def test_a_table_that_a_word_needs_is_kept_in_the_cache(tmp_path: Path):
    found = tune(
        job(), "early-exit:layer=3,grow=fixed,budget=6", costs=costs(per_node=0.001), effort=EFFORT, folder=tmp_path
    )
    assert "table" in found.choice.setting.options, "a chain has another budget"
    said = keep(found, shared_target(), tmp_path / tuning.TABLE_FILE)
    assert said is not None
    (tmp_path / tuning.TABLE_FILE).unlink()
    drafter: Any = load_drafter(said.spec, shared_target())
    assert drafter.policy.shape == found.choice.setting.shape


def test_out_is_refused_before_anything_is_measured(draft: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(SpecdecError, match="files of its own"):
        check_out(subject_of(str(draft), shared_target()), tmp_path / "new")
    with pytest.raises(SpecdecError, match="not an empty directory"):
        check_out(subject_of("suffix", shared_target()), tmp_path / "full")


def test_settings_of_a_directory_take_back_its_own_options():
    subject = Subject(
        "dir", {}, {"table": "x", "budget": "9", "children": "drawn"}, "D", frozenset({"grow", "children"})
    )
    chain = next(iter(chain_settings(subject, 2, (1, 2))))
    assert subject.spec(chain) == "dir:table=none,budget=1,children=chosen,grow=fixed,depth=1"
    drawn = next(iter(drawn_chains(subject, 2, (1, 2), temperature=1.0)))
    assert subject.spec(drawn) == "dir:table=none,budget=1,children=drawn,grow=fixed,depth=1"


@pytest.mark.parametrize("given", [{}, {"children": "chosen"}, {"children": "drawn"}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_children_are_varied_when_sampling_unless_they_are_given(given: dict[str, str], temperature: float):
    subject = Subject("dir", given, {}, "D", frozenset({"grow", "children"}))
    trees = following_settings(subject, 2, (2,), (4,), temperature=temperature)
    chains = drawn_chains(subject, 2, (2,), temperature=temperature)
    kinds = {entry.options.get("children", given.get("children", "chosen")) for entry in [*trees, *chains]}
    assert kinds == ({given["children"]} if given else {"chosen", "drawn"} if temperature else {"chosen"})


def test_drawn_children_are_tried_when_sampling(draft: Path):
    found = tune(job(1, temperature=1.0), str(draft), costs=costs(per_level=0.01, per_node=0.001),
                 effort=Effort(depths=(1, 2), budgets=(4,), few=1, finalists=1))  # fmt: skip
    ways = {(entry.setting.growth, entry.setting.options.get("children")) for entry in found.considered}
    assert ways >= {("fixed", None), ("fixed", "drawn"), ("calibrated", None), ("calibrated", "drawn")}
