"""EAGLE heads: the drafts are those of the head without a cache, and the text is the target's own."""

from __future__ import annotations

import copy
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers import LogitsProcessorList

import specdec
from specdec import formats
from specdec.context import Context
from specdec.drafter import Committed
from specdec.drafters import eagle
from specdec.drafters.eagle import EagleDrafter, beside_features, features_of
from specdec.errors import DrafterMismatch, UnknownDrafter
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.grow.calibration import CalibratedGrowth
from specdec.grow.shape import shape_of
from specdec.probe import target_of
from specdec.sampling import Chooser, SamplingParams
from specdec.target import BEFORE_NORM, Target
from specdec.tree import NO_NODE, TokenTree
from tests.drafters.eagle_heads import Head, features, fitted, logits_after, random_head
from tests.families import VOCAB, Reference, model_of, reference, sizes, tiny_model
from tests.law.enumeration import law_of, total_variation
from tests.law.test_decode_paths import EXACT, PROMPT, TARGET, generate, processors, target_law

torch.set_num_threads(1)

GREEDY = SamplingParams()
SAMPLED = SamplingParams(do_sample=True, temperature=1.5)
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "eagle": ("eagle", {}),
    "eagle, two layers and a gate": ("eagle", {"num_layers": 2, "fusion": "gate", "fc_bias": False}),
    "eagle, own embedding": ("eagle", {"own_embedding": True}),
    "eagle3": ("eagle3", {}),
    "eagle3, few tokens": ("eagle3", {"draft_vocab_size": 40}),
    "eagle3.1": ("eagle3", {"fc_norm": True, "norm_output": True, "draft_vocab_size": 40}),
    "eagle3, residual of the norm": ("eagle3", {"norm_before_residual": True, "num_layers": 2}),
    "eagle3, last layer": ("eagle3", {"taps": (0, 1, 3)}),
    "eagle3, window": ("eagle3", {"sliding_window": 4}),
    "eagle3, made for few positions": ("eagle3", {"layer": {"max_position_embeddings": 4}}),
}
TREES: dict[str, dict[str, Any]] = {
    "chain": {"depth": 3, "budget": None},
    "tree": {"depth": 3, "budget": 9},
    "eagle2": {"depth": 3, "budget": 8, "grow": "eagle2", "width": 3},
}


@cache
def llama() -> Any:
    return tiny_model("llama")


@cache
def head_named(name: str) -> Head:
    kind, options = HEADS[name]
    return random_head(kind, target_of(llama()), **copy.deepcopy(options))


class Conversation:
    """A drafter fed by hand with committed tokens whose taps come from the model without a cache.

    Taps of nodes that were not accepted are NaN: whatever reads them shows.
    """

    def __init__(self, drafter: EagleDrafter, texts: list[list[int]]) -> None:
        self.drafter, self.texts = drafter, [list(text) for text in texts]
        drafter.reset(len(texts), None)
        self.tree: TokenTree | None = None
        width = max(map(len, texts))
        taps = {tap: torch.full((len(texts), width, drafter.target.hidden_size), torch.nan) for tap in drafter.taps}
        for row, text in enumerate(texts):
            for tap, states in self._taps(text).items():
                taps[tap][row, width - len(text) :] = states
        drafter.observe(Committed([list(text) for text in texts], taps=taps))

    def _taps(self, text: list[int]) -> dict[int, Tensor]:
        with torch.no_grad():
            output = self.drafter.target.call(self.drafter.taps, input_ids=torch.tensor([text]), use_cache=False)
        return {tap: states[0] for tap, states in output.taps.items()}

    def propose(self, roots: list[int], params: SamplingParams = GREEDY, room: int = 50) -> TokenTree:
        with torch.no_grad():
            self.tree = self.drafter.propose(torch.tensor(roots), params, Chooser(), room)
        for text, root in zip(self.texts, roots, strict=True):
            text.append(root)
        return self.tree

    def commit(self, paths: list[list[int]], tree: TokenTree | None = None) -> None:
        """Accept these nodes of each row of the last tree."""
        tree = tree or self.tree
        assert tree is not None
        ids = tree.tokens.tolist()
        shape = len(paths), tree.num_nodes, self.drafter.target.hidden_size
        taps = {tap: torch.full(shape, torch.nan) for tap in self.drafter.taps}
        for row, path in enumerate(paths):
            self.texts[row] += [ids[row][node] for node in path]
            for tap, states in self._taps(self.texts[row]).items():
                taps[tap][row, [0, *path]] = states[-len(path) - 1 :]
        nodes = [[0, *path] for path in paths]
        committed = [[ids[row][node] for node in row_nodes] for row, row_nodes in enumerate(nodes)]
        self.drafter.observe(Committed(committed, nodes, tree, taps=taps))


def assert_drafts_are_the_heads_own(
    tree: TokenTree, drafter: EagleDrafter, texts: list[list[int]], room: int = 50
) -> None:
    """Every node's children are the best tokens (or log_q is the law) after its path, computed without any cache."""
    ids = tree.tokens.tolist()
    for row, text in enumerate(texts):
        shape, known = tree.shapes[row], features(drafter.head, drafter.target, torch.tensor([text[:-1]]))
        for node, children in enumerate(shape.children):
            if not children:
                continue
            path = [ids[row][n] for n in shape.path(node)]
            expected = logits_after(drafter.head, drafter.target, text, path, known)
            got = [ids[row][child] for child in children]
            assert len(set(got)) == len(got)
            if tree.log_q is None:
                torch.testing.assert_close(expected[got], expected.topk(len(got)).values, atol=1e-4, rtol=1e-4)
            else:
                torch.testing.assert_close(tree.log_q[row, node], expected / 1.5, atol=1e-4, rtol=1e-4)


def random_path(tree: TokenTree, row: int, rng: random.Random) -> list[int]:
    path, node = [], 0
    while tree.shapes[row].children[node] and rng.random() < 0.75:
        node = rng.choice(tree.shapes[row].children[node])
        path.append(node)
    return path


@pytest.mark.parametrize("options", TREES.values(), ids=TREES)
@pytest.mark.parametrize("name", HEADS)
def test_any_sequence_of_acceptances_leaves_drafts_as_from_scratch(name: str, options: dict[str, Any]) -> None:
    """Three unequal rows, of which one leaves; drawn and chosen by turns; rooms from 1 on; deepest paths too."""
    rng = random.Random(0)
    torch.manual_seed(0)
    drawn: dict[str, Any] = {} if "grow" in options else {"children": "drawn"}
    drafter = EagleDrafter(target_of(llama()), head_named(name), **options, **drawn)
    talk = Conversation(drafter, [[rng.randrange(VOCAB) for _ in range(n)] for n in (7, 2, 5)])
    for step in range(6):
        room = (50, 1, 2)[step % 3]
        params = SAMPLED if step % 2 and drawn else GREEDY
        tree = talk.propose([rng.randrange(VOCAB) for _ in talk.texts], params, room)
        assert 1 <= tree.depth <= room
        assert (tree.log_q is not None) == (params is SAMPLED)
        assert_drafts_are_the_heads_own(tree, drafter, talk.texts)
        deepest = [shape.path(max(range(tree.num_nodes), key=lambda n: shape.depths[n])) for shape in tree.shapes]
        talk.commit(deepest if step == 3 else [random_path(tree, row, rng) for row in range(len(talk.texts))])
        if step == 2:
            drafter.select([2, 0])
            talk.texts = [talk.texts[2], talk.texts[0]]


def test_feature_t_goes_with_token_t_plus_1() -> None:
    assert beside_features([5, 6, 7], 8) == [6, 7, 8]
    assert beside_features([8, 9], 4) == [9, 4]
    assert beside_features([5], 6) == [6]


@pytest.mark.parametrize("name", ["eagle", "eagle3"])
@pytest.mark.parametrize(
    "wrong", [lambda tokens, root: list(tokens), lambda tokens, root: [*tokens[2:], root, root]], ids=["same", "later"]
)
def test_another_alignment_of_features_and_tokens_is_noticed(
    name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = EagleDrafter(target_of(llama()), head_named(name), **TREES["chain"], children="drawn")
    monkeypatch.setattr(eagle, "beside_features", wrong)
    talk = Conversation(drafter, [[5, 6, 7, 8]])
    tree = talk.propose([9], SAMPLED)
    with pytest.raises(AssertionError):
        assert_drafts_are_the_heads_own(tree, drafter, talk.texts)


def test_keeping_keys_of_drafted_nodes_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A past made from the head's own guesses gives other drafts than one made from the target's states."""
    drafter = EagleDrafter(target_of(llama()), head_named("eagle"), **TREES["chain"], children="drawn")
    talk = Conversation(drafter, [[5, 6, 7, 8]])
    tree = talk.propose([9], SAMPLED)
    keep = Context.keep

    def keep_all(self: Context, nodes: list[list[int]]) -> None:
        keep(self, [list(range(self.tree_width)) for _ in nodes] if nodes == [[]] else nodes)

    monkeypatch.setattr(Context, "keep", keep_all)
    talk.commit([tree.shapes[0].path(2)])
    tree = talk.propose([11], SAMPLED)
    with pytest.raises(AssertionError):
        assert_drafts_are_the_heads_own(tree, drafter, talk.texts)


def test_steps_without_a_proposal_are_digested_at_the_next_one() -> None:
    drafter = EagleDrafter(target_of(llama()), head_named("eagle3"), **TREES["tree"])
    talk = Conversation(drafter, [[5, 6, 7], [3]])
    for roots in ([8, 9], [10, 0]):
        for text, root in zip(talk.texts, roots, strict=True):
            text.append(root)
        talk.commit([[], []], TokenTree.of_roots(torch.tensor(roots)))
    tree = talk.propose([11, 12])
    assert_drafts_are_the_heads_own(tree, drafter, talk.texts)


def test_a_long_prompt_is_digested_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eagle, "DIGESTED_AT_ONCE", 4)
    drafter = EagleDrafter(target_of(llama()), head_named("eagle"), **TREES["tree"])
    talk = Conversation(drafter, [list(range(3, 16)), [5, 6], list(range(20, 28))])
    tree = talk.propose([11, 12, 13])
    assert_drafts_are_the_heads_own(tree, drafter, talk.texts)


def test_a_prompt_whose_beginning_was_cached_is_taken_from_its_first_state_on() -> None:
    """Four of seven tokens have states; the head's past begins there, its positions too."""
    target = target_of(llama())
    head = head_named("eagle")
    drafter = EagleDrafter(target, head, **TREES["chain"])
    text = [5, 6, 7, 8, 9, 10, 11]
    drafter.reset(1, None)
    states = features(head, target, torch.tensor([text]))[:, 3:]
    drafter.observe(Committed([text], taps={drafter.taps[0]: states}))
    with torch.no_grad():
        tree = drafter.propose(torch.tensor([12]), GREEDY, Chooser(), 1)
        embeddings = target.embedding(torch.tensor([[9, 10, 11, 12]]))
        mask = torch.full((4, 4), torch.finfo(torch.float32).min).triu(1)[None, None]
        made = head(embeddings, states, torch.arange(4)[None], mask)[:, -1]
    assert tree.tokens[0, 1] == head.logits(made, target.logits_of).argmax()


FAMILY_NAMES = [
    "llama", "llama-without-gqa", "qwen3", "qwen3-moe", "gemma2-sliding", "gemma3-sliding", "gpt2", "opt",
]  # fmt: skip
"""Among them tied embeddings, windows, learned positions, experts, and states between layers of other scale."""
NEW_TOKENS = 24


@cache
def _told(family: str, batch: tuple[int, ...]) -> Reference:
    return reference(tiny_model(family), list(batch), NEW_TOKENS)


@cache
def _fitted(family: str, kind: str) -> tuple[Any, Head]:
    """A model and a head that knows the batch's text partly by heart."""
    model = llama() if family == "llama" else tiny_model(family)
    options: dict[str, Any] = {"draft_vocab_size": 100} if kind == "eagle3" else {}
    head = random_head(kind, target_of(model), **options)
    return model, fitted(head, target_of(model), _told(family, (13, 13)).sequences, steps=30)


@cache
def _well_fitted(kind: str) -> Head:
    """A head for the Llama that knows two texts by heart."""
    target = target_of(llama())
    return fitted(random_head(kind, target), target, _told("llama", (13, 13)).sequences, steps=150)


def speculative(model: Any, told: Reference, drafter: EagleDrafter, **options: Any) -> Any:
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return specdec.generate(model, **told.prompts.inputs, drafter=drafter, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_greedy_text_is_that_of_plain_generate(family: str, kind: str) -> None:
    model, head = _fitted(family, kind)
    drafted = accepted = 0
    for batch, tree in (((13, 13), "chain"), ((13, 6, 10), "tree"), ((13, 13), "eagle2")):
        told = _told(family, batch)
        output = speculative(model, told, EagleDrafter(target_of(model), head, **TREES[tree]))
        assert output.sequences.tolist() == told.sequences.tolist(), f"{batch}, {tree}"
        drafted, accepted = drafted + output.stats.drafted, accepted + output.stats.accepted
    assert 0 < accepted < drafted, "neither accepted nor rejected anything: no test"


def test_a_head_that_knows_the_text_is_mostly_right() -> None:
    """With the wrong feature or token at any place this falls to what chance gives."""
    told = _told("llama", (13, 13))
    for kind in ("eagle", "eagle3"):
        drafter = EagleDrafter(target_of(llama()), _well_fitted(kind), depth=4, budget=None)
        output = speculative(llama(), told, drafter)
        assert output.sequences.tolist() == told.sequences.tolist()
        assert output.stats.alpha[0] > 0.8


@pytest.mark.parametrize("format", ["native", "eagle", "eagle3", "vllm_eagle3", "speculators_eagle3"])
def test_a_directory_in_any_format_can_be_named_as_the_drafter(format: str, tmp_path: Path) -> None:
    """The same head drafts the same tokens from a file as from memory."""
    kind = "eagle" if format == "eagle" else "eagle3"
    model, told, head = llama(), _told("llama", (13, 13)), _well_fitted(kind)
    about = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 3}
    formats.write(HeadCheckpoint(kind, head.config, dict(head.state_dict()), about), tmp_path / "head", format)
    drafter: Any = specdec.load_drafter(f"{tmp_path / 'head'}:depth=3,budget=9", model)
    assert isinstance(drafter, EagleDrafter)
    got = speculative(model, told, drafter)
    expected = speculative(model, told, EagleDrafter(target_of(model), head, depth=3, budget=9))
    assert got.sequences.tolist() == told.sequences.tolist()
    assert (got.stats.drafted, got.stats.accepted) == (expected.stats.drafted, expected.stats.accepted)
    assert got.stats.tau > 1.5


def test_a_bfloat16_target_takes_a_float32_file(tmp_path: Path) -> None:
    model = tiny_model("llama").bfloat16()
    head = head_named("eagle3, few tokens")
    formats.write(HeadCheckpoint("eagle3", head.config, dict(head.state_dict())), tmp_path / "head", "eagle3")
    drafter: Any = specdec.load_drafter(tmp_path / "head", model)
    assert drafter.head.fc.weight.dtype == torch.bfloat16
    told = _told("llama", (13,))
    output = speculative(model, told, drafter, max_new_tokens=6)
    assert output.stats.drafted > 0
    assert output.sequences.shape == (1, 19)


def test_next_tokens_of_id_zero_are_drafted_and_emitted() -> None:
    """Zero is also the padding of the batch."""
    model = tiny_model("llama", seed=3)
    with torch.no_grad():
        model.lm_head.weight[0] *= 4
    told = reference(model, [9, 5, 7], NEW_TOKENS)
    assert (told.sequences[:, 9:] == 0).sum() > 5
    target = target_of(model)
    for kind in ("eagle", "eagle3"):
        head = fitted(random_head(kind, target), target, told.sequences[:1], steps=60)
        output = speculative(model, told, EagleDrafter(target, head, **TREES["tree"]))
        assert output.sequences.tolist() == told.sequences.tolist()
        assert output.stats.accepted > 0


@pytest.mark.parametrize("options", TREES.values(), ids=TREES)
def test_rows_that_meet_the_end_of_text_inside_an_accepted_path_end_there(options: dict[str, Any]) -> None:
    model, target, told = llama(), target_of(llama()), _told("llama", (13, 13))
    head = _well_fitted("eagle")
    seen_inside = False
    for place in (4, 5, 6, 7, 8, 9):
        eos = int(told.sequences[0, 13 + place])
        expected: Any = model.generate(
            **told.prompts.inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos, pad_token_id=0
        )
        output = speculative(model, told, EagleDrafter(target, head, **options), eos_token_id=eos, pad_token_id=0)
        assert output.sequences.tolist() == expected.tolist()
        ends = [(row == eos).nonzero() for row in expected[:, 13:]]
        seen_inside |= output.stats.accepted > 0 and ends[0].numel() != ends[1].numel()
    assert seen_inside, "the rows never ended apart"


@pytest.mark.parametrize("new_tokens", [1, 2, 3])
def test_with_room_for_few_tokens_the_text_is_right(new_tokens: int) -> None:
    model, head = _fitted("llama", "eagle3")
    told = _told("llama", (13, 6, 10))
    output = speculative(model, told, EagleDrafter(target_of(model), head, **TREES["tree"]), max_new_tokens=new_tokens)
    assert output.sequences.tolist() == told.sequences[:, : 13 + new_tokens].tolist()


def test_up_to_the_targets_last_position() -> None:
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=24, bos_token_id=None, eos_token_id=None
    )
    model = model_of(config)
    told = reference(model, [13], 11)
    head = random_head("eagle", target_of(model))
    output = speculative(model, told, EagleDrafter(target_of(model), head, **TREES["tree"]), max_new_tokens=11)
    assert output.sequences.tolist() == told.sequences.tolist()


def test_a_seed_gives_the_tokens_of_plain_sampling_with_chosen_children() -> None:
    model, head = _fitted("llama", "eagle3")
    told = _told("llama", (13,))
    torch.manual_seed(5)
    expected = model.generate(**told.prompts.inputs, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0)
    torch.manual_seed(5)
    output = speculative(model, told, EagleDrafter(target_of(model), head), do_sample=True, top_k=0)
    assert output.sequences.tolist() == expected.tolist()


CHAIN, TREE = shape_of([(0,), (0, 0)]), shape_of([(0,), (1,), (0, 0)])
WIDE = shape_of([(0,), (1,), (2,), (0, 0), (2, 0)])
"""Three children of a law that gives mass to two tokens."""
LAWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "eagle, drawn chain": ("eagle", {}, {"shape": CHAIN, "children": "drawn"}),
    "eagle, drawn tree": ("eagle", {}, {"shape": TREE, "children": "drawn"}),
    "eagle, chosen tree": ("eagle", {}, {"shape": TREE}),
    "eagle, dyspec": ("eagle", {}, {"grow": "dyspec", "depth": 2, "budget": 3, "width": 2}),
    "eagle3, drawn tree": ("eagle3", {}, {"shape": WIDE, "children": "drawn"}),
    "eagle3, drawn tree of two tokens": ("eagle3", {"draft_vocab_size": 2}, {"shape": TREE, "children": "drawn"}),
    "eagle3, chosen of two tokens": ("eagle3", {"draft_vocab_size": 2}, {"shape": CHAIN}),
    "eagle3, eagle2": ("eagle3", {"draft_vocab_size": 2}, {"grow": "eagle2", "depth": 2, "budget": 3}),
}


def three_token_drafter(kind: str, head: dict[str, Any], options: dict[str, Any]) -> EagleDrafter:
    return EagleDrafter(TARGET, random_head(kind, TARGET, seed=1, **head), **options)


@pytest.mark.parametrize(("kind", "head", "options"), [pytest.param(*case, id=name) for name, case in LAWS.items()])
def test_a_whole_generation_has_the_targets_law(kind: str, head: dict[str, Any], options: dict[str, Any]) -> None:
    drafter = three_token_drafter(kind, head, options)
    law = law_of(lambda chooser: generate(chooser, drafter, PROMPT, 4, processors())[0])
    assert total_variation(law, target_law(PROMPT[0].tolist(), 4, processors())) < EXACT


def test_drawn_children_that_pretend_another_law_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = three_token_drafter("eagle3", {"draft_vocab_size": 2}, {"shape": CHAIN, "children": "drawn"})
    right = EagleDrafter._in_target_ids

    def pretending(self: EagleDrafter, tree: TokenTree) -> TokenTree:
        honest = right(self, tree)
        assert honest.log_q is not None
        return TokenTree(honest.tokens, honest.shapes, honest.log_q.clamp(min=-3.0))

    monkeypatch.setattr(EagleDrafter, "_in_target_ids", pretending)
    law = law_of(lambda chooser: generate(chooser, drafter, PROMPT, 3, LogitsProcessorList(), params=SAMPLED)[0])
    plain = target_law(PROMPT[0].tolist(), 3, LogitsProcessorList())
    assert total_variation(law, plain) > 1e-3


def test_drafted_tokens_are_among_those_that_the_head_can_guess() -> None:
    drafter = EagleDrafter(target_of(llama()), head_named("eagle3, few tokens"), **TREES["tree"], children="drawn")
    ids = set(drafter.head.to_token_ids(torch.arange(drafter.head.guessed)).tolist())
    talk = Conversation(drafter, [[5, 6, 7], [8, 9, 10, 11]])
    tree = talk.propose([3, 4], SAMPLED)
    assert tree.log_q is not None
    live = torch.tensor([[parent != NO_NODE for parent in shape.parents] for shape in tree.shapes])
    assert set(tree.tokens[live].tolist()) <= ids
    assert set(tree.log_q[0, 0].isfinite().nonzero().flatten().tolist()) == ids


@pytest.mark.parametrize("name", ["eagle", "eagle3, few tokens"])
def test_a_growth_policy_sees_what_became_of_its_own_tree(name: str) -> None:
    """In its own ids: a policy that counts acceptances would else count nothing, or the wrong tokens."""
    policy = CalibratedGrowth(6, 3, 3)
    talk = Conversation(EagleDrafter(target_of(llama()), head_named(name), grow=policy), [[5, 6, 7], [8, 9]])
    for roots in ([3, 4], [10, 11]):
        tree = talk.propose(roots)
        talk.commit([shape.path(shape.children[0][0]) for shape in tree.shapes])
    assert policy.tables["chosen"].accepted.sum() == before(policy, "accepted") + 4
    assert policy.tables["chosen"].trials.sum() > before(policy, "trials") + 4


def before(policy: CalibratedGrowth, name: str) -> Tensor:
    """What a fresh policy's table begins with."""
    fresh = CalibratedGrowth(policy.budget, policy.depth, policy.width)
    return getattr(fresh.tables["chosen"], name).sum()


def test_taps_are_those_of_the_config_or_the_standard_ones() -> None:
    target = target_of(llama())
    assert features_of(head_named("eagle"), target) == (3,)
    assert features_of(head_named("eagle3"), target) == (1, 1, 2)
    assert features_of(head_named("eagle3, last layer"), target) == (0, 1, BEFORE_NORM)
    assert EagleDrafter(target, head_named("eagle3")).taps == (1, 2)
    deep = Target(model_of(tf.LlamaConfig(**sizes(num_hidden_layers=12))))
    assert features_of(random_head("eagle3", deep), deep) == (2, 6, 9)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("eagle", {"layer": {"hidden_size": 48}}, "hidden size 48, the target has 32"),
        ("eagle3", {"taps": (1, 2, 4)}, "hidden states 4, the target has 0 to 3"),
        ("eagle3", {"taps": (-1, 1, 2)}, r"got \(-1, 1, 2\)"),
        ("eagle3", {"target_hidden_size": 40, "own_embedding": True}, "hidden size 40, the target has 32"),
    ],
)
def test_a_head_of_another_target_is_refused(kind: str, options: dict[str, Any], said: str) -> None:
    target = target_of(llama())
    with pytest.raises(DrafterMismatch, match=said):
        EagleDrafter(target, random_head(kind, target, **options))


def test_a_head_of_another_vocabulary_is_refused() -> None:
    other = Target(model_of(tf.LlamaConfig(**sizes(vocab_size=100))))
    for kind in ("eagle", "eagle3"):
        with pytest.raises(DrafterMismatch, match="vocabulary 100, the target has 128"):
            EagleDrafter(target_of(llama()), random_head(kind, other))


@pytest.mark.parametrize("options", [{"depth": 0}, {"children": "picked"}, {"grow": "wild"}, {"min_confidence": 1.0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UnknownDrafter):
        EagleDrafter(target_of(llama()), head_named("eagle"), **options)
