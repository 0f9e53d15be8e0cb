"""Every length policy leaves the target's law exactly as it is, with chosen and with drawn children; mistakes do not.

Three tokens, float64, all decision paths; see test_every_path. A policy is made anew for each path, so that what one
learned does not reach another; what it learned on its own path does reach the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from specdec.acceptance import Rule, accept
from specdec.costs.table import CostTable, VerifyPoint
from specdec.grow.chosen import ChosenGrowth
from specdec.grow.clover import CloverGrowth
from specdec.grow.drawn import DrawnGrowth
from specdec.grow.fixed import FixedGrowth
from specdec.grow.policy import GrowthPolicy
from specdec.grow.shape import chain, shape_of
from specdec.grow.stopping import Level
from specdec.lengths.acceptance_head import AcceptanceHead, AcceptanceLength
from specdec.lengths.adaedl import AdaedlLength
from specdec.lengths.confidence import AdaptiveConfidenceLength, ConfidenceLength
from specdec.lengths.constant import ConstantLength
from specdec.lengths.goodput import GoodputLength
from specdec.lengths.growth import LimitedGrowth
from specdec.lengths.heuristic import HeuristicLength
from specdec.lengths.policy import LengthPolicy, Row, Step
from specdec.lengths.thompson import ThompsonLength
from specdec.sampling import Chooser
from specdec.tree import TokenTree
from tests.law import proposals
from tests.law.enumeration import law_of, total_variation
from tests.law.policies import grow_rows
from tests.law.tables import PLAIN, Context, Propose, Tables, by_rule, every_tree, law_after_one_step, scored

EXACT = 1e-12
VISIBLE = 0.005


class HeadByShare(AcceptanceHead):
    """Trusts the draft's own probability, more or less; not trained."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 4.0 * inputs[..., 0] + 3.0


def goodput() -> GoodputLength:
    length = GoodputLength()
    points = [VerifyPoint(1, 0, nodes, 1.0 + 0.2 * nodes) for nodes in (1, 8)]
    length.costs = CostTable(tuple(points), per_step=0.1)
    return length


LENGTHS: dict[str, Callable[[], LengthPolicy]] = {
    "constant": lambda: ConstantLength(levels=1),
    "heuristic": lambda: HeuristicLength(start=1),
    "confidence": lambda: ConfidenceLength(stop_below=0.45),
    "confidence of the path": lambda: ConfidenceLength(stop_below=0.4, of="path"),
    "adaptive confidence": lambda: AdaptiveConfidenceLength(stop_below=0.5),
    "adaedl": lambda: AdaedlLength(stop_below=0.6, at_least=0),
    "adaedl after a first level": lambda: AdaedlLength(stop_below=0.6),
    "acceptance": lambda: AcceptanceLength(weights=HeadByShare(), stop_above=0.5),
    "thompson": lambda: ThompsonLength(draft_cost=0.3),
    "goodput": goodput,
}
GROWTH: dict[str, Callable[[], GrowthPolicy]] = {
    "chosen chain": lambda: FixedGrowth(chain(3)),
    "chosen tree": lambda: FixedGrowth(shape_of([(0, 0), (1, 0), (0, 1)])),
    "eagle2": lambda: ChosenGrowth(4, 3, 2, beam=2),
    "clover": lambda: CloverGrowth(3, 2),
    "drawn chain": lambda: FixedGrowth(chain(3), "drawn"),
    "drawn tree": lambda: FixedGrowth(shape_of([(0, 0), (1, 0)]), "drawn"),
    "dyspec": lambda: DrawnGrowth(3, 2, 2),
}
RULES: dict[str, tuple[Rule, ...]] = {
    "drawn chain": ("block", "recursive", "walk"),
    "drawn tree": ("traversal", "recursive"),
    "dyspec": ("traversal",),
}
CASES = [
    pytest.param(name, growth, rule, id=f"{name}-{growth}-{rule}")
    for name in LENGTHS
    for growth in GROWTH
    for rule in RULES.get(growth, ("walk",))
]


def limited(length: LengthPolicy, growth: GrowthPolicy) -> Propose:
    """One proposal under a length policy, as `LimitedDrafter` makes it."""

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        policy = LimitedGrowth(growth, length)
        policy.limits = length.limits(1, policy.depth)
        if not policy.limits[0]:
            return TokenTree.of_roots(torch.tensor([(1, 0, *context)[-1]]))
        return grow_rows(policy, tables, [context], chooser, room=policy.limits[0]).tree

    return propose


def anew(name: str, growth: str) -> Propose:
    """With policies of its own for every tree."""

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        length = LENGTHS[name]()
        length.begin(1)
        return limited(length, GROWTH[growth]())(tables, context, chooser)

    return propose


def distance(propose: Propose, rule: Rule, tables: Tables, length: int = 3) -> float:
    law = law_after_one_step(tables, propose, by_rule(rule), length=length)
    return total_variation(law, PLAIN.target_law(tables, length))


@pytest.mark.parametrize(("name", "growth", "rule"), CASES)
def test_policies_have_the_targets_law(name: str, growth: str, rule: Rule) -> None:
    assert distance(anew(name, growth), rule, Tables.random(1, noise=1.5)) < EXACT


@pytest.mark.parametrize("name", [name for name in LENGTHS if LENGTHS[name]().stops])
@pytest.mark.parametrize("growth", ["chosen chain", "drawn chain"])
def test_policies_that_stop_while_growing_do_so_at_different_depths_on_these_tables(name: str, growth: str) -> None:
    """Otherwise the exact laws above would say nothing about stopping."""
    depths = {
        tree.depth
        for seed in range(8)
        for tree, _ in every_tree(lambda chooser, seed=seed: anew(name, growth)(Tables.random(seed), (), chooser))
    }
    assert len(depths) > 1


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(
    ("growth", "rule"),
    [
        (lambda: FixedGrowth(chain(2), "drawn"), "block"),
        (lambda: FixedGrowth(shape_of([(0,), (1,)]), "drawn"), "traversal"),
        (GROWTH["eagle2"], "walk"),
    ],
    ids=["drawn chain", "drawn pair", "eagle2"],
)
def test_what_is_learned_from_past_steps_leaves_consecutive_steps_exact(
    name: str, growth: Callable[[], GrowthPolicy], rule: Rule
) -> None:
    tables, length = Tables.random(31, length=5, noise=1.5), 3

    def decode(chooser: Chooser) -> Context:
        policy = LENGTHS[name]()
        policy.begin(1)
        emitted: Context = ()
        emitter = PLAIN.emitter([()], chooser)
        while len(emitted) < length:
            room = length - 1 - len(emitted)
            tree = limited(policy, growth())(tables, emitted, chooser).up_to_depth(room)
            acceptance = accept(tree, scored(tables, tree, [emitted]), emitter, [0], rule)
            accepted = len(acceptance.paths[0])
            policy.observe(Step([Row(tree.depth, accepted, min(accepted + 1, tree.depth))], tree.depth, tree.depth))
            emitted += tuple(acceptance.tokens[0])
        return emitted[:length]

    assert total_variation(law_of(decode), PLAIN.target_law(tables, length)) < EXACT


def test_rows_that_stop_at_depths_of_their_own_are_exact_and_independent() -> None:
    tables, length, contexts = Tables.random(30, noise=1.5), 2, [(0,), (2,)]
    laws = [PLAIN.target_law(tables, length + 1, context) for context in contexts]
    joint = {(a, b): p * q for a, p in laws[0].items() for b, q in laws[1].items()}
    law: dict[tuple[Context, Context], float] = {}
    unequal = False

    def draft(chooser: Chooser) -> TokenTree:
        policy = LimitedGrowth(FixedGrowth(chain(2), "drawn"), ConfidenceLength(stop_below=0.5))
        policy.limits = [2, 2]
        return grow_rows(policy, tables, contexts, chooser).tree

    for tree, drafted in every_tree(draft):
        depths = [max(shape.depths) for shape in tree.shapes]
        unequal |= depths[0] != depths[1]

        def step(chooser: Chooser, tree: TokenTree = tree) -> tuple[Context, ...]:
            emitter = PLAIN.emitter(contexts, chooser)
            return tuple(map(tuple, accept(tree, scored(tables, tree, contexts), emitter, [0, 1], "block").tokens))

        for (one, two), p in law_of(step).items():
            for a, rest_a in PLAIN.target_law(tables, length + 1, (*contexts[0], *one)).items():
                for b, rest_b in PLAIN.target_law(tables, length + 1, (*contexts[1], *two)).items():
                    law[a, b] = law.get((a, b), 0.0) + drafted * p * rest_a * rest_b
    assert unequal
    assert total_variation(law, joint) < EXACT


# --- Mistakes -----------------------------------------------------------------------------------------------


def dropping_the_unlikely(growth: Callable[[], GrowthPolicy], least: float) -> Propose:
    """Cut above the token that was unlikely, in place of below it."""
    return proposals.without_unlikely_draws(limited(LengthPolicy(), growth()), least)


class LooksAtTheDraw(LengthPolicy):
    """Knows the whole tree before it says how deep it may go: a cut above the first unlikely token."""

    def cut(self, tree: TokenTree, least: float) -> TokenTree:
        assert tree.log_q is not None
        q, shape, tokens = tree.log_q.softmax(-1)[0], tree.shapes[0], tree.tokens[0].tolist()
        unlikely = [shape.depths[n] for n in range(1, tree.num_nodes) if float(q[shape.parents[n], tokens[n]]) < least]
        return tree.up_to_depth(min(unlikely, default=tree.depth + 1) - 1)


def cut_above(growth: Callable[[], GrowthPolicy], least: float) -> Propose:
    policy = LooksAtTheDraw()
    return lambda tables, context, chooser: policy.cut(limited(policy, growth())(tables, context, chooser), least)


class DeadAhead(LengthPolicy):
    """A length before the step that peeks at the numbers the draws will be made of."""

    def __init__(self, first: Callable[[], int]) -> None:
        super().__init__()
        self._first = first

    def limits(self, rows: int, most: int) -> list[int]:
        return [most if self._first() == 0 else 0]


def peeking(growth: Callable[[], GrowthPolicy]) -> Propose:
    """Draft, and say 0 where the first token came out as another one than 0."""

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        tree = limited(LengthPolicy(), growth())(tables, context, chooser)
        return tree.up_to_depth(DeadAhead(lambda: int(tree.tokens[0, 1])).limits(1, tree.depth)[0])

    return propose


MISTAKES = {
    "drops an unlikely draw of a chain": (dropping_the_unlikely(GROWTH["drawn chain"], 0.3), "block"),
    "drops an unlikely draw of a tree": (dropping_the_unlikely(GROWTH["drawn tree"], 0.3), "traversal"),
    "cuts above the first unlikely token": (cut_above(GROWTH["drawn chain"], 0.3), "block"),
    "cuts above the first unlikely level": (cut_above(GROWTH["dyspec"], 0.3), "traversal"),
    "knows the first token before it decides": (peeking(GROWTH["drawn chain"]), "recursive"),
}  # fmt: skip


@pytest.mark.parametrize(("propose", "rule"), [pytest.param(*case, id=name) for name, case in MISTAKES.items()])
def test_lengths_that_look_at_the_token_being_decided_are_lossy(propose: Propose, rule: Rule) -> None:
    tables = Tables.random(23, noise=2.0)
    assert distance(propose, rule, tables) > VISIBLE
    # Harmless where nothing was drawn.
    assert distance(proposals.as_chosen(propose), "walk", tables) < EXACT


class StopsAfter(LengthPolicy):
    """Stops below unlikely tokens, by the very numbers of the mistakes."""

    stops = True

    def before(self, level: Level) -> Tensor:
        return level.shares >= 0.3


@pytest.mark.parametrize("growth", ["drawn chain", "drawn tree", "dyspec"])
def test_the_same_threshold_is_exact_where_the_token_is_kept(growth: str) -> None:
    tables = Tables.random(23, noise=2.0)
    rules: Sequence[Rule] = RULES[growth]
    for rule in rules:
        propose: Propose = lambda t, c, chooser: limited(StopsAfter(), GROWTH[growth]())(t, c, chooser)  # noqa: E731
        assert distance(propose, rule, tables) < EXACT
