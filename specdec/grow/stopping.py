"""When growth goes no deeper: a rule is asked between the levels, row by row, for any policy.

A rule may look at the laws so far and at the tokens of the nodes that would be expanded next; those stay in the tree
whatever it says. So it never decides about a token by that token's own value, and nothing drawn is dropped for its own
probability: drawn children stay exact. It is asked twice on each level,

    before the draft model runs the nodes of a level: they exist, do they get children?
    after it ran them, when the laws of their children are known and none of these is drawn yet.

A row in which every node says no is cut there. The others go on; when no row does, the draft model is not run again.

Dimensions: B rows, F nodes of a frontier, C columns, N nodes of the tree, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.grow.levels import Children
from specdec.grow.policy import Expand, Frontier, Grown
from specdec.sampling import SamplingParams
from specdec.tree import NO_NODE, TokenTree

TRAITS = ("entropy", "first", "second")
"""What is known of a law: its entropy in nats, and its two largest probabilities."""


@dataclass(frozen=True)
class Level:
    """The nodes of one frontier, all on the host.

    Attributes:
        depths: [B, F] of the nodes; 0 for the root and for padding.
        parents: [B, F], each node's parent as a place in the frontier above; 0 for the root.
        live: bool [B, F]; False for padding, at which the other values mean nothing.
        shares: [B, F], the draft probability of each node's token; 1 for the root.
        paths: [B, F], the product of these along each node's path.
        above: [B, F, 3], the traits of the law that each node's token comes from; those of a sure law for the root.
        below: the same of the laws of their children; None before the draft model has run the nodes.
    """

    depths: Tensor
    parents: Tensor
    live: Tensor
    shares: Tensor
    paths: Tensor
    above: Tensor
    below: Tensor | None = None

    @property
    def depth(self) -> int:
        """Of the deepest node."""
        return int(self.depths.max())


class StoppingRule:
    """Goes on everywhere; rules override one of the two questions."""

    def before(self, level: Level) -> Tensor | None:
        """Bool [B, F]: which nodes are worth running; None for all. `level.below` is None."""
        return None

    def after(self, level: Level) -> Tensor | None:
        """Bool [B, F]: which nodes are worth having children; None for all. `level.below` is known."""
        return None


class ConfidenceRule(StoppingRule):
    """Go on below nodes that are likely enough under the draft; a node that is not stays in the tree.

    Args:
        least_path: least draft probability of a node's whole path.
        least_share: least draft probability of its own token.
    """

    def __init__(self, least_path: float = 0.0, least_share: float = 0.0) -> None:
        self.least_path, self.least_share = least_path, least_share

    def before(self, level: Level) -> Tensor:
        """By the nodes' own tokens, which are in the tree."""
        return (level.paths >= self.least_path) & (level.shares >= self.least_share)


class Watch:
    """Stands between a growth policy and the draft model, and asks the rule.

    Args:
        expand: runs the draft model.
        rule: says when to go no deeper.
        law: makes of draft logits the law that tokens come from, unnormalised and in log space.
        rows: B.
        at_least: levels that grow whatever the rule says.
    """

    def __init__(
        self, expand: Expand, rule: StoppingRule, law: Callable[[Tensor], Tensor], rows: int, at_least: int = 0
    ) -> None:
        self._expand, self._rule, self._law, self.at_least = expand, rule, law, at_least
        self.depths: list[int | None] = [None] * rows
        """Where each row was stopped."""
        self._log_q: list[Tensor] = []  # [B, F, V] of each frontier that ran
        self._traits: list[Tensor] = []  # [B, F, 3]
        self._paths: list[Tensor] = []  # [B, F]
        self._num_columns = 0

    def __call__(self, frontier: Frontier) -> Tensor | None:
        """As `Expand`, also for the first frontier."""
        level = self._level(frontier)
        if self._num_columns and not self._goes_on(level, self._rule.before(level)):
            return None
        logits = self._expand(frontier)
        if logits is None:
            return None
        self._keep(logits, level.paths)
        level = replace(level, below=self._traits[-1])
        return logits if self._goes_on(level, self._rule.after(level)) else None

    def _level(self, frontier: Frontier) -> Level:
        if not self._num_columns:
            ones = torch.ones(frontier.tokens.shape)
            sure = torch.tensor([0.0, 1.0, 0.0]).expand(*ones.shape, 3)
            return Level(frontier.depths, torch.zeros_like(frontier.depths), ones.bool(), ones, ones, sure)
        live = frontier.parents != NO_NODE
        log_q, first = self._log_q[-1], self._num_columns - self._log_q[-1].shape[1]
        at = (frontier.parents - first).clamp(min=0)  # growth goes level by level: parents are in the last frontier
        rows = torch.arange(at.shape[0])[:, None]
        tokens = frontier.tokens.to(log_q.device).clamp(max=log_q.shape[2] - 1)  # padding may hold anything
        shares = log_q[rows.to(log_q.device), at.to(log_q.device), tokens].exp().cpu()
        paths = shares * self._paths[-1][rows, at]
        return Level(frontier.depths, at, live, shares, paths, self._traits[-1][rows, at])

    def _keep(self, logits: Tensor, paths: Tensor) -> None:
        law = self._law(logits)
        log_q = (law if law.dtype == torch.float64 else law.float()).log_softmax(-1)
        q = log_q.exp()
        best = q.topk(min(2, q.shape[-1]), dim=-1).values
        second = best[..., 1:2] if best.shape[-1] > 1 else torch.zeros_like(best)
        entropy = torch.special.entr(q).sum(-1, keepdim=True)
        self._traits.append(torch.cat([entropy, best[..., :1], second], -1).cpu())
        self._log_q.append(log_q)
        self._paths.append(paths)
        self._num_columns += logits.shape[1]

    def _goes_on(self, level: Level, says: Tensor | None) -> bool:
        """Stop the rows in which no node wants to go on; whether any row still grows."""
        if says is not None and level.depth >= self.at_least:
            goes_on = (says & level.live).any(1).tolist()
            for row, (goes, stopped) in enumerate(zip(goes_on, self.depths, strict=True)):
                if not goes and stopped is None:
                    self.depths[row] = level.depth
        return any(stopped is None for stopped in self.depths)

    def tokens_of(self, grown: Grown) -> Level:
        """Every node of a tree that was grown under this watch [B, N]; parents are nodes of the tree."""
        tree = grown.tree
        parents = torch.tensor([shape.parents for shape in tree.shapes])
        columns = torch.tensor(grown.columns)
        live = parents != NO_NODE
        rows = torch.arange(parents.shape[0])[:, None]
        at = columns[rows, parents.clamp(min=0)].clamp(min=0)
        log_q = torch.cat(self._log_q, 1)
        tokens = tree.tokens.to(log_q.device).clamp(max=log_q.shape[2] - 1)  # a root may lie beyond what is guessed
        shares = log_q[rows.to(log_q.device), at.to(log_q.device), tokens].exp().cpu()
        above = torch.cat(self._traits, 1)[rows, at]
        paths = torch.cat([part.to(shares.dtype) for part in self._paths], 1)[rows, at] * shares
        return Level(tree.depths(), parents.clamp(min=0), live, shares, paths, above)


def law_of_tokens(children: Children, params: SamplingParams) -> Callable[[Tensor], Tensor]:
    """What makes the law that tokens come from of draft logits: warped where they are drawn, else as it is."""
    return params.warp if children == "drawn" and params.do_sample else lambda logits: logits


Grow = Callable[[Expand], Grown]
"""A policy's growth, waiting for the draft model."""


def grow_watched(grow: Grow, watch: Watch, root: Tensor) -> Grown:
    """The tree of a policy, each row cut where the watch stopped it.

    Args:
        grow: the policy with everything else given.
        watch: new, of the draft model's `expand`.
        root: [B].
    """
    first = watch(Frontier.of_roots(root))
    if first is None:
        return Grown(TokenTree.of_roots(root), [[0]] * root.shape[0])
    waiting = [first]

    def expand(frontier: Frontier) -> Tensor | None:
        return waiting.pop() if waiting else watch(frontier)

    grown = grow(expand)
    deepest = grown.tree.depth
    return grown.up_to_depths([deepest if depth is None else depth for depth in watch.depths])
