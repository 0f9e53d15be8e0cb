"""Masks that are written where something changed equal masks built anew, additive and block-sparse alike."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

from specdec import additive_mask, block_mask
from specdec.additive_mask import AdditiveMask, ancestor_block, whole_mask
from specdec.block_mask import BlockedMask
from specdec.tree import NO_NODE, Topology, stacked, topology
from specdec.visibility import Reach, Visibility

CPU = torch.device("cpu")
REACHES = {
    "full": Reach(), "window": Reach(window=7), "narrow-window": Reach(window=3), "wide-window": Reach(window=50),
    "chunk": Reach(chunk=6), "wide-chunk": Reach(chunk=40),
}  # fmt: skip


def random_parents(rng: random.Random, count: int, padding: int = 0) -> tuple[int, ...]:
    return (NO_NODE, *(rng.randrange(n) for n in range(1, count)), *[NO_NODE] * padding)


def random_shapes(rng: random.Random, batch: int, most: int = 12) -> tuple[Topology, ...]:
    width = rng.randint(1, most)
    counts = [rng.randint(1, width) for _ in range(batch)]
    width = max(counts)
    return tuple(topology(random_parents(rng, count, width - count)) for count in counts)


def random_steps(rng: random.Random, batch: int, steps: int, most: int = 12) -> list[Visibility]:
    """What a context would ask for: whole trees and trees grown by levels, dropped or kept, rows apart by a little."""
    starts = [rng.choice([0, 0, 3, 11, -2]) for _ in range(batch)]
    lengths = [max(starts) + rng.randint(0, 9)] * batch
    asked = []
    for _ in range(steps):
        shapes = random_shapes(rng, batch, most)
        depths = stacked([shape.depth_row for shape in shapes])
        width = depths.shape[1]
        if rng.random() < 0.5:
            asked.append(visibility(starts, lengths, depths, depths, shapes))
        else:
            cut = rng.randint(1, width)
            sees = stacked([shape.ancestors for shape in shapes])
            for begin, end in ((0, cut), (cut, width)):
                if begin < end:
                    asked.append(
                        visibility(starts, lengths, depths[:, :end], depths[:, begin:end], sees[:, begin:end, :end])
                    )
        if rng.random() < 0.8:
            lengths = [length + rng.choice([0, 1, 1, 2, 5, 13]) for length in lengths]
    return asked


def visibility(starts: list[int], lengths: list[int], columns: Tensor, depths: Tensor, sees: object) -> Visibility:
    handed_out = -(-(max(lengths) + columns.shape[1]) // 16) * 16
    return Visibility(list(starts), list(lengths), columns, depths, sees, handed_out)  # type: ignore[arg-type]


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
def test_the_buffer_holds_what_a_mask_built_anew_would(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive_mask, "SPARE_COLUMNS", 20)  # outgrown now and then
    monkeypatch.setattr(additive_mask, "ROW_STEP", 4)
    rng = random.Random(0)
    advanced = 0
    for trial in range(12):
        mask = AdditiveMask(reach, torch.float32, CPU)
        for asked in random_steps(rng, batch=1 + trial % 4, steps=12):
            advanced += mask._continues(asked)
            assert torch.equal(mask.of(asked), whole_mask(asked, reach, torch.float32))
    assert advanced > 60


def test_a_mask_wider_than_the_buffer_keeps_is_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(additive_mask, "MOST_ROWS", 4)
    rng = random.Random(1)
    mask = AdditiveMask(Reach(window=7), torch.float32, CPU)
    for asked in random_steps(rng, batch=2, steps=20):
        assert torch.equal(mask.of(asked), whole_mask(asked, mask.reach, torch.float32))


def test_rows_that_were_replaced_begin_a_new_mask() -> None:
    rng = random.Random(2)
    mask = AdditiveMask(Reach(window=7), torch.float32, CPU)
    for _ in range(3):
        for asked in random_steps(rng, batch=2, steps=4):
            assert torch.equal(mask.of(asked), whole_mask(asked, mask.reach, torch.float32))
        mask.forget()


def test_a_step_writes_its_own_columns_and_not_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    right = AdditiveMask._write

    def counted(self: AdditiveMask, begins: list[int], ends: list[int], *rest: object) -> None:
        written.append(sum(max(end - begin, 0) for begin, end in zip(begins, ends, strict=True)))
        right(self, begins, ends, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(AdditiveMask, "_write", counted)
    shapes = (topology((NO_NODE, 0, 0, 1, 2)),) * 2
    depths = stacked([shape.depth_row for shape in shapes])
    for reach in (Reach(), Reach(window=100)):
        mask = AdditiveMask(reach, torch.float32, CPU)
        mask.of(visibility([0, 3], [4000, 4000], depths, depths, shapes))
        assert written.pop() == 8000
        written.clear()
        for step in range(1, 20):
            mask.of(visibility([0, 3], [4000 + 3 * step, 4000 + 2 * step], depths, depths, shapes))
            assert sum(written) <= 40
            written.clear()


def test_an_ancestor_block_is_built_once_for_a_topology() -> None:
    shape = topology((NO_NODE, 0, 0, 1))
    block = ancestor_block(shape, torch.float32, CPU)
    assert ancestor_block(topology((NO_NODE, 0, 0, 1)), torch.float32, CPU) is block
    assert torch.equal(block == 0, shape.ancestors)
    assert ancestor_block(shape, torch.bfloat16, CPU).min() == torch.finfo(torch.bfloat16).min


# --- Block-sparse ------------------------------------------------------------------------------------


def dense(mask: BlockMask, batch: int) -> Tensor:
    """Bool [B, Q, C] as a kernel would see it: full blocks whole, partial ones by the rule, others not at all."""
    queries, columns = mask.seq_lengths
    by_rule = create_mask(mask.mask_mod, batch, 1, queries, columns, device="cpu")[:, 0]
    partial, full = torch.zeros_like(by_rule), torch.zeros_like(by_rule)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    for blocks, counts, numbers in (
        (partial, mask.kv_num_blocks, mask.kv_indices),
        (full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(batch):
            for i in range(counts.shape[2]):
                for j in numbers[row, 0, i, : int(counts[row, 0, i])].tolist():
                    size = mask.BLOCK_SIZE
                    blocks[row, i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]] = True
    assert not (partial & full).any(), "no block counts twice"
    return full | (partial & by_rule)


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
def test_a_block_mask_shows_what_the_additive_mask_shows(reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_mask, "BLOCK", 4)
    block_mask.seen_by_blocks.cache_clear()
    rng = random.Random(3)
    full = 0
    for trial in range(3):
        mask = BlockedMask(reach, CPU)
        for asked in random_steps(rng, batch=1 + trial, steps=5):
            got = mask.of(asked)
            batch = len(asked.lengths)
            expected = torch.nn.functional.pad(asked.dense(reach), (0, asked.handed_out - asked.width))
            assert torch.equal(dense(got, batch), expected)
            assert got.full_kv_num_blocks is not None
            full += int(got.full_kv_num_blocks.sum())
    block_mask.seen_by_blocks.cache_clear()
    assert full > 0 or reach.window == 3, "no window of three columns holds a block of four"
