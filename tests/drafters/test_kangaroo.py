"""Kangaroo drafts with the target's first layers and an adapter; every layer runs once for a token."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import specdec
from specdec import formats
from specdec.context import Context
from specdec.drafters.early_exit import EarlyExitDrafter
from specdec.drafters.kangaroo import KangarooDrafter
from specdec.drafters.load import load_drafter
from specdec.errors import DrafterMismatch, UnknownDrafter, UnsupportedModel
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.grow.policy import Frontier
from specdec.heads.kangaroo import KangarooConfig, KangarooHead
from specdec.heads.layer import causal_mask
from specdec.pending import TapRun
from specdec.probe import target_of
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Target
from specdec.tree import TokenTree
from specdec.verifier import Verifier
from tests.families import Reference, model_of, redraw, reference, sizes, tiny_model
from tests.tiny import make_target

NEW_TOKENS = 24
EXIT = 2
BATCHES = {"batch-1": [13], "batch-3": [13, 6, 10]}
FAMILIES = ["llama", "qwen3", "gemma3-sliding", "gpt2", "cohere2-sliding"]
OPTIONS: dict[str, dict[str, Any]] = {
    "chain": {"confidence": 0.0, "depth": 3},
    "until unsure": {"confidence": 0.25},
    "tree": {"confidence": 0.0, "depth": 3, "budget": 9},
    "best-first": {"depth": 3, "budget": 9, "grow": "best-first"},
    "eagle2": {"depth": 3, "budget": 9, "grow": "eagle2", "width": 3},
}


@cache
def model_named(family: str) -> Any:
    return tiny_model(family, "sdpa")


@cache
def told(family: str, batch: str) -> Reference:
    return reference(model_named(family), BATCHES[batch], NEW_TOKENS)


@torch.no_grad()
def head_for(target: Target, attention: float = 0.1, exit_layer: int = EXIT) -> KangarooHead:
    """A random adapter whose attention only corrects the shallow states, so that it is right now and then."""
    head = KangarooHead(KangarooConfig.of(target.config, exit_layer))
    redraw(head, 1)  # type: ignore[arg-type]
    head.layers[0].self_attn.o_proj.weight.mul_(attention)  # type: ignore[union-attr, operator]
    return head.to(target.dtype)


def generate(model: Any, one: Reference, drafter: Any, **options: Any) -> Any:
    return specdec.generate(
        model, **one.prompts.inputs, drafter=drafter, return_dict_in_generate=True,
        **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **options},
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_plain_generate(family: str) -> None:
    model = model_named(family)
    target, head = target_of(model), head_for(target_of(model))
    for name, options in OPTIONS.items():
        drafted = accepted = 0
        for batch in BATCHES:
            one = told(family, batch)
            output = generate(model, one, KangarooDrafter(target, head, **options))
            assert output.sequences.tolist() == one.sequences.tolist(), f"{name}, {batch}"
            drafted, accepted = drafted + output.stats.drafted, accepted + output.stats.accepted
        assert 0 < accepted < drafted, f"{name} neither accepted nor rejected anything: no test"


def from_scratch(drafter: KangarooDrafter, text: list[int]) -> Tensor:
    """Draft logits [V] after a text, with nothing kept from before."""
    target = drafter.target
    with torch.no_grad():
        states = target.model(torch.tensor([text]), output_hidden_states=True).hidden_states[drafter.layer]
        positions = torch.arange(len(text))[None]
        drafted = drafter.head(states, positions, causal_mask(len(text), states))
        return target.logits_of(drafted[0, -1])


class ComparedDrafter(KangarooDrafter):
    """Compares the law at every node that the adapter ran with a computation from scratch."""

    largest, compared = 0.0, 0

    def __init__(self, target: Target, head: KangarooHead, one: Reference, **options: Any) -> None:
        super().__init__(target, head, **options)
        padding = (one.prompts.mask == 0).sum(1).tolist()
        self.known = [row[count:] for row, count in zip(one.sequences.tolist(), padding, strict=True)]
        self.rows = list(range(len(self.known)))
        self.laws: list[Tensor] = []

    def _expand(self, frontier: Frontier) -> Tensor:
        logits = super()._expand(frontier)
        self.laws.append(logits)
        return logits

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """Compared while the adapter's past is that of this step."""
        self.laws = []
        tree = super().propose(root, params, chooser, room)
        assert self._grown is not None
        laws, tokens = torch.cat(self.laws, 1), tree.tokens.tolist()
        for b, row in enumerate(self.rows):
            place = self._context.lengths[b] - self._context.starts[b]
            for node, column in enumerate(self._grown.columns[b]):
                path = [tokens[b][n] for n in tree.shapes[b].path(node)]
                # Nodes beyond a row's last token are there for the other rows, at positions that are cut off.
                if column >= 0 and place + len(path) <= len(self.known[row]) - 2:
                    expected = from_scratch(self, [*self.known[row][: place + 1], *path])
                    self.largest = max(self.largest, (laws[b, column] - expected).abs().max().item())
                    self.compared += 1
        return tree

    def select(self, rows: list[int]) -> None:
        """Rows keep their texts."""
        super().select(rows)
        self.rows = [self.rows[row] for row in rows]


@pytest.mark.parametrize("family", ["llama", "gemma3-sliding"])
@pytest.mark.parametrize("options", ["chain", "tree", "best-first"])
def test_every_node_s_law_is_that_computed_from_scratch(family: str, options: str) -> None:
    model, one = model_named(family), told(family, "batch-3")
    target = target_of(model)
    drafter = ComparedDrafter(target, head_for(target), one, **OPTIONS[options])
    output = generate(model, one, drafter)
    assert output.sequences.tolist() == one.sequences.tolist()
    assert output.stats.accepted > 0
    assert drafter.compared > 50
    assert drafter.largest < 2e-4


def test_states_at_the_wrong_positions_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TapRun.positions
    monkeypatch.setattr(TapRun, "positions", lambda self, ends: right(self, [max(end - 1, 0) for end in ends]))
    model, one = model_named("llama"), told("llama", "batch-3")
    drafter = ComparedDrafter(target_of(model), head_for(target_of(model), attention=1.0), one, confidence=0.0)
    generate(model, one, drafter)
    assert drafter.largest > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("options", [{"depth": 3}, {"depth": 3, "budget": 9}], ids=["chain", "tree"])
def test_an_adapter_without_attention_and_with_the_target_s_norm_is_an_early_exit(
    family: str, options: dict[str, Any]
) -> None:
    model, one = model_named(family), told(family, "batch-3")
    target = target_of(model)
    head = head_for(target, attention=0.0)
    head.norm.weight.copy_(model.model.norm.weight)
    kangaroo = generate(model, one, KangarooDrafter(target, head, confidence=0.0, **options))
    exit_early = generate(model, one, EarlyExitDrafter(target, layer=EXIT, **options))
    assert kangaroo.stats.steps == exit_early.stats.steps


@pytest.mark.parametrize("options", OPTIONS)
def test_every_layer_runs_once_for_every_node(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Verifier, "_good_width", lambda self, num_nodes: num_nodes)  # no padding nodes to count
    model, one = model_named("llama"), told("llama", "batch-1")
    passes, hooks = [0] * 3, []
    for index, layer in enumerate(model.model.layers):

        def count(_module: Any, args: tuple[Any, ...], index: int = index) -> None:
            passes[index] += args[0].shape[1]

        hooks.append(layer.register_forward_pre_hook(count))
    drafter = KangarooDrafter(target_of(model), head_for(target_of(model)), **OPTIONS[options])
    passes[:] = [0] * 3  # without those of the check that a new drafter makes
    output = generate(model, one, drafter)
    for hook in hooks:
        hook.remove()
    nodes = 13 + sum(step.drafted + 1 for step in output.stats.steps)
    if OPTIONS[options].get("grow") is None:
        assert passes == [nodes] * 3
    else:  # nodes that growth looked at and did not keep ran through the shallow layers only
        assert passes[2] == nodes
        assert passes[0] == passes[1] >= nodes


def test_no_output_matrix_runs_for_shallow_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model, one = model_named("llama"), told("llama", "batch-1")
    target = target_of(model)
    widths: list[int] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _module, args: widths.append(args[0].shape[1]))
    drafter = KangarooDrafter(target, head_for(target), confidence=0.0, depth=2)
    output = generate(model, one, drafter)
    hook.remove()
    steps = [step for step in output.stats.steps if step.drafted == 2]
    # Of a step with two drafted tokens: none for three shallow passes, one for each draft, and verification's three.
    assert widths[1 : 1 + 6 * 3] == [0, 1, 0, 1, 0, 3] * 3
    assert len(steps) > 3


def published_chain(drafter: KangarooDrafter, text: list[int], steps: int, threshold: float) -> list[int]:
    """The published loop for one sequence: draft until a token was less likely than the threshold; it is kept."""
    drafted: list[int] = []
    for _ in range(steps):
        shares = from_scratch(drafter, [*text, *drafted]).softmax(-1)
        drafted.append(int(shares.argmax()))
        if shares.max() < threshold:
            break
    return drafted


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.3])
def test_a_chain_stops_after_the_first_unsure_token_as_published(threshold: float) -> None:
    model, target = model_named("llama"), target_of(model_named("llama"))
    drafter = KangarooDrafter(target, head_for(target), confidence=threshold)
    lengths = set()
    for seed in range(8):
        ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(seed))
        seen: list[list[int]] = []
        right = drafter.propose

        def propose(root: Tensor, *rest: Any, right: Any = right, seen: list[list[int]] = seen) -> TokenTree:
            tree = right(root, *rest)
            seen.append(tree.tokens[0].tolist())
            return tree

        drafter.propose = propose  # type: ignore[method-assign]
        specdec.generate(model, ids, drafter=drafter, max_new_tokens=9, do_sample=False)
        drafter.propose = right  # type: ignore[method-assign]
        root, drafted = seen[0][0], seen[0][1:]
        assert drafted == published_chain(drafter, [*ids[0].tolist(), root], 6, threshold)
        lengths.add(len(drafted))
    assert lengths != {6}, "no chain was cut"


def test_rows_that_end_at_different_times_end_as_in_plain_generate() -> None:
    model, one = model_named("llama"), told("llama", "batch-3")
    new = one.sequences[:, one.prompts.ids.shape[1] :]
    ends = [row[index].item() for row, index in zip(new, (4, 11, 18), strict=True)]
    options: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": 0}
    expected = model.generate(**one.prompts.inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    lengths = {next(i for i, token in enumerate(row) if token in ends) for row in new.tolist()}
    assert len(lengths) > 1, "rows must end at different times"
    target = target_of(model)
    for shape in ("chain", "tree", "best-first"):
        drafter = ComparedDrafter(target, head_for(target), one, **OPTIONS[shape])
        output = generate(model, one, drafter, **options)
        assert output.sequences.tolist() == expected.tolist()
        assert drafter.largest < 2e-4


def test_an_end_of_text_inside_an_accepted_path_ends_the_row() -> None:
    model, one = model_named("llama"), told("llama", "batch-1")
    new = one.sequences[0, one.prompts.ids.shape[1] :].tolist()
    target = target_of(model)
    inside = 0
    for place in range(1, NEW_TOKENS - 3):
        eos = new[place]
        if eos in new[:place]:
            continue
        options: dict[str, Any] = {"eos_token_id": eos, "pad_token_id": 0}
        expected = model.generate(**one.prompts.inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
        output = generate(model, one, KangarooDrafter(target, head_for(target), **OPTIONS["tree"]), **options)
        assert output.sequences.tolist() == expected.tolist()
        last = output.stats.steps[-1]
        inside += last.accepted == last.emitted < last.drafted
    assert inside, "no row ended on a proposed token with more below it"


@pytest.mark.parametrize("new_tokens", range(1, 7))
@pytest.mark.parametrize("options", ["chain", "tree", "best-first"])
def test_the_last_steps_keep_to_the_room(new_tokens: int, options: str) -> None:
    model, one = model_named("qwen3"), told("qwen3", "batch-3")
    drafter = KangarooDrafter(target_of(model), head_for(target_of(model)), **OPTIONS[options])
    output = generate(model, one, drafter, max_new_tokens=new_tokens)
    assert output.sequences.tolist() == one.sequences[:, : 13 + new_tokens].tolist()


@pytest.mark.parametrize("room", [1, 2, 10])
@pytest.mark.parametrize("options", ["chain", "tree", "best-first"])
def test_no_tree_is_deeper_than_the_room(room: int, options: str) -> None:
    target = target_of(model_named("llama"))
    with torch.no_grad():
        context = Context(target)
        ids = torch.tensor([[5, 6, 7]])
        context.prefill(ids.tolist())
        states = target.model(ids, output_hidden_states=True).hidden_states[EXIT]
        drafter = KangarooDrafter(target, head_for(target), **OPTIONS[options])
        drafter.reset(1, context)
        drafter.observe(specdec.Committed(ids.tolist(), taps={EXIT: states}))
        tree = drafter.propose(torch.tensor([7]), SamplingParams(), Chooser(), room)
    assert 1 <= tree.depth <= min(room, 3)
    assert tree.resume is not None
    assert tree.resume.hidden.shape == (1, tree.num_nodes, 32)
    assert context.tree_width == tree.num_nodes


def test_text_that_fills_the_target_s_positions_stays_exact() -> None:
    model = model_of(type(model_named("llama").config)(**sizes(max_position_embeddings=32)), "sdpa")
    one = reference(model, [13], 19)
    drafter = KangarooDrafter(target_of(model), head_for(target_of(model)), **OPTIONS["tree"])
    assert generate(model, one, drafter, max_new_tokens=19).sequences.tolist() == one.sequences.tolist()


@pytest.mark.parametrize("options", ["tree", "best-first"])
def test_text_that_outgrows_both_caches_stays_exact(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.cache.MIN_CAPACITY", 4)
    monkeypatch.setattr("specdec.api.SPARE_COLUMNS", -10_000)  # nothing is known about the final length
    model, one = model_named("gemma3-sliding"), told("gemma3-sliding", "batch-3")
    drafter = ComparedDrafter(target_of(model), head_for(target_of(model)), one, **OPTIONS[options])
    assert generate(model, one, drafter).sequences.tolist() == one.sequences.tolist()
    assert drafter.largest < 2e-4


def test_token_0_is_drafted_and_accepted_like_any_other() -> None:
    model = make_target(vocab_size=5, pad_token_id=None)
    ids = torch.tensor([[1, 3, 2, 4, 0, 3]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    drafter = KangarooDrafter(target_of(model), head_for(target_of(model)), depth=2, budget=30, grow="best-first")
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": True, "temperature": 3.0}
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model.generate(**inputs, **options)
        torch.manual_seed(seed)
        output: Any = specdec.generate(model, **inputs, drafter=drafter, return_dict_in_generate=True, **options)
        assert output.sequences.tolist() == expected.tolist()
        assert output.sequences[0, 6:].eq(0).any()
        assert output.stats.tau > 2.5, "a tree of all pairs of five tokens accepts two of them in every step"


def test_after_a_cache_that_was_passed_in_states_keep_their_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, one = model_named("llama"), told("llama", "batch-1")
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(one.prompts.ids[:, :8], past_key_values=past, use_cache=True)
    asked: list[list[int]] = []
    right = KangarooHead.forward

    def forward(self: KangarooHead, states: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        asked.append(positions[0].tolist())
        return right(self, states, positions, *rest)

    monkeypatch.setattr(KangarooHead, "forward", forward)
    drafter = KangarooDrafter(target_of(model), head_for(target_of(model)), confidence=0.0)
    output = generate(model, one, drafter, past_key_values=past)
    assert output.sequences.tolist() == one.sequences.tolist()
    assert asked[:6] == [[place] for place in range(13, 19)]


def test_drawn_children_are_drawn_from_the_adapter_s_law() -> None:
    model, one = model_named("llama"), told("llama", "batch-1")
    drafter = KangarooDrafter(target_of(model), head_for(target_of(model)), children="drawn", depth=2, confidence=0.0)
    laws: list[Tensor] = []
    right = drafter.propose

    def propose(*args: Any) -> TokenTree:
        tree = right(*args)
        assert tree.log_q is not None
        laws.append(tree.log_q[0, 0])
        return tree

    drafter.propose = propose  # type: ignore[method-assign]
    output = generate(model, one, drafter, do_sample=True, temperature=0.5, top_k=0)
    text = output.sequences[0, : 13 + 1].tolist()
    torch.testing.assert_close(laws[0], from_scratch(drafter, text) / 0.5, atol=1e-3, rtol=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    target = target_of(model_named("llama"))
    other = KangarooHead(KangarooConfig.of({**target.config.to_dict(), "hidden_size": 16}))
    with pytest.raises(DrafterMismatch, match="hidden size 16, the target has 32"):
        KangarooDrafter(target, other)
    with pytest.raises(UnknownDrafter, match="kangaroo needs 1 <= layer < 3 on this target, got 3"):
        KangarooDrafter(target, head_for(target), layer=3)
    with pytest.raises(UnknownDrafter, match="confidence is at least 0 and below 1"):
        KangarooDrafter(target, head_for(target), confidence=1.0)
    chain_only = target_of(make_target())
    chain_only.form = "chain"
    with pytest.raises(UnsupportedModel, match="chains only"):
        KangarooDrafter(chain_only, head_for(chain_only))


def test_a_directory_is_a_drafter(tmp_path: Path) -> None:
    model, one = model_named("llama"), told("llama", "batch-1")
    head = head_for(target_of(model), exit_layer=1)
    expected = generate(model, one, KangarooDrafter(target_of(model), head, confidence=0.0)).stats.steps
    for format in ("kangaroo", "native"):
        formats.write(HeadCheckpoint("kangaroo", head.config, head.state_dict()), tmp_path / format, format)
        drafter: Any = load_drafter(f"{tmp_path / format}:confidence=0,depth=6", model)
        assert drafter.layer == 1
        assert generate(model, one, drafter).stats.steps == expected
    assert load_drafter(f"{tmp_path / 'kangaroo'}:layer=2", model).layer == 2  # type: ignore[union-attr]
