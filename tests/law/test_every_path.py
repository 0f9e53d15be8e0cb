"""One speculative step has the target's law exactly, for every kind of proposal and every rule that may serve it.

Three tokens, float64, all decision paths of the real code: drafts, acceptance and next token. The emitted tokens are
completed with the target's own law to a fixed length and compared with the target's joint law.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as lp

from specdec.acceptance import Rule, accept
from specdec.emitter import Emitter
from specdec.grow.shape import best_shape, chain, shape_of
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree
from tests.law import proposals
from tests.law.enumeration import law_of, total_variation
from tests.law.proposals import cut, first_path, padded
from tests.law.tables import (
    PLAIN,
    Decoding,
    Propose,
    Tables,
    Verify,
    by_rule,
    every_tree,
    grown,
    law_after_one_step,
    scored,
)

EXACT = 1e-12
LENGTH = 4

PAIR = shape_of([(0,), (1,)])
ALL_THREE = shape_of([(0,), (1,), (2,)])
BINARY = shape_of([(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)])
IRREGULAR = shape_of([(0,), (1,), (0, 0), (0, 1), (0, 0, 0)])
SECOND_DEEPER = shape_of([(0,), (1,), (2,), (1, 0), (1, 1), (1, 0, 0)])
BEST = best_shape(4, 3)
CHAINS = {f"chain of {n}": chain(n) for n in (1, 2, 3)}
TREES = {
    "pair": PAIR,
    "all three": ALL_THREE,
    "binary": BINARY,
    "irregular": IRREGULAR,
    "second child deeper": SECOND_DEEPER,
    "best shape": BEST,
}
DRAWN_CHAIN_RULES: tuple[Rule, ...] = ("block", "traversal", "recursive", "walk")
DRAWN_TREE_RULES: tuple[Rule, ...] = ("traversal", "recursive", "walk")

DRAWN_CHAINS: dict[str, Propose] = {
    **{name: grown(shape, "drawn") for name, shape in CHAINS.items()},
    "stopped before an unsure draw": proposals.drawn_chain_until_unsure(3, 0.55),
    "stopped after an unlikely draw": proposals.drawn_chain_keeping_the_unlikely(3, 0.4),
    "first path of a tree": first_path(grown(IRREGULAR, "drawn")),
    "cut to depth 2": cut(grown(chain(3), "drawn"), 2),
    "padded": padded(grown(chain(2), "drawn"), 6),
    "nothing": cut(grown(chain(1), "drawn"), 0),
}
DRAWN_TREES: dict[str, Propose] = {
    **{name: grown(shape, "drawn") for name, shape in TREES.items()},
    "led by earlier draws": proposals.drawn_where_earlier_draws_lead(),
    "merged rollouts": proposals.merged_rollouts(2, 2),
    "cut to depth 1": cut(grown(BINARY, "drawn"), 1),
    "cut to depth 2": cut(grown(IRREGULAR, "drawn"), 2),
    "padded": padded(grown(PAIR, "drawn"), 8),
}
CHOSEN: dict[str, Propose] = {
    **{f"top-k {name}": grown(shape, "chosen") for name, shape in {**CHAINS, **TREES}.items()},
    "fixed chain": proposals.fixed([(0, 2), (1, 2)]),
    "fixed tree": proposals.fixed([(0, 1), (0, 0), (2, 2), (1, 1)]),
    "repeated text": proposals.repeating(3),
    "random junk": proposals.random_junk(2),
    "draws, then the unlikely dropped": proposals.as_chosen(
        proposals.without_unlikely_draws(grown(BINARY, "drawn"), 0.3)
    ),
    "draws, then sorted": proposals.as_chosen(proposals.siblings_sorted(grown(BINARY, "drawn"), by="q")),
    "draws with duplicates": proposals.as_chosen(proposals.drawn_with_replacement(3)),
    "first path of top-k": first_path(grown(IRREGULAR, "chosen")),
    "top-k cut and padded": padded(cut(grown(IRREGULAR, "chosen"), 2), 7),
}
DRAWN_CASES = [
    *(pytest.param(p, rule, id=f"{name}-{rule}") for name, p in DRAWN_CHAINS.items() for rule in DRAWN_CHAIN_RULES),
    *(pytest.param(p, rule, id=f"{name}-{rule}") for name, p in DRAWN_TREES.items() for rule in DRAWN_TREE_RULES),
]


def distance(
    tables: Tables, propose: Propose, verify: Verify, decoding: Decoding = PLAIN, length: int = LENGTH
) -> float:
    """Total variation between one speculative step, completed, and the target."""
    law = law_after_one_step(tables, propose, verify, decoding, length=length)
    return total_variation(law, decoding.target_law(tables, length))


@pytest.mark.parametrize(("propose", "rule"), DRAWN_CASES)
def test_drawn_children_have_the_targets_law(propose: Propose, rule: Rule) -> None:
    assert distance(Tables.random(1, noise=1.5), propose, by_rule(rule)) < EXACT


@pytest.mark.parametrize("propose", [pytest.param(p, id=name) for name, p in CHOSEN.items()])
def test_chosen_children_have_the_targets_law(propose: Propose) -> None:
    assert distance(Tables.random(3, noise=1.5), propose, by_rule("walk")) < EXACT


@pytest.mark.parametrize(
    ("propose", "rule"),
    [
        pytest.param(grown(chain(2), "drawn"), "block", id="drawn chain"),
        pytest.param(grown(IRREGULAR, "drawn"), "traversal", id="drawn tree"),
        pytest.param(grown(PAIR, "chosen"), "walk", id="chosen tree"),
    ],
)
def test_the_automatic_rule_is_the_one_for_these_children(propose: Propose, rule: Rule) -> None:
    """Told apart by the law of the emitted tokens without completion, which differs from rule to rule."""

    def law(named: Rule) -> dict[tuple[int, ...], float]:
        return law_after_one_step(Tables.random(4), propose, by_rule(named))

    assert total_variation(law("auto"), law(rule)) < EXACT
    others: list[Rule] = ["recursive", "walk"] if rule != "walk" else []
    assert all(total_variation(law("auto"), law(other)) > 0.005 for other in others)


HARD_TABLES = {
    "draft equal to target": Tables.random(5, noise=0.0),
    "draft sharper than target": Tables.random(6, sharpness=4.0),
    "draft nearly one-hot": Tables.random(7, sharpness=60.0),
    "draft flatter than target": Tables.random(8, sharpness=0.1),
    "tokens without mass": Tables.random(9).without_tokens(1),
    "other tokens without mass": Tables.random(10, noise=3.0).without_tokens(2),
    "equal and without some tokens": Tables(*[Tables.random(11, noise=0.0).without_tokens(3).target] * 2),
}
FEW = {
    "chain of 3": (grown(chain(3), "drawn"), DRAWN_CHAIN_RULES),
    "all three": (grown(ALL_THREE, "drawn"), DRAWN_TREE_RULES),
    "irregular": (grown(IRREGULAR, "drawn"), DRAWN_TREE_RULES),
    "top-k irregular": (grown(IRREGULAR, "chosen"), ("walk",)),
}
FEW_CASES = [pytest.param(p, rule, id=f"{name}-{rule}") for name, (p, rules) in FEW.items() for rule in rules]


@pytest.mark.parametrize(("propose", "rule"), FEW_CASES)
@pytest.mark.parametrize("tables", [pytest.param(t, id=name) for name, t in HARD_TABLES.items()])
def test_equal_sharp_flat_and_truncated_drafts_change_nothing(tables: Tables, propose: Propose, rule: Rule) -> None:
    assert distance(tables, propose, by_rule(rule)) < EXACT


DRAFT_PARAMS = {
    "hot": SamplingParams(do_sample=True, temperature=2.5),
    "cold": SamplingParams(do_sample=True, temperature=0.3),
    "top-k of 2": SamplingParams(do_sample=True, top_k=2),
    "top-k of 1": SamplingParams(do_sample=True, top_k=1),
    "top-p and min-p": SamplingParams(do_sample=True, temperature=0.8, top_p=0.7, min_p=0.2),
}


@pytest.mark.parametrize("params", [pytest.param(p, id=name) for name, p in DRAFT_PARAMS.items()])
@pytest.mark.parametrize(
    ("shape", "rule"),
    [(chain(2), "block"), (chain(2), "traversal"), (BINARY, "traversal"), (ALL_THREE, "recursive"), (PAIR, "walk")],
)
def test_a_draft_warped_unlike_the_target_is_verified_with_its_own_law(params: SamplingParams, shape, rule) -> None:
    decoding = Decoding(LogitsProcessorList([lp.TemperatureLogitsWarper(0.6)]))
    assert distance(Tables.random(12), grown(shape, "drawn", params), by_rule(rule), decoding) < EXACT


PROCESSORS = {
    "temperature and top-k": [lp.TemperatureLogitsWarper(0.7), lp.TopKLogitsWarper(2)],
    "temperature and top-p": [lp.TemperatureLogitsWarper(1.4), lp.TopPLogitsWarper(0.75)],
    "repetition penalty": [lp.RepetitionPenaltyLogitsProcessor(1.8)],
    "no repeated pair": [lp.NoRepeatNGramLogitsProcessor(2)],
    "penalty, no repeated triple, top-k": [
        lp.RepetitionPenaltyLogitsProcessor(3.0),
        lp.NoRepeatNGramLogitsProcessor(3),
        lp.TemperatureLogitsWarper(1.3),
        lp.TopKLogitsWarper(2),
    ],
}


@pytest.mark.parametrize(("propose", "rule"), FEW_CASES)
@pytest.mark.parametrize("processors", [pytest.param(p, id=name) for name, p in PROCESSORS.items()])
def test_processors_see_each_nodes_own_history(processors: list, propose: Propose, rule: Rule) -> None:
    decoding = Decoding(LogitsProcessorList(processors))
    assert distance(Tables.random(13), propose, by_rule(rule), decoding) < EXACT


def test_processors_with_history_really_change_the_law() -> None:
    tables = Tables.random(13)
    plain = Decoding().target_law(tables, LENGTH)
    for processors in PROCESSORS.values():
        processed = Decoding(LogitsProcessorList(processors)).target_law(tables, LENGTH)
        assert total_variation(plain, processed) > 0.05


@pytest.mark.parametrize(("propose", "rule"), FEW_CASES)
@pytest.mark.parametrize("eos", [0, 2])
def test_an_end_of_text_inside_the_accepted_path_ends_the_row(eos: int, propose: Propose, rule: Rule) -> None:
    decoding = Decoding(eos=eos)
    tables = Tables.random(14)
    law = law_after_one_step(tables, propose, by_rule(rule), decoding, length=LENGTH)
    assert total_variation(law, decoding.target_law(tables, LENGTH)) < EXACT
    assert all(eos not in sequence[:-1] for sequence in law)


def test_traversal_on_a_chain_accepts_as_much_as_block_verification() -> None:
    """The law of the accepted length is the same, not only the law of the tokens."""
    tables = Tables.random(15)

    def lengths(rule: Rule) -> dict[int, float]:
        law: dict[int, float] = {}
        for emitted, p in law_after_one_step(tables, grown(chain(3), "drawn"), by_rule(rule)).items():
            law[len(emitted)] = law.get(len(emitted), 0.0) + p
        return law

    assert total_variation(lengths("block"), lengths("traversal")) < EXACT
    expected = {rule: sum(n * p for n, p in lengths(rule).items()) for rule in ("block", "recursive", "walk")}
    assert expected["block"] > expected["recursive"] + 0.01 > expected["walk"]


# --- Several steps --------------------------------------------------------------------------------------


STEPWISE = {
    "drawn chain-block": (grown(chain(1), "drawn"), "block"),
    "drawn chain-recursive": (grown(chain(1), "drawn"), "recursive"),
    "drawn pair-traversal": (grown(PAIR, "drawn"), "traversal"),
    "top-k irregular-walk": (grown(IRREGULAR, "chosen"), "walk"),
    "repeated text-walk": (proposals.repeating(2), "walk"),
}


@pytest.mark.parametrize(("propose", "rule"), [pytest.param(p, rule, id=name) for name, (p, rule) in STEPWISE.items()])
@pytest.mark.parametrize("processors", [[], PROCESSORS["repetition penalty"]], ids=["raw", "repetition penalty"])
def test_consecutive_steps_have_the_targets_law(propose: Propose, rule: Rule, processors: list) -> None:
    """Two or three steps without completion, each drafting from what the one before emitted."""
    tables, decoding, length = Tables.random(16), Decoding(LogitsProcessorList(processors)), 3

    def decode(chooser: Chooser) -> tuple[int, ...]:
        emitter = decoding.emitter([()], chooser)
        emitted: tuple[int, ...] = ()
        while len(emitted) < length:
            tree = propose(tables, emitted, chooser).up_to_depth(length - 1 - len(emitted))
            emitted += tuple(accept(tree, scored(tables, tree, [emitted]), emitter, [0], rule).tokens[0])
        return emitted

    assert total_variation(law_of(decode), decoding.target_law(tables, length)) < EXACT


# --- Several rows ---------------------------------------------------------------------------------------


def _two_rows(tables: Tables, depths: tuple[int, int]) -> Propose:
    """Drawn chains of unequal depth below the same root, in one batch."""

    def propose(_: Tables, __: tuple[int, ...], chooser: Chooser) -> TokenTree:
        rows = [grown(chain(max(n, 1)), "drawn")(tables, (), chooser).up_to_depth(n) for n in depths]
        widest = max(tree.num_nodes for tree in rows)
        rows = [tree.padded_to(widest) for tree in rows]
        log_q = torch.cat([tree.log_q for tree in rows if tree.log_q is not None])
        return TokenTree(torch.cat([t.tokens for t in rows]), tuple(s for t in rows for s in t.shapes), log_q)

    return propose


@pytest.mark.parametrize("rule", ["block", "traversal", "recursive", "walk"])
@pytest.mark.parametrize("depths", [(1, 2), (0, 1)])
def test_rows_of_unequal_depth_are_exact_and_independent(depths: tuple[int, int], rule: Rule) -> None:
    tables, decoding = Tables.random(17), Decoding()
    propose, length = _two_rows(tables, depths), max(depths) + 1
    single = decoding.target_law(tables, length)
    joint = {(a, b): p * q for a, p in single.items() for b, q in single.items()}
    law: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for tree, drafted in every_tree(lambda chooser: propose(tables, (), chooser)):

        def step(chooser: Chooser, tree: TokenTree = tree) -> tuple[tuple[int, ...], ...]:
            emitter = decoding.emitter([(), ()], chooser)
            return tuple(map(tuple, accept(tree, scored(tables, tree, [(), ()]), emitter, [0, 1], rule).tokens))

        for (one, two), p in law_of(step).items():
            for a, rest_a in decoding.target_law(tables, length, one).items():
                for b, rest_b in decoding.target_law(tables, length, two).items():
                    law[a, b] = law.get((a, b), 0.0) + drafted * p * rest_a * rest_b
    assert total_variation(law, joint) < EXACT


@pytest.mark.parametrize("children", ["chosen", "drawn"])
def test_rows_that_advance_in_step_are_exact_and_independent(children) -> None:
    tables, decoding, length = Tables.random(18), Decoding(eos=2), 3
    single = decoding.target_law(tables, length)
    joint = {(a, b): p * q for a, p in single.items() for b, q in single.items()}

    def draft(chooser: Chooser) -> TokenTree:
        one = grown(PAIR, children)(tables, (), chooser)
        two = grown(shape_of([(0,), (0, 0)]), children)(tables, (), chooser)
        return TokenTree(torch.cat([one.tokens, two.tokens]), (*one.shapes, *two.shapes))

    law: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for tree, drafted in every_tree(draft):

        def step(chooser: Chooser, tree: TokenTree = tree) -> tuple[tuple[int, ...], ...]:
            emitter = decoding.emitter([(), ()], chooser, in_step=True)
            return tuple(map(tuple, accept(tree, scored(tables, tree, [(), ()]), emitter, [0, 1]).tokens))

        for (one, two), p in law_of(step).items():
            for a, rest_a in decoding.target_law(tables, length, one).items():
                for b, rest_b in decoding.target_law(tables, length, two).items():
                    law[a, b] = law.get((a, b), 0.0) + drafted * p * rest_a * rest_b
    assert total_variation(law, joint) < EXACT


def test_greedy_decoding_follows_the_argmax_whatever_is_proposed() -> None:
    tables = Tables.random(19)
    greedy = [0] * LENGTH
    for at in range(LENGTH):
        greedy[at] = int(tables.target[tuple(greedy[:at])].argmax())
    for propose in (grown(IRREGULAR, "drawn"), grown(BINARY, "chosen")):
        for tree, _ in every_tree(lambda chooser, propose=propose: propose(tables, (), chooser)):
            logits = scored(tables, tree, [()])
            logits = logits.nan_to_num()  # a real target has numbers at padding nodes too
            emitter = Emitter(torch.tensor([[1, 0]]), LogitsProcessorList(), [], SamplingParams())  # type: ignore[arg-type]
            tokens = accept(tree, logits, emitter, [0]).tokens[0]
            assert tokens == greedy[: len(tokens)]
