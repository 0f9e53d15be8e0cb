"""Growing level by level: when it stops, and that what was drawn stays."""

from __future__ import annotations

import pytest
import torch

from specdec.grow.fixed import FixedGrowth
from specdec.grow.levels import Children
from specdec.grow.shape import best_shape, chain
from specdec.sampling import Chooser, SamplingParams


def grown(shape, share, min_confidence, children: Children = "chosen", rows=1):
    """A tree from a law that gives its best token `share` at every node; also the levels that were run."""
    levels = []

    def expand(frontier):
        levels.append(frontier.tokens.shape[1])
        law = torch.full((rows, frontier.tokens.shape[1], 5), (1 - share) / 4)
        law[..., 2] = share
        return law.log()

    params = SamplingParams(do_sample=children == "drawn", generator=torch.Generator().manual_seed(0))
    root = torch.zeros(rows, dtype=torch.long)
    policy = FixedGrowth(shape, children, min_confidence)
    return policy.grow(root, params, Chooser(params.generator), 99, expand, 5).tree, levels


@pytest.mark.parametrize(("share", "depth"), [(0.9, 6), (0.6, 3), (0.2, 1)])
def test_a_chain_ends_after_the_first_level_below_the_confidence(share, depth):
    tree, levels = grown(chain(6), share, min_confidence=0.3)  # 0.6 ** 2 >= 0.3 > 0.6 ** 3
    assert tree.depth == depth
    assert len(levels) == depth


def test_without_a_confidence_the_whole_shape_grows():
    shape = best_shape(11, 4)
    tree, _ = grown(shape, 0.3, min_confidence=0.0)
    assert tree.num_nodes == shape.num_nodes


def test_the_level_that_ended_the_growth_is_kept_whole():
    shape = best_shape(12, 4)
    tree, _ = grown(shape, 0.3, min_confidence=0.5)
    assert tree.num_nodes == 1 + len(shape.levels[1])


@pytest.mark.parametrize("children", ["chosen", "drawn"])
def test_a_cut_tree_is_consistent(children):
    tree, _ = grown(best_shape(12, 4), 0.5, min_confidence=0.4, children=children, rows=3)
    assert tree.tokens.shape == (3, tree.num_nodes)
    assert all(len(shape.parents) == tree.num_nodes for shape in tree.shapes)
    if children == "drawn":
        assert tree.log_q is not None
        assert tree.log_q.shape[:2] == tree.tokens.shape
