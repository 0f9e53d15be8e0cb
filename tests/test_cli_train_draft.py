"""`specdec train draft-model`: cut, from scratch in stages, on whose text, and with AdaSPEC's filter."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.load import load_drafter
from specdec.train import fast_draft
from specdec.train.architecture import Costs, num_parameters
from specdec.train.job import Job
from specdec.train.recipe import recipe_for
from specdec.train.run_log import read_log
from tests.test_cli_train import at_step, failed, finished, run, same, save
from tests.tiny import make_target, perturbed

torch.set_num_threads(1)
SMALL = ("--steps", 3, "--row-length", 32, "--batch-rows", 2, "--save-every", 1, "--evaluate-every", 0,
         "--set", "data.validation_tokens=4", "--set", "data.validation_prompts=1", "--device", "cpu")  # fmt: skip
SIZES = ("--from-scratch", "--layers", 2, "--width", 16)
CUT = ("--cut-from", "target", "--layers", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a draft model, texts, and a finished run from scratch in two stages."""
    path = tmp_path_factory.mktemp("draft")
    save(make_target(), path / "target")
    save(perturbed(make_target(), 0.05), path / "draft")
    for name, word in (("texts", "def"), ("answers", "return")):
        lines = [{"text": f"{word} f{n}(a, b):\n    a + {n} * b\n"} for n in range(16)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    finished(train(path, path / "whole", *SIZES, "--pretrain", path / "texts.jsonl"))
    return path


def train(folder: Path, out: Path, *more: object, kind: str = "draft-model") -> Any:
    return run("train", kind, folder / "target", folder / "answers.jsonl", "--out", out, *SMALL, *more)


def plan(folder: Path, out: Path, *more: object) -> dict[str, Any]:
    return json.loads(finished(train(folder, out, *more, "--plan", "--json")).stdout)


def steps(run_folder: Path) -> list[int]:
    return [event["step"] for event in read_log(run_folder / "log.jsonl") if event["event"] == "step"]


# --- From scratch --------------------------------------------------------------------------------------


def test_a_fresh_model_goes_through_its_stages_and_drafts_by_the_run_s_name(folder: Path) -> None:
    out = folder / "whole"
    model = AutoModelForCausalLM.from_pretrained(folder / "target")
    drafter = load_drafter(out, model)
    assert isinstance(drafter, DraftModelDrafter)
    config: Any = drafter.model.model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (2, 16, 100)
    assert os.readlink(out / "drafter") == "align/drafter"
    assert steps(out / "pretrain") == steps(out / "align") == [1, 2, 3]
    first, second = (json.loads((out / name / "recipe.json").read_text())["head"] for name in ("pretrain", "align"))
    assert first["learns"] == "tokens"
    assert second.get("learns", "law") == "law"
    identities = [json.loads((out / name / "latest" / "state.json").read_text())["identity"] for name in
                  ("pretrain", "align")]  # fmt: skip
    assert identities[0]["draft"]["weights"] != identities[1]["draft"]["weights"]


def test_a_signal_in_a_stage_saves_it_and_the_same_command_ends_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*SIZES, "--pretrain", folder / "texts.jsonl")
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        stopped = finished(train(folder, tmp_path / "run", *command))
    assert "stopped and saved after step 2 of 3 of stage pretrain; the same command goes on" in stopped.stderr
    assert os.readlink(tmp_path / "run" / "drafter") == "pretrain/drafter"
    assert not (tmp_path / "run" / "align").exists()
    with monkeypatch.context() as patch:  # the last step of a stage: the next one must not begin
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        again = finished(train(folder, tmp_path / "run", *command))
    assert "after step 3 of 3 of stage pretrain" in again.stderr
    assert not (tmp_path / "run" / "align").exists()
    rest = finished(train(folder, tmp_path / "run", *command))
    assert "stage 2 of 2, align: 3 steps" in rest.stderr
    assert "stage 1 of 2" not in rest.stderr
    assert rest.stdout.splitlines()[0].startswith(f"best drafter: {tmp_path / 'run' / 'drafter'} (step 3, tau ")
    for name in ("pretrain", "align"):
        assert same(folder / "whole" / name, tmp_path / "run" / name, 3)


def test_the_largest_architecture_within_the_budget_is_chosen_and_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(model: Any, grid: Any) -> Costs:
        return Costs(1.0, {made: num_parameters(made, model.config) / 100_000 for made in grid})

    monkeypatch.setattr(fast_draft, "measured_costs", measured)
    small = plan(folder, tmp_path / "run", "--from-scratch", "--share", 0.03)
    large = plan(folder, tmp_path / "run", "--from-scratch", "--share", 0.1)
    assert small["parameters"] < large["parameters"]
    shallow = finished(train(folder, tmp_path / "run", "--from-scratch", "--layers", 1, "--plan"))
    assert "timing a step of the target and of 5 draft architectures" in shallow.stderr
    assert "draft of 1 layer of width 24: a step costs 0.05 of the target's" in shallow.stderr
    assert not (tmp_path / "run").exists()


def test_fresh_weights_learn_at_a_rate_for_their_width_and_the_plan_says_so(folder: Path, tmp_path: Path) -> None:
    published = recipe_for("draft-model").loop.learning_rate
    command = (*SIZES, "--pretrain", folder / "texts.jsonl")
    planned = plan(folder, tmp_path / "run", *command)["stages"]
    kept = {name: json.loads((folder / "whole" / name / "recipe.json").read_text())["loop"]["learning_rate"]
            for name in ("pretrain", "align")}  # fmt: skip
    assert kept == pytest.approx({"pretrain": 4 * published, "align": published})
    assert kept == {name: stage["learning_rate"] for name, stage in planned.items()}
    chosen = plan(folder, tmp_path / "run", *command, "--set", "head.stages.pretrain.loop.learning_rate=1e-3")["stages"]
    assert [stage["learning_rate"] for stage in chosen.values()] == [1e-3, published]


def test_stages_have_settings_of_their_own(folder: Path, tmp_path: Path) -> None:
    more = ("--pretrain", folder / "texts.jsonl", "--continue-on", folder / "answers.jsonl", "--text", "draft",
            "--set", "head.stages.pretrain.loop.steps=7")  # fmt: skip
    result = finished(train(folder, tmp_path / "run", *SIZES, *more, "--plan"))
    assert [line.strip() for line in result.stdout.splitlines() if line.startswith("stage ")] == [
        "stage pretrain", "stage continue", "stage align"]  # fmt: skip
    lines = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("  steps  ")]
    assert lines == ["3", "7,", "3,"]  # the first one is that of the settings


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (("--from-scratch", "--layers", 9, "--width", 16), 1, "1 to 4 layers and a width below 32"),
        (("--from-scratch", "--width", 17), 1, "a multiple of 8, got any and 17"),
        (("--from-scratch", "--share", 1.5), 2, "share of a target step between 0 and 1"),
        ((*SIZES, "--set", "head.stages.warm.loop.steps=2"), 2, "no stage 'warm'; there are pretrain, continue, align"),
        ((*SIZES, "--set", "head.stages.align.loop.step=2"), 2, "[head.stages.align] [loop] has no setting 'step'"),
        ((*SIZES, "--set", "head.cut.num_layers=2"), 2, "a fresh model is not cut"),
        (("--share", 0.1), 2, "--share belongs to --from-scratch"),
        (("--from-scratch", "--from", "x"), 2, "--from and --from-scratch are two ways to begin"),
        (("--layers", 2, "--from", "x"), 2, "--layers belongs to --cut-from or --from-scratch"),
        (
            ("--from", "x", "--set", 'head.draft="scratch"'),
            2,
            '--from and head.draft = "scratch" are two ways to begin',
        ),
        ((*SIZES, "--features", "x"), 2, "a draft model reads no hidden states of the target; leave --features out"),
        ((*SIZES, "--set", "data.written_from=0.5"), 2, "leave data.written_from out"),
        ((*SIZES, "--set", "head.options.dept=3"), 2, "draft-model has no option 'dept'; it has depth, budget"),
        ((*CUT, "--set", "head.options.dept=3"), 2, "draft-model has no option 'dept'; it has depth, budget"),
        ((*CUT, "--set", "head.options.depth=0"), 2, "[head] options {'depth': 0}: "),
        ((*CUT, "--set", "head.options.depth=deep"), 2, "[head] options {'depth': 'deep'}: "),
        ((*CUT, "--set", "head.options.grow=wild"), 2, "there is no growth 'wild'"),
        (("--cut-from", "target"), 2, "--cut-from needs a size to cut to"),
        (("--cut-from", "target", "--layers", 9), 1, "num_layers of a cut is at most the model's 4, got 9"),
        (("--from", "x", "--text", "mine"), 2, "no text 'mine' to learn from; there are fixed, target, draft, mixture"),
        (("--from", "x", "--keep-share", 0.5, "--set", 'head.learns="tokens"'), 2, "the token filter compares laws"),
        (
            ("--from", "x", "--keep-share", 0.5, "--set", "head.keep_share=1.0"),
            2,
            "given twice, by --set and by --keep",
        ),
    ],
)
def test_what_a_draft_model_cannot_be_made_of_is_one_line(
    folder: Path, tmp_path: Path, more: tuple[object, ...], status: int, words: str
) -> None:
    failed(train(folder, tmp_path / "run", *more), status, words)
    assert not (tmp_path / "run" / "recipe.json").exists()
    assert not (tmp_path / "run" / "start").exists()


def test_weights_to_begin_with_are_refused_where_the_recipe_s_file_begins_fresh(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "fresh.toml").write_text('[head]\ndraft = "scratch"\n')
    more = ("--from", folder / "draft", "--recipe", tmp_path / "fresh.toml")
    failed(train(folder, tmp_path / "run", *more), 2, '--from and head.draft = "scratch" are two ways to begin')


def test_options_of_draft_models_are_refused_for_heads(folder: Path, tmp_path: Path) -> None:
    failed(
        train(folder, tmp_path / "run", "--text", "draft", kind="medusa"), 2, "--text belongs to the kind draft-model"
    )


def test_another_size_in_the_same_directory_is_refused(folder: Path) -> None:
    command = ("--from-scratch", "--layers", 3, "--width", 16, "--pretrain", folder / "texts.jsonl")
    failed(train(folder, folder / "whole", *command), 1, "architecture.json holds 2x16", "Use another --out")


# --- Cut, whose text, which tokens ---------------------------------------------------------------------


def test_a_model_is_cut_out_of_the_target_by_one_option(folder: Path, tmp_path: Path) -> None:
    finished(train(folder, tmp_path / "run", "--cut-from", "target", "--layers", 2, "--width", 24, "--steps", 1))
    config = json.loads((tmp_path / "run" / "drafter" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (2, 24)
    other = plan(folder, tmp_path / "other", "--cut-from", folder / "draft", "--layers", 3)
    assert other["recipe"]["head"] == {"draft": str(folder / "draft"), "cut": {"num_layers": 3}}


@pytest.mark.parametrize("more", [(), ("--fresh",)])
def test_a_start_that_was_refused_leaves_no_cut_of_other_sizes_to_the_next(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[object, ...]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("specdec.train.job.checkpoint_bytes", lambda trainable: 1 << 60)
        failed(train(folder, tmp_path / "run", *CUT), 1, "MB free, one checkpoint takes")
    finished(train(folder, tmp_path / "run", "--cut-from", "target", "--layers", 3, "--steps", 1, *more))
    config = json.loads((tmp_path / "run" / "drafter" / "config.json").read_text())
    assert config["num_hidden_layers"] == 3


def test_options_stand_for_settings_of_the_recipe(folder: Path, tmp_path: Path) -> None:
    begin = ("--from", folder / "draft")
    made = plan(folder, tmp_path / "run", *begin, "--text", "mixture", "--divergence", "jsd:0.5", "--keep-share", 0.4)
    assert made["recipe"]["head"] == {"text": {"fixed": 0.5, "draft": 0.5}, "keep_share": 0.4}
    assert made["recipe"]["objective"]["divergence"] == "jsd:0.5"
    assert plan(folder, tmp_path / "run", *begin, "--text", "fixed")["recipe"]["head"] == {"text": {}}


def test_the_filter_s_reference_is_seen_while_it_is_distilled_and_stops_alike(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--from", folder / "draft", "--keep-share", 0.4, "--steps", 2)
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        stopped = finished(train(folder, tmp_path / "run", *command))
    assert "after step 1 of 2 of stage reference; the same command goes on" in stopped.stderr
    assert stopped.stdout.splitlines()[-1].endswith(f"--drafter {tmp_path / 'run' / 'reference' / 'drafter'}")
    rest = finished(train(folder, tmp_path / "run", *command))
    assert "stage 1 of 2, reference" in rest.stderr
    assert "stage 2 of 2, draft" in rest.stderr
    assert steps(tmp_path / "run" / "reference") == steps(tmp_path / "run") == [1, 2]


def test_the_reference_of_a_fresh_model_is_a_stage_that_is_seen_and_stops_alike(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "nobody's")
    out, push = tmp_path / "run", ("--push-to-hub", "nobody/nothing")
    command = (*SIZES, "--keep-share", 0.4, "--steps", 2)
    for step in (1, 2):  # the last step of the reference, too: its drafter is not the one to push
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            stopped = finished(train(folder, out, *command, *push))
        assert f"after step {step} of 2 of stage align/reference; the same command goes on" in stopped.stderr
        assert os.readlink(out / "drafter") == "align/reference/drafter"
        assert (out / "drafter" / "config.json").is_file()
        assert not (out / "align" / "latest").exists()
    starts = json.loads((out / "align" / "reference" / "run.json").read_text())["starts"]
    assert [start["after_step"] for start in starts] == [0, 1]
    rest = finished(train(folder, out, *command))
    assert "stage 2 of 2, align: 2 steps" in rest.stderr
    assert os.readlink(out / "drafter") == "align/drafter"
    assert steps(out / "align" / "reference") == steps(out / "align") == [1, 2]


def test_a_stage_says_its_place_among_stages_and_their_references(folder: Path, tmp_path: Path) -> None:
    more = ("--pretrain", folder / "texts.jsonl", "--keep-share", 0.4, "--steps", 1, "--json")
    result = finished(train(folder, tmp_path / "run", *SIZES, *more))
    events = [json.loads(line) for line in result.stdout.splitlines()]
    names = ["pretrain", "align/reference", "align"]
    assert [event["stage"] for event in events if event["event"] == "step"] == names
    told = [event["text"] for event in events if event["event"] == "stage"]
    assert [text.split(": ")[0] for text in told] == [f"stage {n} of 3, {names[n - 1]}" for n in (1, 2, 3)]
    assert (events[-1]["stage"], events[-1]["stopped"]) == ("align", False)


def test_a_job_with_stages_reaches_other_processes_whole() -> None:
    recipe = recipe_for("draft-model", head={"draft": "scratch", "scratch": {"num_layers": 2}})
    job = Job(recipe=recipe, target="t", data=Path("a"), out=Path("o"), stages={"pretrain": Path("p")})
    assert Job.of_json(job.to_json()) == job
