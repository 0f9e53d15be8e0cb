"""The drafter protocol: three calls decode, a fourth drops finished rows.

Prefill is an observation, and a drafter digests at its next `propose` whatever it has been shown and has
not run yet; so there is no special case for "everything was accepted".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from specdec.context import Context
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree


@dataclass(frozen=True)
class Committed:
    """Tokens that are now final and in the target's cache: the prompt, or root and path of the last tree.

    Attributes:
        tokens: per row, in order, without padding. A row may be empty.
        nodes: per row, the tree nodes of those tokens (root first); None for the prompt.
        tree: the tree that was scored; None for the prompt.
        logits: raw target logits of every node [B, N, V], rejected ones included; None for the prompt.
        taps: the target's hidden states that the drafter asked for, by index: [B, N, D] by node, or
            [B, S, D] for the prompt, left-padded as the prompt was. With a cache that the caller passed in, S
            counts only the prompt's positions that were run: a row's last tokens.
    """

    tokens: list[list[int]]
    nodes: list[list[int]] | None = None
    tree: TokenTree | None = None
    logits: Tensor | None = None
    taps: dict[int, Tensor] = field(default_factory=dict)


@runtime_checkable
class Drafter(Protocol):
    """What proposes. B is the number of rows still running."""

    taps: tuple[int, ...]
    """Hidden states wanted, by transformers' `hidden_states` index or BEFORE_NORM; () for none."""

    def reset(self, batch_size: int, context: Context) -> None:
        """Begin a generation of `batch_size` rows.

        `context` is the target's cached past. Only drafters that run the target's own layers use it.
        """
        ...

    def observe(self, committed: Committed) -> None:
        """Take note of final tokens. Cheap: work belongs into the next `propose`."""
        ...

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """Trees below the roots [B], at most `room` (>= 1) deep.

        Children either are chosen by any rule, or are drawn from `log_q` through `chooser`; never drawn and
        then dropped for their own probability.
        """
        ...

    def select(self, rows: list[int]) -> None:
        """Keep only these rows, in this order; the others have finished."""
        ...
