"""Every growth policy with every rule that may serve it has the target's law exactly; near misses have not.

Three tokens, float64, all decision paths; see test_every_path. The mistakes are those that published trees make, and
those that these policies would make with one line changed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from specdec.acceptance import Rule, accept
from specdec.grow.calibration import AcceptanceTable, CalibratedGrowth, DrawnValues
from specdec.grow.chosen import ChosenGrowth
from specdec.grow.drawn import DraftProbabilities, DrawnGrowth, SlotValues
from specdec.grow.fixed import FixedGrowth
from specdec.grow.policy import GrowthPolicy
from specdec.grow.sequoia import sequoia_shape
from specdec.grow.shape import greedy_shape, shape_of
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree
from tests.law import proposals
from tests.law.enumeration import law_of, total_variation
from tests.law.policies import grow_rows, grown_by
from tests.law.tables import (
    PLAIN,
    Context,
    Propose,
    Tables,
    Verify,
    by_rule,
    every_tree,
    law_after_one_step,
    scored,
    with_log_q,
)

EXACT = 1e-12
VISIBLE = 0.005
LENGTH = 4
DRAWN_RULES: tuple[Rule, ...] = ("traversal", "recursive", "walk")


def calibrated(
    budget: int, depth: int, width: int, children: str, seed: int = 0, threshold: float = 0.0
) -> CalibratedGrowth:
    """With tables of random rates, as after some learning."""
    policy = CalibratedGrowth(budget, depth, width, children, threshold=threshold)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for table in policy.tables.values():
        table.set_rates(0.1 + 0.6 * torch.rand(table.rates.shape, dtype=torch.float64, generator=generator))
    return policy


CHOSEN: dict[str, Callable[[], GrowthPolicy]] = {
    "paths with gaps": lambda: FixedGrowth(shape_of([[0, 1], [2], [2, 2, 0]])),
    "medusa's construction": lambda: FixedGrowth(greedy_shape(5, ((0.6, 0.3, 0.1), (0.4, 0.3), (0.3, 0.2)))),
    "sequoia": lambda: FixedGrowth(sequoia_shape(5, 3, (0.4, 0.45, 0.1), 3)),
    "eagle2": lambda: ChosenGrowth(4, 3, 2, beam=2),
    "eagle2, all of the vocabulary": lambda: ChosenGrowth(9, 3, 10, beam=10),
    "opt-tree": lambda: ChosenGrowth(5, 3, 3, least_gain=0.4),
    "best-first": lambda: ChosenGrowth(6, 3, 3),
    "calibrated": lambda: calibrated(5, 3, 3, "chosen"),
    "calibrated by threshold": lambda: calibrated(9, 3, 3, "chosen", threshold=0.2),
}
DRAWN: dict[str, Callable[[], GrowthPolicy]] = {
    "sequoia": lambda: FixedGrowth(sequoia_shape(4, 2, (0.4, 0.45, 0.1), 3), "drawn"),
    "dyspec": lambda: DrawnGrowth(4, 2, 2),
    "dyspec, wide": lambda: DrawnGrowth(3, 2, 3),
    "dyspec, deep": lambda: DrawnGrowth(3, 3, 2),
    "dyspec by threshold": lambda: DrawnGrowth(9, 2, 2, threshold=0.3),
    "dyspec, more than there is": lambda: DrawnGrowth(50, 2, 2),
    "dyspec, one child": lambda: DrawnGrowth(2, 3, 1),
    "calibrated": lambda: calibrated(4, 2, 2, "drawn"),
    "calibrated, deep": lambda: calibrated(2, 3, 2, "drawn", seed=1),
    "calibrated by threshold": lambda: calibrated(9, 2, 2, "drawn", threshold=0.2),
    "calibrated, unlearned": lambda: CalibratedGrowth(4, 2, 2, "drawn"),
}
DRAWN_CASES = [pytest.param(make, rule, id=f"{name}-{rule}") for name, make in DRAWN.items() for rule in DRAWN_RULES]


def distance(propose: Propose, verify: Verify, tables: Tables, length: int = LENGTH) -> float:
    law = law_after_one_step(tables, propose, verify, length=length)
    return total_variation(law, PLAIN.target_law(tables, length))


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in CHOSEN.items()])
@pytest.mark.parametrize("seed", [1, 2])
def test_policies_of_chosen_children_have_the_targets_law(make: Callable[[], GrowthPolicy], seed: int) -> None:
    assert distance(grown_by(make), by_rule("walk"), Tables.random(seed, noise=1.5)) < EXACT


@pytest.mark.parametrize(("make", "rule"), DRAWN_CASES)
def test_policies_of_drawn_children_have_the_targets_law(make: Callable[[], GrowthPolicy], rule: Rule) -> None:
    assert distance(grown_by(make), by_rule(rule), Tables.random(1, noise=1.5), 3) < EXACT


HARD = {
    "sharp draft": Tables.random(6, sharpness=4.0),
    "nearly one-hot draft": Tables.random(7, sharpness=60.0),
    "flat draft": Tables.random(8, sharpness=0.1),
    "tokens without mass": Tables.random(10, noise=3.0).without_tokens(2),
}


@pytest.mark.parametrize("name", ["dyspec, wide", "dyspec by threshold", "calibrated"])
@pytest.mark.parametrize("tables", [pytest.param(tables, id=name) for name, tables in HARD.items()])
def test_sharp_flat_and_truncated_drafts_change_nothing(name: str, tables: Tables) -> None:
    assert distance(grown_by(DRAWN[name]), by_rule("traversal"), tables, 3) < EXACT
    cold = SamplingParams(do_sample=True, temperature=0.4, top_k=2)
    assert distance(grown_by(DRAWN[name], cold), by_rule("traversal"), tables, 3) < EXACT


@pytest.mark.parametrize("make", [*CHOSEN.values(), *DRAWN.values()], ids=[*CHOSEN, *(f"drawn {n}" for n in DRAWN)])
def test_a_room_of_one_gives_one_exact_level(make: Callable[[], GrowthPolicy]) -> None:
    tables = Tables.random(3)
    propose = grown_by(make, room=1)
    assert all(tree.depth == 1 for tree, _ in every_tree(lambda chooser: propose(tables, (), chooser)))
    assert distance(propose, by_rule("auto"), tables, 2) < EXACT


# --- Mistakes -----------------------------------------------------------------------------------------------


class LooksAtTheDraw(DraftProbabilities):
    """A slot is worth what its own token turned out to be worth."""

    def of(self, seen: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        return shares, shares


class LooksAtTheDrawByTable(DrawnValues):
    """The calibrated key without its expectation."""

    def of(self, seen: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        _, reaches = super().of(seen, shares)
        return reaches, reaches


def random_table() -> AcceptanceTable:
    """Of rates far apart, so that two draws at one slot are worth very different things."""
    table = AcceptanceTable("drawn")
    heads = torch.rand(table.rates.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) > 0.5
    table.set_rates(0.02 + 0.96 * heads)
    return table


def capped_after_drawing(make: Callable[[], DrawnGrowth], budget: int) -> Propose:
    """Grow, then keep the nodes whose own tokens were likeliest along their path."""

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        tree = grow_rows(make(), tables, [context], chooser).tree
        assert tree.log_q is not None
        q, shape, tokens = tree.log_q.softmax(-1)[0], tree.shapes[0], tree.tokens[0].tolist()
        score = [1.0]
        for node in range(1, tree.num_nodes):
            score.append(score[shape.parents[node]] * float(q[shape.parents[node], tokens[node]]))
        kept = sorted(range(1, tree.num_nodes), key=lambda node: -score[node])[:budget]
        return tree._keeping([[node == 0 or node in kept for node in range(tree.num_nodes)]])

    return propose


def pretending(make: Callable[[], GrowthPolicy]) -> Propose:
    """Chosen children that claim the draft's law."""
    return lambda tables, context, chooser: with_log_q(
        grow_rows(make(), tables, [context], chooser).tree, tables, context
    )


def valued(values: Callable[[], SlotValues]) -> Propose:
    return grown_by(lambda: DrawnGrowth(3, 2, 2, values=values()))


MISTAKES: dict[str, Propose] = {
    "dyspec with keys that know the draw": valued(LooksAtTheDraw),
    "calibrated with keys that know the draw": valued(lambda: LooksAtTheDrawByTable(random_table())),
    "dyspec capped by the draws' own probability": capped_after_drawing(lambda: DrawnGrowth(4, 2, 2), 3),
    "dyspec with siblings sorted": proposals.siblings_sorted(grown_by(DRAWN["dyspec"]), by="q"),
    "eagle2 claiming its scores as a law": pretending(CHOSEN["eagle2"]),
    "opt-tree claiming its scores as a law": pretending(CHOSEN["opt-tree"]),
}


@pytest.mark.parametrize("rule", ["traversal", "recursive"])
@pytest.mark.parametrize("propose", [pytest.param(propose, id=name) for name, propose in MISTAKES.items()])
def test_growth_that_cheats_is_lossy(propose: Propose, rule: Rule) -> None:
    tables = Tables.random(23, noise=2.0)
    assert distance(propose, by_rule(rule), tables, 3) > VISIBLE
    # Harmless once nothing is claimed.
    assert distance(proposals.as_chosen(propose), by_rule("walk"), tables, 3) < EXACT


# --- Several rows, several steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eagle2", "opt-tree", "calibrated"])
def test_rows_with_trees_of_their_own_grow_as_if_alone(name: str) -> None:
    contexts = [(0,), (1,), (2,)]
    tables = Tables.random(29, length=5, noise=1.0)
    grown = grow_rows(CHOSEN[name](), tables, contexts, Chooser())
    assert len({shape.parents for shape in grown.tree.shapes}) > 1, "rows of one shape would show nothing"
    for row, context in enumerate(contexts):
        alone = grow_rows(CHOSEN[name](), tables, [context], Chooser()).tree
        here = TokenTree(grown.tree.tokens[row : row + 1], grown.tree.shapes[row : row + 1])._keeping(
            [[True] * grown.tree.num_nodes]
        )
        assert here.shapes == alone.shapes
        assert here.tokens.tolist() == alone.tokens.tolist()


@pytest.mark.parametrize("rule", ["traversal", "recursive"])
def test_drawn_rows_of_different_shapes_are_exact_and_independent(rule: Rule) -> None:
    tables, length, contexts = Tables.random(30, noise=1.5), 2, [(0,), (2,)]
    laws = [PLAIN.target_law(tables, length + 1, context) for context in contexts]
    joint = {(a, b): p * q for a, p in laws[0].items() for b, q in laws[1].items()}
    law: dict[tuple[Context, Context], float] = {}
    shapes = set()
    for tree, drafted in every_tree(lambda chooser: grow_rows(DrawnGrowth(2, 2, 2), tables, contexts, chooser).tree):
        shapes.add(tree.shapes)

        def step(chooser: Chooser, tree: TokenTree = tree) -> tuple[Context, ...]:
            emitter = PLAIN.emitter(contexts, chooser)
            return tuple(map(tuple, accept(tree, scored(tables, tree, contexts), emitter, [0, 1], rule).tokens))

        for (one, two), p in law_of(step).items():
            for a, rest_a in PLAIN.target_law(tables, length + 1, (*contexts[0], *one)).items():
                for b, rest_b in PLAIN.target_law(tables, length + 1, (*contexts[1], *two)).items():
                    law[a, b] = law.get((a, b), 0.0) + drafted * p * rest_a * rest_b
    assert any(one != two for one, two in shapes), "rows must differ"
    assert total_variation(law, joint) < EXACT


@pytest.mark.parametrize(
    ("children", "width", "rule"), [("chosen", 2, "walk"), ("drawn", 2, "traversal"), ("drawn", 1, "block")]
)
def test_tables_learned_from_past_steps_leave_consecutive_steps_exact(children: str, width: int, rule: Rule) -> None:
    tables, length = Tables.random(31, noise=1.5), 3

    def decode(chooser: Chooser) -> Context:
        policy = CalibratedGrowth(2, 3 - width, width, children)  # type: ignore[arg-type]
        for table in policy.tables.values():
            table.belief = 0.5  # one observation turns the table over
        emitter = PLAIN.emitter([()], chooser)
        emitted: Context = ()
        while len(emitted) < length:
            room = length - 1 - len(emitted)
            tree = grow_rows(policy, tables, [emitted], chooser, room=max(room, 1)).tree.up_to_depth(room)
            acceptance = accept(tree, scored(tables, tree, [emitted]), emitter, [0], rule)
            policy.observe(tree, [[0, *acceptance.paths[0]]])
            emitted += tuple(acceptance.tokens[0])
        return emitted

    assert total_variation(law_of(decode), PLAIN.target_law(tables, length)) < EXACT
