"""Measured acceptance: right denominators, the published construction from it, and files that come back as written."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.measured import MeasuredDrafter
from specdec.errors import UnknownDrafter
from specdec.grow.accuracy import AcceptanceCounts, head_accuracy
from specdec.grow.fixed import FixedGrowth
from specdec.grow.named import growth_named
from specdec.grow.shape import greedy_shape, shape_of
from specdec.probe import target_of
from specdec.tree import TokenTree
from tests.tiny import prompt, shared_draft, shared_target

MEDUSA_63 = {
    "": 10, "0": 10, "1": 7, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1, "8": 1, "9": 1,
    "00": 10, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1, "10": 2, "20": 1, "000": 2,
}  # fmt: skip
"""How many children each node of the published 63-node table of Medusa has (`mc_sim_7b_63`); all others have none."""


def published_table() -> list[tuple[int, ...]]:
    return [(*map(int, node), rank) for node, count in MEDUSA_63.items() for rank in range(count)]


def accuracies_behind(table: list[tuple[int, ...]], depth: int, ranks: int) -> tuple[tuple[float, ...], ...]:
    """A table a[depth][rank] that the greedy construction turns into these paths, by the perceptron rule on log a.

    The construction takes a node before another when its product is larger, so every path inside must beat every open
    slot outside: linear constraints on the logs.
    """
    inside = set(table)
    outside = {(*p[:-1], p[-1] + 1) for p in inside if p[-1] + 1 < ranks} | {(*p, 0) for p in inside if len(p) < depth}
    outside -= inside

    def features(path: tuple[int, ...]) -> torch.Tensor:
        x = torch.zeros(depth, ranks, dtype=torch.float64)
        for level, rank in enumerate(path):
            x[level, rank] += 1
        return x.flatten()

    gaps = torch.stack([features(p) - features(q) for p in inside for q in outside])
    falling = torch.stack([features((0,) * d + (r,)) - features((0,) * d + (r + 1,))
                           for d in range(depth) for r in range(ranks - 1)])  # fmt: skip
    below_one = -torch.eye(depth * ranks, dtype=torch.float64)[::ranks]
    constraints = torch.cat([gaps, falling, below_one])
    logs = torch.zeros(depth * ranks, dtype=torch.float64)
    for _ in range(50_000):
        margins = constraints @ logs
        worst = int(margins.argmin())
        if margins[worst] > 0:
            break
        logs += constraints[worst]
    logs = 5 * logs.view(depth, ranks) / logs.abs().max()
    return tuple(tuple(row) for row in logs.exp().tolist())


def test_medusas_construction_gives_the_published_tree_from_accuracies_that_are_behind_it() -> None:
    table = published_table()
    assert len(table) == 63
    shape = greedy_shape(63, accuracies_behind(table, 4, 10))
    assert shape == shape_of(table)
    assert [len(level) for level in shape.levels[1:]] == [10, 28, 23, 2]
    assert sum(not children for children in shape.topology.children) == 42


def test_the_construction_is_that_of_the_definition() -> None:
    """Each step takes the most valuable of all next siblings and first children, written down as such."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.rand(3, 5, dtype=torch.float64, generator=generator).sort(descending=True).values
        accuracy = tuple(map(tuple, rows.tolist()))
        chosen: list[tuple[int, ...]] = [(0,)]
        while len(chosen) < 20:
            candidates = {(*p[:-1], p[-1] + 1) for p in chosen if p[-1] < 4} | {(*p, 0) for p in chosen if len(p) < 3}
            open_slots = candidates - set(chosen)
            chosen.append(max(open_slots, key=lambda p, a=accuracy: _value(p, a)))
        assert greedy_shape(20, accuracy) == shape_of(chosen)


def _value(path: tuple[int, ...], accuracy: Any) -> float:
    value = 1.0
    for level, rank in enumerate(path):
        value *= accuracy[level][rank]
    return value


# --- Counting -----------------------------------------------------------------------------------------------


def test_each_head_is_divided_by_the_positions_whose_token_is_known() -> None:
    """Heads that always know: every entry is 1 for rank 0, however far ahead the head looks and short the text is."""
    texts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1]]
    guesses = []
    for text in texts:
        ids = torch.full((len(text), 3, 2), 99)
        for at in range(len(text)):
            for head in range(3):
                if at + 2 + head < len(text):
                    ids[at, head, 0] = text[at + 2 + head]
        guesses.append(ids)
    counts = head_accuracy(guesses, texts)
    assert counts.trials[:, 0].tolist() == [6 + 1, 5, 4]
    assert counts.hits[:, 0].tolist() == [6 + 1, 5, 4]
    assert counts.by_depth_and_rank() == ((1.0, 0.0), (1.0, 0.0), (1.0, 0.0))
    assert head_accuracy(guesses, texts, first=1).hits.sum() < 16  # looking one token short is seen


def test_acceptance_is_counted_where_a_node_was_reached() -> None:
    tree = TokenTree.of_nodes(torch.tensor([0, 0]), [[(0, 1), (0, 2), (1, 3), (2, 4), (2, 5)]] * 2)
    counts = AcceptanceCounts(3, 4)
    counts.observe(tree, [[0, 2, 5], [0]])
    assert counts.trials.tolist() == [[2, 2, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert counts.hits.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert counts.by_rank() == (0.0, 2 / 3)
    assert counts.by_depth_and_rank() == ((0.0, 0.5), (0.0, 1.0))


def test_a_measured_drafter_counts_what_the_statistics_say(tmp_path: Path) -> None:
    inner = DraftModelDrafter(target_of(shared_draft()), depth=3, budget=12)
    measured = MeasuredDrafter(inner, depth=3, width=8)
    output: Any = specdec.generate(
        shared_target(), **prompt(2), drafter=measured, max_new_tokens=60, return_dict_in_generate=True
    )
    reached = Counter(min(step.accepted, 2) for step in output.stats.steps)
    assert measured.counts.trials[0, 0] == len(output.stats.steps)
    assert measured.counts.trials[2, 0] <= reached[2]
    assert 0 < measured.counts.hits.sum() <= sum(step.accepted for step in output.stats.steps)
    measured.counts.save(tmp_path / "counts.json")
    assert AcceptanceCounts.of_json(json.loads((tmp_path / "counts.json").read_text()), tmp_path).by_rank() == (
        measured.counts.by_rank()
    )
    for word in ("sequoia", "fixed"):
        policy = growth_named(word, depth=3, budget=7, table=str(tmp_path / "counts.json"))
        assert isinstance(policy, FixedGrowth)
        assert policy.shape.num_nodes == 8


# --- Files --------------------------------------------------------------------------------------------------


def test_a_list_of_paths_and_a_list_of_rates_are_tables_too(tmp_path: Path) -> None:
    paths, rates = tmp_path / "paths.json", tmp_path / "rates.json"
    paths.write_text("[[0, 0], [1], [0, 2, 1]]")
    rates.write_text("[0.5, 0.3, 0.1]")
    fixed = growth_named("fixed", depth=2, table=str(paths))
    assert isinstance(fixed, FixedGrowth)
    assert fixed.shape == shape_of([(0,), (1,), (0, 0), (0, 2)])  # within the depth
    sequoia = growth_named("sequoia", depth=2, budget=4, table=str(rates))
    assert isinstance(sequoia, FixedGrowth)
    assert sequoia.shape.width <= 3
    with pytest.raises(UnknownDrafter, match="leaves out some ranks"):
        growth_named("fixed", depth=2, table=str(paths), children="drawn")


@pytest.mark.parametrize("word", ["fixed", "sequoia"])
@pytest.mark.parametrize(
    "content",
    [
        "{", '"text"', "3", "{}", "[1.5, 0.2]", "[-1]", '[["a"]]', "[[]]", '{"format": "specdec-acceptance-1"}',
        '{"format": "specdec-acceptance-1", "trials": [[1]], "hits": [[2]]}',
        '{"format": "specdec-acceptance-1", "trials": [[0]], "hits": [[0]]}',
        '{"format": "specdec-acceptance-1", "trials": [1], "hits": [1]}',
        '{"format": "specdec-acceptance-1", "trials": [[1, "x"]], "hits": [[1, 1]]}',
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_gets_one_line(word: str, content: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(UnknownDrafter) as error:
        growth_named(word, depth=2, table=str(tmp_path / "table.json"))
    assert "\n" not in str(error.value)
