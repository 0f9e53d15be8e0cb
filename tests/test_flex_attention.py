"""FlexAttention gives the logits and the text of eager attention, and its kernel is compiled a few times at most."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import specdec
from specdec import verifier
from specdec.block_mask import BlockedMask
from specdec.column_order import ColumnOrder
from specdec.context import Context
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import UnsupportedModel
from specdec.probe import probe, target_of
from specdec.target import FLEX, Target, TargetOutput
from specdec.tree import NO_NODE, TokenTree, stacked, topology
from specdec.verifier import Verifier
from specdec.visibility import Reach, Visibility
from tests.families import VOCAB, perturbed, reference, tiny_model
from tests.test_masks import random_shapes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")

QUICK = ["llama", "mistral-sliding", "gemma3-sliding", "llama4-chunked"]
FURTHER = ["llama-without-gqa", "qwen2", "qwen3", "qwen3-moe", "gemma2-sliding", "phi3", "gpt-neox", "opt", "olmo2",
           "cohere2-sliding", "deepseek-v3"]  # fmt: skip
ROUNDING = 1e-4
LENGTHS = [14, 9, 11]
BATCH = [13, 6, 10]


def slow(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@torch.no_grad()
def both(family: str) -> tuple[Context, Context]:
    """The same text of three rows in a context with FlexAttention and in one with eager attention."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    contexts = []
    for attention in (FLEX, "eager"):
        context = Context(Target(tiny_model(family, attention, layers=2)))
        context.prefill(rows)
        contexts.append(context)
    return contexts[0], contexts[1]


def a_tree(batch: int, seed: int, most: int = 9) -> TokenTree:
    shapes = random_shapes(random.Random(seed), batch, most)
    tokens = torch.randint(3, VOCAB, (batch, len(shapes[0].parents)), generator=torch.Generator().manual_seed(seed))
    return TokenTree(tokens, shapes)


def assert_close(got: TargetOutput, expected: TargetOutput) -> None:
    scale = max(expected.logits.std().item(), 1.0)
    assert (got.logits - expected.logits).abs().max() < ROUNDING * scale


@pytest.mark.parametrize("family", [*QUICK, *slow(FURTHER)])
@torch.no_grad()
def test_trees_after_unequal_commits_have_the_logits_of_eager_attention(family: str) -> None:
    flex, eager = both(family)
    for seed, kept in ((0, [[0, 1], [0], [0]]), (3, [[0], [0, 1], [0, 1]])):
        tree = a_tree(3, seed)
        outputs = [context.run(tree.tokens, tree.depths(), tree.shapes) for context in (flex, eager)]
        assert_close(*outputs)
        for context in (flex, eager):
            context.keep(kept)
    for context in (flex, eager):
        context.select([2, 0])
    tree = a_tree(2, 5)
    levels = [(0, 1), (1, tree.num_nodes)]  # grown: the second level sees the first
    for begin, end in levels:
        outputs = [
            context.run(tree.tokens[:, begin:end], tree.depths()[:, begin:end], tree.ancestors()[:, begin:end, :end])
            for context in (flex, eager)
        ]
        assert_close(*outputs)


@torch.no_grad()
def test_a_block_mask_without_the_window_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    flex, eager = both("mistral-sliding")
    tree = a_tree(3, 0)
    expected = eager.run(tree.tokens, tree.depths(), tree.shapes).logits
    monkeypatch.setattr(Reach, "is_limited", False)
    got = flex.run(tree.tokens, tree.depths(), tree.shapes).logits
    assert (got - expected).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", *slow(QUICK[1:]), *slow(FURTHER)])
def test_the_probe_calls_it_a_tree(family: str) -> None:
    answer = probe(Target(tiny_model(family, FLEX, layers=2)))
    assert answer.form == "tree", answer.reason
    assert answer.difference < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3-sliding", *slow(["mistral-sliding", "llama4-chunked"])])
def test_the_text_is_that_of_plain_generate(family: str) -> None:
    """A left-padded batch; chains, trees, layers that resume, and a draft model that has FlexAttention, too."""
    model, told = tiny_model(family, FLEX, layers=2), reference(tiny_model(family, layers=2), BATCH, 10)
    drafters: list[Any] = ["lookup:ngram=2,tokens=4", "recycling:budget=8,depth=4"]
    if family == "llama":
        draft_tree = DraftModelDrafter(target_of(perturbed(model)), depth=3, budget=6)
        drafters = ["early-exit:layer=1,depth=2,budget=4", draft_tree]
    accepted = drafted = 0
    for drafter in drafters:
        output: Any = specdec.generate(
            model, **told.prompts.inputs, drafter=drafter, max_new_tokens=10, return_dict_in_generate=True
        )
        assert output.sequences.tolist() == told.sequences.tolist(), drafter
        accepted, drafted = accepted + output.stats.accepted, drafted + output.stats.drafted
    assert 0 < accepted < drafted


def test_attention_that_takes_neither_mask_is_refused_with_a_way_out() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModel, match=r"'flash_attention_2' takes no tree mask.*set_attn_implementation"):
        Target(model)


# --- Node order ----------------------------------------------------------------------------------------


def blocks_with_something(parents: tuple[int, ...], size: int) -> int:
    """Blocks of the tree's mask in which any query sees any column."""
    seen = topology(parents).ancestors
    rows = [rows.any(0) for rows in seen.split(size)]
    return sum(int(columns.any()) for row in rows for columns in row.split(size))


def ordered(parents: tuple[int, ...]) -> tuple[int, ...]:
    shape = topology(parents)
    return shape.in_order(shape.heavy_first).parents


def breadth_first(parents: tuple[int, ...]) -> tuple[int, ...]:
    shape = topology(parents)
    return shape.in_order(tuple(sorted(range(len(parents)), key=lambda n: (shape.depths[n], n)))).parents


def test_depth_first_has_fewer_blocks_than_breadth_first() -> None:
    """Trees in which early nodes have more children, as best-first growth leaves them, from fixed seeds."""
    for seed in range(4):
        rng = random.Random(seed)
        parents = (NO_NODE, *(min(rng.randrange(n), rng.randrange(n)) for n in range(1, 256)))
        assert blocks_with_something(ordered(parents), 16) < 0.6 * blocks_with_something(breadth_first(parents), 16)
        assert blocks_with_something(ordered(parents), 128) == blocks_with_something(breadth_first(parents), 128) == 3


def test_the_heavy_path_comes_first_and_siblings_of_one_size_in_their_order() -> None:
    shape = topology((NO_NODE, 0, 0, 2, 3, 0, NO_NODE))
    assert shape.heavy_first == (0, 2, 3, 4, 1, 5, 6)
    assert shape.in_order(shape.heavy_first).parents == (NO_NODE, 0, 1, 2, 0, 0, NO_NODE)


def test_a_chain_keeps_its_order() -> None:
    for parents in ((NO_NODE,), (NO_NODE, 0, 1, 2), (NO_NODE, 0, 1, NO_NODE)):
        assert topology(parents).heavy_first == tuple(range(len(parents)))


def test_what_is_computed_by_column_comes_back_by_node() -> None:
    nodes = [[(0, 4), (0, 5), (2, 6), (3, 7), (1, 8)], [(0, 9), (0, 10), (0, 11), (3, 12)]]
    tree = TokenTree.of_nodes(torch.tensor([20, 21]), nodes)
    order = ColumnOrder(tree)
    assert order.tree.tokens.tolist() == [[20, 5, 6, 7, 4, 8], [21, 11, 12, 9, 10, 0]]
    computed = order.tree.tokens[:, :, None].float()
    by_node = order.by_node(TargetOutput(computed, {1: computed}))
    assert torch.equal(by_node.logits[:, :, 0].long(), tree.tokens)
    assert torch.equal(by_node.taps[1], by_node.logits)
    assert order.columns([[0, 1, 5], [0, 3]]) == [[0, 4, 5], [0, 1]]


@pytest.mark.parametrize("children", ["chosen", "drawn"])
def test_the_order_of_columns_changes_no_token(children: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", layers=2)
    told = reference(model, BATCH, 16)
    draft = target_of(perturbed(model))
    grow = "best-first" if children == "chosen" else "dyspec"
    options: dict[str, Any] = {"do_sample": False}
    if children == "drawn":
        options = {"do_sample": True, "temperature": 0.7}
    laid_out = 0
    begin, right = Verifier.__init__, ColumnOrder.columns

    def counted(self: ColumnOrder, nodes: list[list[int]]) -> list[list[int]]:
        nonlocal laid_out
        columns = right(self, nodes)
        laid_out += columns != nodes
        return columns

    outputs: list[Any] = []
    for block_sparse in (False, True):

        def __init__(self: Verifier, *args: Any, block_sparse: bool = block_sparse, **kwargs: Any) -> None:
            begin(self, *args, **kwargs)
            self._block_sparse = block_sparse

        with monkeypatch.context() as patched:
            patched.setattr(verifier, "ORDERED_FROM", 2)
            patched.setattr(Verifier, "__init__", __init__)
            patched.setattr(ColumnOrder, "columns", counted)
            torch.manual_seed(0)
            drafter = DraftModelDrafter(draft, depth=3, budget=9, width=3, grow=grow)
            inputs: dict[str, Any] = {**told.prompts.inputs, **options, "max_new_tokens": 16}
            outputs.append(specdec.generate(model, **inputs, drafter=drafter, return_dict_in_generate=True))
    assert laid_out > 3, "nothing was put in another order"
    assert outputs[1].sequences.tolist() == outputs[0].sequences.tolist()
    assert outputs[1].stats.accepted == outputs[0].stats.accepted > 0
    if children == "chosen":
        assert outputs[1].sequences.tolist() == told.sequences.tolist()


def test_small_trees_and_other_attention_keep_their_order() -> None:
    tree = TokenTree.of_nodes(torch.tensor([20]), [[(0, 4), (0, 5), (2, 6)]])
    assert tree.shapes[0].heavy_first != (0, 1, 2, 3)
    for attention in (FLEX, "eager"):
        verify = Verifier(Target(tiny_model("llama", attention, layers=2)))
        with torch.no_grad():
            verify.context.prefill([[5, 6, 7]])
            verify.score(tree)
        assert verify._order is None


# --- The compiled kernel -------------------------------------------------------------------------------


@contextmanager
def counted_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Everything that is compiled is counted, and runs as it was traced; nothing is switched off on the CPU."""
    graphs: list[int] = []
    compile_for_real = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    def counting(function: Any, **_: Any) -> Any:
        return compile_for_real(function, backend=backend)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", counting)
        patched.setattr(Target, "uncompiled_on_cpu", lambda self: nullcontext())
        patched.setattr("transformers.integrations.flex_attention.WrappedFlexAttention._is_flex_compiled", False)
        yield graphs


@pytest.mark.slow
@torch.no_grad()
def test_fifty_uneven_steps_compile_the_kernel_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the first shapes, once for changing ones, and once more for each time that rows leave."""
    with counted_graphs(monkeypatch) as graphs:
        context = Context(Target(tiny_model("gemma3-sliding", FLEX, layers=2)), 600)
        context.prefill([[5] * length for length in (130, 100, 120)])
        counts = []
        rng = random.Random(0)
        for step in range(50):
            if step in (40, 45):
                context.select([0, 2] if step == 40 else [1])
            tree = a_tree(context.batch_size, step, most=24).padded_to(2)
            graphs.clear()
            context.run(tree.tokens, tree.depths(), tree.shapes)
            context.keep([[0, *shape.path(rng.randrange(shape.depths.count(1) + 1))] for shape in tree.shapes])
            counts.append(len(graphs))
    assert sum(counts) <= 4, counts
    assert sum(counts[2:40]) == 0, counts


def attention_case(device: str) -> tuple[Any, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """A block mask of several blocks of every kind, the same as a dense mask, and queries, keys and values."""
    shapes = random_shapes(random.Random(0), 2, 200)
    depths = stacked([shape.depth_row for shape in shapes])
    asked = Visibility([0, 5], [700, 650], depths, depths, shapes, 1024)
    mask = BlockedMask(Reach(), torch.device(device)).of(asked)
    visible = torch.nn.functional.pad(asked.dense(Reach()), (0, asked.handed_out - asked.width)).to(device)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 16, generator=generator).to(device)
        for heads, length in ((4, depths.shape[1]), (2, 1024), (2, 1024))
    )
    return mask, visible, (query, key, value)


def assert_kernel_agrees(device: str, **options: Any) -> None:
    mask, visible, (query, key, value) = attention_case(device)
    assert query.shape[2] > 128
    assert int(mask.full_kv_num_blocks.sum()) > 0
    with torch.no_grad():
        got = torch.compile(flex_attention, **options)(query, key, value, block_mask=mask, enable_gqa=True)
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None])
    assert (got - expected).abs().max() < 1e-2 if device == "cuda" else (got - expected).abs().max() < 1e-5


@pytest.mark.slow
def test_the_compiled_kernel_skips_only_what_nobody_sees() -> None:
    assert_kernel_agrees("cpu", dynamic=False)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_cuda
def test_the_compiled_kernel_on_a_gpu_skips_only_what_nobody_sees() -> None:
    assert_kernel_agrees("cuda")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("family", QUICK)
def test_on_a_gpu_the_text_is_that_of_plain_generate(family: str) -> None:
    """Heads of 8 are too small for the GPU kernel."""
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128}
    eager, flex = (tiny_model(family, attention, layers=2, **sizes).cuda() for attention in ("eager", FLEX))
    told = reference(eager, BATCH, 40)
    for drafter in ("recycling:budget=8,depth=4", "lookup:ngram=2,tokens=4"):
        output: Any = specdec.generate(flex, **told.prompts.inputs, drafter=drafter, max_new_tokens=40)
        assert output.tolist() == told.sequences.tolist()
