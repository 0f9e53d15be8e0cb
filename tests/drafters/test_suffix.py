"""The suffix automaton against exhaustive search, and what the drafter makes of it."""

from __future__ import annotations

import random

import pytest
import torch

from specdec.context import Context
from specdec.drafter import Committed
from specdec.drafters.suffix import SuffixAutomaton, SuffixDrafter, grow_by_counts
from specdec.probe import target_of
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree
from tests.tiny import shared_target


def occurrences(texts: list[list[int]], part: list[int]) -> int:
    return sum(text[i : i + len(part)] == part for text in texts for i in range(len(text) - len(part) + 1))


def longest_repeated_suffix(texts: list[list[int]]) -> int:
    """Length of the longest end of the last text that also occurs elsewhere, overlaps included."""
    text = texts[-1]
    return next((n for n in range(len(text) - 1, 0, -1) if occurrences(texts, text[-n:]) > 1), 0)


def state_of(automaton: SuffixAutomaton, part: list[int]) -> int | None:
    state: int | None = 0
    for token in part:
        assert state is not None
        state = automaton.next[state].get(token)
        if state is None:
            return None
    return state


def built(texts: list[list[int]]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for text in texts:
        automaton.begin_text()
        for token in text:
            automaton.append(token)
    return automaton


def random_text(rng: random.Random, letters: int, longest: int) -> list[int]:
    return [rng.randrange(letters) for _ in range(rng.randrange(1, longest))]


@pytest.mark.parametrize("letters", [1, 2, 4, 20])
def test_the_longest_repeated_suffix_is_found_after_every_token(letters: int) -> None:
    rng = random.Random(letters)
    for _ in range(30):
        text, automaton = random_text(rng, letters, 40), SuffixAutomaton()
        for length, token in enumerate(text, 1):
            automaton.append(token)
            state = automaton.repeated_suffix()
            expected = longest_repeated_suffix([text[:length]])
            assert automaton.lengths[state] == expected
            assert state_of(automaton, text[length - expected : length]) == state


@pytest.mark.parametrize("letters", [2, 4])
def test_exactly_the_substrings_of_all_texts_are_in_it_with_their_counts(letters: int) -> None:
    rng = random.Random(letters)
    for _ in range(30):
        texts = [random_text(rng, letters, 14) for _ in range(rng.randrange(1, 4))]
        automaton = built(texts)
        for length in range(1, 5):
            for number in range(letters**length):
                part = [number // letters**k % letters for k in range(length)]
                state = state_of(automaton, part)
                assert (state is not None) == (occurrences(texts, part) > 0)
                if state is not None:
                    assert automaton.counts[state] == occurrences(texts, part)


def test_another_text_is_matched_along_its_end() -> None:
    rng = random.Random(1)
    for _ in range(60):
        texts = [random_text(rng, 3, 20) for _ in range(2)]
        automaton, other = built(texts), random_text(rng, 3, 25)
        state = matched = 0
        for end, token in enumerate(other, 1):
            state, matched = automaton.advance(state, matched, token)
            expected = next(n for n in range(end, -1, -1) if n == 0 or occurrences(texts, other[end - n : end]))
            assert matched == expected
            assert state_of(automaton, other[end - matched : end]) == state


def test_it_has_fewer_than_two_states_per_token() -> None:
    text = [random.Random(2).randrange(3) for _ in range(500)]
    assert len(built([text]).next) <= 2 * len(text)


def test_continuations_grow_best_first_by_their_share() -> None:
    #          after 1: 2 three times (then 3, 3, 5), 4 once
    automaton = built([[1, 2, 3], [1, 2, 3], [1, 2, 5], [1, 4, 6]])
    state = state_of(automaton, [1])
    assert state is not None
    assert grow_by_counts(automaton, state, 9, 2, 2, 0.0) == [(0, 2), (1, 3), (0, 4), (3, 6), (1, 5)]
    assert grow_by_counts(automaton, state, 2, 2, 2, 0.0) == [(0, 2), (1, 3)]
    assert grow_by_counts(automaton, state, 4, 1, 2, 0.0) == [(0, 2), (0, 4)]
    assert grow_by_counts(automaton, state, 4, 2, 1, 0.0) == [(0, 2), (1, 3)]
    assert grow_by_counts(automaton, state, 4, 2, 2, 0.3) == [(0, 2), (1, 3)]


# --- The drafter -------------------------------------------------------------------------------------------------


def begin(drafter: SuffixDrafter, prompts: list[list[int]]) -> None:
    drafter.reset(len(prompts), Context(target_of(shared_target())))
    drafter.observe(Committed(prompts))


def chain_of(tree: TokenTree, row: int = 0) -> list[int]:
    nodes = tree.first_path()
    return [nodes.tokens.tolist()[row][n] for n in range(1, nodes.num_nodes) if nodes.shapes[row].parents[n] >= 0]


def propose(drafter: SuffixDrafter, roots: list[int], room: int = 20) -> TokenTree:
    return drafter.propose(torch.tensor(roots), SamplingParams(), Chooser(), room)


def test_a_proposal_is_as_deep_as_the_match_allows() -> None:
    drafter = SuffixDrafter(factor=2.0, branches=1)
    begin(drafter, [[1, 2, 3, 4, 5, 6, 7, 8, 9, 2]])
    assert chain_of(propose(drafter, [3])) == [4, 5, 6, 7]  # "2 3" matches: two tokens, four levels
    assert chain_of(propose(drafter, [3], room=3)) == [4, 5, 6]
    begin(drafter, [[1, 2, 3, 4, 5, 6]])
    assert propose(drafter, [9]).num_nodes == 1


def test_a_root_is_seen_once_although_it_is_committed_later() -> None:
    drafter = SuffixDrafter(branches=1, factor=1.0)
    begin(drafter, [[1, 2, 3]])
    propose(drafter, [1])
    drafter.observe(Committed([[1, 2]]))  # root and one accepted token
    propose(drafter, [3])
    drafter.observe(Committed([[3]]))
    assert drafter._rows[0].text == [1, 2, 3, 1, 2, 3]


def test_rows_have_texts_of_their_own() -> None:
    drafter = SuffixDrafter(branches=1, factor=1.0)
    begin(drafter, [[1, 2, 1, 7], [1, 3, 1, 3], [1, 4, 5]])
    tree = propose(drafter, [1, 1, 1], room=2)
    assert [chain_of(tree, row) for row in range(3)] == [[7], [3, 1], [4]]
    drafter.observe(Committed([[1], [1], [1]]))
    drafter.select([2, 0])
    tree = propose(drafter, [4, 2])
    assert [chain_of(tree, row) for row in range(2)] == [[5, 1], [1, 7]]


@pytest.mark.parametrize("finished_first", [False, True])
def test_earlier_requests_are_matched_only_when_remembered(finished_first: bool) -> None:
    for remember, expected in ((0, []), (100, [12, 13, 14])):
        drafter = SuffixDrafter(remember=remember, branches=1, factor=3.0)
        begin(drafter, [[10, 11, 12, 13, 14], [1, 2]])
        if finished_first:
            drafter.select([1])
        begin(drafter, [[5, 6, 10]])
        assert chain_of(propose(drafter, [11], room=3)) == expected


def test_the_own_text_goes_before_an_earlier_one_of_equal_length() -> None:
    drafter = SuffixDrafter(remember=100, branches=1, factor=1.0)
    begin(drafter, [[10, 77]])
    begin(drafter, [[10, 55, 1]])
    assert chain_of(propose(drafter, [10])) == [55]


def test_memory_stays_below_its_cap_and_forgets_the_oldest() -> None:
    drafter, rng = SuffixDrafter(remember=50, branches=1), random.Random(0)
    for request in range(40):
        begin(drafter, [[100 + request, *[rng.randrange(5) for _ in range(rng.randrange(1, 30))]]])
        stored = sum(map(len, drafter._earlier_texts))
        assert stored <= 50
        assert len(drafter._earlier.next) <= 2 * 50
    begin(drafter, [[0]])
    assert state_of(drafter._earlier, [100 + 39]) is not None
    assert state_of(drafter._earlier, [100]) is None


def test_a_text_longer_than_the_memory_leaves_its_end() -> None:
    drafter = SuffixDrafter(remember=10, branches=1, factor=1.0)
    begin(drafter, [list(range(100, 160))])
    begin(drafter, [[1]])
    assert chain_of(propose(drafter, [155])) == [156]
    assert sum(map(len, drafter._earlier_texts)) <= 10
    assert state_of(drafter._earlier, [120]) is None
