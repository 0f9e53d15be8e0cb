"""Prompt lookup against a search by hand."""

from __future__ import annotations

import random

import pytest

from specdec.drafters.lookup import NgramIndex


def most_recent_continuation(text: list[int], shortest: int, longest: int, length: int) -> list[int]:
    """What followed the last earlier occurrence of the longest n-gram that ends the text; by exhaustive search."""
    for n in range(min(longest, len(text)), shortest - 1, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[-n:]:
                source = text[end:]
                return [source[i % len(source)] for i in range(length)]
    return []


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 3), (2, 4), (3, 3)])
def test_the_longest_and_then_most_recent_match_is_continued(shortest: int, longest: int) -> None:
    rng = random.Random(0)
    found = 0
    for _ in range(200):
        text = [rng.randrange(4) for _ in range(rng.randrange(1, 40))]
        index = NgramIndex(shortest, longest)
        position = 0
        while position < len(text) - 1:  # as it arrives while decoding: in pieces
            piece = text[position : min(position + rng.randrange(1, 6), len(text) - 1)]
            index.extend(piece)
            position += len(piece)
        expected = most_recent_continuation(text, shortest, longest, 7)
        assert index.continuations(text[-1], 7) == ([expected] if expected else [])
        found += bool(expected)
    assert found >= 50


def test_a_period_is_continued_beyond_the_end_of_the_text() -> None:
    index = NgramIndex(1, 3)
    index.extend([9, 1, 2, 3, 1, 2])
    assert index.continuations(3, 8) == [[1, 2, 3, 1, 2, 3, 1, 2]]


def test_nothing_is_proposed_without_an_earlier_occurrence() -> None:
    index = NgramIndex(1, 3)
    assert index.continuations(5, 4) == []
    index.extend([1, 2, 3])
    assert index.continuations(4, 4) == []
