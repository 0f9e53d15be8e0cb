"""Cost tables: interpolation, fits, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specdec.costs.interpolation import interpolated, least_squares, median_of
from specdec.costs.table import CostTable, DraftPoint, VerifyPoint, step_seconds
from specdec.errors import SpecdecError

CLIFF = {1: 1.0, 2: 1.9, 3: 2.8, 4: 2.0, 8: 2.4}
"""Two and three rows cost more than four, as with unpacked float32 products."""


def table(**fields: object) -> CostTable:
    points = [VerifyPoint(batch, context, nodes, seconds * batch * (1 + context / 100))
              for batch in (1, 4) for context in (0, 100) for nodes, seconds in CLIFF.items()]  # fmt: skip
    return CostTable(tuple(points), **fields)  # type: ignore[arg-type]


def test_measured_points_come_back_as_they_are_also_where_the_curve_falls():
    assert [table().verify(nodes) for nodes in CLIFF] == list(CLIFF.values())
    assert table().verify(3) > table().verify(4), "nothing is smoothed away"


def test_between_points_the_curve_is_linear_in_nodes_context_and_batch():
    assert table().verify(6) == pytest.approx(2.2)
    assert table().verify(1, 1, 50) == pytest.approx(1.5)
    assert table().verify(1, 2, 0) == pytest.approx(2.0)
    assert table().verify(6, 2, 50) == pytest.approx(2.2 * 1.5 * 2)


def test_beyond_the_last_point_it_goes_on_and_never_falls():
    assert table().verify(12) == pytest.approx(2.8)
    assert table().verify(1, 1, 200) == pytest.approx(3.0)
    falling = [(1.0, 2.0), (2.0, 1.0)]
    assert interpolated(falling, 5.0) == 1.0
    assert interpolated(falling, 0.0) == 2.0


def test_drafting_is_fitted_to_levels_and_nodes_of_its_own_growth():
    points = [DraftPoint("fixed", levels, nodes, 1, 0.5 + 2 * levels + 0.1 * nodes)
              for levels, nodes in ((1, 1), (4, 4), (4, 24), (8, 60))]  # fmt: skip
    costs = table(proposals=(*points, DraftPoint("eagle2", 4, 24, 1, 50.0)))
    assert costs.draft(6, 30) == pytest.approx(0.5 + 12 + 3)
    assert costs.draft(4, 24, growth="eagle2") == pytest.approx(50.0)
    assert table().draft(6, 30) == 0.0, "nothing measured costs nothing"


def test_a_fit_has_no_negative_cost_and_finds_a_single_point():
    assert min(least_squares([(1.0, 1.0, 1.0), (1.0, 2.0, 2.0), (1.0, 4.0, 1.0)], [5.0, 4.0, 3.0])) >= 0
    (cost,) = least_squares([(2.0,)], [3.0])
    assert cost == pytest.approx(1.5)


def test_a_step_is_the_sum_of_its_parts_and_nothing_drafted_costs_no_drafting():
    costs = table(proposals=(DraftPoint("fixed", 1, 3, 1, 7.0),), per_step=0.25, per_token=0.5)
    drafting = costs.draft(1, 3)
    assert drafting == pytest.approx(7.0)
    assert step_seconds(costs, 3, 1, 2) == pytest.approx(7.0 + CLIFF[4] + 0.25 + 1.0)
    assert step_seconds(costs, 0, 0, 1) == pytest.approx(CLIFF[1] + 0.75)


def test_medians_and_ranges_by_hand():
    assert median_of([3.0, 1.0, 2.0]) == (2.0, 2.0)
    assert median_of([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 2.0)


def test_a_table_survives_its_file(tmp_path: Path):
    costs = table(proposals=(DraftPoint("fixed", 1, 3.5, 1, 7.0, 0.5),), per_step=0.25, source={"threads": 2})
    costs.save(tmp_path / "costs.json")
    assert CostTable.load(tmp_path / "costs.json") == costs


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "does not hold a cost table"),
        ("[]", "does not hold a cost table"),
        ('{"format": "other"}', "format 'other'"),
        ('{"format": "specdec-costs-1", "verifications": []}', "at least one verification"),
        ('{"format": "specdec-costs-1", "verifications": [[1, 1, 1, -2.0]]}', "above 0"),
        ('{"format": "specdec-costs-1", "verifications": [[1, 1, 1, NaN]]}', "above 0"),
        ('{"format": "specdec-costs-1", "verifications": [[1, 1]]}', "does not hold a cost table"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path: Path, text: str, said: str):
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(SpecdecError, match=said) as caught:
        CostTable.load(tmp_path / "costs.json")
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_how_to_get_one(tmp_path: Path):
    with pytest.raises(SpecdecError, match="--save-costs"):
        CostTable.load(tmp_path / "nothing.json")


def test_json_is_plain(tmp_path: Path):
    table().save(tmp_path / "costs.json")
    assert json.loads((tmp_path / "costs.json").read_text())["verifications"][0] == [1, 0, 1, 1.0, 0.0]
