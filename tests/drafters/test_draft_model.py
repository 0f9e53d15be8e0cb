"""Whatever is accepted, the draft model's cache holds the committed text, and its drafts are what it would say."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec.context import Context
from specdec.drafter import Committed
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.probe import target_of
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree
from tests.tiny import VOCAB, perturbed, prompt, shared_draft, shared_target

GREEDY = SamplingParams()
SAMPLED = SamplingParams(do_sample=True, temperature=1.5)


def logits_after(text: list[int]) -> Tensor:
    """Logits [V] of the draft model after this text, without any cache."""
    with torch.no_grad():
        return shared_draft()(torch.tensor([text]), use_cache=False).logits[0, -1]


def assert_drafts_are_the_models_own(tree: TokenTree, texts: list[list[int]]) -> None:
    """Every node's children are the top tokens (or q is the law) after that node's text; `texts` end in the root."""
    tokens = tree.tokens.tolist()
    for row, text in enumerate(texts):
        shape = tree.shapes[row]
        for node, children in enumerate(shape.children):
            if not children:
                continue
            expected = logits_after([*text, *(tokens[row][n] for n in shape.path(node))])
            if tree.log_q is None:
                best = expected.topk(len(children)).indices.tolist()
                assert [tokens[row][child] for child in children] == best
            else:
                torch.testing.assert_close(tree.log_q[row, node], expected / 1.5, atol=1e-4, rtol=1e-4)
                assert len({tokens[row][child] for child in children}) == len(children)


def assert_cache_is_that_of_the_text(drafter: DraftModelDrafter, texts: list[list[int]]) -> None:
    """Committed columns of every row equal those of a fresh forward; what is pending is the rest of the text."""
    context = drafter._context
    for row, text in enumerate(texts):
        start, end = context.starts[row], context.lengths[row]
        assert end - start + len(drafter._pending[row]) == len(text)
        assert drafter._pending[row] == text[end - start :]
        with torch.no_grad():
            fresh = shared_draft()(torch.tensor([text[: end - start]]), use_cache=True).past_key_values
        for ours, theirs in zip(context.cache.buffers, fresh.layers, strict=True):
            for mine, expected in zip(ours.used, (theirs.keys, theirs.values), strict=True):
                torch.testing.assert_close(mine[row, :, start:end], expected[0], atol=1e-4, rtol=1e-4)


def random_path(tree: TokenTree, row: int, rng: random.Random) -> list[int]:
    """A random walk from the root that may stop anywhere."""
    path, node = [], 0
    while tree.shapes[row].children[node] and rng.random() < 0.75:
        node = rng.choice(tree.shapes[row].children[node])
        path.append(node)
    return path


@pytest.mark.parametrize("options", [{"depth": 4}, {"depth": 3, "budget": 9}], ids=["chain", "tree"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["chosen", "drawn"])
def test_any_sequence_of_acceptances_leaves_the_cache_of_the_text(
    options: dict[str, Any], batch_size: int, params: SamplingParams
) -> None:
    rng = random.Random(batch_size)
    torch.manual_seed(0)
    drafter = DraftModelDrafter(target_of(shared_draft()), children="drawn", **options)
    drafter.reset(batch_size, Context(target_of(shared_target())))
    texts = [[rng.randrange(3, VOCAB) for _ in range(rng.randrange(2, 9))] for _ in range(batch_size)]
    drafter.observe(Committed([list(text) for text in texts]))
    for step in range(10):
        roots = [rng.randrange(3, VOCAB) for _ in texts]
        room = rng.choice([1, 2, 50])
        with torch.no_grad():
            tree = drafter.propose(torch.tensor(roots), params, Chooser(), room)
        assert 1 <= tree.depth <= room
        for text, root in zip(texts, roots, strict=True):
            text.append(root)
        assert_drafts_are_the_models_own(tree, texts)
        paths = [random_path(tree, row, rng) for row in range(len(texts))]
        if step % 4 == 3:  # the first proposed token of every level, the whole depth: nothing is run twice for it
            paths = [_deepest_path(tree, row) for row in range(len(texts))]
        tokens = tree.tokens.tolist()
        committed = [[root, *(tokens[row][n] for n in paths[row])] for row, root in enumerate(roots)]
        for text, new in zip(texts, committed, strict=True):
            text.extend(new[1:])
        drafter.observe(Committed(committed, [[0, *path] for path in paths], tree))
        assert_cache_is_that_of_the_text(drafter, texts)
        if step == 6 and batch_size == 3:
            drafter.select([2, 0])
            texts = [texts[2], texts[0]]
            assert_cache_is_that_of_the_text(drafter, texts)


def _deepest_path(tree: TokenTree, row: int) -> list[int]:
    shape = tree.shapes[row]
    return shape.path(max(range(tree.num_nodes), key=lambda node: shape.depths[node]))


def test_tokens_that_came_without_a_proposal_are_digested_at_the_next_one() -> None:
    drafter = DraftModelDrafter(target_of(shared_draft()), depth=3)
    drafter.reset(1, Context(target_of(shared_target())))
    drafter.observe(Committed([[5, 6, 7]]))
    text = [5, 6, 7, 8]
    with torch.no_grad():
        tree = drafter.propose(torch.tensor([8]), GREEDY, Chooser(), 3)
    drafter.observe(Committed([[8]], [[0]], tree))
    for token in (9, 10):  # steps in which this drafter was not asked
        drafter.observe(Committed([[token]], [[0]], TokenTree.of_roots(torch.tensor([token]))))
        text.append(token)
    text.append(11)
    with torch.no_grad():
        tree = drafter.propose(torch.tensor([11]), GREEDY, Chooser(), 3)
    assert_drafts_are_the_models_own(tree, [text])


def test_a_draft_model_equal_to_the_target_is_accepted_throughout() -> None:
    twin = perturbed(shared_target(), amount=0.0)
    for children in ("chosen", "drawn"):
        for do_sample in (False, True):
            if do_sample and children == "chosen":
                continue
            drafter = DraftModelDrafter(target_of(twin), depth=4, children=children)
            output: Any = specdec.generate(
                shared_target(), **prompt(1), drafter=drafter, max_new_tokens=21, do_sample=do_sample,
                return_dict_in_generate=True,
            )  # fmt: skip
            assert output.stats.tau == 5.0
            assert output.stats.alpha == [1.0] * 4


def test_the_draft_model_runs_each_committed_token_once() -> None:
    """A chain of depth d that is accepted throughout costs d forwards of the draft and d + 1 token passes."""
    twin, passes = perturbed(shared_target(), amount=0.0), []
    drafter = DraftModelDrafter(target_of(twin), depth=4)
    hook = twin.model.embed_tokens.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[1]))
    specdec.generate(shared_target(), **prompt(1), drafter=drafter, max_new_tokens=21)
    hook.remove()
    first, *rest = passes
    assert first == 13  # the prompt and the first root in one forward
    # Three nodes of each tree are run (leaves need none), then the last accepted token together with the next root.
    assert rest == [1, 1, 1, *[2, 1, 1, 1] * 3]
