"""Early exit drafts with the target's own layers, and no layer runs twice for a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import specdec
from specdec.context import Context
from specdec.drafters.early_exit import EarlyExitDrafter
from specdec.errors import UnsupportedModel
from specdec.probe import target_of
from specdec.sampling import Chooser, SamplingParams
from specdec.verifier import Verifier
from tests.tiny import make_target, prompt, shared_target

LAYERS = 4


@contextmanager
def counted_tokens(model: Any) -> Iterator[list[int]]:
    """Tokens that passed each layer, rows counted, from here to the end of the block."""
    passes = [0] * LAYERS
    hooks = []
    for index, layer in enumerate(model.model.layers):

        def count(_module: Any, args: tuple[Any, ...], index: int = index) -> None:
            passes[index] += args[0].shape[0] * args[0].shape[1]

        hooks.append(layer.register_forward_pre_hook(count))
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("options", [{"depth": 3}, {"depth": 3, "budget": 7}], ids=["chain", "tree"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("do_sample", [False, True])
def test_every_layer_runs_once_for_every_node(
    layer: int, options: dict[str, Any], batch_size: int, do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Verifier, "_good_width", lambda self, num_nodes: num_nodes)  # no padding nodes to count
    model = shared_target()
    drafter = EarlyExitDrafter(target_of(model), layer=layer, **options)
    torch.manual_seed(0)
    with counted_tokens(model) as passes:
        output: Any = specdec.generate(
            model, **prompt(batch_size), drafter=drafter, max_new_tokens=16, do_sample=do_sample,
            return_dict_in_generate=True,
        )  # fmt: skip
    steps = output.stats.steps
    nodes = sum(step.drafted + 1 for step in steps)
    assert passes == [batch_size * 12 + nodes] * LAYERS


def test_a_resumed_forward_gives_the_logits_and_the_cache_of_a_whole_one() -> None:
    target = target_of(shared_target())
    ids = prompt(1)["input_ids"]
    with torch.no_grad():
        split, whole = Context(target), Context(target)
        for context in (split, whole):
            context.prefill(ids.tolist())
        drafter = EarlyExitDrafter(target, layer=2, depth=3, budget=6)
        drafter.reset(1, split)
        tree = drafter.propose(torch.tensor([7]), SamplingParams(), Chooser(), 5)
        assert tree.resume is not None
        assert tree.resume.layer == 2
        resumed = split.finish(2, tree.resume.hidden, tree.tokens, tree.ancestors()).logits
        expected = whole.run(tree.tokens, tree.depths(), tree.ancestors()).logits
    torch.testing.assert_close(resumed, expected, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(split.cache.buffers, whole.cache.buffers, strict=True):
        for mine, other in zip(ours.used, theirs.used, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_it_drafts_what_the_first_layers_with_norm_and_head_say() -> None:
    model = make_target()
    target = target_of(model)
    ids = prompt(1)["input_ids"]
    with torch.no_grad():
        context = Context(target)
        context.prefill(ids.tolist())
        drafter = EarlyExitDrafter(target, layer=2, depth=4)
        drafter.reset(1, context)
        drafted = drafter.propose(torch.tensor([7]), SamplingParams(), Chooser(), 9).tokens[0].tolist()
        layers, model.model.layers = model.model.layers, model.model.layers[:2]
        text = [*ids[0].tolist(), 7]
        for _ in range(4):
            text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        model.model.layers = layers
    assert drafted == text[12:]


@pytest.mark.parametrize("room", [1, 2, 3, 10])
def test_no_tree_is_deeper_than_the_room(room: int) -> None:
    target = target_of(shared_target())
    with torch.no_grad():
        context = Context(target)
        context.prefill([[5, 6, 7]])
        drafter = EarlyExitDrafter(target, layer=2, depth=4, budget=8)
        drafter.reset(1, context)
        tree = drafter.propose(torch.tensor([7]), SamplingParams(), Chooser(), room)
    assert tree.depth == min(room, drafter.policy.depth)
    assert tree.resume is not None
    assert tree.resume.hidden.shape == (1, tree.num_nodes, 32)


def test_a_target_that_decodes_chains_only_is_refused() -> None:
    target = target_of(make_target())
    target.form = "chain"
    with pytest.raises(UnsupportedModel, match="chains only"):
        EarlyExitDrafter(target)
