"""Weights of a draft may change between steps: the law is the target's all the same, and where it would not be."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.grow.levels import Children
from specdec.grow.shape import Shape, shape_of
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Target
from specdec.train.online import LearningDrafter, OnlineSettings
from specdec.tree import TokenTree
from tests.law.enumeration import law_of, total_variation
from tests.law.test_decode_paths import DRAFT, EXACT, PROMPT, generate, processors, target_law, tiny

torch.set_num_threads(1)
CHAIN, TREE = shape_of([(0,), (0, 0)]), shape_of([(0,), (1,), (0, 0)])
OTHER = tiny(11, 1)
LENGTH = 4
VISIBLE = 0.005


def load(live: Target, weights: Target) -> None:
    live.model.load_state_dict(weights.model.state_dict())


class Swapping(LearningDrafter):
    """Takes other weights at every second proposal of a generation, in the middle of it, as no LearningDrafter does."""

    proposals = most_proposals = 0

    def reset(self, batch_size: int, context: Context) -> None:
        super().reset(batch_size, context)
        self.proposals = 0
        self.text: list[int] = []

    def observe(self, committed: Committed) -> None:
        super().observe(committed)
        self.text += committed.tokens[0]

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        inner: Any = self.drafter
        load(inner.model, (DRAFT, OTHER)[self.proposals % 2])
        self.proposals += 1
        self.most_proposals = max(self.most_proposals, self.proposals)
        return super().propose(root, params, chooser, room)


class MisstatedLaw(Swapping):
    """Takes other weights between draw and verification, which is told what these would have drawn from."""

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        tree = super().propose(root, params, chooser, room)
        other = (OTHER, DRAFT)[(self.proposals - 1) % 2].model
        tokens = tree.tokens[0].tolist()
        texts = [
            [*self.text, tokens[0], *(tokens[n] for n in tree.shapes[0].path(node))] for node in range(len(tokens))
        ]
        laws = [params.warp(other(torch.tensor([text])).logits[:, -1]) for text in texts]
        return replace(tree, log_q=torch.cat(laws)[None])


def swapping(make: type[Swapping], children: Children, shape: Shape) -> Swapping:
    return make(
        DraftModelDrafter(copy.deepcopy(DRAFT), children=children, shape=shape),
        OnlineSettings(learn_every=10**6, max_age=None),
    )


def distance(make: type[Swapping], children: Children, shape: Shape) -> float:
    drafter = swapping(make, children, shape)
    law = law_of(lambda chooser: generate(chooser, drafter, PROMPT, LENGTH, processors())[0])
    assert drafter.most_proposals > 1 or make is MisstatedLaw  # which may accept whatever is proposed
    return total_variation(law, target_law(PROMPT[0].tolist(), LENGTH, processors()))


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("children", ["drawn", "chosen"])
def test_weights_that_change_between_steps_leave_the_law_exact(children: Children, shape: Shape):
    assert distance(Swapping, children, shape) < EXACT


@pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])
def test_weights_that_change_between_draw_and_verification_are_lossy(shape: Shape):
    assert distance(MisstatedLaw, "drawn", shape) > VISIBLE


def test_learning_between_generations_leaves_the_law_of_the_next_one_exact():
    drafter = LearningDrafter(
        DraftModelDrafter(copy.deepcopy(DRAFT), children="drawn", shape=TREE),
        OnlineSettings(learn_every=1, max_age=None, steps=1, row_length=16, buffer_tokens=64),
    )
    for seed in range(3):
        generate(Chooser(torch.Generator().manual_seed(seed)), drafter, PROMPT, 6, processors())
    drafter.finish()
    assert drafter.learner.published >= 2
    inner: Any = drafter.drafter
    learned = inner.model.model.state_dict()
    assert any(not torch.equal(value, DRAFT.model.state_dict()[name]) for name, value in learned.items())
    law = law_of(lambda chooser: generate(chooser, inner, PROMPT, LENGTH, processors())[0])
    assert total_variation(law, target_law(PROMPT[0].tolist(), LENGTH, processors())) < EXACT
