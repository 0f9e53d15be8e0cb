"""Two drafters, one text: who proposes where, that both stay in step, and that mixed rows are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec.acceptance import Rule, accept
from specdec.context import Context
from specdec.drafter import Committed
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.early_exit import EarlyExitDrafter
from specdec.drafters.hybrid import HybridDrafter, certain_law, mixed
from specdec.drafters.load import load_drafter
from specdec.drafters.lookup import LookupDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import UnknownDrafter
from specdec.grow.shape import shape_of
from specdec.probe import target_of
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree
from tests.law import proposals
from tests.law.enumeration import law_of, total_variation
from tests.law.tables import PLAIN, Tables, by_rule, every_tree, grown, law_after_one_step, scored
from tests.law.tables import Context as TableContext
from tests.tiny import prompt, shared_draft, shared_target

GREEDY = SamplingParams()


class Counted(DraftModelDrafter):
    """A draft model that notes how often it was asked."""

    calls = 0

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        self.calls += 1
        return super().propose(root, params, chooser, room)


def hybrid(**options: Any) -> HybridDrafter:
    return HybridDrafter(SuffixDrafter(min_match=3), Counted(target_of(shared_draft()), **options))


def begun(drafter: HybridDrafter, texts: list[list[int]]) -> HybridDrafter:
    drafter.reset(len(texts), Context(target_of(shared_target())))
    drafter.observe(Committed(texts))
    return drafter


REPEATS = [5, 6, 7, 8, 9, 10, 5, 6]
"""Followed by 7, its end occurred before and went on with 8, 9, 10."""
NEW = [11, 12, 13, 14, 15, 16, 17, 18]


@torch.no_grad()
def test_a_row_with_a_match_takes_it_and_the_others_take_the_model() -> None:
    drafter = begun(hybrid(depth=3), [REPEATS, NEW])
    tree = drafter.propose(torch.tensor([7, 19]), GREEDY, Chooser(), 5)
    assert tree.tokens[0, 1:4].tolist() == [8, 9, 10]
    alone = begun(hybrid(depth=3), [NEW])
    expected = alone.propose(torch.tensor([19]), GREEDY, Chooser(), 5)
    assert tree.tokens[1, : expected.num_nodes].tolist() == expected.tokens[0].tolist()


@torch.no_grad()
def test_the_model_does_not_run_when_every_row_has_a_match() -> None:
    drafter = begun(hybrid(depth=3), [REPEATS, REPEATS])
    drafter.propose(torch.tensor([7, 7]), GREEDY, Chooser(), 5)
    assert isinstance(drafter.second, Counted)
    assert drafter.second.calls == 0


@pytest.mark.parametrize("options", [{"depth": 3}, {"depth": 3, "budget": 8, "grow": "eagle2"}], ids=["chain", "tree"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_is_that_of_plain_generate_and_both_have_their_turn(
    options: dict[str, Any], batch_size: int
) -> None:
    drafter = hybrid(**options)
    inputs = prompt(batch_size)
    expected = shared_target().generate(**inputs, max_new_tokens=96, do_sample=False)
    output: Any = specdec.generate(
        shared_target(), **inputs, drafter=drafter, max_new_tokens=96, do_sample=False, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == expected.tolist()
    assert isinstance(drafter.second, Counted)
    if batch_size == 1:  # the tiny target soon repeats itself
        assert 0 < drafter.second.calls < len(output.stats.steps)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_drafter_that_runs_the_targets_layers_serves_all_rows_or_none(batch_size: int) -> None:
    drafter = HybridDrafter(SuffixDrafter(min_match=3), EarlyExitDrafter(target_of(shared_target()), layer=2, budget=6))
    inputs = prompt(batch_size)
    expected = shared_target().generate(**inputs, max_new_tokens=64, do_sample=False)
    output: Any = specdec.generate(shared_target(), **inputs, drafter=drafter, max_new_tokens=64, do_sample=False)
    assert output.tolist() == expected.tolist()


def test_a_name_with_a_plus_makes_one() -> None:
    drafter = load_drafter("lookup:min_ngram=2,tokens=6+early-exit:layer=1,depth=2", shared_target())
    assert isinstance(drafter, HybridDrafter)
    assert isinstance(drafter.first, LookupDrafter)
    assert isinstance(drafter.second, EarlyExitDrafter)
    assert (drafter.first.min_ngram, drafter.first.tokens, drafter.second.policy.depth) == (2, 6, 2)
    with pytest.raises(UnknownDrafter, match="no drafter 'nothing'"):
        load_drafter("suffix+nothing", shared_target())


# --- The law of chosen children among drawn ones ------------------------------------------------------------


CHOSEN = {
    "chain": proposals.fixed([(0, 2), (1, 1)]),
    "pair": proposals.fixed([(0, 1), (0, 2)]),
    "token 0 second": proposals.fixed([(0, 2), (0, 0), (2, 1)]),
    "all three": proposals.fixed([(0, 1), (0, 0), (0, 2), (1, 0)]),
}


def certain(propose: Any) -> Any:
    """Chosen children with the law in which they are certain."""

    def with_law(tables: Tables, context: TableContext, chooser: Chooser) -> TokenTree:
        tree = propose(tables, context, chooser)
        law = certain_law(tree, 0, torch.zeros(1, tree.num_nodes, 3, dtype=torch.float64))
        return TokenTree(tree.tokens, tree.shapes, law[None])

    return with_law


@pytest.mark.parametrize("propose", [pytest.param(propose, id=name) for name, propose in CHOSEN.items()])
@pytest.mark.parametrize("rule", ["traversal", "recursive"])
def test_certain_children_have_the_targets_law_and_lose_nothing_to_the_walk(propose: Any, rule: Rule) -> None:
    tables = Tables.random(40, noise=1.5)

    def law(rule: Rule, length: int | None, propose: Any) -> Any:
        return law_after_one_step(tables, propose, by_rule(rule), length=length)

    assert total_variation(law(rule, 4, certain(propose)), PLAIN.target_law(tables, 4)) < 1e-12

    def tokens(rule: Rule, propose: Any) -> float:
        return sum(len(emitted) * p for emitted, p in law(rule, None, propose).items())

    assert tokens(rule, certain(propose)) >= tokens("walk", propose) - 1e-12


@pytest.mark.parametrize("rule", ["traversal", "recursive", "walk"])
def test_rows_of_both_kinds_in_one_batch_are_exact_and_independent(rule: Rule) -> None:
    tables, length = Tables.random(41, noise=1.5), 3
    single = PLAIN.target_law(tables, length)
    joint = {(a, b): p * q for a, p in single.items() for b, q in single.items()}

    def propose(chooser: Chooser) -> TokenTree:
        chosen = proposals.fixed([(0, 1), (0, 2), (1, 0)])(tables, (), chooser)
        drawn = grown(shape_of([(0,), (1,)]), "drawn")(tables, (), chooser)
        assert drawn.log_q is not None
        both = TokenTree(drawn.tokens.repeat(2, 1), drawn.shapes * 2, drawn.log_q.repeat(2, 1, 1))
        return mixed(TokenTree(chosen.tokens.repeat(2, 1), chosen.shapes * 2), both, [True, False])

    law: dict[Any, float] = {}
    for tree, drafted in every_tree(propose):

        def step(chooser: Chooser, tree: TokenTree = tree) -> tuple[tuple[int, ...], ...]:
            emitter = PLAIN.emitter([(), ()], chooser)
            return tuple(map(tuple, accept(tree, scored(tables, tree, [(), ()]), emitter, [0, 1], rule).tokens))

        for (one, two), p in law_of(step).items():
            for a, rest_a in PLAIN.target_law(tables, length, one).items():
                for b, rest_b in PLAIN.target_law(tables, length, two).items():
                    law[a, b] = law.get((a, b), 0.0) + drafted * p * rest_a * rest_b
    assert total_variation(law, joint) < 1e-12
