"""What decides how many levels to draft, apart from the drafter: before a step, or while its tree grows.

Before a step a policy gives each row a limit; 0 for all rows means that nothing is drafted and the target decodes
plainly. While a tree grows it answers as a `StoppingRule`. After verification it sees what came of it. All it may use
is the past, its own randomness, and what its rule may look at: so every policy is lossless, and none touches the
generator of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdec.grow.stopping import Level, StoppingRule

__all__ = ["LengthPolicy", "Level", "Row", "Step"]


@dataclass(frozen=True)
class Row:
    """What verification said of one row's tree.

    Attributes:
        drafted: levels that the tree had; 0 when nothing was proposed.
        accepted: levels that were accepted.
        tried: levels at which a child could have been accepted: one more than `accepted` where the path ended at a
            node with children.
        tokens: of policies that watch tokens: each tried node's place in `Step.tokens`, and whether it was accepted.
    """

    drafted: int
    accepted: int
    tried: int
    tokens: tuple[tuple[int, bool], ...] = ()


@dataclass(frozen=True)
class Step:
    """One step of the rows still running.

    Attributes:
        rows: None for a row in which another drafter's tree was verified.
        limit: levels asked of the drafter.
        nodes: proposed nodes of the batch's widest row.
        draft_seconds: from the call of `propose` to its return, 0 when nothing was drafted.
        verify_seconds: from there to the commit; forward, acceptance and bookkeeping.
        tokens: of policies that watch tokens, what growth knew of every node [B, N].
        labels: of policies that want them, each node's probability of acceptance [B, N] given its parent's.
    """

    rows: list[Row | None]
    limit: int
    nodes: int
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    tokens: Level | None = None
    labels: Tensor | None = None


class LengthPolicy(StoppingRule):
    """Drafts all that the drafter has; policies override what they decide.

    Args:
        carry_over: keep what was learned from one generation to the next; otherwise every `generate` begins anew.
        at_least: levels that grow whatever the rule says; 0 lets a rule stop at the root.
    """

    stops = False
    """Whether it is asked while trees grow."""
    watches_tokens = False
    """Whether steps come with `tokens`."""
    wants_labels = False
    """Whether steps come with `labels`."""

    def __init__(self, *, carry_over: bool = False, at_least: int = 0) -> None:
        self.carry_over, self.at_least = carry_over, at_least

    def begin(self, batch_size: int) -> None:
        """Begin a generation."""
        if not self.carry_over:
            self.forget()

    def forget(self) -> None:
        """As if nothing had ever been observed."""

    def limits(self, rows: int, most: int) -> list[int]:
        """Levels to draft for each of the rows, 0 to `most` (>= 1)."""
        return [most] * rows

    def observe(self, step: Step) -> None:
        """See what verification made of the last trees."""

    def select(self, rows: list[int]) -> None:
        """Keep only these rows; the others have finished."""
