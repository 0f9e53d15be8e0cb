"""Learned acceptance: what is counted, that it finds the true rates, and that files bring it back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import UnknownDrafter
from specdec.grow.calibration import KNOTS, LOOKED_AT, AcceptanceTable, CalibratedGrowth, DrawnValues
from specdec.grow.chosen import ChosenGrowth
from specdec.grow.policy import Frontier
from specdec.probe import target_of
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree
from tests.tiny import perturbed, prompt, shared_target

LAW = torch.tensor([0.55, 0.2, 0.15, 0.07, 0.03])


def grown(policy: CalibratedGrowth, rows: int = 1, seed: int = 0) -> TokenTree:
    def expand(frontier: Frontier) -> Tensor:
        return LAW.log().expand(*frontier.tokens.shape, -1)

    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(do_sample=True)
    return policy.grow(torch.zeros(rows, dtype=torch.long), params, Chooser(generator), 9, expand, 5).tree


def test_rates_are_those_of_what_was_seen() -> None:
    """2000 outcomes of a child of rank 1 and q = 0.3 that is right in 3 of 10: off by 0.06 with odds below 1e-8."""
    table = AcceptanceTable("drawn")
    generator = torch.Generator().manual_seed(0)
    fates = (torch.rand(2000, generator=generator) < 0.3).tolist()
    for start in range(0, 2000, 10):
        table.learn([(1, 0.3, fate) for fate in fates[start : start + 10]])
    rates = table.of(torch.tensor([0.3, 0.3, 0.3]))
    assert abs(float(rates[1]) - 0.3) < 0.06
    untouched = AcceptanceTable("drawn").of(torch.tensor([0.3, 0.3, 0.3]))
    assert (rates[0], rates[2]) == (untouched[0], untouched[2])


def test_old_outcomes_are_forgotten() -> None:
    table = AcceptanceTable("chosen", memory=50)
    table.learn([(0, 0.6, True)] * 500)
    for _ in range(60):
        table.learn([(0, 0.6, False)] * 10)
    assert float(table.of(torch.tensor([0.6]))[0]) < 0.2  # what is left is the belief of 4 acceptances


def test_of_drawn_children_the_younger_siblings_of_an_accepted_one_were_not_tried() -> None:
    policy = CalibratedGrowth(3, 1, 3, "drawn")
    tree = grown(policy)
    assert len(tree.shapes[0].children[0]) == 3
    policy.observe(tree, [[0, 2]])
    table = policy.tables["drawn"]
    assert table.trials.sum(1)[:3].tolist() == pytest.approx([1, 1, 0])
    assert table.accepted.sum(1)[:3].tolist() == pytest.approx([0, 1, 0])
    chosen = CalibratedGrowth(3, 1, 3, "chosen")
    tree = grown(chosen)
    chosen.observe(tree, [[0, 2]])
    table = chosen.tables["chosen"]
    assert table.trials.sum(1)[:3].tolist() == pytest.approx([1, 1, 1])
    assert table.accepted.sum(1)[:3].tolist() == pytest.approx([0, 1, 0])


def test_an_outcome_counts_for_the_knots_around_its_probability() -> None:
    """By nearness in log q: 0.55 lies ln(1.1) / ln(1.5) of the way from 0.5 to 0.75."""
    policy = CalibratedGrowth(3, 1, 3, "chosen")
    policy.observe(grown(policy), [[0]])
    trials = policy.tables["chosen"].trials
    assert [KNOTS[int(trials[rank].argmax())] for rank in range(3)] == [0.5, 0.25, 0.125]
    part = math.log(1.1) / math.log(1.5)
    assert trials[0, KNOTS.index(0.5) :][:2].tolist() == pytest.approx([1 - part, part], abs=1e-5)


def test_before_anything_was_learned_chosen_trees_are_those_of_the_draft_probabilities() -> None:
    """No probability between two knots is worth what its neighbour is: the order of the draft stays."""
    generator = torch.Generator().manual_seed(3)

    def expand(frontier: Frontier) -> Tensor:
        laws = torch.Generator().manual_seed(int(frontier.tokens.sum()) + 7 * frontier.tokens.shape[1])
        return 2 * torch.randn(*frontier.tokens.shape, 40, generator=laws)

    for budget in (4, 12, 30):
        arguments = (torch.tensor([1]), SamplingParams(), Chooser(generator), 9, expand, 40)
        learned = CalibratedGrowth(budget, 5, 6).grow(*arguments).tree
        plain = ChosenGrowth(budget, 5, 6).grow(*arguments).tree
        assert learned.shapes == plain.shapes
        assert torch.equal(learned.tokens, plain.tokens)


def test_what_was_learned_moves_a_rank_without_losing_the_order_within_it() -> None:
    table = AcceptanceTable("chosen")
    table.learn([(1, share, True) for share in (0.1, 0.2, 0.3) for _ in range(60)])
    shares = torch.linspace(0.1, 0.3, 20, dtype=torch.float64)
    first, second = table.of(torch.stack([shares, shares], 1)).unbind(1)
    assert torch.allclose(first, shares)
    assert bool((second > 2 * first).all())
    assert bool((second.diff() > 0).all())


def test_a_child_without_draft_probability_is_worth_nothing_if_it_was_chosen() -> None:
    shares = torch.tensor([0.5, 2.0**-30, 0.0])
    assert AcceptanceTable("chosen").of(shares).tolist() == pytest.approx([0.5, 2.0**-30, 0.0])
    drawn = AcceptanceTable("drawn").of(shares)
    assert bool((drawn > 0).all())
    assert drawn.isfinite().all()


def test_a_tree_of_another_drafter_teaches_nothing() -> None:
    policy = CalibratedGrowth(6, 2, 3, "chosen")
    grown(policy)
    foreign = TokenTree.of_nodes(torch.tensor([0]), [[(0, 4), (1, 3)]])
    policy.observe(foreign, [[0, 1]])
    assert float(policy.tables["chosen"].trials.sum()) == 0
    policy.observe(foreign, [[0, 1]])  # nor does a step in which it was not asked
    tree = grown(policy)
    policy.observe(tree.up_to_depth(1), [[0, 1]])  # one that was cut does, as far as it goes
    assert float(policy.tables["chosen"].trials.sum()) == len(tree.shapes[0].children[0])


@pytest.mark.parametrize(("vocabulary", "within"), [(LOOKED_AT, 1e-9), (60, 0.05), (500, 0.05)])
def test_the_expected_acceptance_of_a_slot_is_that_over_the_whole_law(vocabulary: int, within: float) -> None:
    """A sum over the vocabulary, which takes the tokens beyond the likeliest ones as one."""
    generator = torch.Generator().manual_seed(2)
    table = AcceptanceTable("drawn")
    table.set_rates(
        0.1 + 0.9 * torch.rand(table.rates.shape, dtype=torch.float64, generator=generator).cummax(1).values
    )
    for sharpness in (0.0, 1.0, 4.0, 20.0):
        q = (sharpness * torch.randn(3, vocabulary, dtype=torch.float64, generator=generator)).softmax(-1)
        drawn = torch.stack([torch.randperm(vocabulary, generator=generator)[:4] for _ in range(3)])
        shares = q.gather(1, drawn)
        keys, reaches = DrawnValues(table).of(DrawnValues(table).seen(q), shares)
        for row in range(3):
            stay, left = 1.0, q[row].clone()
            for draw in range(4):
                rates = table.of(q[row, :, None].expand(-1, 4))[:, draw]
                expected = float((left * rates).sum() / left.sum())
                assert float(keys[row, draw]) == pytest.approx(stay * expected, rel=within)
                accept = float(rates[drawn[row, draw]])
                assert float(reaches[row, draw]) == pytest.approx(stay * accept, rel=1e-9)
                stay *= 1 - accept
                left[drawn[row, draw]] = 0.0
        least, most = DrawnValues(table).first
        assert bool((keys[:, 0] >= least - 1e-9).all())
        assert bool((keys[:, 0] <= most + 1e-9).all())


def test_learning_makes_the_tree_deep_where_the_draft_is_right() -> None:
    """A draft that is the target: every first draw is accepted, whatever its probability, and one path is the tree.

    The tables begin with the opposite, so that trees are wide at first.
    """
    twin = perturbed(shared_target(), amount=0.0)
    drafter = DraftModelDrafter(target_of(twin), depth=6, budget=6, width=3, grow="calibrated", children="drawn")
    assert isinstance(drafter.policy, CalibratedGrowth)
    drafter.policy.tables["drawn"].learn([(0, share, False) for share in KNOTS for _ in range(40)])
    torch.manual_seed(0)
    output: Any = specdec.generate(
        shared_target(), **prompt(3), drafter=drafter, max_new_tokens=240, do_sample=True, temperature=1.5,
        return_dict_in_generate=True,
    )  # fmt: skip
    early = [step.accepted for step in output.stats.steps[:6]]
    late = [step.accepted for step in output.stats.steps[-8:-2]]  # the end has less room
    assert sum(late) > sum(early)
    assert sum(late) > 5 * 6


def test_a_saved_table_comes_back(tmp_path: Path) -> None:
    policy = CalibratedGrowth(6, 2, 3, "drawn")
    policy.observe(grown(policy), [[0, 1]])
    policy.save(tmp_path / "tables.json")
    restored = CalibratedGrowth(6, 2, 3, "drawn", tmp_path / "tables.json")
    for kind, table in policy.tables.items():
        assert torch.equal(restored.tables[kind].rates, table.rates)
    assert float(restored.tables["drawn"].trials.sum()) > 0


@pytest.mark.parametrize("damage", ["format", "knots", "shape", "negative", "impossible", "text", "missing"])
def test_a_file_that_is_no_calibration_gets_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "tables.json"
    CalibratedGrowth(6, 2, 3).save(path)
    content = json.loads(path.read_text())
    if damage == "format":
        content["format"] = "another"
    elif damage == "knots":
        content["knots"] = [0.5]
    elif damage == "shape":
        content["drawn"]["trials"] = [[1.0]]
    elif damage == "negative":
        content["drawn"]["trials"][0][0] = -1.0
    elif damage == "impossible":
        content["drawn"]["accepted"][0][0] = 7.0
    elif damage == "text":
        content["chosen"]["trials"] = "many"
    path.write_text("" if damage == "missing" else json.dumps(content))
    with pytest.raises(UnknownDrafter) as error:
        CalibratedGrowth(6, 2, 3, "chosen", path)
    assert "\n" not in str(error.value)
