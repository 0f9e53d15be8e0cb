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
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree


class LookupDrafter:
    """Chains from n-gram matches in prompt and output.

    Args:
        ngram: longest n-gram to match.
        tokens: longest chain to propose.
        min_ngram: shortest n-gram to match.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, *, ngram: int = 3, tokens: int = 10, min_ngram: int = 1) -> None:
        if not 1 <= min_ngram <= ngram:
            raise UnknownDrafter(f"lookup needs 1 <= min_ngram <= ngram, got min_ngram={min_ngram}, ngram={ngram}")
        if tokens < 1:
            raise UnknownDrafter(f"lookup needs tokens >= 1, got {tokens}")
        self.ngram, self.tokens, self.min_ngram = ngram, tokens, min_ngram
        self._rows: list[NgramIndex] = []

    def reset(self, batch_size: int, context: Context) -> None:
        """Forget all text."""
        self._rows = [NgramIndex(self.min_ngram, self.ngram) for _ in range(batch_size)]

    def observe(self, committed: Committed) -> None:
        """Index the final tokens."""
        for index, tokens in zip(self._rows, committed.tokens, strict=True):
            index.extend(tokens)

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """A chain per row, empty where nothing matches."""
        length = min(self.tokens, room)
        chains = [index.continuation(token, length) for index, token in zip(self._rows, root.tolist(), strict=True)]
        return TokenTree.of_chains(root, chains)

    def select(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self._rows = [self._rows[row] for row in rows]


class NgramIndex:
    """Where each n-gram of a growing text last ended."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest, self.longest = shortest, longest
        self.text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: list[int]) -> None:
        """Append tokens and index every n-gram that ends in them."""
        for token in tokens:
            self.text.append(token)
            end = len(self.text)
            for n in range(self.shortest, min(self.longest, end) + 1):
                self._ends[tuple(self.text[end - n : end])] = end

    def continuation(self, root: int, length: int) -> list[int]:
        """Up to `length` tokens that followed the last occurrence of the text's end plus `root`.

        A continuation that runs into the end of the text goes on periodically: the text from the match on
        is about to repeat.
        """
        for n in range(self.longest, self.shortest - 1, -1):
            if n - 1 > len(self.text):
                continue
            key = (*self.text[len(self.text) - n + 1 :], root)
            end = self._ends.get(key)
            if end is not None:
                source = self.text[end : end + length]
                if len(source) < length:
                    source.append(root)
                return [source[i % len(source)] for i in range(length)]
        return []
