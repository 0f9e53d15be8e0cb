"""`specdec data` from the command line: from prompts to answers to prepared data to features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from specdec.cli import app
from specdec.target import BEFORE_NORM
from specdec.train.feature_cache import read_index
from specdec.train.prepare import open_prepared
from tests.train import chats
from tests.train.chats import message
from tests.train.endpoint_server import Behaviour, serving


def run(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)], **options)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a ChatML tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "target"
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=340, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, max_position_embeddings=256, bos_token_id=1,
        eos_token_id=[4, 2], pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    chats.tokenizer(chats.CHATML).save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": [message("user", f"What is {n}?"), message("assistant", f"It is {n}.")]} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(target: Path, source: Path, folder: Path) -> Path:
    result = run("prepare", source, "--tokenizer", target, "--out", folder, "--holdout", 0.2)
    assert result.exit_code == 0, result.output
    return folder


def test_prepare_prints_the_numbers(target: Path, source: Path, tmp_path: Path):
    result = run("prepare", source, "--tokenizer", target, "--out", tmp_path / "data", "--holdout", 0.2)
    assert result.exit_code == 0
    manifest = open_prepared(tmp_path / "data").manifest
    assert f"{manifest['documents']} documents to train on" in result.stdout
    assert manifest["tokenizer"]["name"] == str(target)
    assert "supervised (" in result.stdout


def test_prepare_speaks_json(target: Path, source: Path, tmp_path: Path):
    result = run("prepare", source, "--tokenizer", target, "--out", tmp_path / "data", "--json")
    told = json.loads(result.stdout)
    assert told["rows"] == 12
    assert told["documents"] + told["held_out"] == 12


def test_warnings_and_errors_are_one_line_on_stderr(target: Path, source: Path, tmp_path: Path):
    result = run("prepare", source, "--tokenizer", target, "--out", tmp_path / "short", "--max-length", 26)
    assert "warning: " in result.stderr
    assert "answers were cut off at 26 tokens" in result.stderr
    source.write_text(source.read_text() + "broken\n")
    result = run("prepare", source, "--tokenizer", target, "--out", tmp_path / "data")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "chats.jsonl:13: not JSON" in result.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("from_text", [True, False])
def test_preview_marks_what_is_supervised(target: Path, source: Path, tmp_path: Path, from_text: bool):
    what: list[Any] = [source, "--tokenizer", target] if from_text else [prepared(target, source, tmp_path / "data")]
    result = run("preview", *what, "--rows", 2, "--plain")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("⟦") == result.stdout.count("document ") == 2
    inside = result.stdout.split("⟦")[1].split("⟧")[0].replace("·", "")
    assert inside.startswith("It is ")
    assert inside.endswith(".<|im_end|>")


def test_preview_of_text_needs_a_tokenizer(source: Path):
    result = run("preview", source)
    assert result.exit_code == 2
    assert "--tokenizer" in result.stderr


def test_answers_of_the_target_become_data_again(target: Path, source: Path, tmp_path: Path):
    answers = tmp_path / "answers.jsonl"
    command = ("regenerate", source, "--target", target, "--out", answers, "-n", 8, "--temperature", 0.5, "--limit", 5)
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "5 rows with 5 answers" in result.stdout
    assert "0 rows with 0 answers, 0 of them cut at the cap, 5 were there already" in run(*command).stdout
    result = run("prepare", answers, "--tokenizer", target, "--out", tmp_path / "data", "--json")
    assert json.loads(result.stdout)["forms"] == {"tokens": 5}


def test_options_of_the_template_must_stay_as_they_were(target: Path, source: Path, tmp_path: Path):
    command = ("regenerate", source, "--target", target, "--out", tmp_path / "a.jsonl", "-n", 4, "--limit", 1)
    assert run(*command, "--template-option", "enable_thinking=false").exit_code == 0
    result = run(*command)
    assert result.exit_code == 1
    assert "template_options None (before: {'enable_thinking': False})" in result.stderr


def test_regenerate_passes_over_rows_that_ask_nothing(source: Path, tmp_path: Path):
    source.write_text('{"q": 1}\nbroken\n' + source.read_text())
    with serving(Behaviour()) as url:
        command = ("regenerate", source, "--endpoint", url, "--model", "tiny", "--out", tmp_path / "a.jsonl")
        stopped = run(*command)
        assert stopped.exit_code == 1
        assert "chats.jsonl:1: expected messages" in stopped.stderr
        assert "--skip-bad" in stopped.stderr
        result = run(*command, "--skip-bad", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["finished"], told["bad"]) == (12, 2)
    assert "chats.jsonl:1: expected messages" in told["first_bad"]
    assert "warning: 2 rows were passed over" in result.stderr


def test_an_endpoint_answers_and_failures_end_with_status_1(source: Path, tmp_path: Path):
    behaviour = Behaviour(failures=[(400, {})])
    with serving(behaviour) as url:
        command = ("regenerate", source, "--endpoint", url, "--model", "tiny", "--out", tmp_path / "a.jsonl", "--json")
        result = run(*command, "--concurrency", 1)
        assert result.exit_code == 1
        assert json.loads(result.stdout)["finished"] == 11
        assert "1 prompts have no answer" in result.stderr
        assert run(*command).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "either --target PATH or --endpoint URL"),
        (["--target", "a", "--endpoint", "http://x"], "either --target PATH or --endpoint URL"),
        (["--endpoint", "http://x"], "--model"),
        (["--endpoint", "http://x", "--model", "m", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        (["--endpoint", "http://x", "--model", "m", "--template", __file__], "the server uses its own"),
        (["--endpoint", "http://x", "--model", "m", "--template-option", "a=1"], "the server uses its own"),
        (["--target", "a", "--temperature", "0.5", "--template-option", "x"], "no model"),
    ],
)
def test_wrong_ways_to_ask_are_said(source: Path, tmp_path: Path, arguments: list[str], complaint: str):
    missing = [str(tmp_path / "missing") if word == "a" else word for word in arguments]
    result = run("regenerate", source, "--out", tmp_path / "a.jsonl", *missing)
    assert result.exit_code in (1, 2)
    assert complaint in result.stderr


def test_features_tell_their_size_and_ask(target: Path, source: Path, tmp_path: Path):
    data = prepared(target, source, tmp_path / "data")
    command = ("features", data, "--target", target, "--out", tmp_path / "cache", "--taps", "1,3", "--row-length", 32)
    asked = run(*command)
    assert asked.exit_code == 1
    assert "before-norm, tap-1, tap-3 of " in asked.stdout
    assert "388 bytes a token" in asked.stdout  # 3 taps of 32 float32 numbers and an id
    assert "add --yes" in asked.stderr
    assert not (tmp_path / "cache").exists()
    assert run(*command, "--yes").exit_code == 0
    assert read_index(tmp_path / "cache").taps == (BEFORE_NORM, 1, 3)
    assert "0 of them computed now" in run(*command, "--yes").stdout


def test_features_of_a_kind_are_those_that_it_reads(target: Path, source: Path, tmp_path: Path):
    data = prepared(target, source, tmp_path / "data")
    result = run("features", data, "--target", target, "--out", tmp_path / "cache", "--kind", "medusa", "-y", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["taps"] == ["before-norm"]


def test_features_of_a_kind_that_reads_none_are_refused(target: Path, source: Path, tmp_path: Path):
    data = prepared(target, source, tmp_path / "data")
    for kind, words, status in (("draft-model", "reads no hidden states", 2), ("medusa9", "no kind 'medusa9'", 1)):
        result = run("features", data, "--target", target, "--out", tmp_path / "cache", "--kind", kind, "-y")
        assert result.exit_code == status
        assert words in result.stderr.splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "cache").exists()


def test_features_refuse_data_of_another_tokenizer(target: Path, source: Path, tmp_path: Path):
    data = prepared(target, source, tmp_path / "data")
    result = run("features", data, "--target", "demo", "--out", tmp_path / "cache", "--taps", "1", "-y")
    assert result.exit_code == 1
    assert "prepared with the tokenizer of" in result.stderr
    assert run("features", data, "--target", target, "--out", tmp_path / "c", "--taps", "x").exit_code == 2
    assert run("features", data, "--target", target, "--out", tmp_path / "c").exit_code == 2
