"""Checkpoints: whole or not there, rotated, linked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from specdec.errors import BadCheckpoint, SpecdecError
from specdec.train.checkpoint import STATE, Checkpoints, read_state, step_of


def write(folder: Path) -> None:
    (folder / "weights").mkdir()
    (folder / "weights" / "a.bin").write_bytes(b"abc")


def kills(monkeypatch: pytest.MonkeyPatch, folder: Path, into: Path) -> list[Path]:
    """Copies of a folder as a kill would leave it around every move, and within every removal; grows meanwhile."""
    left: list[Path] = []
    move, remove = os.replace, shutil.rmtree

    def copied() -> Path:
        left.append(into / str(len(left)))
        shutil.copytree(folder, left[-1], symlinks=True)
        return left[-1]

    def replace(old: Any, new: Any) -> None:
        copied()
        move(old, new)
        copied()

    def rmtree(path: Any, **options: Any) -> None:
        half = copied() / Path(path).name
        for file in half.rglob("*"):
            if file.is_file() and file.name != STATE:
                file.unlink()
        remove(path, **options)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    return left


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


def test_rotation_keeps_what_was_saved_last_among_higher_steps_of_another_life(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 6):
        checkpoints.save(step, write, {})
    for step in (3, 4):
        path = checkpoints.save(step, write, {})
        assert path.is_dir()
        assert (tmp_path / "latest").resolve() == path.resolve()
        assert checkpoints.latest() == path
    assert sorted(map(step_of, checkpoints.all())) == [4, 5, 6]


@pytest.mark.parametrize("steps", [(1, 1), (1, 2), (2, 1, 2)])
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]
) -> None:
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    *before, last = steps
    for step in before:
        checkpoints.save(step, write, {"life": 1})
    with monkeypatch.context() as patch:
        left = kills(patch, tmp_path / "run", tmp_path / "left")
        checkpoints.save(last, write, {"life": 2})
    assert len(left) >= 4
    for folder in left:
        again = Checkpoints(folder, keep=1)
        latest = again.latest()
        assert latest is not None
        assert (step_of(latest), read_state(latest)["life"]) in ((before[-1], 1), (last, 2))
        assert all((path / "weights" / "a.bin").is_file() for path in again.all())
        again.clear_unfinished()
        found = again.latest()
        assert found is not None
        assert step_of(found) == step_of(latest)
        again.save(9, write, {})
        assert {path.name for path in folder.iterdir() if not path.name.startswith("step-")} == {"latest"}


@pytest.mark.parametrize("failing", [0, 1])
def test_a_replacement_that_fails_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, write, {"life": 1})
    move, moves = os.replace, []

    def replace(old: Any, new: Any) -> None:
        moves.append(old)
        if len(moves) == failing + 1:
            raise OSError("refused")
        move(old, new)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="step-000001 is whole"):
        checkpoints.save(1, write, {"life": 2})
    assert checkpoints.all() == [path]
    assert read_state(path)["life"] == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
)
def test_what_cannot_be_written_is_told_with_the_checkpoint_that_is_whole(tmp_path: Path, error: Exception) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, write, {})

    def fails(_folder: Path) -> None:
        raise error

    with pytest.raises(OSError, match=r"step 2 cannot be written .*step-000001 is whole\. Make room") as caught:
        checkpoints.save(2, fails, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), RuntimeError("tensors share memory")])
def test_an_error_that_is_none_of_writing_passes_as_it_is(tmp_path: Path, error: Exception) -> None:
    def fails(_folder: Path) -> None:
        raise error

    with pytest.raises(RuntimeError) as caught:
        Checkpoints(tmp_path).save(1, fails, {})
    assert caught.value is error


def test_two_cannot_write_to_a_folder_at_once(tmp_path: Path) -> None:
    with Checkpoints(tmp_path).alone():
        with pytest.raises(SpecdecError, match=r"another process is writing to .*; wait for it or choose another"):
            Checkpoints(tmp_path).alone().__enter__()
        with Checkpoints(tmp_path / "heads").alone():
            pass
    with Checkpoints(tmp_path).alone():
        pass


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
