"""Which rows a step sees: every token once in an epoch, the same on every machine, whoever asks first."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import pytest
import torch

from specdec.errors import BadData
from specdec.train.batch import PADDING, TrainBatch, order_of
from specdec.train.order import Order, Piece, derived_seed, fill
from specdec.train.prepared import MemoryData
from tests.train.toy import ROW_LENGTH, Texts

LENGTHS = (5, 3, 30, 9, 2, 70, 1, 12)


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_holds_every_token_once_but_lone_ones(packed: bool) -> None:
    order = Order(LENGTHS, 16, seed=3, packed=packed)
    seen = Counter((p.document, t) for row in order.rows_of(0) for p in row for t in range(p.start, p.stop))
    expected = {(d, t) for d, n in enumerate(LENGTHS) for t in range(n) if n > 1}
    assert set(seen) == expected
    assert set(seen.values()) == {1}
    assert all(sum(p.stop - p.start for p in row) <= 16 for row in order.rows_of(0))


def test_epochs_differ_and_seeds_differ_and_the_same_seed_does_not() -> None:
    assert Order(LENGTHS, 16, 3).rows_of(0) == Order(LENGTHS, 16, 3).rows_of(0)
    assert Order(LENGTHS, 16, 3).rows_of(0) != Order(LENGTHS, 16, 3).rows_of(1)
    assert Order(LENGTHS, 16, 3).rows_of(0) != Order(LENGTHS, 16, 4).rows_of(0)


def test_a_row_is_the_same_whether_one_starts_there_or_comes_by() -> None:
    walked = Order(LENGTHS, 16, 3)
    rows = [walked.row(number) for number in range(40)]
    assert Order(LENGTHS, 16, 3).row(37) == rows[37]
    assert len({rows[i] for i in range(len(walked.rows_of(0)))}) == len(walked.rows_of(0))


def test_packing_wastes_little() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = tuple(torch.randint(4, 200, (500,), generator=generator).tolist())
    rows = Order(lengths, 256).rows_of(0)
    assert sum(lengths) / (256 * len(rows)) > 0.93


def test_a_document_goes_into_the_fullest_row_with_room() -> None:
    pieces = [Piece(0, 0, 6), Piece(1, 0, 5), Piece(2, 0, 4)]
    assert fill(pieces, 10) == [(pieces[0], pieces[2]), (pieces[1],)]


@pytest.mark.parametrize("lengths", [(), (1, 1)])
def test_data_without_two_tokens_is_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(BadData):
        Order(lengths, 16)


def answered(length: int, answer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A text whose last `answer` tokens are supervised."""
    return torch.arange(length), torch.arange(length) >= length - answer


@pytest.mark.parametrize("packed", [True, False])
def test_of_long_documents_pieces_that_hold_a_prompt_alone_are_left_out(packed: bool) -> None:
    """No step can then be without anything to learn."""
    documents = MemoryData([answered(200, 20), answered(200, 8), answered(10, 2), answered(33, 1)])
    order = order_of(documents, 32, seed=1, packed=packed)
    kept = sorted((p.document, p.start) for row in order.rows_of(0) for p in row)
    assert kept == [(0, 160), (0, 192), (1, 192), (2, 0)]  # a lone supervised token at a piece's start is not predicted
    for row in order.rows_of(1):
        assert TrainBatch.of_rows(documents, [row], [0], 32).num_supervised > 0


def test_rows_too_short_for_anything_to_be_learned_are_refused() -> None:
    with pytest.raises(BadData, match="in rows of 4 tokens nothing can be learned"):
        order_of(MemoryData([answered(9, 1)]), 4, seed=1)


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_texts_shorter_than_what_is_looked_ahead_have_no_such_token(length: int) -> None:
    texts = MemoryData([(torch.arange(length), torch.ones(length, dtype=torch.bool))])
    batch = TrainBatch.of_rows(texts, [(Piece(0, 0, length),)], [0], length)
    for ahead in range(1, 9):
        assert int(batch.stands(ahead).sum()) == len(batch.tokens(ahead)) == max(length - ahead, 0)


def test_derived_seeds_are_fixed_and_distinct() -> None:
    assert derived_seed(0, "rows", 1) == derived_seed(0, "rows", 1) == 1662069725463105427
    assert len({derived_seed(a, b, c) for a in range(5) for b in ("x", "y") for c in range(5)}) == 50


def batch_of(row: tuple[Piece, ...]) -> TrainBatch:
    return TrainBatch.of_rows(Texts(), [row], [0], ROW_LENGTH)


def test_a_batch_lays_documents_side_by_side_with_positions_of_their_own() -> None:
    texts = Texts()
    batch = batch_of((Piece(2, 0, 6), Piece(3, 2, 5)))
    assert batch.ids[0, :9].tolist() == [*texts.ids[2][:6].tolist(), *texts.ids[3][2:5].tolist()]
    assert batch.positions[0, :9].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert batch.documents[0, :9].tolist() == [0] * 6 + [1] * 3
    assert (batch.documents[0, 9:] == PADDING).all()
    assert not batch.supervised[0, 9:].any()


def test_what_a_position_predicts_stays_inside_its_document_and_is_supervised() -> None:
    batch = batch_of((Piece(0, 0, 6), Piece(1, 0, 3)))
    for ahead in (1, 2, 3):
        expected = [
            t + ahead < ROW_LENGTH
            and int(batch.documents[0, t]) == int(batch.documents[0, t + ahead]) != PADDING
            and bool(batch.supervised[0, t + ahead])
            for t in range(ROW_LENGTH)
        ]
        assert batch.drafts(ahead)[0].tolist() == expected
    assert not batch.drafts(ROW_LENGTH).any()
    assert batch.num_supervised == int(batch.drafts(1).sum()) > 0


def test_seeds_of_long_texts_keep_none_of_them() -> None:
    tracemalloc.start()
    try:
        for number in range(20):
            derived_seed(0, "held out", f"{number}" + "x" * 100_000)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 100_000
