"""Cached features: the same losses as in process, resumed by shard, and never taken for what they are not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.errors import BadData, UnsupportedModel
from specdec.probe import target_of
from specdec.target import BEFORE_NORM, Target
from specdec.train import feature_cache
from specdec.train.batch import TrainBatch
from specdec.train.feature_cache import CachedData, FeaturePlan, plan_features, write_features
from specdec.train.features import TargetFeatures, check_packing, stored_taps
from specdec.train.order import Order, Piece
from specdec.train.prepared import PreparedData, write_prepared
from specdec.train.recipe import recipe_for
from specdec.train.report import StepReport
from specdec.train.run import make_training, train_head
from tests.families import FAMILIES, tiny_model
from tests.tiny import VOCAB, make_target, perturbed, shared_target

ROW = 16
LENGTHS = [5, 16, 33, 2, 9, 17, 12, 40, 7, 3]
"""Shorter and longer than a row; 33 and 17 leave a lone token, which trains nothing."""


def prepared(folder: Path, seed: int = 0) -> PreparedData:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    write_prepared(folder, ((ids, [place > 1 or len(ids) < 4 for place in range(len(ids))]) for ids in rows), {})
    return PreparedData(folder)


def cached(folder: Path, data: PreparedData, target: Target, taps: tuple[int, ...], **options: Any) -> CachedData:
    write_features(plan_features(data, target, taps, row_length=ROW, **options), data, target, folder, rows_at_once=2)
    return CachedData(data, folder, target, taps, row_length=ROW)


def batches(documents: Any, *, packed: bool = True) -> list[TrainBatch]:
    """One epoch, three rows at a time."""
    rows = Order(documents.lengths, ROW, packed=packed).rows_of(0)
    groups = [list(range(first, min(first + 3, len(rows)))) for first in range(0, len(rows), 3)]
    return [TrainBatch.of_rows(documents, [rows[n] for n in numbers], numbers, ROW) for numbers in groups]


def losses(batch: TrainBatch) -> torch.Tensor:
    """Cross-entropy of each supervised token under the target's own law."""
    return torch.nn.functional.cross_entropy(batch.laws(1).float(), batch.tokens(1), reduction="none")


@pytest.mark.parametrize("packed", [True, False])
def test_cached_and_in_process_features_agree_to_rounding(tmp_path: Path, packed: bool):
    target = target_of(shared_target())
    taps = (0, 2, target.num_layers, BEFORE_NORM)
    data = prepared(tmp_path / "data")
    documents = cached(tmp_path / "cache", data, target, taps, packed=packed, shard_bytes=20_000)
    assert len(documents.plan.shards) > 2
    features = TargetFeatures(target, taps)
    for kept, plain in zip(batches(documents), batches(data), strict=True):
        from_cache, in_process = features(kept), features(plain)
        live = plain.documents >= 0
        assert from_cache.taps.keys() == in_process.taps.keys()
        for tap in taps:
            torch.testing.assert_close(from_cache.taps[tap][live], in_process.taps[tap][live], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(losses(from_cache), losses(in_process), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["medusa", "dflash", "eagle3"])
def test_training_from_the_cache_has_the_losses_of_training_in_process(tmp_path: Path, kind: str):
    model = shared_target()
    target, data = target_of(model), prepared(tmp_path / "data")
    small = {"steps": 4, "rows_per_step": 3, "rows_at_once": 3, "warmup": 0}
    recipe = recipe_for(kind, loop=small, data={"row_length": ROW, "validation_prompts": 0})
    training = make_training(recipe, target)
    documents = cached(tmp_path / "cache", data, target, training.taps)
    found: list[list[float]] = []
    for name, texts in (("cached", documents), ("in process", data)):
        reports: list[Any] = []
        train_head(recipe, model, texts, tmp_path / name, report=reports.append)
        found.append([report.loss for report in reports if isinstance(report, StepReport)])
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][0] != pytest.approx(found[0][-1], rel=1e-3), "something was learned, so the steps differ"


def test_with_a_cache_no_layer_of_the_target_runs(tmp_path: Path):
    target = target_of(make_target())
    data = prepared(tmp_path / "data")
    documents = cached(tmp_path / "cache", data, target, (1, target.num_layers))
    features = TargetFeatures(target, (1, target.num_layers))
    batch = features(batches(documents)[0])

    def fail(*_: Any) -> None:
        raise AssertionError("a layer ran")

    hooks = [layer.register_forward_hook(fail) for layer in target.layers]
    again = features(batches(documents)[0])
    with pytest.raises(AssertionError, match="a layer ran"):
        features(batches(data)[0])
    for hook in hooks:
        hook.remove()
    assert batch.logits is not None
    assert again.logits is not None
    assert torch.equal(again.logits, batch.logits)


def test_what_has_to_be_kept_follows_from_what_is_read():
    target = target_of(shared_target())
    last = target.num_layers
    assert stored_taps(target, (1, last), needs_logits=False) == {1, BEFORE_NORM}
    assert stored_taps(target, (1,), needs_logits=False) == {1}
    assert stored_taps(target, (1,)) == {1, BEFORE_NORM}


def test_the_size_is_known_before_anything_is_computed(tmp_path: Path):
    target = target_of(shared_target())
    data = prepared(tmp_path / "data")
    plan = plan_features(data, target, (1, 2), row_length=ROW, shard_bytes=20_000)
    assert plan.bytes == sum(LENGTHS) * (3 * target.hidden_size * 4 + 4)
    write_features(plan, data, target, tmp_path / "cache")
    on_disk = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.safetensors"))
    assert 0 < on_disk - plan.bytes < 2000 * len(plan.shards)


def test_only_missing_shards_are_computed(tmp_path: Path):
    target = target_of(shared_target())
    data = prepared(tmp_path / "data")
    plan = plan_features(data, target, (1,), row_length=ROW, shard_bytes=10_000)
    assert write_features(plan, data, target, tmp_path / "cache") == sum(LENGTHS)
    before = {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    assert write_features(plan, data, target, tmp_path / "cache") == 0
    gone, torn = plan.shards[1], plan.shards[-1]
    (tmp_path / "cache" / gone.file).unlink()
    (tmp_path / "cache" / torn.file).write_bytes(before[torn.file][:-100])
    (tmp_path / "cache" / f".unfinished-{gone.file}").write_bytes(b"half")
    told: list[int] = []
    assert write_features(plan, data, target, tmp_path / "cache", tell=told.append) == gone.tokens + torn.tokens
    assert told[0] == sum(LENGTHS) - gone.tokens - torn.tokens
    assert {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()} == before


KILLED = """
import sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from specdec.probe import target_of
from specdec.train.feature_cache import plan_features, write_features
from specdec.train.prepared import PreparedData
from tests.tiny import shared_target
data, target = PreparedData(Path(sys.argv[1])), target_of(shared_target())
plan = plan_features(data, target, (1,), row_length=16, shard_bytes=5_000)
print("ready", flush=True)
write_features(plan, data, target, Path(sys.argv[2]), rows_at_once=1, tell=lambda _: time.sleep(0.05))
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path):
    prepared(tmp_path / "data")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "data")]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    while not list((tmp_path / "killed").glob("shard-*")) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = len(list((tmp_path / "killed").glob("shard-*")))
    data, target = PreparedData(tmp_path / "data"), target_of(shared_target())
    plan = plan_features(data, target, (1,), row_length=ROW, shard_bytes=5_000)
    assert 0 < whole < len(plan.shards)
    assert write_features(plan, data, target, tmp_path / "killed", rows_at_once=1) < sum(LENGTHS)
    write_features(plan, data, target, tmp_path / "unbroken", rows_at_once=1)
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("killed", "unbroken")]
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedData, Path]:
    """Taps 1 and before-norm of the shared target, in several shards."""
    folder = tmp_path_factory.mktemp("features")
    data, target = prepared(folder / "data"), target_of(shared_target())
    plan = plan_features(data, target, (1,), row_length=ROW, shard_bytes=10_000)
    write_features(plan, data, target, folder / "cache")
    return data, folder / "cache"


def test_other_data_is_refused(cache: tuple[PreparedData, Path], tmp_path: Path):
    with pytest.raises(BadData, match="computed for another data"):
        CachedData(prepared(tmp_path / "data", seed=1), cache[1], target_of(shared_target()), (1,), row_length=ROW)


def test_another_target_of_the_same_shape_is_refused(cache: tuple[PreparedData, Path]):
    data, path = cache
    other = target_of(perturbed(shared_target(), 0.01))
    with pytest.raises(BadData, match="other states than the target computes"):
        CachedData(data, path, other, (1,), row_length=ROW)


def test_another_kind_of_target_dtype_row_length_or_tap_is_refused(cache: tuple[PreparedData, Path]):
    data, path = cache
    target = target_of(shared_target())
    with pytest.raises(BadData, match="another target"):
        CachedData(data, path, target_of(make_target(num_hidden_layers=3)), (1,), row_length=ROW)
    with pytest.raises(BadData, match="another dtype: float32, this run has bfloat16"):
        CachedData(data, path, target_of(make_target().bfloat16()), (1,), row_length=ROW)
    with pytest.raises(BadData, match="another row length: 16, this run has 32"):
        CachedData(data, path, target, (1,), row_length=2 * ROW)
    with pytest.raises(BadData, match=r"lacks tap-3; it holds before-norm, tap-1"):
        CachedData(data, path, target, (1, 3), row_length=ROW)


def test_another_row_length_is_fine_where_no_document_was_cut(tmp_path: Path):
    target = target_of(shared_target())
    write_prepared(tmp_path / "data", [([5, 6, 7, 8], [True] * 4)] * 3, {})
    data = PreparedData(tmp_path / "data")
    cached(tmp_path / "cache", data, target, (1,))
    assert CachedData(data, tmp_path / "cache", target, (1,), row_length=9).lengths == (4, 4, 4)


def copied(cache: tuple[PreparedData, Path], folder: Path) -> tuple[PreparedData, Path]:
    folder.mkdir()
    for file in cache[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return cache[0], folder


def test_a_missing_or_torn_shard_is_named(cache: tuple[PreparedData, Path], tmp_path: Path):
    data, path = copied(cache, tmp_path / "cache")
    shard = path / feature_cache.read_index(path).shards[1].file
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(BadData, match=f"{shard.name} is missing or not whole"):
        CachedData(data, path, target_of(shared_target()), (1,), row_length=ROW)


def test_other_ids_in_a_shard_are_found_when_they_are_read(cache: tuple[PreparedData, Path], tmp_path: Path):
    data, path = copied(cache, tmp_path / "cache")
    shard = feature_cache.read_index(path).shards[1]
    tensors = load_file(path / shard.file)
    tensors["ids"][0] += 1
    save_file(tensors, path / shard.file)
    documents = CachedData(data, path, target_of(shared_target()), (1,), row_length=ROW)
    documents.piece(Piece(0, 0, 4))
    with pytest.raises(BadData, match=f"holds other ids than the prepared data for document {shard.first}"):
        documents.piece(Piece(shard.first, 0, 2))


def test_shards_are_opened_when_they_are_needed_and_not_all_kept(
    cache: tuple[PreparedData, Path], monkeypatch: pytest.MonkeyPatch
):
    opened: list[str] = []
    real = feature_cache.safe_open

    def counting(file: Any, **options: Any) -> Any:
        opened.append(Path(file).name)
        return real(file, **options)

    monkeypatch.setattr(feature_cache, "safe_open", counting)
    monkeypatch.setattr(feature_cache, "OPEN_SHARDS", 1)
    documents = CachedData(cache[0], cache[1], target_of(shared_target()), (1,), row_length=ROW)
    shards = documents.plan.shards
    assert set(opened) == {shards[0].file, shards[-1].file}
    opened.clear()
    for number in (shards[0].first, shards[0].first, shards[1].first, shards[0].first):
        documents.piece(Piece(number, 0, 2))
    assert opened[-2:] == [shards[1].file, shards[0].file]


def test_a_cache_of_other_settings_is_not_written_into(cache: tuple[PreparedData, Path], tmp_path: Path):
    data, path = cache
    target = target_of(shared_target())
    with pytest.raises(BadData, match=r"something else \(taps, shards differ\)"):
        write_features(plan_features(data, target, (1, 2), row_length=ROW, shard_bytes=10_000), data, target, path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadData, match="something else than cached features"):
        write_features(plan_features(data, target, (1,), row_length=ROW), data, target, tmp_path)


def test_taps_that_do_not_exist_and_a_full_disk_are_refused(
    cache: tuple[PreparedData, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data, target = cache[0], target_of(shared_target())
    with pytest.raises(BadData, match="taps 0 to 4 and before-norm, got 5"):
        plan_features(data, target, (5,), row_length=ROW)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 10}))
    with pytest.raises(BadData, match=r"need [\d,]+ bytes more, .* has 10 free"):
        write_features(plan_features(data, target, (1,), row_length=ROW), data, target, tmp_path / "cache")


def test_states_that_are_no_numbers_are_named(cache: tuple[PreparedData, Path], tmp_path: Path):
    broken = make_target()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    target = Target(broken)
    with pytest.raises(
        BadData, match=r"before-norm of document \d+, tokens 0 to \d+, holds values that are no numbers"
    ):
        write_features(plan_features(cache[0], target, (1,), row_length=ROW), cache[0], target, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("shard-*"))


def test_a_damaged_index_is_one_line(cache: tuple[PreparedData, Path], tmp_path: Path):
    data, path = copied(cache, tmp_path / "cache")
    index = json.loads((path / "features.json").read_text())
    (path / "features.json").write_text(json.dumps({**index, "format_version": 2}))
    with pytest.raises(BadData, match="format version 2"):
        CachedData(data, path, target_of(shared_target()), (1,), row_length=ROW)
    (path / "features.json").write_text("{")
    with pytest.raises(BadData, match="holds no cached features"):
        CachedData(data, path, target_of(shared_target()), (1,), row_length=ROW)


def test_a_plan_reads_back_as_it_was_written(cache: tuple[PreparedData, Path]):
    plan = plan_features(cache[0], target_of(shared_target()), (1,), row_length=ROW, shard_bytes=10_000)
    assert isinstance(plan, FeaturePlan)
    assert feature_cache.read_index(cache[1]) == plan


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_unpacked_losses_agree_or_packing_is_refused(family: str, tmp_path: Path):
    """Each supervised token's loss does not depend on what else is in its row."""
    target = Target(tiny_model(family, "eager"))
    data = prepared(tmp_path / "data")
    try:
        check_packing(target)
    except UnsupportedModel:
        assert family in CANNOT_PACK
        return
    assert family not in CANNOT_PACK
    features = TargetFeatures(target, ())
    by_token: list[dict[tuple[int, ...], list[float]]] = []
    for packed in (True, False):
        found: dict[tuple[int, ...], list[float]] = {}
        for batch in batches(data, packed=packed):
            values = losses(features(batch))
            for value, context in zip(values.tolist(), contexts(batch), strict=True):
                found.setdefault(context, []).append(value)
        by_token.append(found)
    packed_losses, plain_losses = by_token
    assert packed_losses.keys() == plain_losses.keys()
    for context, values in packed_losses.items():
        assert sorted(values) == pytest.approx(sorted(plain_losses[context]), abs=2e-4)


CANNOT_PACK = {"opt", "gpt-oss"}
"""Their masks do not read positions, so documents of one row would see each other."""


def contexts(batch: TrainBatch) -> list[tuple[int, ...]]:
    """What each supervised token follows in its document, itself included, in the order of `losses`."""
    result = []
    for row, column in batch.drafts(1).nonzero().tolist():
        first = column - int(batch.positions[row, column])
        result.append(tuple(batch.ids[row, first : column + 2].tolist()))
    return result
