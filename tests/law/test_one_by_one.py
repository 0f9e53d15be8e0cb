"""Rules that weigh all nodes of all rows at once, or look no further than they must, decide as their papers do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from specdec import drawn_rules
from specdec.drawn_rules import Decided
from specdec.grow.drawn import DrawnGrowth
from specdec.law import Law, TreeLaw
from specdec.sampling import Chooser
from specdec.tree import NO_NODE, TokenTree, topology
from tests.law import one_by_one
from tests.law.enumeration import law_of, total_variation
from tests.law.policies import grow_rows
from tests.law.tables import PLAIN, Tables, scored

EXACT = 1e-12
Decide = Callable[[TokenTree, Law, Chooser], Decided]
RULES: dict[str, tuple[Decide, Decide]] = {
    "traversal in turn": (drawn_rules.traversal_in_turn, one_by_one.traversal),
    "traversal at once": (drawn_rules.traversal_at_once, one_by_one.traversal),
    "recursive at once": (drawn_rules.recursive_rejection, one_by_one.recursive_rejection),
}
CONTEXTS = [(0,), (2,)]


def decisions(decide: Decide, tree: TokenTree, tables: Tables) -> dict[object, float]:
    """The law of what a rule decides: paths and next tokens of both rows."""
    logits = scored(tables, tree, CONTEXTS)

    def run(chooser: Chooser) -> object:
        decided = decide(tree, TreeLaw(tree, logits, PLAIN.emitter(CONTEXTS, chooser), [0, 1]), chooser)
        return tuple(map(tuple, decided.paths)), tuple(decided.next_tokens)

    return law_of(run)  # type: ignore[arg-type]


TABLES = {
    "ordinary": Tables.random(3, noise=1.5),
    "nearly one-hot": Tables.random(7, sharpness=60.0),
    "tokens without mass": Tables.random(10, noise=3.0).without_tokens(2),
    "draft equal to target": Tables.random(5, noise=0.0),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tables", [pytest.param(tables, id=name) for name, tables in TABLES.items()])
def test_the_decisions_are_those_of_one_by_one(rule: str, tables: Tables) -> None:
    fast, plain = RULES[rule]
    shapes = set()
    for seed, policy in enumerate((DrawnGrowth(4, 3, 2), DrawnGrowth(3, 2, 3))):
        tree = grow_rows(policy, tables, CONTEXTS, Chooser(torch.Generator().manual_seed(seed))).tree
        shapes |= set(tree.shapes)
        assert total_variation(decisions(fast, tree, tables), decisions(plain, tree, tables)) < EXACT
    assert len(shapes) > 1


def test_the_comparison_sees_a_rule_that_is_another_one() -> None:
    tables = TABLES["ordinary"]
    tree = grow_rows(DrawnGrowth(4, 3, 2), tables, CONTEXTS, Chooser(torch.Generator().manual_seed(0))).tree
    other = decisions(one_by_one.recursive_rejection, tree, tables)
    for name in ("traversal in turn", "traversal at once"):
        assert total_variation(decisions(RULES[name][0], tree, tables), other) > 0.01


class Float32Law:
    """The same law in float32 at every node."""

    def __init__(self, p: list[float]) -> None:
        self._p = torch.tensor(p)

    def p(self, row: int, node: int) -> torch.Tensor:
        return self._p

    def p_at(self, places: list[tuple[int, int]]) -> torch.Tensor:
        return self._p.repeat(len(places), 1)


@pytest.mark.parametrize(
    "rule",
    [drawn_rules.traversal_in_turn, drawn_rules.traversal_at_once, one_by_one.traversal, drawn_rules.block],
)
def test_a_residual_that_is_rounding_leaves_weights_that_are_chances(rule: Decide) -> None:
    """A draft that is its target to rounding: p - q has a mass that 1 + mass does not show in float32.

    Then mass / (mass + 1 - w) with w = 1 was a division by zero: a decision that no node stood for.
    """
    q = [0.5, 0.5 - 2**-25, 2**-25]
    shape = topology((NO_NODE, 0, 1))
    tree = TokenTree(torch.tensor([[0, 0, 2]]), (shape,), torch.tensor(q).log().expand(1, 3, 3).clone())

    class Asked(Chooser):
        def accept(self, probability: torch.Tensor) -> torch.Tensor:
            assert bool(((probability >= 0) & (probability <= 1)).all()), probability
            return super().accept(probability)

    for seed in range(20):
        decided = rule(tree, Float32Law([0.5, 0.5, 0.0]), Asked(torch.Generator().manual_seed(seed)))
        assert decided.paths == [[1]]  # the first token is accepted for sure, the second one never
