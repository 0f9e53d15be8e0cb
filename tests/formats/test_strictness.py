"""What is wrong with a checkpoint is named in one line, all of it at once, and nothing in it is ever run."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from specdec import formats
from specdec.errors import BadCheckpoint, SpecdecError, UnknownDrafter
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.formats.replace import whole_directory
from specdec.heads.medusa import MedusaConfig, MedusaHead
from tests.formats.published import V1_CONFIG, VLLM_CONFIG, D, V, medusa_shapes, random_tensors, save, vllm_shapes


def refusal(path: Path) -> str:
    """The one line that reading gives."""
    with pytest.raises(SpecdecError) as caught:
        formats.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path.name) in message or str(path) in message
    return message


def damaged(tmp_path: Path, damage: Callable[[dict[str, Any]], Any], file: str = "medusa_lm_head.pt") -> str:
    tensors = random_tensors(medusa_shapes())
    damage(tensors)
    return refusal(save(tmp_path, V1_CONFIG, file, tensors))


def test_missing_left_over_and_wrong_shaped_tensors_are_named_in_one_error(tmp_path: Path) -> None:
    def damage(tensors: dict[str, Any]) -> None:
        del tensors["1.0.linear.bias"]
        tensors["0.1.weight"] = torch.zeros(V, D + 1)
        tensors["stranger"] = torch.zeros(2)

    message = damaged(tmp_path, damage)
    assert "1.0.linear.bias is missing" in message
    assert f"0.1.weight has shape [{V}, {D + 1}], expected" in message
    assert "stranger is unexpected" in message


def test_a_head_that_is_missing_in_the_middle_is_named(tmp_path: Path) -> None:
    def damage(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith("1.")]:
            del tensors[name]

    assert "1.0.linear.weight is missing" in damaged(tmp_path, damage)


def test_tensors_of_another_kind_of_numbers_are_refused(tmp_path: Path) -> None:
    def damage(tensors: dict[str, Any]) -> None:
        tensors["0.0.linear.weight"] = torch.ones(D, D, dtype=torch.int8)

    assert "0.0.linear.weight holds int8, expected float numbers" in damaged(tmp_path, damage)


class Hostile:
    """Runs a command when it is unpickled carelessly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_hostile_pickle_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    mark, file = tmp_path / "was-run", tmp_path / "medusa_lm_head.pt"
    tensors = {**random_tensors(medusa_shapes()), "payload": Hostile(mark)}
    if legacy:
        file.write_bytes(pickle.dumps(tensors, protocol=2))
    else:
        torch.save(tensors, file)
    (tmp_path / "config.json").write_text(json.dumps(V1_CONFIG))
    assert "tensors only" in refusal(tmp_path)
    assert not mark.exists()
    torch.load(file, weights_only=False) if not legacy else pickle.loads(file.read_bytes())
    assert mark.exists(), "the pickle was harmless, so nothing was shown"


def test_a_pickle_of_something_else_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"0.0.linear.weight": [1, 2]}, tmp_path / "medusa_lm_head.pt")
    assert "mapping of names to tensors" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "medusa_lm_head.pt"])
@pytest.mark.parametrize("content", [b"", b"not weights at all, but some text that goes on\n" * 20, b"\x00" * 64])
def test_empty_and_foreign_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path)
    assert name in message


@pytest.mark.parametrize("file", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
@pytest.mark.parametrize("kept", [7, 0.3, 0.95])
def test_truncated_files_are_refused(file: str, kept: float, tmp_path: Path) -> None:
    save(tmp_path, V1_CONFIG, file, random_tensors(medusa_shapes()))
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: int(kept) if kept > 1 else int(kept * len(whole))])
    assert file in refusal(tmp_path)


def sharded(folder: Path, *, both: str | None = None) -> dict[str, str]:
    """vLLM's heads in two files with an index."""
    tensors = random_tensors(vllm_shapes())
    names = list(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    if both is not None:
        halves = [[*half, *({both} - set(half))] for half in halves]
    weight_map = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / file)
        weight_map.update(dict.fromkeys(half, file))
    (folder / "config.json").write_text(json.dumps(VLLM_CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    whole = save(tmp_path / "whole", VLLM_CONFIG, "model.safetensors", random_tensors(vllm_shapes()))
    read, expected = formats.read(tmp_path), formats.read(whole)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert read.config == expected.config


def test_a_tensor_in_two_shards_is_named_with_both_files(tmp_path: Path) -> None:
    sharded(tmp_path, both="blocks.0.layers.0.weight")
    message = refusal(tmp_path)
    assert "blocks.0.layers.0.weight lies in model-00001-of-00002.safetensors and in model-00002" in message


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors, which is not there" in refusal(tmp_path)


@pytest.mark.parametrize("elsewhere", ["../model.safetensors", "/etc/passwd"])
def test_an_index_does_not_lead_out_of_its_directory(elsewhere: str, tmp_path: Path) -> None:
    index = {"weight_map": {"blocks.0.layers.0.weight": elsewhere}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "points out of its directory" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff", '{"a": ' * 3000])
def test_a_config_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    save(tmp_path, None, "model.safetensors", random_tensors(vllm_shapes()))
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "config.json" in refusal(tmp_path)


def test_a_missing_config_is_named_where_the_format_needs_one(tmp_path: Path) -> None:
    save(tmp_path, None, "model.safetensors", random_tensors(vllm_shapes()))
    assert "no config.json" in refusal(tmp_path)


def test_a_directory_of_nothing_and_a_path_of_nothing_are_refused(tmp_path: Path) -> None:
    assert "no draft head in a known format" in refusal(tmp_path)
    assert "there is no" in refusal(tmp_path / "absent")


def test_a_weight_file_can_be_named_itself(tmp_path: Path) -> None:
    save(tmp_path, V1_CONFIG, "medusa_lm_head.pt", random_tensors(medusa_shapes()))
    assert formats.read(tmp_path / "medusa_lm_head.pt").config.num_heads == 3
    (tmp_path / "notes.txt").write_text("x")
    assert "no weight file" in refusal(tmp_path / "notes.txt")


def native(folder: Path) -> HeadCheckpoint:
    head = MedusaHead(MedusaConfig(D, V, 2))
    checkpoint = HeadCheckpoint("medusa", head.config, head.state_dict(), {"hidden_size": D, "vocab_size": V})
    formats.write(checkpoint, folder)
    return checkpoint


def test_our_own_format_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = native(tmp_path / "head")
    read = formats.read(tmp_path / "head")
    assert (read.kind, read.config, read.target) == (written.kind, written.config, written.target)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in written.tensors.items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "unheard-of"}, "known kinds are"),
        ({"head": {}}, "lacks the fields hidden_size"),
        ({"head": {"hidden_size": D, "vocab_size": V, "num_heads": 2, "colour": 1}}, "unknown fields colour"),
        ({"head": {"hidden_size": str(D), "vocab_size": V, "num_heads": 2}}, "hidden_size is '16', expected int"),
        ({"head": {"hidden_size": D, "vocab_size": V, "num_heads": 2, "output": "other"}}, "output is 'other'"),
        ({"head": {"hidden_size": D, "vocab_size": V, "num_heads": 0}}, "num_heads is at least 1"),
        ({"head": {"hidden_size": D, "vocab_size": V, "num_heads": 3}}, "blocks.2.0.linear.weight is missing"),
        ({"head": {"hidden_size": D, "vocab_size": V, "num_heads": 1}}, "blocks.1.0.linear.weight is unexpected"),
        ({"head": 3}, "are objects"),
        ({"format_version": 2}, "format version 2"),
    ],
)
def test_a_drafter_json_that_does_not_describe_its_tensors_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    native(tmp_path / "head")
    file = tmp_path / "head" / "drafter.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises((BadCheckpoint, UnknownDrafter), match=said):
        formats.read(tmp_path / "head")


def test_a_directory_that_is_not_empty_is_only_replaced_when_that_is_asked_for(tmp_path: Path) -> None:
    checkpoint = native(tmp_path / "head")
    with pytest.raises(BadCheckpoint, match="not empty"):
        formats.write(checkpoint, tmp_path / "head")
    formats.write(checkpoint, tmp_path / "head", "vllm_medusa", overwrite=True)
    assert formats.read(tmp_path / "head").format == "vllm_medusa"
    assert not (tmp_path / "head" / "drafter.json").exists()


@pytest.mark.parametrize("inside", ["notes.txt", "config.json/deeper"])
def test_a_directory_that_is_no_checkpoint_is_never_replaced(inside: str, tmp_path: Path) -> None:
    checkpoint = native(tmp_path / "head")
    precious = tmp_path / "precious" / inside
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(BadCheckpoint, match="not overwritten"):
        formats.write(checkpoint, tmp_path / "precious", overwrite=True)
    assert precious.read_text() == "mine"


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    native(tmp_path / "head")

    def interrupted() -> None:
        with whole_directory(tmp_path / "head", overwrite=True) as folder:
            (folder / "half").write_text("half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert formats.read(tmp_path / "head").config.num_heads == 2
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_tensors_that_do_not_belong_to_the_configuration_are_not_written(tmp_path: Path) -> None:
    checkpoint = native(tmp_path / "head")
    tensors = dict(checkpoint.tensors)
    tensors["blocks.0.0.linear.weight"] = torch.zeros(1)
    wrong = HeadCheckpoint("medusa", checkpoint.config, tensors)
    with pytest.raises(BadCheckpoint, match=r"blocks.0.0.linear.weight has shape \[1\]"):
        formats.write(wrong, tmp_path / "out")
    with pytest.raises(BadCheckpoint, match="no format 'unheard-of'"):
        formats.write(checkpoint, tmp_path / "out", "unheard-of")
