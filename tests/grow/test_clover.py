"""Clover's sampler spends each row's budget from the root down, and drops what is far behind the likeliest child."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.grow.clover import CloverGrowth
from specdec.grow.policy import Frontier, Grown
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE
from tests.law.enumeration import total_variation
from tests.law.tables import PLAIN, Tables, by_rule, law_after_one_step, root_of

V = 7


def law_after(path: tuple[int, ...]) -> Tensor:
    """Logits [V] that depend on row, root and path."""
    generator = torch.Generator().manual_seed(hash(path) % 2**31)
    return torch.randn(V, generator=generator) * 2.0


def grown(policy: CloverGrowth, roots: list[int], room: int = 9, most_children: int = V) -> tuple[Grown, list[int]]:
    """A growth whose laws depend on each node's own path, and the widths of the frontiers that were run."""
    paths: list[list[tuple[int, ...]]] = [[] for _ in roots]
    widths = []

    def expand(frontier: Frontier) -> Tensor:
        widths.append(frontier.tokens.shape[1])
        rows = []
        for row, (tokens, parents) in enumerate(zip(frontier.tokens.tolist(), frontier.parents.tolist(), strict=True)):
            known = list(paths[row])
            paths[row] += [(*(known[p] if p != NO_NODE else ()), t) for t, p in zip(tokens, parents, strict=True)]
            rows.append(torch.stack([law_after(path) for path in paths[row][len(known) :]]))
        return torch.stack(rows)

    made = policy.grow(torch.tensor(roots), SamplingParams(), Chooser(), room, expand, most_children)
    return made, widths


def slow_tree(root: int, budget: int, depth: int, nucleus: float, least_share: float, width: int) -> list:
    """The rule in plain words, for one row: nodes as paths, level by level."""
    level, nodes = {(root,): 1.0}, []
    for _ in range(depth):
        found = []
        for path, value in level.items():
            shares = law_after(path).softmax(-1).tolist()
            before = 0.0
            for token in sorted(range(V), key=lambda t: -shares[t])[:width]:
                if before < nucleus and shares[token] >= least_share * max(shares):
                    found.append((value * shares[token], (*path, token)))
                before += shares[token]
        best = sorted(found, reverse=True)[: budget - len(nodes)]
        nodes += [path for _, path in best]
        level = {path: value for value, path in best}
    return nodes


@pytest.mark.parametrize("budget", [1, 3, 6, 15])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize(("nucleus", "least_share"), [(0.8, 0.25), (0.5, 0.0), (1.0, 0.1)])
def test_trees_are_those_of_the_rule_in_plain_words(
    budget: int, depth: int, nucleus: float, least_share: float
) -> None:
    roots = [3, 0, 5, 6]
    policy = CloverGrowth(budget, depth, nucleus=nucleus, least_share=least_share)
    made, widths = grown(policy, roots)
    assert len(widths) <= depth
    for row, root in enumerate(roots):
        shape, tokens = made.tree.shapes[row], made.tree.tokens[row].tolist()
        padding = [n > 0 and shape.parents[n] == NO_NODE for n in range(len(shape.parents))]
        paths = [(root, *(tokens[m] for m in shape.path(n))) for n in range(1, len(tokens)) if not padding[n]]
        assert paths == slow_tree(root, budget, depth, nucleus, least_share, budget)


def test_rows_that_are_sure_go_deep_and_rows_that_are_not_go_wide() -> None:
    sure, unsure = torch.tensor([9.0, 0, 0, 0, 0, 0, 0]), torch.zeros(V)

    def expand(frontier: Frontier) -> Tensor:
        width = frontier.tokens.shape[1]
        return torch.stack([sure.expand(width, -1), unsure.expand(width, -1)])

    root = torch.tensor([1, 2])
    made = CloverGrowth(4, 5).grow(root, SamplingParams(), Chooser(), 9, expand, V)
    assert [max(shape.depths) for shape in made.tree.shapes] == [4, 1]
    assert made.tree.num_drafted == [4, 4]


def test_width_room_and_vocabulary_bound_the_tree() -> None:
    made, _ = grown(CloverGrowth(12, 6, 1), [3, 4])
    assert made.tree.is_chain
    assert CloverGrowth(12, 6, 1).is_chain
    made, widths = grown(CloverGrowth(30, 6), [3, 4], room=2)
    assert made.tree.depth == len(widths) == 2
    made, _ = grown(CloverGrowth(30, 1, nucleus=1.0, least_share=0.0), [3], most_children=2)
    assert made.tree.num_drafted == [2]


@pytest.mark.parametrize("budget", [2, 5])
def test_it_has_the_targets_law(budget: int) -> None:
    def propose(tables: Tables, context: tuple[int, ...], chooser: Chooser):
        paths: list[tuple[int, ...]] = []

        def expand(frontier: Frontier) -> Tensor:
            known = list(paths)
            pairs = zip(frontier.tokens[0].tolist(), frontier.parents[0].tolist(), strict=True)
            paths.extend(() if parent == NO_NODE else (*known[parent], token) for token, parent in pairs)
            return torch.stack([tables.draft[*context, *path] for path in paths[len(known) :]])[None]

        root = torch.tensor([root_of(context)])
        return CloverGrowth(budget, 3).grow(root, SamplingParams(do_sample=True), chooser, 3, expand, 3).tree

    tables = Tables.random(3, noise=1.5)
    law = law_after_one_step(tables, propose, by_rule("auto"), length=4)
    assert total_variation(law, PLAIN.target_law(tables, 4)) < 1e-12
