"""Learned acceptance: what is counted, that it finds the true rates, and that files bring it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import UnknownDrafter
from specdec.grow.calibration import EDGES, AcceptanceTable, CalibratedGrowth, DrawnValues
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
    assert float(table.of(torch.tensor([0.6]))[0]) < 0.2  # what is left is the belief of 8 trials


def test_of_drawn_children_the_younger_siblings_of_an_accepted_one_were_not_tried() -> None:
    policy = CalibratedGrowth(3, 1, 3, "drawn")
    tree = grown(policy)
    assert len(tree.shapes[0].children[0]) == 3
    policy.observe(tree, [[0, 2]])
    table = policy.tables["drawn"]
    assert (table.trials.sum(1)[:3].tolist(), table.accepted.sum(1)[:3].tolist()) == ([1, 1, 0], [0, 1, 0])
    chosen = CalibratedGrowth(3, 1, 3, "chosen")
    tree = grown(chosen)
    chosen.observe(tree, [[0, 2]])
    table = chosen.tables["chosen"]
    assert (table.trials.sum(1)[:3].tolist(), table.accepted.sum(1)[:3].tolist()) == ([1, 1, 1], [0, 1, 0])


def test_probabilities_are_counted_in_their_bins() -> None:
    policy = CalibratedGrowth(3, 1, 3, "chosen")
    policy.observe(grown(policy), [[0]])
    bins = [int(torch.bucketize(LAW[rank], torch.tensor(EDGES))) for rank in range(3)]
    assert [int(policy.tables["chosen"].trials[rank].argmax()) for rank in range(3)] == bins
    assert len(set(bins)) > 1


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


def test_the_expected_acceptance_of_a_slot_is_that_over_the_whole_law() -> None:
    """The bins' masses give the same as a sum over the vocabulary, for laws with more tokens than are looked at."""
    generator = torch.Generator().manual_seed(2)
    table = AcceptanceTable("drawn")
    table.rates = torch.rand(table.rates.shape, dtype=torch.float64, generator=generator)
    for sharpness in (0.0, 1.0, 4.0):
        q = (sharpness * torch.randn(3, 500, dtype=torch.float64, generator=generator)).softmax(-1)
        drawn = torch.stack([torch.randperm(500, generator=generator)[:4] for _ in range(3)])
        shares = q.gather(1, drawn)
        keys, reaches = DrawnValues(table).of(q, shares)
        for row in range(3):
            stay, left = 1.0, q[row].clone()
            for draw in range(4):
                rates = table.rates[draw][table.bins(q[row])]
                expected = float((left * rates).sum() / left.sum())
                assert float(keys[row, draw]) == pytest.approx(stay * expected, rel=1e-6)
                accept = float(rates[drawn[row, draw]])
                assert float(reaches[row, draw]) == pytest.approx(stay * accept, rel=1e-6)
                stay *= 1 - accept
                left[drawn[row, draw]] = 0.0


def test_learning_makes_the_tree_deep_where_the_draft_is_right() -> None:
    """A draft that is the target: every first draw is accepted, whatever its probability, and one path is the tree."""
    twin = perturbed(shared_target(), amount=0.0)
    drafter = DraftModelDrafter(target_of(twin), depth=6, budget=6, width=3, grow="calibrated", children="drawn")
    torch.manual_seed(0)
    output: Any = specdec.generate(
        shared_target(), **prompt(3), drafter=drafter, max_new_tokens=240, do_sample=True, temperature=1.5,
        return_dict_in_generate=True,
    )  # fmt: skip
    early = [step.accepted for step in output.stats.steps[:30]]
    late = [step.accepted for step in output.stats.steps[-30:]]
    assert sum(late) > sum(early)
    assert sum(late) > 5 * 30


def test_a_saved_table_comes_back(tmp_path: Path) -> None:
    policy = CalibratedGrowth(6, 2, 3, "drawn")
    policy.observe(grown(policy), [[0, 1]])
    policy.save(tmp_path / "tables.json")
    restored = CalibratedGrowth(6, 2, 3, "drawn", tmp_path / "tables.json")
    for kind, table in policy.tables.items():
        assert torch.equal(restored.tables[kind].rates, table.rates)
    assert float(restored.tables["drawn"].trials.sum()) > 0


@pytest.mark.parametrize("damage", ["format", "edges", "shape", "negative", "impossible", "text", "missing"])
def test_a_file_that_is_no_calibration_gets_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "tables.json"
    CalibratedGrowth(6, 2, 3).save(path)
    content = json.loads(path.read_text())
    if damage == "format":
        content["format"] = "another"
    elif damage == "edges":
        content["edges"] = [0.5]
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
