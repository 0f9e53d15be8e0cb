"""`specdec convert` and `specdec info` on draft heads: what they write and print, and how they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specdec import formats
from specdec.cli.convert import NAMES
from tests.formats.published import same_bytes, tensors_in
from tests.formats.test_medusa import full, v1, v2, vllm
from tests.test_cli import failed, run
from tests.tiny import make_target


def facts(*arguments: object) -> Any:
    """What a command prints with --json."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_head_is_written_in_another_format_and_back(tmp_path: Path) -> None:
    source = v1(tmp_path / "source", heads=5)
    to_vllm = facts("convert", source, "--to", "vllm_medusa", "--out", tmp_path / "vllm")
    assert (to_vllm["from"], to_vllm["format"], to_vllm["kind"]) == ("medusa_v1", "vllm_medusa", "medusa")
    facts("convert", tmp_path / "vllm", "--to", "medusa_v1", "--out", tmp_path / "back")
    assert same_bytes(tensors_in(source), tensors_in(tmp_path / "back"))


def test_without_a_directory_the_name_is_that_of_source_and_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    v1(tmp_path / "heads")
    result = run("convert", "heads/medusa_lm_head.pt", "--to", "native")
    assert result.exit_code == 0
    assert result.stdout.startswith("heads-native: a medusa head of")
    assert formats.read("heads-native").format == "native"


def test_a_directory_that_is_not_empty_is_replaced_only_with_force(tmp_path: Path) -> None:
    source, out = v1(tmp_path / "source"), vllm(tmp_path / "out")
    failed(run("convert", source, "--to", "native", "--out", out), 1, "not empty", "--force")
    assert formats.read(out).format == "vllm_medusa"
    facts("convert", source, "--to", "native", "--out", out, "--force")
    assert formats.read(out).format == "native"


def test_the_targets_name_is_written_where_the_format_states_it(tmp_path: Path) -> None:
    facts("convert", vllm(tmp_path / "in"), "--to", "medusa_v1", "--out", tmp_path / "out", "--target", "some/target")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["base_model_name_or_path"] == "some/target"


def test_a_full_model_gives_up_its_heads_only_when_asked_to_and_takes_them_back(tmp_path: Path) -> None:
    source = full(tmp_path / "source")
    refused = run("convert", source, "--to", "native", "--out", tmp_path / "heads")
    failed(refused, 1, "would be lost", "--head-only")
    facts("convert", source, "--to", "native", "--out", tmp_path / "heads", "--head-only")
    lacking = run("convert", tmp_path / "heads", "--to", "medusa_2", "--out", tmp_path / "again")
    failed(lacking, 1, "--base")
    facts("convert", tmp_path / "heads", "--to", "medusa_2", "--out", tmp_path / "again", "--base", source)
    assert same_bytes(tensors_in(source), tensors_in(tmp_path / "again"))


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["SRC", "--to", "wild"], 2, ["wild", "vllm_medusa"]),
        (["SRC"], 2, ["--to"]),
        (["nowhere", "--to", "native"], 1, ["nowhere"]),
        (["SRC", "--to", "medusa_v1"], 1, ["use the target's", "medusa_v2"]),
        (["SRC", "--to", "dflash"], 1, ["dflash", "medusa"]),
        (["SRC", "--to", "medusa_2", "--base", "nowhere"], 1, ["nowhere", "config.json"]),
        (["SRC", "--to", "medusa_2", "--base", "nowhere", "--head-only"], 1, ["contradict"]),
    ],
)
def test_what_cannot_be_converted_ends_in_one_line(
    arguments: list[str], status: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = v2(tmp_path / "source")
    failed(run("convert", *[str(source) if word == "SRC" else word for word in arguments]), status, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("content", [b"", b"text, not tensors", b"\x80\x04cos\nsystem\n(S'true'\ntR."])
def test_broken_and_hostile_files_end_in_one_line(content: bytes, tmp_path: Path) -> None:
    source = v1(tmp_path / "source")
    (source / "medusa_lm_head.pt").write_bytes(content)
    for arguments in (["info", source], ["convert", source, "--to", "native", "--out", tmp_path / "out"]):
        failed(run(*arguments), 1, "medusa_lm_head.pt", "refused")


def test_info_describes_a_head_from_its_files_alone(tmp_path: Path) -> None:
    source = v1(tmp_path / "source", heads=5)
    told = facts("info", source)["head"]
    assert (told["kind"], told["format"], told["config"]["num_heads"]) == ("medusa", "medusa_v1", 5)
    assert told["parameters"] == 5 * (16 * 16 + 16 + 40 * 16)
    assert told["dtypes"] == ["float32"]
    shown = run("info", source).stdout
    assert "made for lmsys/vicuna-7b-v1.3" in " ".join(shown.split())
    assert "hidden_size 16" in shown


def test_info_says_whether_a_head_fits_a_target(tmp_path: Path) -> None:
    source = v1(tmp_path / "source")
    fitting, other = tmp_path / "fitting", tmp_path / "other"
    make_target(hidden_size=16, vocab_size=40).save_pretrained(fitting)
    make_target(hidden_size=32, vocab_size=40).save_pretrained(other)
    assert facts("info", source, "--target", fitting)["fits_target"]["fits"] is True
    refused = facts("info", source, "--target", other)["fits_target"]
    assert refused["fits"] is False
    assert "hidden_size 32 (drafter: 16)" in refused["reason"]


def test_the_help_names_every_format() -> None:
    assert NAMES.split(", ") == [known.NAME for known in formats.FORMATS]
    assert "vllm_medusa" in " ".join(run("convert", "--help").stdout.split())
