"""The target adapter: a tree's logits are each path's logits, layers run in two parts, taps are transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.context import Context
from specdec.errors import UnsupportedModel
from specdec.target import BEFORE_NORM, Target, TargetOutput, find_layers, layer_kinds
from specdec.tree import TokenTree
from specdec.visibility import Reach
from tests.families import FAMILIES, LAYERS, VOCAB, WINDOW, tiny_model

LENGTHS = [14, 9, 11]
"""Longer than every window, and unequal."""
NODES = [[(0, 5), (0, 9), (1, 7), (2, 11), (3, 4)], [(0, 8), (1, 8), (2, 6), (3, 9), (4, 10)], [(0, 3), (0, 4), (0, 5)]]
ROUNDING = 5e-5
FAMILY_NAMES = list(FAMILIES)


def rows_of_prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


def a_tree() -> TokenTree:
    return TokenTree.of_nodes(torch.tensor([20, 21, 22]), NODES)


@torch.no_grad()
def prefilled(target: Target, rows: list[list[int]]) -> Context:
    context = Context(target)
    context.prefill(rows)
    return context


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> Tensor:
    """Logits [V] after a text, in one forward without cache or padding."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def run(context: Context, tree: TokenTree, **options: Any) -> TargetOutput:
    with torch.no_grad():
        return context.run(tree.tokens, tree.depths(), tree.ancestors(), **options)


def assert_paths_agree(model: Any, logits: Tensor, tree: TokenTree, texts: list[list[int]]) -> None:
    scale = logits.std().item()
    for row, shape in enumerate(tree.shapes):
        for node, parent in enumerate(shape.parents):
            if node and parent < 0:
                continue
            path = tree.tokens[row, [0, *shape.path(node)]].tolist()
            expected = logits_of(model, texts[row] + path)
            assert (logits[row, node] - expected).abs().max() < ROUNDING * max(scale, 1), f"row {row}, node {node}"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_node_has_the_logits_of_its_own_path(family: str) -> None:
    model = tiny_model(family)
    rows, tree = rows_of_prompts(), a_tree()
    assert_paths_agree(model, run(prefilled(Target(model), rows), tree).logits, tree, rows)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_after_an_unequal_commit_the_next_tree_agrees_too(family: str) -> None:
    model = tiny_model(family)
    rows, tree = rows_of_prompts(), a_tree()
    context = prefilled(Target(model), rows)
    run(context, tree)
    kept = [[0, 2, 4], [0, 1, 2, 3, 4, 5], [0]]
    context.keep(kept)
    texts = [row + tree.tokens[i, kept[i]].tolist() for i, row in enumerate(rows)]
    assert_paths_agree(model, run(context, tree).logits, tree, texts)
    context.keep([[0], [0, 1], [0, 3]])
    context.select([2, 0])
    texts = [texts[2] + [22, 5], texts[0] + [20]]
    chain = TokenTree.of_chains(torch.tensor([30, 31]), [[4, 5, 6], [7]])
    assert_paths_agree(model, run(context, chain).logits, chain, texts)


@pytest.mark.parametrize("family", ["mistral-sliding", "gemma3-sliding", "llama4-chunked", "gpt-oss"])
def test_a_mask_without_the_window_is_noticed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    rows, tree = rows_of_prompts(), a_tree()
    monkeypatch.setattr(Reach, "is_limited", False)
    logits = run(prefilled(Target(model), rows), tree).logits
    assert (logits[0, 0] - logits_of(model, [*rows[0], 20])).abs().max() > 0.01


@pytest.mark.parametrize("layer", [1, LAYERS - 1])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_layers_in_two_parts_equal_the_whole_forward(family: str, layer: int) -> None:
    target = Target(tiny_model(family))
    rows, tree = rows_of_prompts(), a_tree()
    whole = run(prefilled(target, rows), tree).logits
    context = prefilled(target, rows)
    bottom = run(context, tree, num_layers=layer)
    assert bottom.hidden is not None
    assert bottom.hidden.shape == (3, tree.num_nodes, target.hidden_size)
    with torch.no_grad():
        top = context.finish(layer, bottom.hidden, tree.tokens, tree.ancestors())
    assert (top.logits - whole).abs().max() < ROUNDING * max(whole.std().item(), 1)
    assert (bottom.logits - whole).abs().max() > 100 * ROUNDING, "an early exit has other logits than the whole"


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_bottom_equals_a_model_that_ends_there(family: str) -> None:
    model = tiny_model(family)
    target = Target(model)
    parent, name = find_layers(model, LAYERS)
    rows, tree = rows_of_prompts(), a_tree()
    early = run(prefilled(target, rows), tree, num_layers=2).logits
    setattr(parent, name, torch.nn.ModuleList(list(target.layers)[:2]))
    assert_paths_agree(model, early, tree, rows)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_taps_are_the_hidden_states_of_transformers(family: str) -> None:
    model = tiny_model(family)
    rows, tree = rows_of_prompts(), a_tree()
    taps = tuple(range(LAYERS + 1))
    got = run(prefilled(Target(model), rows), tree, taps=taps).taps
    node = 5  # the end of a branch in row 0
    path = tree.tokens[0, [0, *tree.shapes[0].path(node)]].tolist()
    with torch.no_grad():
        states = model(input_ids=torch.tensor([[*rows[0], *path]]), output_hidden_states=True).hidden_states
    for tap in taps:
        assert got[tap].shape == (3, tree.num_nodes, model.config.hidden_size)
        difference = (got[tap][0, node] - states[tap][0, -1]).abs().max().item()
        assert difference < ROUNDING * max(states[tap].abs().max().item(), 1), f"tap {tap}"


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_the_output_matrix_on_normed_last_states_gives_the_models_own_logits(family: str) -> None:
    model = tiny_model(family)
    output = model(torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    got = Target(model).logits_of(output.hidden_states[-1])
    torch.testing.assert_close(got, output.logits, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_resumed_forward_serves_the_taps_above_its_first_layer(family: str) -> None:
    target = Target(tiny_model(family))
    rows, tree = rows_of_prompts(), a_tree()
    expected = run(prefilled(target, rows), tree, taps=(1, 2)).taps
    context = prefilled(target, rows)
    bottom = run(context, tree, num_layers=1)
    assert bottom.hidden is not None
    with torch.no_grad():
        got = context.finish(1, bottom.hidden, tree.tokens, tree.ancestors(), taps=(1, 2)).taps
    for tap in (1, 2):
        assert (got[tap] - expected[tap]).abs().max() < ROUNDING * max(expected[tap].abs().max().item(), 1)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@torch.no_grad()
def test_norm_and_head_alone_finish_a_forward_to_the_bit(family: str) -> None:
    target = Target(tiny_model(family))
    last = target.num_layers
    ids = torch.tensor([rows_of_prompts()[0][:9], rows_of_prompts()[1]])
    whole = target.call((last, BEFORE_NORM), input_ids=ids, use_cache=False)
    fresh = Target(target.model)  # one that has not seen yet what its layers return
    finished = fresh.norm_and_head(whole.taps[BEFORE_NORM], taps=(last, BEFORE_NORM))
    assert torch.equal(finished.logits, whole.logits)
    assert torch.equal(finished.taps[last], whole.taps[last])
    assert torch.equal(finished.taps[BEFORE_NORM], whole.taps[BEFORE_NORM])
    other = fresh.norm_and_head(whole.taps[BEFORE_NORM].flip(1)).logits
    assert not torch.allclose(other, whole.logits), "the states decide"
    again = target.call((), input_ids=ids, use_cache=False)
    assert torch.equal(again.logits, whole.logits), "the layers are back in their place"


def test_norm_and_head_have_no_taps_of_layers() -> None:
    target = Target(tiny_model("llama"))
    with pytest.raises(ValueError, match="do not run"):
        target.norm_and_head(torch.zeros(1, 2, target.hidden_size), taps=(1,))


def test_taps_below_the_first_layer_of_a_resumed_forward_are_refused() -> None:
    target = Target(tiny_model("llama"))
    context, tree = prefilled(target, rows_of_prompts()), a_tree()
    bottom = run(context, tree, num_layers=2)
    assert bottom.hidden is not None
    with pytest.raises(ValueError, match="below layer 2"):
        context.finish(2, bottom.hidden, tree.tokens, tree.ancestors(), taps=(1,))


@pytest.mark.parametrize("part", ["bottom", "top"])
def test_the_list_of_layers_is_restored_after_an_exception(part: str) -> None:
    model = tiny_model("llama")
    target = Target(model)
    parent, name = find_layers(model, LAYERS)
    context, tree = prefilled(target, rows_of_prompts()), a_tree()
    hidden = torch.zeros(3, tree.num_nodes, target.hidden_size)
    before = dict(model.named_parameters())
    unknown = torch.full_like(tree.tokens, VOCAB + 5)  # no such row in the embedding
    if part == "bottom":
        with pytest.raises(IndexError):
            context.run(unknown, tree.depths(), tree.ancestors(), num_layers=1)
    else:
        run(context, tree, num_layers=1)
        with pytest.raises(IndexError):
            context.finish(1, hidden, unknown, tree.ancestors())
    assert getattr(parent, name) is target.layers
    assert len(target.layers) == LAYERS
    assert list(before) == [key for key, _ in model.named_parameters()]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in target.layers)


def test_keeping_logits_of_the_last_nodes_only() -> None:
    target = Target(tiny_model("llama"))
    rows, tree = rows_of_prompts(), a_tree()
    every = run(prefilled(target, rows), tree).logits
    last = run(prefilled(target, rows), tree, keep_logits=2).logits
    assert last.shape[1] == 2
    assert torch.allclose(last, every[:, -2:], atol=ROUNDING)


def test_layer_kinds_follow_the_config() -> None:
    assert layer_kinds(FAMILIES["llama"]) == ("full_attention",)
    assert layer_kinds(FAMILIES["mistral-sliding"]) == ("sliding_attention",)
    assert layer_kinds(FAMILIES["gemma3-sliding"]) == ("full_attention", "sliding_attention")
    assert layer_kinds(FAMILIES["llama4-chunked"]) == ("chunked_attention", "full_attention")
    assert Target(tiny_model("mistral-sliding")).window == WINDOW
    assert Target(tiny_model("llama4-chunked")).chunk == WINDOW


def test_a_model_without_the_expected_number_of_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"no list of 7 decoder layers.*plain model\.generate"):
        find_layers(tiny_model("llama"), 7)
