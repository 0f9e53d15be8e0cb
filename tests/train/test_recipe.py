"""Recipes: defaults that fit the run, files and assignments over them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specdec.errors import BadRecipe
from specdec.train.job import Job
from specdec.train.joint import JointSettings, head_recipe
from specdec.train.recipe import DEFAULTS, Recipe, parsed_settings, recipe_for
from specdec.train.run import HEADS


def recipe(*assignments: str, kind: str = "medusa", file: Path | None = None) -> Recipe:
    return recipe_for(kind, file, **parsed_settings(assignments))


def test_every_kind_that_can_be_trained_has_defaults():
    assert DEFAULTS.keys() == {*HEADS, "draft-model", "medusa2"}
    assert all(default.kind == kind for kind, default in DEFAULTS.items())
    assert all(default.loop.save_every and default.loop.evaluate_every for default in DEFAULTS.values())


@pytest.mark.parametrize(
    ("assignment", "section", "name", "value"),
    [
        ("loop.steps=500", "loop", "steps", 500),
        ("loop.learning-rate = 3e-4", "loop", "learning_rate", 3e-4),
        ("loop.clip=1", "loop", "clip", 1.0),
        ("loop.bf16=true", "loop", "bf16", True),
        ("objective.divergence=jsd:0.5", "objective", "divergence", "jsd:0.5"),
        ('loop.schedule="wsd"', "loop", "schedule", "wsd"),
        ("data.packed=false", "data", "packed", False),
    ],
)
def test_an_assignment_sets_one_field(assignment: str, section: str, name: str, value: Any):
    got = getattr(getattr(recipe(assignment), section), name)
    assert (got, type(got)) == (value, type(value))


def test_options_of_the_drafter_are_set_one_by_one():
    settings = recipe("head.num_heads=3", "head.options.budget=7", "head.options.depth=2").head
    assert settings == {"num_heads": 3, "options": {"budget": 7, "depth": 2}}
    assert recipe("head.noise=0.1", kind="hydra++").head == {"num_layers": 4, "noise": 0.1}


def test_files_lie_over_defaults_and_assignments_over_files(tmp_path: Path):
    file = tmp_path / "recipe.toml"
    file.write_text('[loop]\nsteps = 30\nseed = 4\n[objective]\ndivergence = "tv"\n')
    got = recipe("loop.steps=20", file=file)
    assert (got.loop.steps, got.loop.seed, got.objective.divergence) == (20, 4, "tv")
    assert got.loop.learning_rate == DEFAULTS["medusa"].loop.learning_rate


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("steps=5", "expected section.name=value"),
        ("loop.steps", "expected section.name=value"),
        ("loop.steps=", "expected section.name=value"),
        ("loops.steps=5", "no section 'loops'"),
        ("loop.step=5", "no setting 'step'"),
        ("loop.steps=5.5", "steps is of type int, got 5.5"),
        ("loop.steps=many", "steps is of type int, got 'many'"),
        ("loop.bf16=1", "bf16 is of type bool"),
        ("loop.learning_rate=nan", "is a number, got nan"),
        ("objective.divergence=klx", "no divergence 'klx'"),
        ("objective.divergence=jsd:2", "beta lies between 0 and 1"),
        ("data.row_length=2", "at least 4"),
    ],
)
def test_what_does_not_exist_or_does_not_fit_is_named(assignment: str, words: str):
    with pytest.raises(BadRecipe, match=words.replace("[", r"\[")):
        recipe(assignment)


def test_a_setting_given_twice_is_refused():
    with pytest.raises(BadRecipe, match="given twice"):
        recipe("loop.steps=5", "loop.steps=6")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = 3", "sections loop, objective"),
        ("loop = 3", r"\[loop\] of a recipe is a section"),
        ('kind = "hydra"', "the recipe is for 'hydra'"),
        ("[loop", "cannot be read"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, words: str):
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(BadRecipe, match=words) as caught:
        recipe(file=file)
    assert str(file) in str(caught.value)


def test_an_unknown_kind_is_answered_with_those_there_are():
    with pytest.raises(BadRecipe, match="no kind 'medusa3' to train; there are medusa, hydra"):
        recipe_for("medusa3")


def test_defaults_fit_short_runs_several_processes_and_short_targets():
    short = recipe("loop.steps=20").fitted()
    assert short.loop.warmup == 2
    shared = recipe("loop.rows_per_step=12").fitted(processes=3, max_positions=100)
    assert (shared.loop.rows_at_once, shared.data.row_length) == (4, 100)
    assert recipe("loop.rows_per_step=6").fitted().loop.rows_at_once == 6
    assert recipe().fitted(max_positions=100_000).data.row_length == DEFAULTS["medusa"].data.row_length


@pytest.mark.parametrize(("width", "times"), [(256, 4), (1024, 2), (64, 4), (4096, 1), (8192, 1)])
def test_heads_of_a_narrow_target_learn_faster(width: int, times: float):
    for kind in HEADS:
        fitted = recipe(kind=kind).fitted(width=width)
        assert fitted.loop.learning_rate == pytest.approx(times * DEFAULTS[kind].loop.learning_rate)
        assert fitted.fitted(width=width) == fitted, "a recipe that is fitted twice, as in the command, stays"


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_rate_that_was_given_stays(kind: str, tmp_path: Path):
    rate = DEFAULTS[kind].loop.learning_rate
    assert recipe(f"loop.learning_rate={rate}", kind=kind).fitted(width=256).loop.learning_rate == rate
    (tmp_path / "recipe.toml").write_text("[loop]\nlearning_rate = 1e-5\n")
    assert recipe(kind=kind, file=tmp_path / "recipe.toml").fitted(width=256).loop.learning_rate == 1e-5


def test_a_trained_draft_model_keeps_its_rate_and_a_fresh_one_does_not():
    rate = DEFAULTS["draft-model"].loop.learning_rate
    assert recipe(kind="draft-model").fitted(width=256).loop.learning_rate == rate
    assert recipe(kind="draft-model").for_width(1024).loop.learning_rate == pytest.approx(2 * rate)
    assert recipe("loop.learning_rate=2e-4", kind="draft-model").for_width(1024).loop.learning_rate == 2e-4


def test_of_medusa2_the_heads_follow_the_width_and_adapters_do_not():
    fitted = recipe(kind="medusa2").fitted(width=1024)
    assert fitted.loop.learning_rate == DEFAULTS["medusa2"].loop.learning_rate
    assert JointSettings.of(fitted).frozen_rate == pytest.approx(2e-3)
    assert fitted.fitted(width=1024) == fitted
    assert head_recipe(fitted).fitted(width=1024).loop == recipe(kind="medusa").changed(
        {"loop": {"steps": JointSettings.of(fitted).frozen_steps}}
    ).fitted(width=1024).loop  # fmt: skip
    chosen = recipe("head.frozen_rate=1e-3", kind="medusa2").fitted(width=1024)
    assert head_recipe(chosen).fitted(width=1024).loop.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("assignment", "processes", "words"),
    [
        ("loop.rows_at_once=8", 2, "cannot be shared by 2 processes"),
        ("loop.rows_per_step=7", 2, "cannot be shared by 2 processes"),
        ("data.row_length=200", 1, "200 tokens are longer than the target's 100 positions"),
        ("loop.learning_rate=0.0", 1, "learning rate is positive"),
        ("loop.beta1=1.0", 1, r"betas lie in \[0, 1\)"),
        ("loop.keep=0", 1, "keep is 1 or more"),
        ("loop.steps=0", 1, "at least 1"),
    ],
)
def test_what_somebody_chose_is_refused_and_not_bent(assignment: str, processes: int, words: str):
    with pytest.raises(BadRecipe, match=words):
        recipe(assignment).fitted(processes, max_positions=100)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_resolved_recipe_reads_back(kind: str):
    chosen = recipe("loop.steps=7", "head.options.budget=5", kind=kind).fitted(2, 300)
    assert Recipe.of_resolved(json.loads(json.dumps(chosen.resolved()))) == chosen


def test_a_job_reaches_another_process_as_it_is():
    job = Job(
        recipe("loop.steps=7"), "demo", Path("data"), Path("out"), prompts=Path("p.txt"), report_to=("wandb",),
        threads=2, command=("specdec", "train"),
    )  # fmt: skip
    again = Job.of_json(job.to_json())
    assert again == job
    assert again.recipe.given == job.recipe.given == {"loop.steps"}
