"""Prompt lookup: the continuation of the last place where the same n tokens occurred.

Saxena, "Prompt lookup decoding" (2023). Longest n-gram first; among equal lengths the most recent place,
which follows the text better than the first one. The index grows with the text, so a search costs the
same at 100 and at 100 000 tokens.
"""

from __future__ import annotations

from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed
from specdec.errors import UnknownDrafter
from specdec.grow.trie import merged
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree


class LookupDrafter:
    """Chains, or trees of several, from n-gram matches in prompt and output.

    Args:
        ngram: longest n-gram to match.
        tokens: longest chain to propose.
        min_ngram: shortest n-gram to match.
        matches: how many places to take continuations from, the most recent first; equal beginnings become one path of
            a tree of at most `tokens * matches` nodes.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, *, ngram: int = 3, tokens: int = 10, min_ngram: int = 1, matches: int = 1) -> None:
        if not 1 <= min_ngram <= ngram:
            raise UnknownDrafter(f"lookup needs 1 <= min_ngram <= ngram, got min_ngram={min_ngram}, ngram={ngram}")
        if tokens < 1:
            raise UnknownDrafter(f"lookup needs tokens >= 1, got {tokens}")
        if matches < 1:
            raise UnknownDrafter(f"lookup needs matches >= 1, got {matches}")
        self.ngram, self.tokens, self.min_ngram, self.matches = ngram, tokens, min_ngram, matches
        self._rows: list[NgramIndex] = []

    def reset(self, batch_size: int, context: Context) -> None:
        """Forget all text."""
        self._rows = [NgramIndex(self.min_ngram, self.ngram, self.matches) for _ in range(batch_size)]

    def observe(self, committed: Committed) -> None:
        """Index the final tokens."""
        for index, tokens in zip(self._rows, committed.tokens, strict=True):
            index.extend(tokens)

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """A chain per row, or a tree of several, empty where nothing matches."""
        length = min(self.tokens, room)
        rows = zip(self._rows, root.tolist(), strict=True)
        trees = [merged(index.continuations(token, length), length * self.matches) for index, token in rows]
        return TokenTree.of_nodes(root, trees)

    def select(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self._rows = [self._rows[row] for row in rows]


class NgramIndex:
    """Where each n-gram of a growing text ended, the last few times."""

    def __init__(self, shortest: int, longest: int, places: int = 1) -> None:
        self.shortest, self.longest, self.places = shortest, longest, places
        self.text: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def extend(self, tokens: list[int]) -> None:
        """Append tokens and index every n-gram that ends in them."""
        for token in tokens:
            self.text.append(token)
            end = len(self.text)
            for n in range(self.shortest, min(self.longest, end) + 1):
                ends = self._ends.setdefault(tuple(self.text[end - n : end]), [])
                ends.append(end)
                del ends[: -self.places]

    def continuations(self, root: int, length: int) -> list[list[int]]:
        """Up to `length` tokens that followed each of the last occurrences of the text's end plus `root`.

        A continuation that runs into the end of the text goes on periodically: the text from the match on
        is about to repeat.
        """
        for n in range(self.longest, self.shortest - 1, -1):
            if n - 1 > len(self.text):
                continue
            key = (*self.text[len(self.text) - n + 1 :], root)
            if key in self._ends:
                return [self._from(end, root, length) for end in reversed(self._ends[key])]
        return []

    def _from(self, end: int, root: int, length: int) -> list[int]:
        source = self.text[end : end + length]
        if len(source) < length:
            source.append(root)
        return [source[i % len(source)] for i in range(length)]
