"""Policies grow the trees that slow and obvious searches find, in few draft forwards, for rows of their own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from specdec.errors import UnknownDrafter
from specdec.grow.calibration import AcceptanceTable, DrawnValues
from specdec.grow.chosen import ChosenGrowth
from specdec.grow.drawn import DrawnGrowth
from specdec.grow.marginals import ddtree, grow_on_marginals
from specdec.grow.named import POLICIES, growth_named
from specdec.grow.policy import Frontier, Grown, GrowthPolicy
from specdec.grow.trie import merged
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE, TokenTree
from tests.grow.reference import (
    Law,
    ScriptedChooser,
    best_paths,
    dyspec_heap,
    dyspec_threshold,
    eagle2_paths,
)

SAMPLING = SamplingParams(do_sample=True)
VOCAB = 6


def random_law(seed: int, sharpness: float = 2.0, vocab: int = VOCAB) -> Callable[[tuple[int, ...]], Tensor]:
    """Logits that depend on the whole path."""

    def logits(path: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, *path)) % 2**31)
        return sharpness * torch.randn(vocab, dtype=torch.float64, generator=generator)

    return logits


def constant_law(share: float) -> Callable[[tuple[int, ...]], Tensor]:
    """Token 2 has this probability at every node."""
    law = torch.full((VOCAB,), (1 - share) / (VOCAB - 1), dtype=torch.float64)
    law[2] = share
    return lambda path: law.log()


def probabilities(logits: Callable[[tuple[int, ...]], Tensor]) -> Law:
    return lambda path: logits(path).softmax(-1).tolist()


class Draft:
    """Counts forwards and the nodes in them; one law per row."""

    def __init__(self, laws: list[Callable[[tuple[int, ...]], Tensor]]) -> None:
        self.laws = laws
        self.forwards: list[int] = []
        self.paths: list[list[tuple[int, ...] | None]] = [[] for _ in laws]

    def expand(self, frontier: Frontier) -> Tensor:
        self.forwards.append(frontier.tokens.shape[1])
        rows = []
        for row, law in enumerate(self.laws):
            known, at = self.paths[row], []
            for token, parent in zip(frontier.tokens[row].tolist(), frontier.parents[row].tolist(), strict=True):
                above = None if parent == NO_NODE else known[parent]
                at.append(() if not known else None if above is None else (*above, token))
            self.paths[row] = known + at
            vocab = law(()).shape[0]
            rows.append(torch.stack([torch.full((vocab,), math.nan) if p is None else law(p) for p in at]))
        return torch.stack(rows)

    def grow(
        self, policy: GrowthPolicy, params: SamplingParams = SAMPLING, chooser: Chooser | None = None, room: int = 99
    ) -> Grown:
        root = torch.zeros(len(self.laws), dtype=torch.long)
        return policy.grow(root, params, chooser or ScriptedChooser(), room, self.expand, self.laws[0](()).shape[0])


def paths(tree: TokenTree, row: int = 0) -> set[tuple[int, ...]]:
    tokens, shape = tree.tokens[row].tolist(), tree.shapes[row]
    return {
        tuple(tokens[n] for n in shape.path(node))
        for node in range(1, tree.num_nodes)
        if shape.parents[node] != NO_NODE
    }


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("budget", "depth", "width"), [(1, 1, 1), (5, 3, 2), (12, 4, 3), (30, 3, 6), (7, 7, 1)])
def test_best_first_and_eagle2_find_what_a_full_search_finds(seed: int, budget: int, depth: int, width: int) -> None:
    logits = random_law(seed)
    law = probabilities(logits)
    assert paths(Draft([logits]).grow(ChosenGrowth(budget, depth, width)).tree) == best_paths(
        law, budget, depth, width, VOCAB
    )
    eagle = ChosenGrowth(budget, depth, width, beam=width)
    assert paths(Draft([logits]).grow(eagle).tree) == eagle2_paths(law, budget, depth, width, VOCAB)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("budget", "depth", "width"), [(1, 1, 1), (6, 3, 2), (16, 5, 3), (40, 4, 6), (5, 9, 1)])
def test_dyspec_is_the_published_heap_with_the_same_draws(seed: int, budget: int, depth: int, width: int) -> None:
    logits = random_law(seed)
    chooser = ScriptedChooser()
    reference = dyspec_heap(
        probabilities(logits),
        lambda path: chooser.draw_without_replacement(logits(path), VOCAB).tolist(),
        budget, depth, width,
    )  # fmt: skip
    draft = Draft([logits])
    assert paths(draft.grow(DrawnGrowth(budget, depth, width)).tree) == {path for path, _ in reference}
    assert len(draft.forwards) <= depth, "one forward for each level, where the paper has one for each node"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("budget", "depth", "width"), [(6, 3, 2), (16, 5, 3), (40, 4, 6)])
def test_heap_and_threshold_agree_at_the_matching_threshold(seed: int, budget: int, depth: int, width: int) -> None:
    logits = random_law(seed)
    law, chooser = probabilities(logits), ScriptedChooser()

    def draws(path: tuple[int, ...]) -> list[int]:
        return chooser.draw_without_replacement(logits(path), VOCAB).tolist()

    by_heap = dyspec_heap(law, draws, budget, depth, width)
    threshold = by_heap[-1][1] * (1 - 1e-9)  # the last key taken; rounding must not decide
    assert dyspec_threshold(law, draws, threshold, depth, width) == {path for path, _ in by_heap}
    layered = Draft([logits]).grow(DrawnGrowth(1000, depth, width, threshold=threshold))
    assert paths(layered.tree) == {path for path, _ in by_heap}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3])
def test_calibrated_drawn_growth_above_a_threshold_is_best_first_that_stops_there(seed: int, threshold: float) -> None:
    """What is not run below the threshold is not missed: the same slots as of a growth that ran everything."""
    table = AcceptanceTable("drawn")
    rates = torch.rand(table.rates.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    table.set_rates(0.05 + 0.9 * rates)
    values, logits = DrawnValues(table), random_law(seed)
    everything, pruned = Draft([logits]), Draft([logits])
    slots = DrawnGrowth(1000, 4, 3, values=values).grow_slots(
        torch.zeros(1, dtype=torch.long), SAMPLING, ScriptedChooser(), 99, everything.expand, VOCAB
    )
    (expected,), _ = slots.best_first(DrawnGrowth(1000, 4, 3, threshold=threshold, values=values))
    grown = pruned.grow(DrawnGrowth(1000, 4, 3, threshold=threshold, values=values))
    assert grown.tree.num_drafted == [len(expected)]
    assert [node for node, _, _ in expected] == list(grown.tree.shapes[0].parents[1:])
    assert sum(pruned.forwards) <= sum(everything.forwards)
    assert len(expected) < 3 + 9 + 27 + 81, "else nothing was left out"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("least", [0.02, 0.1, 0.4, 1.0])
def test_chosen_growth_above_a_least_value_keeps_the_best_paths_that_are_worth_it(seed: int, least: float) -> None:
    logits = random_law(seed)
    law = probabilities(logits)

    def value(path: tuple[int, ...]) -> float:
        return math.prod(law(path[:level])[token] for level, token in enumerate(path))

    expected = {path for path in best_paths(law, 12, 3, 4, VOCAB) if value(path) >= least}
    draft = Draft([logits])
    assert paths(draft.grow(ChosenGrowth(12, 3, 4, least_value=least)).tree) == expected
    if not expected:
        assert draft.forwards == [1]


def test_values_never_grow_downwards_so_what_is_not_run_is_not_missed() -> None:
    """A level never runs more nodes than the budget; where one path is sure, the others are soon dropped."""
    for share, most in ((0.999, 2), (1 / VOCAB, 8)):
        for policy in (DrawnGrowth(8, 8, 6), ChosenGrowth(8, 8, 6)):
            draft = Draft([constant_law(share)])
            draft.grow(policy)
            assert max(draft.forwards[3:], default=0) <= most
            assert max(draft.forwards) <= 8


def test_opt_tree_stops_where_a_level_brings_too_little() -> None:
    sure, unsure = constant_law(0.999), constant_law(0.2)
    policy = ChosenGrowth(6, 8, 6, least_gain=0.5)
    draft = Draft([sure, unsure])
    grown = draft.grow(policy)
    depths = [max(shape.depths) for shape in grown.tree.shapes]
    assert depths[0] == 6  # a chain of near-certain tokens: each level brings almost 1, until the budget is spent
    assert depths[1] <= 2
    assert len(paths(grown.tree, 0)) == len(paths(grown.tree, 1)) == 6


@pytest.mark.parametrize(
    "policy",
    [
        ChosenGrowth(9, 4, 3, beam=3), ChosenGrowth(9, 4, 3, least_gain=0.3), ChosenGrowth(9, 4, 3),
        DrawnGrowth(9, 4, 3), DrawnGrowth(9, 4, 3, threshold=0.1), ChosenGrowth(9, 4, 3, least_value=0.05),
        growth_named("calibrated", depth=4, budget=9, width=3, children="drawn", threshold=0.1),
        growth_named("calibrated", depth=4, budget=9, width=3, children="drawn"),
        growth_named("calibrated", depth=4, budget=9, width=3),
    ],
)  # fmt: skip
def test_rows_of_a_batch_grow_as_alone_in_one_forward_for_each_level(policy: GrowthPolicy) -> None:
    laws = [random_law(10, 5.0), random_law(11, 0.5), random_law(12, 1.5)]
    draft = Draft(laws)
    together = draft.grow(policy).tree
    assert len(draft.forwards) <= 4
    assert len({shape.parents for shape in together.shapes}) > 1
    for row, law in enumerate(laws):
        assert paths(together, row) == paths(Draft([law]).grow(policy).tree)


EVERY = {word: growth_named(word, depth=4, budget=12, children="chosen") for word in POLICIES} | {
    "calibrated, drawn": growth_named("calibrated", depth=4, budget=12, children="drawn"),
    "fixed, drawn": growth_named("fixed", depth=4, budget=12, children="drawn"),
}


@pytest.mark.parametrize("word", EVERY)
@pytest.mark.parametrize("params", [SAMPLING, SamplingParams()], ids=["sampling", "greedy"])
def test_limits_hold_whatever_the_room_and_the_vocabulary(word: str, params: SamplingParams) -> None:
    for vocab, room in itertools.product((1, 2, 6), (1, 2, 99)):
        tree = Draft([random_law(0, vocab=vocab), random_law(1, vocab=vocab)]).grow(EVERY[word], params, room=room).tree
        assert 1 <= tree.depth <= min(room, 4)
        for row in range(2):
            assert 1 <= tree.num_drafted[row] <= 12
            assert len(paths(tree, row)) == tree.num_drafted[row], "siblings differ"
            assert all(len(children) <= vocab for children in tree.shapes[row].children)


@pytest.mark.parametrize("word", sorted(set(EVERY) - {"fixed", "sequoia"}))  # fixed shapes take the top tokens
def test_tokens_without_mass_are_never_proposed(word: str) -> None:
    def law(path: tuple[int, ...]) -> Tensor:
        return torch.tensor([-math.inf, 0.3, -math.inf, 0.1, -math.inf])

    for params in (SAMPLING, SamplingParams()):
        if word == "fixed, drawn" and not params.do_sample:
            continue
        tree = Draft([law, law]).grow(EVERY[word], params).tree
        assert all(set(path) <= {1, 3} for row in range(2) for path in paths(tree, row))


# --- Independent marginals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("budget", "depth", "width"), [(1, 1, 1), (9, 4, 3), (25, 4, 6), (200, 3, 6)])
def test_ddtree_is_best_first_where_laws_depend_on_depth_alone(seed: int, budget: int, depth: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 4, VOCAB, generator=generator)
    root = torch.tensor([1, 2])
    tree = ddtree(root, logits, budget, depth, width)
    for row in range(2):
        law = [entry.softmax(-1).tolist() for entry in logits[row].double()]
        assert paths(tree, row) == best_paths(lambda path, law=law: law[len(path)], budget, depth, width, VOCAB)
    # Beside the heap, the level-by-level search of a policy that knows nothing of the laws' independence.
    searched = ChosenGrowth(budget, depth, width, beam=10**6)
    other = grow_on_marginals(searched, root, logits, SAMPLING, Chooser(), 9)
    assert all(paths(tree, row) == paths(other, row) for row in range(2))


@pytest.mark.parametrize("word", EVERY)
@pytest.mark.parametrize("room", [1, 3, 9])
def test_every_policy_grows_on_marginals(word: str, room: int) -> None:
    logits = torch.randn(3, 3, VOCAB, generator=torch.Generator().manual_seed(1))
    tree = grow_on_marginals(EVERY[word], torch.zeros(3, dtype=torch.long), logits, SAMPLING, Chooser(), room)
    assert 1 <= tree.depth <= min(room, 3)


# --- Tries --------------------------------------------------------------------------------------------------


def test_several_chains_become_one_tree_of_all_their_prefixes() -> None:
    chains = [[1, 2, 3], [1, 2, 4], [5], [1, 2, 3, 6]]
    tree = TokenTree.of_nodes(torch.tensor([0]), [merged(chains, 99)])
    assert paths(tree) == {tuple(chain[:n]) for chain in chains for n in range(1, len(chain) + 1)}
    assert merged(chains, 4) == [(0, 1), (1, 2), (2, 3), (2, 4)]
    assert merged([], 4) == merged([[]], 4) == []


# --- Names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "options", "says"),
    [
        ("eagle3", {}, "there is no growth 'eagle3'"),
        ("eagle2", {"children": "drawn"}, "no use for children=drawn"),
        ("eagle2", {"threshold": 0.5}, "no use for threshold"),
        ("fixed", {"threshold": 0.5}, "no use for threshold"),
        ("dyspec", {"min_confidence": 0.5}, "no use for min_confidence"),
        ("best-first", {"table": "x.json"}, "no use for table"),
        ("opt-tree", {"threshold": -0.1}, "at least 0"),
        ("opt-tree", {"threshold": math.nan}, "at least 0"),
        ("calibrated", {"threshold": -0.1}, "at least 0"),
        ("dyspec", {"budget": 0}, "budget >= 1"),
        ("dyspec", {"budget": 5000}, "at most 1024"),
        ("dyspec", {"width": 0}, "width >= 1"),
        ("fixed", {"children": "guessed"}, "chosen"),
        ("sequoia", {"table": "nowhere.json"}, "nowhere.json"),
        ("calibrated", {"table": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_options_that_do_nothing_or_make_no_sense_are_refused(word: str, options: dict, says: str) -> None:
    with pytest.raises(UnknownDrafter, match=says):
        growth_named(word, depth=4, **options)
