"""The second stage: rows that the target writes, which follow from numbers alone and are its own words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.errors import BadCheckpoint, BadRecipe
from specdec.probe import target_of
from specdec.train.batch import PADDING, TrainBatch
from specdec.train.checkpoint import Checkpoints
from specdec.train.kinds.head import HeadTraining
from specdec.train.loop import Loop
from specdec.train.prepared import MemoryData
from specdec.train.recipe import Recipe, parsed_settings, recipe_for
from specdec.train.report import StepReport
from specdec.train.run import make_training, row_source, staged_source, train_head
from tests.tiny import VOCAB, shared_target

LENGTH, PROMPT = 24, 6


def data() -> MemoryData:
    """Random documents whose first tokens are a prompt."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (12, LENGTH), generator=generator)
    return MemoryData([(row, torch.arange(LENGTH) >= PROMPT) for row in ids])


def recipe(*more: str) -> Recipe:
    steps = [] if any(each.startswith("loop.steps=") for each in more) else ["loop.steps=6"]
    settings = [*steps, "loop.rows_per_step=2", "data.row_length=24", "head.num_heads=2", "loop.save_every=3"]
    return recipe_for("mlp-speculator", None, **parsed_settings([*settings, *more])).fitted()


def batches(*more: str) -> tuple[TrainBatch, TrainBatch, TrainBatch]:
    """The first row, the last one of the first stage and the first one of the second; and without stages."""
    torch.manual_seed(0)
    chosen = recipe("data.written_from=0.5", *more)
    source = staged_source(make_training(chosen, target_of(shared_target())), data(), chosen)
    return source([4, 5]), source([6, 7]), row_source(data(), chosen)([6, 7])


def test_the_second_stage_keeps_beginnings_and_writes_what_the_target_says():
    _, written, fixed = batches("data.written_temperature=0.0")
    assert torch.equal(written.ids[:, :PROMPT], fixed.ids[:, :PROMPT])
    assert not torch.equal(written.ids, fixed.ids)
    greedy = shared_target().generate(
        fixed.ids[:, :PROMPT], attention_mask=torch.ones(2, PROMPT, dtype=torch.long), do_sample=False,
        max_new_tokens=LENGTH - PROMPT,
    )  # fmt: skip
    assert torch.equal(written.ids, greedy)
    assert torch.equal(written.supervised, (torch.arange(LENGTH) >= PROMPT).expand(2, -1))
    assert (written.documents != PADDING).all()


def test_the_first_stage_is_the_data():
    first, _, _ = batches()
    assert torch.equal(first.ids, row_source(data(), recipe())([4, 5]).ids)


def test_the_same_numbers_are_written_the_same():
    one, other = batches()[1], batches()[1]
    assert torch.equal(one.ids, other.ids)
    assert not torch.equal(one.ids, batches("loop.seed=5")[1].ids)


def test_the_head_that_learns_can_draft_for_the_target(monkeypatch: pytest.MonkeyPatch):
    greedy = ("data.written_temperature=0.0", "head.options.budget=4")
    asked: list[HeadTraining] = []
    drafter = HeadTraining.drafter
    monkeypatch.setattr(HeadTraining, "drafter", lambda self: asked.append(self) or drafter(self))
    alone = batches(*greedy)[1]
    assert not asked
    together = batches(*greedy, "data.written_speculative=true")[1]
    assert len(asked) == 1
    assert torch.equal(alone.ids, together.ids)


def test_whether_the_head_drafts_for_the_target_is_part_of_what_a_run_is(tmp_path: Path):
    train_head(recipe("loop.steps=3", "data.written_from=0.5"), shared_target(), data(), tmp_path)
    other = recipe("loop.steps=3", "data.written_from=0.5", "data.written_speculative=true")
    with pytest.raises(BadCheckpoint, match=r"data\.written"):
        train_head(other, shared_target(), data(), tmp_path)


@pytest.mark.parametrize("writing", [(), ("data.written_speculative=true",)])
def test_a_run_that_breaks_off_in_the_second_stage_ends_with_the_same_weights(tmp_path: Path, writing: tuple[str, ...]):
    def run(folder: Path, stop: int | None = None) -> list[float]:
        heard: list[float] = []
        loops: list[Loop] = []

        def report(what: Any) -> None:
            assert isinstance(what, StepReport)
            heard.append(what.loss)
            if what.step == stop:
                loops[0]._stop()

        train_head(
            recipe("data.written_from=0.5", *writing), shared_target(), data(), folder, report=report,
            restored=loops.append,
        )  # fmt: skip
        return heard

    whole = run(tmp_path / "whole")
    broken = run(tmp_path / "broken", stop=4)
    assert Checkpoints(tmp_path / "broken").latest() == tmp_path / "broken" / "step-000004"
    assert broken + run(tmp_path / "broken") == whole
    assert len(whole) == 6


def test_a_share_outside_the_run_is_refused():
    with pytest.raises(BadRecipe, match="from 0 to 1"):
        recipe("data.written_from=1.5")
