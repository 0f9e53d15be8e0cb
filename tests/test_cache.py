"""The cache appends in place, commits at the cost of a tree, and is still a transformers cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from specdec.cache import BufferedLayer, KVCache
from specdec.context import Context
from specdec.target import Target
from tests.families import prompts, reference, tiny_model

HEADS, SIZE = 2, 3


def columns(batch: int, count: int, start: int = 0) -> Tensor:
    """States [B, H, C, D] in which column c of row b holds 100 b + c."""
    values = torch.arange(start, start + count, dtype=torch.float32) + 100 * torch.arange(batch)[:, None]
    return values[:, None, :, None].expand(batch, HEADS, count, SIZE).clone()


def filled(batch: int, count: int, capacity: int = 0, num_layers: int = 2) -> KVCache:
    cache = KVCache(num_layers, capacity)
    for layer in layers_of(cache):
        layer.update(columns(batch, count), -columns(batch, count))
    return cache


def layers_of(cache: Cache) -> list[Any]:
    """The layers without transformers' union of layer types, some of which hold no keys."""
    return list(cache.layers)


def read(cache: KVCache, layer: int = 0) -> list[list[float]]:
    keys, values = layers_of(cache)[layer].keys, layers_of(cache)[layer].values
    assert torch.equal(keys, -values), "keys and values move together"
    return keys[:, 0, :, 0].tolist()


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of all moves of layer 0 and on."""
    widths: list[int] = []
    right = BufferedLayer.move

    def counted(self: BufferedLayer, sources: Tensor, destinations: Tensor) -> None:
        widths.append(sources.shape[1])
        right(self, sources, destinations)

    monkeypatch.setattr(BufferedLayer, "move", counted)
    return widths


def test_keep_moves_a_path_behind_the_past() -> None:
    cache = filled(1, 10)  # 6 committed columns, then a tree of 4
    cache.keep([[6, 8, 9]], [6], 9)
    assert read(cache) == [[0, 1, 2, 3, 4, 5, 6, 8, 9]]
    assert read(cache, 1) == read(cache)


def test_keep_serves_rows_of_different_lengths() -> None:
    cache = filled(3, 12)  # rows have 8, 5 and 7 committed columns; the tree begins at 8
    cache.keep([[8, 11], [8, 9, 10, 11], []], [8, 5, 7], 10)
    rows = read(cache)
    assert rows[0] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 11]
    assert rows[1][:9] == [100, 101, 102, 103, 104, 108, 109, 110, 111]
    assert rows[2][:7] == [200, 201, 202, 203, 204, 205, 206]


def test_keep_of_a_chain_s_prefix_moves_nothing_at_batch_1(moves: list[int]) -> None:
    cache = filled(1, 10)
    cache.keep([[6, 7, 8]], [6], 9)
    assert moves == []
    assert read(cache) == [list(map(float, range(9)))]


def test_keep_moves_at_most_the_columns_that_are_kept(moves: list[int]) -> None:
    cache = filled(2, 400)
    cache.keep([[390, 393, 399], [390]], [390, 390], 393)
    assert moves == [3, 3]  # one move for each of two layers, three columns wide, after 390 committed ones


def test_keep_of_nothing_forgets_the_tree() -> None:
    cache = filled(1, 10)
    cache.keep([[]], [6], 6)
    assert read(cache) == [[0, 1, 2, 3, 4, 5]]


def test_overlapping_moves_read_before_they_write() -> None:
    cache = filled(2, 8)
    cache.keep([[5, 6, 7], [4, 6, 7]], [4, 4], 7)
    assert [row[4:] for row in read(cache)] == [[5, 6, 7], [104, 106, 107]]


def test_appending_past_the_capacity_keeps_what_was_there() -> None:
    cache = filled(2, 5, capacity=64)
    layer = layers_of(cache)[0]
    assert isinstance(layer, BufferedLayer)
    layer.update(columns(2, 200, 5), -columns(2, 200, 5))
    assert layer.get_seq_length() == 205
    assert layer.capacity >= 205
    assert read(cache)[1] == [100.0 + c for c in range(205)]


def test_capacity_at_least_doubles_when_it_does_not_suffice() -> None:
    cache = filled(1, 64, capacity=64)
    layer = layers_of(cache)[0]
    assert isinstance(layer, BufferedLayer)
    layer.update(columns(1, 1, 64), -columns(1, 1, 64))
    assert layer.capacity == 128


def test_a_row_and_rows_together_again() -> None:
    cache = filled(3, 6)
    rows = [cache.row(2, 6), cache.row(0, 4)]
    layers_of(cache)[0].update(columns(3, 1, 90), -columns(3, 1, 90))  # copies do not notice
    assert read(rows[0]) == [[200, 201, 202, 203, 204, 205]]
    assert read(rows[1]) == [[0, 1, 2, 3]]
    assert read(KVCache.of_rows(rows)) == [[200, 201, 202, 203, 204, 205], [0, 1, 2, 3, 0, 0]]


def test_copy_of_a_dynamic_cache_and_back() -> None:
    theirs = DynamicCache()
    for layer in range(2):
        theirs.update(columns(2, 5), -columns(2, 5), layer)
    ours = KVCache.copy_of(theirs, 2, capacity=32)
    assert read(ours) == [[0, 1, 2, 3, 4], [100, 101, 102, 103, 104]]
    for layer in layers_of(ours):
        layer.update(columns(2, 2, 5), -columns(2, 2, 5))
    assert theirs.get_seq_length() == 5, "the user's cache is untouched until write_back"
    ours.write_back(theirs)
    assert theirs.get_seq_length() == 7
    keys = layers_of(theirs)[1].keys
    assert torch.equal(keys, columns(2, 7))


def test_copy_of_a_sliding_cache_restores_logical_columns() -> None:
    model = tiny_model("gemma3-sliding")
    theirs = DynamicCache(config=model.config)
    ids = prompts([20]).ids
    with torch.no_grad():
        model(input_ids=ids, past_key_values=theirs, use_cache=True)
    kept = layers_of(theirs)[0].keys
    assert kept.shape[2] < 20
    ours = KVCache.copy_of(theirs, 3)
    assert [layer.get_seq_length() for layer in layers_of(ours)] == [20, 20, 20]
    keys = layers_of(ours)[0].keys
    assert torch.equal(keys[:, :, -kept.shape[2] :], kept)


@pytest.mark.parametrize("count", [1, 3])
def test_crop_takes_a_count_to_remove(count: int) -> None:
    cache = filled(1, 6)
    cache.crop(-count)
    assert read(cache) == [list(map(float, range(6 - count)))]
    with pytest.raises(ValueError, match="non-positive"):
        layers_of(cache)[0].crop(count)


def test_rows_are_selected_repeated_and_reset() -> None:
    cache = filled(3, 4)
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert [row[0] for row in read(cache)] == [200, 0]
    cache.batch_repeat_interleave(2)
    assert [row[0] for row in read(cache)] == [200, 200, 0, 0]
    cache.reset()
    assert cache.get_seq_length() == 0


def test_plain_generate_runs_on_it() -> None:
    model = tiny_model("gemma3-sliding")
    told = reference(model, [12], 20)
    ours = model.generate(**told.prompts.inputs, past_key_values=KVCache(3), max_new_tokens=20, do_sample=False)
    assert ours.tolist() == told.sequences.tolist()


@pytest.mark.parametrize("lengths", [[12], [12, 7, 9]])
def test_no_step_allocates_a_new_buffer_when_the_length_is_known(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[tuple[int, ...]] = []
    import specdec.cache

    right = specdec.cache._buffer_like

    def counted(states: Tensor, capacity: int) -> Tensor:
        allocated.append((*states.shape, capacity))
        return right(states, capacity)

    monkeypatch.setattr(specdec.cache, "_buffer_like", counted)
    model = tiny_model("llama")
    specdec.target_of(model)
    allocated.clear()
    specdec.generate(model, **prompts(lengths).inputs, drafter="recycling", max_new_tokens=100, do_sample=False)
    assert len(allocated) == 2 * 3, "keys and values of three layers, once"


def test_buffers_stay_in_place_from_step_to_step() -> None:
    context = Context(Target(tiny_model("llama")), capacity=200)
    ids = prompts([10]).ids
    with torch.no_grad():
        context.prefill(ids.tolist())
        addresses = _addresses(context.cache)
        tree = torch.tensor([[5, 6, 7]])
        sees = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]], dtype=torch.bool)
        for _ in range(5):
            context.run(tree, torch.tensor([[0, 1, 1]]), sees)
            context.keep([[0, 2]])
            assert _addresses(context.cache) == addresses
    assert context.lengths == [20]


def _addresses(cache: KVCache) -> list[int]:
    return [layer.keys.data_ptr() for layer in layers_of(cache) if layer.keys is not None]
