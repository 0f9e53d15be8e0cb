"""Measured costs: the rounds, what is kept on disk, and when it is measured anew. The clock is not the machine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.costs import store
from specdec.costs.measure import Grid, measure_verifications, measured_costs
from specdec.costs.table import CostTable
from specdec.errors import SpecdecError
from specdec.packed import deoptimize, optimize
from specdec.probe import target_of
from specdec.verifier import Verifier
from tests.tiny import make_target, shared_target

GRID = Grid(nodes=(1, 2, 4), contexts=(8, 16), batches=(1, 2), repeats=5)


class FakeClock:
    """Stands still but for verifications, which take `seconds(nodes, batch)`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speed: float = 1.0) -> None:
        self.now, self.speed, self.calls = 0.0, speed, 0
        score = Verifier.score

        def slow(verifier: Any, tree: Any) -> Any:
            self.calls += 1
            spike = 50.0 if self.calls % 7 == 0 else 0.0
            self.now += self.speed * (tree.num_nodes + 10 * len(tree.shapes)) + spike
            return score(verifier, tree)

        monkeypatch.setattr(Verifier, "score", slow)

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    return tmp_path


def kept_files(folder: Path) -> list[Path]:
    return sorted((folder / "costs").glob("*.json"))


def test_medians_of_interleaved_rounds_are_not_moved_by_spikes(monkeypatch: pytest.MonkeyPatch):
    points = measure_verifications(target_of(shared_target()), GRID, clock=FakeClock(monkeypatch))
    assert len(points) == 12
    assert {(p.batch, p.nodes): p.seconds for p in points} == {(b, n): n + 10.0 * b for b in (1, 2) for n in (1, 2, 4)}
    assert max(point.spread for point in points) <= 50


def test_kept_costs_are_used_and_measured_anew_when_asked(monkeypatch: pytest.MonkeyPatch, own_cache: Path):
    clock, target = FakeClock(monkeypatch), target_of(shared_target())
    first = measured_costs(target, GRID, clock=clock)
    calls = clock.calls
    assert measured_costs(target, GRID, clock=clock) == first
    assert clock.calls - calls < calls / 2, "only the two points of the check were measured"
    assert len(kept_files(own_cache)) == 1
    before = clock.calls
    again = measured_costs(target, GRID, clock=clock, fresh=True)
    assert clock.calls - before == calls
    assert again.measured_at > first.measured_at


def test_a_machine_that_became_slower_is_measured_anew(monkeypatch: pytest.MonkeyPatch):
    clock, target = FakeClock(monkeypatch), target_of(shared_target())
    clock.calls = 1
    first = measured_costs(target, GRID, clock=clock)
    clock.speed = 20.0
    assert measured_costs(target, GRID, clock=clock).verify(4) == pytest.approx(20 * first.verify(4))


def test_a_wider_grid_than_the_kept_one_is_measured(monkeypatch: pytest.MonkeyPatch):
    clock, target = FakeClock(monkeypatch), target_of(shared_target())
    measured_costs(target, GRID, clock=clock)
    wider = Grid((1, 2, 4, 8), GRID.contexts, GRID.batches, 5)
    assert max(p.nodes for p in measured_costs(target, wider, clock=clock).verifications) == 8


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": "specdec-costs-1"}'])
def test_a_damaged_file_is_measured_anew(monkeypatch: pytest.MonkeyPatch, own_cache: Path, damage: str):
    clock, target = FakeClock(monkeypatch), target_of(shared_target())
    measured_costs(target, GRID, clock=clock)
    (file,) = kept_files(own_cache)
    file.write_text(damage)
    measured_costs(target, GRID, clock=clock)
    assert CostTable.load(file).verify(1) == 11.0


def test_an_old_table_and_one_from_the_future_are_not_used(monkeypatch: pytest.MonkeyPatch):
    target = target_of(shared_target())
    table = measured_costs(target, GRID, clock=FakeClock(monkeypatch))
    key = store.fingerprint(target)
    assert store.read(key) == table
    assert store.read(key, table.measured_at + store.MAX_AGE + 1) is None
    assert store.read(key, table.measured_at - 10) is None


def test_the_fingerprint_changes_with_everything_that_costs_depend_on():
    model = make_target()
    target = target_of(model)
    keys = {store.fingerprint(target), store.fingerprint(target, "suffix:budget=4")}
    keys.add(store.fingerprint(target_of(make_target(num_hidden_layers=5))))
    optimize(model, min_elements=0)
    keys.add(store.fingerprint(target_of(model)))
    deoptimize(model)
    keys.add(store.fingerprint(target_of(make_target().bfloat16())))
    assert len(keys) == 5
    assert store.fingerprint(target_of(model)) in keys, "taking the optimisation back gives the first one again"


def test_the_fingerprint_changes_with_threads_and_versions(monkeypatch: pytest.MonkeyPatch):
    target = target_of(shared_target())
    first = store.fingerprint(target)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    threads = store.fingerprint(target)
    monkeypatch.setattr(store, "versions", lambda: {"torch": "0"})
    assert len({first, threads, store.fingerprint(target)}) == 3


def test_a_grid_stays_within_the_models_positions():
    small = Grid(nodes=(1, 8, 64), contexts=(64, 512)).within(100)
    assert max(small.nodes) + max(small.contexts) <= 100
    assert Grid().within(None) == Grid()
    with pytest.raises(SpecdecError, match="no room"):
        Grid(nodes=(1,), contexts=(5,)).within(1)


@pytest.mark.parametrize("wrong", [{"nodes": ()}, {"batches": (0,)}, {"contexts": (-1,)}, {"repeats": 0}])
def test_a_grid_of_nothing_is_refused(wrong: Any):
    with pytest.raises(SpecdecError, match=r"measured"):
        Grid(**wrong)


def test_a_read_only_cache_only_means_measuring_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SPECDEC_CACHE", str(blocked))
    clock = FakeClock(monkeypatch)
    assert measured_costs(target_of(shared_target()), GRID, clock=clock).verify(1) == 11.0
