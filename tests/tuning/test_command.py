"""`specdec tune`: what it prints and writes, and how it ends."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from specdec.cli import app
from specdec.drafters.directory import read_drafter_json
from specdec.tuning.tune import Effort
from tests.test_cli import save_model
from tests.tuning.costs import costs

SMALL = Effort(depths=(1, 2), budgets=(3,), few=1, finalists=1, repeats=1)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "target"
    save_model(folder, seed=1)
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPECDEC_DEBUG", raising=False)
    monkeypatch.setattr(import_module("specdec.cli.tune"), "Effort", lambda: SMALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.txt").write_text("def push(self):\n")
    torch.set_num_threads(1)


def tune(target: Path, *arguments: object) -> Any:
    words = ["tune", target, "-q", "questions.txt", "-n", 10, "--no-optimize", *arguments]
    return CliRunner().invoke(app, list(map(str, words)))


def test_it_prints_what_it_expects_and_measured_and_writes_the_choice(target: Path, tmp_path: Path):
    save_model(tmp_path / "draft", seed=1)  # the target once more: always right
    costs(per_level=0.01, per_node=0.0).save(tmp_path / "costs.json")
    result = tune(target, "-d", "draft:grow=fixed", "--costs", "costs.json")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "choice: grow=fixed,depth=2,budget=2" in lines
    assert any(line.startswith("expected: ") for line in lines)
    assert any(line.startswith("projected from the given costs: ") for line in lines)
    assert lines[-1] == "kept in draft/drafter.json; use --drafter draft"
    assert read_drafter_json(Path("draft")).options == {"grow": "fixed", "depth": "2", "budget": "2"}
    used = CliRunner().invoke(app, ["generate", str(target), "-d", "draft", "-p", "def push", "-n", "4"])
    assert used.exit_code == 0, used.output


def test_where_nothing_pays_it_says_so_and_keeps_nothing(target: Path, tmp_path: Path):
    costs(per_level=0, per_node=1000.0).save(tmp_path / "costs.json")
    result = tune(target, "-d", "suffix", "--costs", "costs.json", "--out", "mine")
    assert result.exit_code == 0, result.output
    assert "speculation does not pay here" in result.stdout
    assert not Path("mine").exists()


def test_it_measures_here_ranks_in_the_grid_and_reports_json(target: Path):
    result = tune(target, "-d", "lookup:min_ngram=1", "--grid", "--json", "--save-costs", "costs.json", "--dry-run")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["projected"] is False
    assert report["measured"]["tokens_per_second"] > 0
    options = [entry["options"] for entry in report["grid"]]
    plainly = None in options  # the choice is measured too, and on a busy machine it may be not to speculate
    assert len(options) == 5 + plainly == len({str(entry) for entry in options})
    assert report["path"] is None
    assert json.loads(Path("costs.json").read_text())["verifications"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "--drafter"),
        (["-d", "sufix"], 1, "did you mean 'suffix'"),
        (["-d", "suffix+lookup"], 1, "two drafters"),
        (["-d", "suffix", "--limit", 0], 2, "expected 1 or more"),
        (["-d", "suffix", "-n", 399], 1, "leaves room"),
        (["-d", "suffix", "--costs", "costs.json", "--fresh"], 2, "measures nothing"),
        (["-d", "suffix", "--costs", "questions.txt"], 1, "does not hold a cost table"),
        (["-d", "suffix", "--out", "."], 1, "not an empty directory"),
    ],
)
def test_wrong_arguments_are_one_line(target: Path, tmp_path: Path, arguments: list[object], status: int, said: str):
    costs().save(tmp_path / "costs.json")
    result = tune(target, *arguments)
    assert result.exit_code == status, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1
