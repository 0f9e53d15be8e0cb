"""Replays by hand, described machines, and the check of a replay against its own run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.costs.roofline import MACHINES, machine_named
from specdec.errors import SpecdecError
from specdec.tuning.recorded import Recorded, read_recorded
from specdec.tuning.simulate import capped_steps, oracle_steps, plain_steps, replayed, self_check, simulate
from specdec.tuning.traces import Step
from tests.bench.runs import record
from tests.tuning.costs import costs

STEPS = (Step(10, 4, 4, 5), Step(15, 4, 4, 1), Step(16, 4, 4, 3))
ACCEPTED = (4, 0, 2)
RUN = Recorded(STEPS, ACCEPTED, True, None, None, (1.0, 1.0, 1.0), True)


def seconds(nodes: int, tokens: int) -> float:
    """Of one step of `costs()`: drafting, verification, the rest."""
    return 0.2 * nodes + 1.0 + 0.05 * nodes + 0.01 + 0.02 * tokens


def saved(path: Path, *records: Any) -> Path:
    (path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def drafting(question: int = 1, **steps: Any) -> Any:
    made: Any = record("lookup", question)
    made["steps"].update({"drafted": [4, 4, 4], "accepted": [4, 0, 2], "emitted": [5, 1, 3], "tried": [4, 1, 3],
                          "draft": [0.1] * 3, "verify": [0.6, 0.5, 0.7], "accept": [0.0] * 3, "total": [0.8] * 3,
                          **steps})  # fmt: skip
    return made


def test_a_replay_of_one_row_adds_up_its_steps():
    expected = 9 / (seconds(4, 5) + seconds(4, 1) + seconds(4, 3))
    assert replayed([STEPS], costs()) == pytest.approx(expected)


def test_plain_steps_are_one_token_each_at_growing_contexts():
    assert plain_steps(RUN) == [Step(10 + place, 0, 0, 1) for place in range(9)]
    assert replayed([plain_steps(RUN)], costs()) == pytest.approx(1 / 1.03)


def test_the_oracle_drafts_what_is_accepted():
    assert [(step.nodes, step.emitted) for step in oracle_steps(RUN)] == [(4, 5), (0, 1), (2, 3)]


def test_a_shorter_chain_takes_more_steps_for_the_same_text():
    assert list(capped_steps(RUN, 2)) == [
        Step(10, 2, 2, 3), Step(13, 1, 1, 2),  # of the five tokens, four drafted
        Step(15, 2, 2, 1),
        Step(16, 2, 2, 3),
    ]  # fmt: skip
    for length in (1, 2, 3, 4, 9):
        steps = list(capped_steps(RUN, length))
        assert sum(step.emitted for step in steps) == 9
        assert all(step.emitted <= step.nodes + 1 for step in steps)
    assert list(capped_steps(RUN, 4)) == list(STEPS)


def test_a_batch_pads_to_its_widest_row_where_the_costs_say_so():
    uneven = [Step(1, 0, 0, 1), Step(1, 4, 4, 3)]
    # Two rows at opposite places: each step has both, 4 tokens, in the time of the wide one.
    assert replayed([uneven], costs(), 2) == pytest.approx(4 / (0.8 + 1.2 + 0.01 + 0.02 * 2))


def test_ways_of_drafting_and_the_oracle_bound():
    found = {entry.way: entry for entry in simulate([RUN], costs(), [1], [1, 2, 4, 8])}
    assert set(found) == {"length 1", "length 2", "recorded", "oracle"}, "nothing is known beyond what was drafted"
    assert found["oracle"].speedup == max(entry.speedup for entry in found.values())
    dear = {entry.way: entry for entry in simulate([RUN], costs(per_level=100.0), [1], [])}
    assert dear["oracle"].speedup == 1.0, "an oracle may draft nothing"
    assert dear["recorded"].speedup < 0.1
    tree = Recorded(STEPS, ACCEPTED, False, None, None, (1.0,) * 3, True)
    assert {entry.way for entry in simulate([tree], costs(), [1], [1, 2])} == {"recorded", "oracle"}


def test_the_replay_reproduces_the_run_it_was_recorded_in(tmp_path: Path):
    runs = read_recorded(saved(tmp_path, drafting(), drafting(2)))["lookup"]
    checked = self_check(runs)
    assert checked is not None
    assert checked.measured == pytest.approx(9 / 2.4)
    assert checked.replayed == pytest.approx(checked.measured)
    assert checked.holds
    assert self_check([RUN]) is None, "without times there is nothing to check"


def test_records_that_do_not_say_what_was_drafted_are_refused(tmp_path: Path):
    plain = record("plain")
    plain["steps"].update({"drafted": None, "accepted": None})
    with pytest.raises(SpecdecError, match="what was drafted"):
        read_recorded(saved(tmp_path, plain))


# --- Described machines ---------------------------------------------------------------------------------------


def test_a_small_batch_is_bound_by_reading_the_weights():
    machine = machine_named("8b@h100", "none")
    reading = 2 * 8.03e9 / (3.35e12 * 0.8)
    fixed = 3e-5 + 32 * 4e-6
    assert machine.verify(1) == pytest.approx(reading + fixed)
    assert machine.verify(8) == pytest.approx(machine.verify(1)), "nodes are free while reading takes longer"
    assert machine.draft(4, 4) == 0.0


def test_a_large_batch_is_bound_by_computing_and_a_long_context_by_its_keys():
    machine = machine_named("8b@h100", "none")
    fixed = 3e-5 + 32 * 4e-6
    assert machine.verify(8, 256) == pytest.approx(2 * 8.03e9 * 2048 / (989e12 * 0.6) + fixed)
    read = 2 * 8.03e9 + 64 * 8000 * 131072
    assert machine.verify(1, 64, 8000) == pytest.approx(read / (3.35e12 * 0.8) + fixed)


def test_devices_that_share_layers_read_faster_and_talk():
    one, four = machine_named("70b@h200", "none"), machine_named("70b@4xh200", "none")
    assert four.verify(1) < one.verify(1)
    assert four.verify(1) > one.verify(1) / 4, "all-reduces and kernels do not shrink"


def test_weights_and_keys_need_room():
    assert not machine_named("70b@h100").fits(1, 0)
    assert machine_named("70b@4xh100").fits(1, 1000)
    assert not machine_named("8b@h100").fits(256, 8000)


def test_a_head_grows_with_its_target_and_costs_a_forward_for_each_level():
    small, large = machine_named("8b@h100"), machine_named("70b@h100")
    assert small.draft_model.parameters == pytest.approx(14 * 4096**2 + 32000 * 4096)
    assert large.draft(1, 1) > small.draft(1, 1)
    assert small.draft(4, 4) == pytest.approx(4 * small.draft(1, 1))


@pytest.mark.parametrize(
    ("name", "draft", "said"),
    [
        ("8b", "head", "MODEL@DEVICE"),
        ("9b@h100", "head", "no model '9b'"),
        ("8b@abacus", "head", "no device 'abacus'"),
        ("8b@h100", "oracle", "no draft 'oracle'"),
        ("8b@0xh100", "head", "not above 0"),
    ],
)
def test_a_machine_that_is_not_described_is_one_line(name: str, draft: str, said: str):
    with pytest.raises(SpecdecError, match=said):
        machine_named(name, draft)


def test_a_file_of_machines_may_be_the_users_own(tmp_path: Path):
    (tmp_path / "mine.toml").write_text(MACHINES.read_text().replace("[device.h100]", "[device.mine]"))
    assert machine_named("8b@mine", "none", tmp_path / "mine.toml").device.bytes_per_second == 3.35e12
    (tmp_path / "bad.toml").write_text("[")
    with pytest.raises(SpecdecError, match="cannot read the machines"):
        machine_named("8b@h100", "none", tmp_path / "bad.toml")
    (tmp_path / "less.toml").write_text(MACHINES.read_text().replace("flops_share", "other"))
    with pytest.raises(SpecdecError, match="does not describe"):
        machine_named("8b@h100", "none", tmp_path / "less.toml")


# --- The command ----------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def test_the_command_labels_projections_and_checks_the_replay(tmp_path: Path):
    saved(tmp_path, drafting())
    result = run(tmp_path, "--batch", 1, "--batch", 64)
    assert result.exit_code == 0, result.output
    first, check, header, *rows = result.stdout.strip().splitlines()
    assert first.startswith("PROJECTION, not a measurement: lookup, 8 billion parameters")
    assert "a text drafter: no forward at all" in first
    assert "holds, tolerance 10 %" in check
    assert header.split()[-2:] == ["recorded", "oracle"]
    assert [row.split()[0] for row in rows] == ["1", "64"]


def test_json_of_the_command_is_one_labelled_object(tmp_path: Path):
    costs().save(tmp_path / "costs.json")
    result = run(saved(tmp_path, drafting()), "--costs", tmp_path / "costs.json", "--json")
    content = json.loads(result.stdout)
    assert content["projection"] is True
    (method,) = content["methods"]
    assert {entry["batch"] for entry in method["projections"]} == {1}
    assert method["self_check"]["holds"] is True


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--batch", 0], 2, "expected 1 or more"),
        (["--method", "suffix"], 1, "has no method 'suffix'"),
        (["--costs", "nowhere.json"], 1, "there is no cost table"),
        (["--costs", "costs.json", "--draft", "head"], 1, "a cost table has its own drafter"),
        (["--costs", "8b@abacus"], 1, "no device"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, arguments: list[object], status: int, said: str):
    result = run(saved(tmp_path, drafting()), *arguments)
    assert result.exit_code == status
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1
