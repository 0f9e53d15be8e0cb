"""Whatever Hydra, Clover or an MLP speculator guess, the text is the target's own; and their states are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import specdec
from specdec.context import Context
from specdec.decode import Committed
from specdec.drafters.sequential import SequentialDrafter
from specdec.errors import DrafterMismatch, UnknownDrafter
from specdec.grow.shape import chain, shape_of
from specdec.heads.clover import CloverConfig, CloverHead
from specdec.heads.hydra import HydraConfig, HydraHead
from specdec.heads.layer import LayerConfig, causal_mask
from specdec.heads.mlp_speculator import MLPSpeculatorConfig, MLPSpeculatorHead
from specdec.heads.sequential import SequentialHead, TargetEnds, guessed_tokens, teacher_forced
from specdec.probe import target_of
from specdec.sampling import Chooser, SamplingParams
from specdec.target import BEFORE_NORM, Target
from specdec.tree import TokenTree
from tests.drafters.test_draft_model import random_path
from tests.families import FAMILIES, Reference, model_of, reference, sizes, tiny_model
from tests.law.enumeration import law_of, total_variation
from tests.law.test_decode_paths import EXACT, PARAMS, TREE, generate, processors, target_law
from tests.law.test_decode_paths import PROMPT as THREE_TOKEN_PROMPT
from tests.law.test_decode_paths import TARGET as THREE_TOKEN_TARGET

NEW_TOKENS = 40
LENGTHS = [13, 6, 10]
FAMILY_NAMES = ("llama", "llama-without-gqa", "qwen3", "gemma3-sliding", "gpt2")


def layer_of(target: Target) -> LayerConfig:
    return replace(LayerConfig.of(target.config), hidden_act="silu")


MAKE: dict[str, Callable[[Target], nn.Module]] = {
    "hydra": lambda t: HydraHead(HydraConfig(t.hidden_size, t.vocab_size, 3)),
    "hydra-plus-plus": lambda t: HydraHead(HydraConfig(t.hidden_size, t.vocab_size, 3, 2, prefix=layer_of(t))),
    "clover": lambda t: CloverHead(CloverConfig(layer_of(t), t.vocab_size, 4)),
    "clover-shared": lambda t: CloverHead(CloverConfig(layer_of(t), t.vocab_size, 3, 1, own_lm_head=False)),
    "mlp": lambda t: MLPSpeculatorHead(MLPSpeculatorConfig(t.hidden_size, t.vocab_size, 40, 3)),
    "mlp-tied": lambda t: MLPSpeculatorHead(MLPSpeculatorConfig(t.hidden_size, t.vocab_size, 24, 4, True, True)),
}
TREES: dict[str, dict[str, Any]] = {
    "chain": {},
    "tree": {"budget": 8},
    "clover": {"budget": 6, "grow": "clover"},
    "eagle2": {"budget": 8, "grow": "eagle2"},
}
UNEVEN = shape_of([(0,), (1,), (0, 0), (1, 0), (1, 1), (1, 1, 0)])
CASES = [(family, kind) for family in FAMILY_NAMES for kind in MAKE
         if family == "llama" or kind not in ("clover-shared", "mlp-tied")]  # fmt: skip
CASES += [(family, "hydra-plus-plus") for family in FAMILIES if family not in FAMILY_NAMES]
WITH_TEXT = ("hydra-plus-plus", "clover")


def made(kind: str, target: Target, seed: int = 0) -> nn.Module:
    """A head with random weights everywhere."""
    torch.manual_seed(seed)
    head = MAKE[kind](target)
    for name, parameter in head.named_parameters():
        if parameter.ndim > 1 and "q.weight" not in name and "k.weight" not in name:
            nn.init.normal_(parameter, 0.0, 0.15)
    return head.to(target.dtype).eval()


def states_of(target: Target, head: SequentialHead, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The states [B, S, D] that the head reads, without any cache."""
    tap = BEFORE_NORM if head.before_norm else target.num_layers
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if mask is not None:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return target.call((tap,), **inputs).taps[tap]


def trained(kind: str, target: Target, text: Tensor, mask: Tensor, steps: int = 15) -> nn.Module:
    """A head that has seen just these texts [B, S] for a moment, so that it is often right on them."""
    module = made(kind, target)
    head = cast(SequentialHead, module)
    ends = TargetEnds(target.embedding, target.lm_head)
    hidden = states_of(target, head, text, mask)
    optimizer = torch.optim.Adam([p for n, p in module.named_parameters()], lr=0.01)
    for _ in range(steps):
        loss = torch.zeros(())
        for depth, states in enumerate(teacher_forced(head, hidden, text, ends)):
            labels = guessed_tokens(text, depth)
            logits = head.logits(depth, states[:, : labels.shape[1]], ends)
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


@cache
def told(family: str, batch: int) -> tuple[Any, Reference]:
    model = tiny_model(family, "eager", layers=2)
    return model, reference(model, LENGTHS[:batch], NEW_TOKENS)


@cache
def head_for(family: str, kind: str) -> nn.Module:
    model, batch = told(family, 3)
    mask = torch.cat([batch.prompts.mask, torch.ones(3, NEW_TOKENS, dtype=torch.long)], 1)
    return trained(kind, target_of(model), batch.sequences, mask)


def speculative(model: Any, prompts: dict[str, Any], drafter: Any, new_tokens: int = NEW_TOKENS, **options: Any) -> Any:
    return specdec.generate(
        model, **prompts, drafter=drafter, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_greedy_text_is_that_of_plain_generate(family: str, kind: str) -> None:
    drafted = accepted = 0
    for batch in (1, 3):
        model, expected = told(family, batch)
        for name in TREES if batch == 3 else ("tree",):
            options = TREES[name]
            drafter = SequentialDrafter(target_of(model), head_for(family, kind), **options)
            output = speculative(model, expected.prompts.inputs, drafter)
            assert output.sequences.tolist() == expected.sequences.tolist(), f"{name}, batch of {batch}"
            drafted, accepted = drafted + output.stats.drafted, accepted + output.stats.accepted
    assert 0.05 * drafted < accepted < drafted, "neither accepted nor rejected anything: no test"


def recomputed_seeds(drafter: SequentialDrafter, texts: list[list[int]]) -> list[Tensor]:
    """What depth 0 reads after each text, which ends in the root: all states and pairs from scratch, no caches."""
    seeds = []
    for text in texts:
        hidden = states_of(drafter.target, drafter.head, torch.tensor([text[:-1]]))
        with torch.no_grad():
            state = drafter.head.pair(hidden, torch.tensor([text[1:]]), drafter._ends)
            if drafter.head.text is not None:
                positions = torch.arange(state.shape[1])[None]
                state = drafter.head.text(state, positions, causal_mask(state.shape[1], state))
        seeds.append(state[0, -1])
    return seeds


class CheckedDrafter(SequentialDrafter):
    """Compares what depth 0 reads with a computation from scratch at every proposal."""

    texts: list[list[int]]
    differences: list[float]

    def reset(self, batch_size: int, context: Context) -> None:
        super().reset(batch_size, context)
        self.texts, self.differences = [[] for _ in range(batch_size)], []

    def observe(self, committed: Committed) -> None:
        super().observe(committed)
        for text, tokens in zip(self.texts, committed.tokens, strict=True):
            text.extend(tokens)

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self.texts = [self.texts[row] for row in rows]

    def _digest(self, roots: list[int]) -> Tensor:
        seeds = super()._digest(roots)
        whole = [[*text, root] for text, root in zip(self.texts, roots, strict=True)]
        expected = torch.stack(recomputed_seeds(self, whole))[:, None]
        self.differences.append((seeds - expected).abs().max().item())
        return seeds


def ending_apart(model: Any, expected: Reference) -> tuple[list[int], Tensor]:
    """End tokens that rows reach at different times, and plain generate's text with them."""
    new = expected.sequences[:, expected.prompts.ids.shape[1] :]
    ends = [int(row[index]) for row, index in zip(new, (8, 17, 33), strict=True)]
    text = model.generate(
        **expected.prompts.inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    firsts = {next((i for i, token in enumerate(row) if token in ends), None) for row in new.tolist()}
    assert len(firsts) > 1, "rows must end at different times"
    return ends, text


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", ["chain", "tree"])
def test_states_after_any_acceptance_are_those_computed_from_scratch(kind: str, name: str) -> None:
    """In a left-padded batch whose rows accept unequally and end at different times."""
    model, expected = told("llama", 3)
    ends, text = ending_apart(model, expected)
    drafter = CheckedDrafter(target_of(model), head_for("llama", kind), **TREES[name])
    output = speculative(model, expected.prompts.inputs, drafter, eos_token_id=ends, pad_token_id=0)
    assert output.sequences.tolist() == text.tolist()
    assert output.stats.accepted > 3
    assert len(drafter.differences) > 4
    assert max(drafter.differences) < 1e-4


@pytest.mark.parametrize("kind", MAKE)
def test_a_state_that_is_off_by_one_token_is_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic mistake: the root goes with the state of the token before the last one."""
    model, expected = told("llama", 1)
    right = SequentialDrafter.observe

    def shifted(self: SequentialDrafter, committed: Committed) -> None:
        taps = {tap: states.roll(1, 1) for tap, states in committed.taps.items()}
        right(self, replace(committed, taps=taps))

    monkeypatch.setattr(SequentialDrafter, "observe", shifted)
    drafter = CheckedDrafter(target_of(model), head_for("llama", kind))
    output = speculative(model, expected.prompts.inputs, drafter)
    assert output.sequences.tolist() == expected.sequences.tolist(), "wrong drafts never change the text"
    # A proposal after a tree of one node, as the room runs out, has no other state to take.
    assert sum(difference > 1e-2 for difference in drafter.differences) >= len(drafter.differences) - 1


@pytest.mark.parametrize("kind", WITH_TEXT)
def test_a_token_that_is_off_by_one_is_noticed_where_pairs_are_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = told("llama", 1)
    monkeypatch.setattr("specdec.drafters.sequential.pair_tokens", lambda tokens, root: tokens)
    drafter = CheckedDrafter(target_of(model), head_for("llama", kind))
    speculative(model, expected.prompts.inputs, drafter)
    assert (max(drafter.differences) > 1e-2) == (kind == "clover"), "Hydra's prefix layer reads no tokens"


@pytest.mark.parametrize("kind", MAKE)
def test_the_tree_holds_the_best_guesses_below_every_node(kind: str) -> None:
    """Chosen children are the top tokens, drawn ones come with their law, of the head fed with each node's own path."""
    model, expected = told("llama", 1)
    target, head = target_of(model), head_for("llama", kind)
    text = expected.sequences[0].tolist()
    for children in ("chosen", "drawn"):
        params = SamplingParams(do_sample=children == "drawn", temperature=1.3)
        drafter = SequentialDrafter(target, head, children=children, shape=UNEVEN)
        drafter.reset(1, Context(target))
        states = states_of(target, drafter.head, torch.tensor([text[:-1]]))
        drafter.observe(Committed([text[:-1]], taps={drafter.taps[0]: states}))
        tree = drafter.propose(torch.tensor(text[-1:]), params, Chooser(torch.Generator().manual_seed(0)), 9)
        for node, below in enumerate(tree.shapes[0].children):
            path = [int(tree.tokens[0, n]) for n in tree.shapes[0].path(node)]
            if below:
                logits = fed(drafter, text, path)
                if children == "chosen":
                    assert tree.tokens[0, list(below)].tolist() == logits.topk(len(below)).indices.tolist()
                else:
                    assert tree.log_q is not None
                    torch.testing.assert_close(tree.log_q[0, node], logits / 1.3, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def fed(drafter: SequentialDrafter, text: list[int], path: list[int]) -> Tensor:
    """Logits [V] after feeding the root and a path, one token at a time."""
    state, hidden = recomputed_seeds(drafter, [text])[0], None
    for depth, token in enumerate([text[-1], *path]):
        state, hidden = drafter.head.step(depth, state, torch.tensor(token), drafter._ends)
    assert hidden is not None
    return drafter.head.logits(len(path), hidden, drafter._ends)


@pytest.mark.parametrize("kind", WITH_TEXT)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cache_that_outgrows_its_buffers_and_a_prompt_read_in_parts_change_nothing(
    kind: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.cache.MIN_CAPACITY", 4)
    monkeypatch.setattr("specdec.drafters.sequential.PAIRS_AT_ONCE", 5)
    model, expected = told("llama", batch)
    drafter = CheckedDrafter(target_of(model), head_for("llama", kind), budget=6)
    output = speculative(model, expected.prompts.inputs, drafter)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert drafter._context is not None
    assert drafter._context.cache.buffers[0].capacity >= 32
    assert max(drafter.differences) < 1e-4


@pytest.mark.parametrize("kind", ["hydra", "clover"])
def test_a_prompt_whose_beginning_is_cached_already_is_read_from_where_it_runs(kind: str) -> None:
    model, expected = told("llama", 1)
    ids = expected.prompts.ids
    past = model(ids[:, :7], use_cache=True).past_key_values
    drafter = SequentialDrafter(target_of(model), head_for("llama", kind))
    output = speculative(model, {"input_ids": ids, "past_key_values": past}, drafter)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.stats.accepted > 0


@pytest.mark.parametrize("kind", ["hydra", "clover"])
@pytest.mark.parametrize("options", [{}, {"budget": 8}, {"grow": "clover", "budget": 4}], ids=str)
@pytest.mark.parametrize("room", [1, 2, 30])
def test_no_tree_is_deeper_than_the_room(kind: str, options: dict[str, Any], room: int) -> None:
    model, expected = told("llama", 3)
    target = target_of(model)
    drafter = SequentialDrafter(target, head_for("llama", kind), **options)
    drafter.reset(1, Context(target))
    text = expected.sequences[:1, :20]
    drafter.observe(Committed(text.tolist(), taps={drafter.taps[0]: states_of(target, drafter.head, text)}))
    tree = drafter.propose(text[:, -1], SamplingParams(), Chooser(), room)
    assert 1 <= tree.depth <= min(room, drafter.head.depth)


@pytest.mark.parametrize("kind", ["hydra", "hydra-plus-plus", "mlp"])
def test_a_true_next_token_of_id_0_is_no_padding(kind: str) -> None:
    """Four tokens, so that 0 is often right, in trees whose paths have different lengths."""
    model = model_of(type(FAMILIES["llama"])(**sizes(vocab_size=4)), "sdpa")
    ids = torch.tensor([[1, 3, 2, 1, 3], [2, 2, 1, 3, 1]])
    expected = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(ids))
    assert (expected[:, 5:] == 0).float().mean() > 0.1
    head = trained(kind, target_of(model), expected, torch.ones_like(expected))
    shape = shape_of([(0,), (1,), (0, 0), (0, 1), (0, 2), (1, 0), (0, 0, 0)])
    drafter = SequentialDrafter(target_of(model), head, shape=shape)
    output = speculative(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, drafter)
    assert output.sequences.tolist() == expected.tolist()
    assert output.stats.accepted > 10


@pytest.mark.parametrize("kind", ["hydra", "clover"])
def test_an_end_of_text_inside_an_accepted_path_ends_the_text_there(kind: str) -> None:
    model, expected = told("llama", 1)
    prompt_length = expected.prompts.ids.shape[1]
    drafter = SequentialDrafter(target_of(model), head_for("llama", kind))
    ended_inside = 0
    for place in range(3, 20):
        end = int(expected.sequences[0, prompt_length + place])
        text = model.generate(**expected.prompts.inputs, max_new_tokens=NEW_TOKENS, do_sample=False,
                              eos_token_id=end, pad_token_id=0)  # fmt: skip
        output = speculative(model, expected.prompts.inputs, drafter, eos_token_id=end, pad_token_id=0)
        assert output.sequences.tolist() == text.tolist()
        steps = output.stats.steps
        ended_inside += bool(steps) and steps[-1].accepted == steps[-1].emitted
    assert ended_inside, "no text ended on a drafted token: no test"


def test_trees_are_not_deeper_than_the_head() -> None:
    target = target_of(told("llama", 1)[0])
    head = made("hydra", target)
    assert SequentialDrafter(target, head).policy.depth == 3
    assert SequentialDrafter(target, head, shape=chain(6)).policy.depth == 3
    with pytest.raises(UnknownDrafter, match="this Hydra head was made for 3 levels, got depth=4"):
        SequentialDrafter(target, head, depth=4)


def test_a_head_for_another_target_is_refused() -> None:
    target = target_of(told("llama", 1)[0])
    with pytest.raises(DrafterMismatch, match="reads the states of another model"):
        specdec.load_drafter(SequentialDrafter(target, made("mlp", target)), told("qwen3", 1)[0])
    with pytest.raises(DrafterMismatch, match="hidden size 48, the target has 32"):
        SequentialDrafter(target, HydraHead(HydraConfig(48, target.vocab_size)))
    with pytest.raises(DrafterMismatch, match="vocabulary 77, the target has 128"):
        SequentialDrafter(target, MLPSpeculatorHead(MLPSpeculatorConfig(32, 77, 8)))


@pytest.mark.parametrize("kind", ["hydra", "mlp", "clover"])
def test_bfloat16_heads_draft_in_bfloat16(kind: str) -> None:
    model = model_of(FAMILIES["llama"], "sdpa").bfloat16()
    drafter = SequentialDrafter(target_of(model), made(kind, target_of(model)), budget=6)
    ids = torch.arange(3, 12)[None]
    output = speculative(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, drafter, 12)
    assert output.sequences.shape == (1, 21)


LAW_CASES = [("hydra", "chosen"), ("hydra", "drawn"), ("hydra-plus-plus", "drawn"), ("clover", "chosen"),
             ("clover", "drawn"), ("mlp", "drawn")]  # fmt: skip


def law_drafter(kind: str, children: str, **options: Any) -> SequentialDrafter:
    """A drafter for the three-token target of tests/law, in float64."""
    head = made(kind, THREE_TOKEN_TARGET, seed=4)
    return SequentialDrafter(THREE_TOKEN_TARGET, head, **({"children": children, "shape": TREE} | options))


@pytest.mark.parametrize(("kind", "children"), LAW_CASES)
def test_a_whole_generation_has_the_targets_law(kind: str, children: str) -> None:
    drafter = law_drafter(kind, children)
    law = law_of(lambda chooser: generate(chooser, drafter, THREE_TOKEN_PROMPT, 4, processors())[0])
    assert total_variation(law, target_law(THREE_TOKEN_PROMPT[0].tolist(), 4, processors())) < EXACT


def test_clover_s_sampler_has_the_targets_law() -> None:
    drafter = law_drafter("clover", "chosen", grow="clover", budget=3, shape=None)
    law = law_of(lambda chooser: generate(chooser, drafter, THREE_TOKEN_PROMPT, 4, processors())[0])
    assert total_variation(law, target_law(THREE_TOKEN_PROMPT[0].tolist(), 4, processors())) < EXACT


def test_children_that_come_with_another_law_than_they_were_drawn_from_are_noticed() -> None:
    class Lying(SequentialDrafter):
        def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
            tree = super().propose(root, params, chooser, room)
            return replace(tree, log_q=None if tree.log_q is None else 0.2 * PARAMS.warp(tree.log_q).clamp(min=-9))

    drafter = Lying(THREE_TOKEN_TARGET, made("hydra", THREE_TOKEN_TARGET, seed=4), children="drawn", shape=TREE)
    law = law_of(lambda chooser: generate(chooser, drafter, THREE_TOKEN_PROMPT, 4, processors())[0])
    assert total_variation(law, target_law(THREE_TOKEN_PROMPT[0].tolist(), 4, processors())) > 1e-3


def test_rows_that_observe_and_leave_at_random_keep_their_own_states() -> None:
    """Paths that stop anywhere, empty ones too, in rows of different lengths; one row leaves on the way."""
    import random

    model, _ = told("llama", 3)
    target, rng = target_of(model), random.Random(3)
    drafter = SequentialDrafter(target, head_for("llama", "clover"), budget=7)
    drafter.reset(3, Context(target))
    texts = [[rng.randrange(3, 128) for _ in range(n)] for n in (5, 2, 9)]
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros(3, 9, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, 9 - len(text) :], mask[row, 9 - len(text) :] = torch.tensor(text), 1
    tap = drafter.taps[0]
    drafter.observe(Committed([list(t) for t in texts], taps={tap: states_of(target, drafter.head, ids, mask)}))
    for step in range(6):
        roots = [rng.randrange(3, 128) for _ in texts]
        seeds = recomputed_seeds(drafter, [[*text, root] for text, root in zip(texts, roots, strict=True)])
        tree = drafter.propose(torch.tensor(roots), SamplingParams(), Chooser(), 9)
        first = [drafter.head.step(0, seed, torch.tensor(0), drafter._ends)[1] for seed in seeds]
        for row, hidden in enumerate(first):
            best = drafter.head.logits(0, hidden, drafter._ends).argmax()
            assert tree.tokens[row, 1] == best
        paths = [random_path(tree, row, rng) for row in range(len(texts))]
        nodes = [[0, *path] for path in paths]
        tokens = [[int(tree.tokens[row, n]) for n in kept] for row, kept in enumerate(nodes)]
        states = torch.zeros(len(texts), tree.num_nodes, target.hidden_size)
        for row, kept in enumerate(nodes):
            texts[row] += tokens[row]
            states[row, kept] = states_of(target, drafter.head, torch.tensor([texts[row]]))[0, -len(kept) :]
        drafter.observe(Committed(tokens, nodes, tree, taps={tap: states}))
        if step == 3:
            drafter.select([2, 0])
            texts = [texts[2], texts[0]]
