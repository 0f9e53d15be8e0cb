"""The table of token recycling: what fills it and what is read from it."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed
from specdec.drafters.recycling import UNKNOWN, RecyclingDrafter
from specdec.probe import target_of
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree
from tests.tiny import shared_target

V = 12


def begun(batch_size: int = 1, **options: int | bool) -> RecyclingDrafter:
    drafter = RecyclingDrafter(V, **options)  # type: ignore[arg-type]
    drafter.reset(batch_size, Context(target_of(shared_target())))
    return drafter


def preferring(*rows: list[int]) -> Tensor:
    """Logits [N, V] whose best tokens are these, in order."""
    logits = torch.zeros(len(rows), V)
    for row, best in enumerate(rows):
        for rank, token in enumerate(best):
            logits[row, token] = 10.0 - rank
    return logits


def test_every_scored_node_leaves_its_best_successors_rejected_ones_too() -> None:
    drafter = begun(successors=2)
    tree = TokenTree.of_nodes(torch.tensor([5]), [[(0, 6), (0, 7)]])
    drafter.observe(Committed([[5]], [[0]], tree, preferring([1, 2], [3, 4], [8, 9])[None]))
    assert drafter._table[[5, 6, 7]].tolist() == [[1, 2], [3, 4], [8, 9]]
    assert (drafter._table[[1, 2, 3]] == UNKNOWN).all()


def test_padding_nodes_leave_nothing() -> None:
    drafter = begun(2, successors=2)
    tree = TokenTree.of_nodes(torch.tensor([5, 6]), [[(0, 7)], []])
    logits = torch.stack([preferring([1, 2], [3, 4]), preferring([8, 9], [10, 11])])
    drafter.observe(Committed([[5], [6]], [[0], [0]], tree, logits))
    assert drafter._table[[5, 6, 7]].tolist() == [[1, 2], [8, 9], [3, 4]]
    assert (drafter._table[0] == UNKNOWN).all()  # the id that padding happens to hold


def test_the_prompt_teaches_what_followed_each_token_the_latest_first() -> None:
    drafter = begun(successors=3)
    drafter.observe(Committed([[1, 2, 1, 3, 1, 2]]))
    assert drafter._table[1].tolist() == [2, 3, UNKNOWN]
    assert drafter._table[2].tolist() == [1, UNKNOWN, UNKNOWN]


def test_the_table_unrolls_into_the_shape_and_unknown_places_stay_empty() -> None:
    drafter = begun(successors=2, budget=4, depth=3)
    drafter._table[1] = torch.tensor([2, 3])
    drafter._table[2] = torch.tensor([4, UNKNOWN])
    tree = drafter.propose(torch.tensor([1]), SamplingParams(), Chooser(), 10)
    paths = {tuple(tree.tokens[0, n].item() for n in tree.shapes[0].path(node)) for node in range(1, tree.num_nodes)}
    assert paths == {(2,), (3,), (2, 4)}
    assert tree.log_q is None


def test_no_tree_is_deeper_than_the_room() -> None:
    drafter = begun(successors=2, budget=11, depth=5)
    drafter._table[:] = torch.tensor([1, 2])
    for room in range(1, 7):
        tree = drafter.propose(torch.tensor([1]), SamplingParams(), Chooser(), room)
        assert tree.depth == min(room, drafter.shape.depth)


def test_the_table_is_forgotten_unless_it_is_to_be_remembered() -> None:
    for remember in (False, True):
        drafter = begun(remember=remember)
        drafter.observe(Committed([[1, 2]]))
        drafter.reset(1, Context(target_of(shared_target())))
        assert (drafter._table[1, 0].item() == 2) == remember


def test_more_successors_than_tokens_are_cut_to_the_vocabulary() -> None:
    drafter = begun(successors=50)
    tree = TokenTree.of_roots(torch.tensor([5]))
    drafter.observe(Committed([[5]], [[0]], tree, torch.randn(1, 1, V)))
    assert sorted(drafter._table[5].tolist()) == list(range(V))
