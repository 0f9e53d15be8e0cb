"""Checkpoints: whole or not there, rotated, linked."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec.errors import BadCheckpoint
from specdec.train.checkpoint import STATE, Checkpoints, read_state, step_of


def write(folder: Path) -> None:
    (folder / "weights").mkdir()
    (folder / "weights" / "a.bin").write_bytes(b"abc")


def test_a_saved_checkpoint_is_whole_and_latest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run")
    path = checkpoints.save(7, write, {"loss": 1.5})
    assert checkpoints.latest() == path
    assert step_of(path) == 7
    assert read_state(path) == {"step": 7, "loss": 1.5}
    assert (tmp_path / "run" / "latest").resolve() == path.resolve()
    assert not list((tmp_path / "run").glob(".unfinished*"))


def test_a_save_that_fails_leaves_the_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.save(1, write, {})

    def full_disk(folder: Path) -> None:
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(2, full_disk, {})
    assert checkpoints.all() == [first]
    assert checkpoints.latest() == first
    assert not list(tmp_path.glob(".unfinished*"))


def test_what_a_killed_save_left_is_ignored_and_cleared(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.save(1, write, {})
    (tmp_path / ".unfinished-step-000002").mkdir()
    (tmp_path / ".unfinished-step-000002" / STATE).write_text("{}")
    (tmp_path / "step-000009").mkdir()  # no state inside: somebody's own directory
    assert checkpoints.latest() == first
    checkpoints.save(3, write, {})
    assert not (tmp_path / ".unfinished-step-000002").exists()


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    best = checkpoints.save(1, write, {})
    checkpoints.link("best", best)
    for step in range(2, 7):
        checkpoints.save(step, write, {})
    assert sorted(map(step_of, checkpoints.all())) == [1, 5, 6]
    assert checkpoints.best() == best.resolve()
    checkpoints.link("best", tmp_path / "step-000006")
    checkpoints.rotate()
    assert sorted(map(step_of, checkpoints.all())) == [5, 6]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, write, {"try": 1})
    assert read_state(checkpoints.save(1, write, {"try": 2}))["try"] == 2


@pytest.mark.parametrize("content", ["", "[]", '{"no": 1}', "{"])
def test_a_state_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE).write_text(content)
    with pytest.raises(BadCheckpoint, match=STATE):
        read_state(tmp_path)


def test_a_name_that_is_no_step_is_refused() -> None:
    with pytest.raises(BadCheckpoint, match="step-NNNNNN"):
        step_of(Path("latest"))
