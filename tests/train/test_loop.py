"""The loop: what one process with one big batch does, several micro-batches, processes and lives do as well."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from specdec.errors import BadCheckpoint, BadRecipe, SpecdecError
from specdec.train.checkpoint import Checkpoints
from specdec.train.loop import Loop
from specdec.train.loop_settings import LoopSettings
from specdec.train.report import Score, StepReport
from specdec.train.schedule import Schedule
from tests.train.test_checkpoint import kills
from tests.train.toy import make_loop

ROOT = Path(__file__).parents[2]
FSDP = ("--fsdp",)


def weights_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"step-{step:06d}" / "training.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(folder: Path, **settings: Any) -> list[Any]:
    reports: list[Any] = []
    make_loop(folder, reports=reports, **settings).run()
    return reports


def test_training_lowers_the_loss_and_raises_acceptance(tmp_path: Path) -> None:
    reports = run(tmp_path, steps=40, learning_rate=1e-2, save_every=0)
    first, last = reports[0], reports[-1]
    assert last.loss < 0.8 * first.loss
    assert all(after > before for before, after in zip(first.alpha, last.alpha, strict=True))
    assert first.terms.keys() == {"depth 1", "depth 2"}
    assert len(first.alpha) == len(first.agreement) == 2


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_resumed_run_ends_with_the_same_bytes(tmp_path: Path, stop: int) -> None:
    whole = run(tmp_path / "whole")
    loop = make_loop(tmp_path / "broken", reports=(heard := []))
    loop.report = lambda report: (heard.append(report), report.step == stop and loop._stop())[0]
    assert loop.run() == stop
    rest = run(tmp_path / "broken")
    assert [r.loss for r in heard] + [r.loss for r in rest] == [r.loss for r in whole]
    assert same(weights_of(tmp_path / "whole", 12), weights_of(tmp_path / "broken", 12))


def test_accumulating_small_batches_equals_one_big_batch_to_rounding(tmp_path: Path) -> None:
    big = run(tmp_path / "big", rows_at_once=4)
    small = run(tmp_path / "small", rows_at_once=1)
    assert [r.supervised for r in big] == [r.supervised for r in small]
    for a, b in zip(big, small, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    a, b = weights_of(tmp_path / "big", 12), weights_of(tmp_path / "small", 12)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4


def test_dividing_by_the_micro_batches_own_tokens_would_be_noticed(tmp_path: Path) -> None:
    rows = [make_loop(tmp_path).source([number]).num_supervised for number in range(4)]
    assert len(set(rows)) > 1  # rows supervise unequally many tokens: a mean of means is another number


def test_another_run_in_the_folder_is_refused_field_by_field(tmp_path: Path) -> None:
    run(tmp_path, steps=2)
    with pytest.raises(BadCheckpoint, match=r"settings\.learning_rate 0\.5 \(checkpoint: 0\.001\)"):
        make_loop(tmp_path, steps=2, learning_rate=0.5).run()
    with pytest.raises(BadCheckpoint, match="resume, or choose another"):
        make_loop(tmp_path, steps=2).run(resume=False)


def test_how_often_one_saves_may_change_on_resume(tmp_path: Path) -> None:
    run(tmp_path, steps=3)
    assert make_loop(tmp_path, steps=3, save_every=5, keep=9).run() == 3


@pytest.mark.parametrize("name", ["training.safetensors", "optimizer.pt"])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    run(tmp_path, steps=2)
    file = tmp_path / "step-000002" / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadCheckpoint, match="step-000002"):
        make_loop(tmp_path, steps=2).run()


def ends_before_a_poisoned_step(folder: Path, **settings: Any) -> None:
    """The loss of step 4 is a number and its gradient is none: weights and checkpoints stay those of step 3."""
    loop = make_loop(folder, steps=6, rows_at_once=2, **settings)
    backward = loop.accelerator.backward

    def poisoned(loss: torch.Tensor) -> None:
        backward(loss)
        if loop.step == 3:
            for parameter in loop._learning.module.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(torch.inf)

    loop.accelerator.backward = poisoned  # type: ignore[method-assign]
    with pytest.raises(BadRecipe, match=r"gradient's norm of step 4 is (nan|inf); nothing was saved after step 3"):
        loop.run()
    loop._gather()
    assert same(weights_of(folder, 3), dict(loop.trainable.module.state_dict()))
    assert make_loop(folder, steps=6, rows_at_once=2, **settings).run() == 6


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    loop = make_loop(tmp_path)

    def poison(report: StepReport | Score) -> None:
        assert isinstance(report, StepReport)
        if report.step == 3:
            with torch.no_grad():
                next(loop.trainable.module.parameters()).fill_(torch.nan)

    loop.report = poison
    loop.settings.__dict__["save_every"] = 2
    with pytest.raises(BadRecipe, match=r"loss of step 4 is nan; nothing was saved after step 2"):
        loop.run()
    weights = weights_of(tmp_path, 2)
    assert all(value.isfinite().all() for value in weights.values())


def test_the_gradient_is_divided_by_the_steps_tokens_after_the_backward_pass(tmp_path: Path) -> None:
    """Before it, what pushes improbable tokens down would lie below the least float16 of a target's output matrix."""
    loop = make_loop(tmp_path, steps=1, rows_at_once=2)
    backward = loop.accelerator.backward
    losses: list[float] = []
    reports: list[StepReport | Score] = []

    def kept(loss: torch.Tensor) -> None:
        losses.append(float(loss.detach()))
        backward(loss)

    loop.accelerator.backward = kept  # type: ignore[method-assign]
    loop.report = reports.append
    tokens = sum(batch.num_supervised for batch in loop._batches())
    loop.run()
    (report,) = [report for report in reports if isinstance(report, StepReport)]
    assert report.loss == pytest.approx(sum(losses) / tokens)
    assert report.gradient_norm < report.loss  # of the mean loss: that of the sum is some hundred times as large


def test_a_gradient_that_is_no_number_ends_the_run_before_anything_learns_from_it(tmp_path: Path) -> None:
    ends_before_a_poisoned_step(tmp_path)


def test_an_error_while_saving_that_is_none_of_writing_passes_as_it_is(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, steps=2)

    def save(_path: Path) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    loop.trainable.save = save  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=r"^CUDA error"):
        loop.run()


SCORES = {1: 1.0, 2: 5.0, 3: 2.0, 4: 5.0}


def scored(folder: Path) -> Loop:
    loop = make_loop(folder, steps=4, evaluate_every=1, keep=1)
    loop.evaluate = lambda _trainable: Score(SCORES[loop.step])
    return loop


def test_a_kill_at_any_moment_keeps_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        left = kills(patch, tmp_path / "run", tmp_path / "left")
        scored(tmp_path / "run").run()
    for folder in (tmp_path / "run", *left):
        assert scored(folder).run() == 4
        assert {"step-000002", "step-000004"} <= {path.name for path in Checkpoints(folder).all()}
        assert (folder / "best").resolve().name == "step-000002"
        assert (folder / "latest").resolve().name == "step-000004"
        assert (folder / "drafter").resolve() == folder / "step-000002" / "drafter"


def test_the_best_checkpoint_is_the_one_with_the_best_score(tmp_path: Path) -> None:
    reports = run(tmp_path, steps=6, evaluate_every=1, keep=1)
    scores = {step: report.value for step, report in enumerate((r for r in reports if isinstance(r, Score)), start=1)}
    best = max(scores, key=lambda step: scores[step])
    assert (tmp_path / "best").resolve().name == f"step-{best:06d}"


def test_validation_does_not_change_what_is_learned(tmp_path: Path) -> None:
    plain = [r.loss for r in run(tmp_path / "a")]
    validated = [r.loss for r in run(tmp_path / "b", evaluate_every=2) if isinstance(r, StepReport)]
    assert plain == validated


@pytest.mark.parametrize("settings", [{"steps": 0}, {"rows_per_step": 3, "rows_at_once": 2}, {"warmup": 99}])
def test_settings_that_do_not_fit_are_named(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(BadRecipe):
        make_loop(tmp_path, **settings)


def test_rows_that_processes_cannot_share_are_named() -> None:
    with pytest.raises(BadRecipe, match="multiple of 6"):
        LoopSettings(1, rows_per_step=4, rows_at_once=2).check(3)


def test_schedules_rise_fall_and_stay() -> None:
    cosine = Schedule("cosine", 100, 10, floor=0.1)
    assert cosine(0) == 0.1
    assert cosine(9) == 1.0
    assert cosine(10) == pytest.approx(1.0)
    assert cosine(99) == pytest.approx(0.1)
    assert Schedule("linear", 101, 0, floor=0.0)(50) == pytest.approx(0.5)
    wsd = Schedule("wsd", 101, 0, floor=0.0, decay_share=0.2)
    assert wsd(70) == 1.0
    assert wsd(90) == pytest.approx(0.5)
    assert wsd(100) == pytest.approx(0.0)
    assert Schedule("constant", 5)(4) == 1.0


def start(folder: Path, *options: str, processes: int = 1) -> subprocess.Popen[str]:
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    command = [sys.executable, *launcher, "-m", "tests.train.toy", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)  # fmt: skip


def finish(process: subprocess.Popen[str]) -> dict[int, float]:
    """Losses by step of a run that is left alone."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-2000:]
    return {int(step): float(loss) for step, loss in re.findall(r"^loss (\d+) (\S+)$", output, re.MULTILINE)}


def kill_after(process: subprocess.Popen[str], seconds: float) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if "ready" in line:
            break
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
    ("processes", "kills", "more"),
    [(1, 3, ()), pytest.param(2, 2, (), marks=pytest.mark.slow), pytest.param(2, 2, FSDP, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments_and_resumed_the_bytes_are_those_of_an_unbroken_run(
    tmp_path: Path, processes: int, kills: int, more: tuple[str, ...]
) -> None:
    options = ("--steps", "12", "--pause", "0.03", "--rows-at-once", "2", *more)
    unbroken = finish(start(tmp_path / "unbroken", *options, processes=processes))
    moments = random.Random(processes)
    for _ in range(kills):
        kill_after(start(tmp_path / "broken", *options, processes=processes), moments.uniform(0.05, 0.4))
    rest = finish(start(tmp_path / "broken", *options, processes=processes))
    assert len(unbroken) == 12
    assert all(unbroken[step] == loss for step, loss in rest.items())
    for step in (11, 12):
        assert same(weights_of(tmp_path / "unbroken", step), weights_of(tmp_path / "broken", step))


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), FSDP])
def test_two_processes_agree_with_one_to_rounding(tmp_path: Path, more: tuple[str, ...]) -> None:
    options = ("--steps", "8", "--rows-at-once", "1")
    one, two = finish(start(tmp_path / "one", *options)), finish(start(tmp_path / "two", *options, *more, processes=2))
    assert one.keys() == two.keys()
    assert all(one[step] == pytest.approx(two[step], rel=1e-5) for step in one)
    a, b = weights_of(tmp_path / "one", 8), weights_of(tmp_path / "two", 8)
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4


@pytest.mark.parametrize("where", ["_anybody", "_validate_and_save"])
def test_a_signal_at_any_moment_ends_a_run_that_is_saved(tmp_path: Path, where: str) -> None:
    loop = make_loop(tmp_path, steps=6, save_every=0)
    healthy = getattr(loop, where)

    def signalled(*values: Any) -> Any:
        found = healthy(*values)
        if loop.step == 2:
            loop._stop()
        return found

    setattr(loop, where, signalled)
    assert loop.run() == 3
    assert loop.stopped
    assert [path.name for path in loop.checkpoints.all()] == ["step-000003"]


def test_a_signal_while_the_last_step_is_saved_is_told(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, steps=2)
    save = loop.trainable.save
    loop.trainable.save = lambda path: (save(path), loop.step == 2 and loop._stop())[0]  # type: ignore[method-assign]
    assert loop.run() == 2
    assert loop.stopped


def test_what_one_process_has_heard_decides_nothing_until_all_agree(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, steps=3, save_every=0)
    loop._anybody = lambda flag: flag and loop.step >= 2  # type: ignore[method-assign]
    loop._stop()
    assert loop.run() == 2
    assert [path.name for path in loop.checkpoints.all()] == ["step-000002"]


def test_the_same_run_started_twice_is_refused_and_leaves_the_first_alone(tmp_path: Path) -> None:
    first, second = (make_loop(tmp_path, steps=3) for _ in range(2))
    save = first.trainable.save

    def saving(path: Path) -> None:
        with pytest.raises(SpecdecError, match="another process is writing"):
            second.run()
        save(path)

    first.trainable.save = saving  # type: ignore[method-assign]
    assert first.run() == 3
    assert second.run() == 3


def test_sigterm_finishes_the_step_and_saves(tmp_path: Path) -> None:
    process = start(tmp_path, "--steps", "400", "--pause", "0.02")
    assert process.stdout is not None
    for line in process.stdout:
        if "ready" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    losses = finish(process)
    steps = sorted(losses)
    assert 0 < len(steps) < 400
    assert (tmp_path / "latest").resolve().name == f"step-{steps[-1]:06d}"
