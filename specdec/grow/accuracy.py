"""Measured acceptance, the input of fixed shapes: by rank for Sequoia, by depth and rank for Medusa's construction.

Two ways to measure. `AcceptanceCounts.observe` counts what verification shows of real trees, which is right for any
drafter. `head_accuracy` compares the guesses of independent heads with a text they did not see (Medusa's way): cheap,
and right for heads whose guesses do not depend on each other.

Dimensions: K depths (heads), R ranks, T tokens of a text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.errors import UnknownDrafter
from specdec.tree import TokenTree

FORMAT = "specdec-acceptance-1"


class AcceptanceCounts:
    """Trials and hits of each depth and rank, [K, R] each: how often a node was reached that had such a child, and how
    often that child was the accepted one.

    Args:
        depth: K.
        width: R.
    """

    def __init__(self, depth: int, width: int) -> None:
        self.trials = torch.zeros(depth, width, dtype=torch.float64)
        self.hits = torch.zeros(depth, width, dtype=torch.float64)

    def observe(self, tree: TokenTree, nodes: list[list[int]]) -> None:
        """Count the trees of one step; `nodes` are the accepted ones of each row, root first."""
        depth, width = self.trials.shape
        for shape, path in zip(tree.shapes, nodes, strict=True):
            for level, (node, following) in enumerate(zip(path[:depth], [*path[1:], None], strict=False)):
                children = shape.children[node][:width]
                self.trials[level, : len(children)] += 1
                if following in children:
                    self.hits[level, children.index(following)] += 1

    def by_rank(self) -> tuple[float, ...]:
        """Sequoia's acceptance vector, over all depths; up to the last rank that was ever tried."""
        trials, hits = self.trials.sum(0), self.hits.sum(0)
        return _rates(hits, trials)

    def by_depth_and_rank(self) -> tuple[tuple[float, ...], ...]:
        """Medusa's table; each entry has its own number of trials. Depths never tried are left out."""
        rows = [_rates(hits, trials) for hits, trials in zip(self.hits, self.trials, strict=True)]
        return tuple(row for row in rows if row)

    def save(self, path: Path) -> None:
        """Write the counts as JSON."""
        content = {"format": FORMAT, "trials": self.trials.tolist(), "hits": self.hits.tolist()}
        path.write_text(json.dumps(content), encoding="utf-8")

    @staticmethod
    def of_json(content: Any, path: Path) -> AcceptanceCounts:
        """The counts of a file that `save` wrote, as read.

        Raises:
            UnknownDrafter: it holds something else, or nothing was counted.
        """
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}")
            trials = torch.tensor(content["trials"], dtype=torch.float64)
            hits = torch.tensor(content["hits"], dtype=torch.float64)
            if trials.ndim != 2 or trials.shape != hits.shape or bool((hits > trials).any() or (hits < 0).any()):
                raise ValueError("trials and hits do not belong together")
            if not bool(trials[:1, :1].sum() > 0):
                raise ValueError("nothing was counted")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UnknownDrafter(f"{path} does not hold acceptance counts ({FORMAT}): {error}") from error
        counts = AcceptanceCounts(*trials.shape)
        counts.trials, counts.hits = trials, hits
        return counts


def _rates(hits: Tensor, trials: Tensor) -> tuple[float, ...]:
    tried = int((trials > 0).sum())
    return tuple((hits[:tried] / trials[:tried].clamp(min=1)).tolist())


def head_accuracy(guesses: Sequence[Tensor], texts: Sequence[Sequence[int]], *, first: int = 2) -> AcceptanceCounts:
    """How often the guess of each head and rank is the token that stands there, over whole texts.

    Every head is divided by the number of positions at which the token it guesses is known: head k has `first + k`
    fewer of them than the text has tokens.

    Args:
        guesses: per text, ids [T, K, R]: at position t the R likeliest tokens of head k, best first.
        texts: per text, its T tokens; greedy outputs of the target on your own prompts tell of temperature 0.
        first: how far ahead head 0 looks: it guesses token t + first. 2 for Medusa heads, 1 where the first guess is
            the token right after t.
    """
    depth, width = guesses[0].shape[1:]
    counts = AcceptanceCounts(depth, width)
    for ids, text in zip(guesses, texts, strict=True):
        tokens = torch.tensor(text, device=ids.device)
        if ids.shape != (len(text), depth, width):
            raise ValueError(f"guesses of a text of {len(text)} tokens are [{len(text)}, {depth}, {width}]")
        for head in range(depth):
            known = max(len(text) - first - head, 0)
            right = ids[:known, head] == tokens[first + head :, None][:known]
            counts.trials[head] += known
            counts.hits[head] += right.sum(0).cpu()
    return counts
