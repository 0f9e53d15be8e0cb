"""Medusa heads draft losslessly: greedy text, sampled text with a seed, and the exact law of one step."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec import formats
from specdec.drafter import Committed
from specdec.drafters.directory import fingerprint
from specdec.drafters.load import load_drafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.errors import DrafterMismatch, UnknownDrafter
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.grow.shape import shape_of
from specdec.heads.medusa import MedusaConfig, MedusaHead
from specdec.probe import target_of
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Target
from specdec.tree import TokenTree, topology
from tests.drafters.memorised import memorised_heads
from tests.families import FAMILIES, reference, tiny_model
from tests.law.enumeration import total_variation
from tests.law.tables import PLAIN, Context, Propose, Tables, by_rule, law_after_one_step
from tests.tiny import VOCAB, make_target, perturbed, prompt, shared_target

TREES: dict[str, dict[str, Any]] = {
    "chain": {"budget": 3, "depth": 3, "width": 1},
    "tree": {"budget": 12, "depth": 4},
    "best-first": {"grow": "best-first", "budget": 12},
    "drawn": {"budget": 8, "children": "drawn"},
    "unsure": {"budget": 12, "min_confidence": 0.2},
    "deeper than there are heads": {"budget": 20, "depth": 9},
}


def medusa(model: Any, head: MedusaHead, **options: Any) -> MedusaDrafter:
    return MedusaDrafter(target_of(model), head, **options)


def plain(model: Any, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    return model.generate(**inputs, **{"max_new_tokens": 30, "do_sample": False, **options}).tolist()


def drafted(model: Any, inputs: dict[str, Any], drafter: Any, **options: Any) -> Any:
    arguments: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, **options}
    return specdec.generate(model, **inputs, drafter=drafter, **arguments, return_dict_in_generate=True)


@cache
def shared_heads(batch_size: int) -> Any:
    return memorised_heads(shared_target(), prompt(batch_size))


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_is_that_of_plain_generate(batch_size: int, tree: str) -> None:
    inputs = prompt(batch_size)
    output = drafted(shared_target(), inputs, medusa(shared_target(), shared_heads(batch_size), **TREES[tree]))
    assert output.sequences.tolist() == plain(shared_target(), inputs)
    assert 0 < output.stats.accepted < output.stats.drafted


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_plain_generate_on_other_families(family: str) -> None:
    model = tiny_model(family, "eager", layers=2)
    told = reference(model, [13, 6, 10], 30)
    output = drafted(model, told.prompts.inputs, medusa(model, memorised_heads(model, told.prompts.inputs)))
    assert output.sequences.tolist() == told.sequences.tolist()
    assert 0 < output.stats.accepted < output.stats.drafted


def test_random_heads_change_nothing_either() -> None:
    torch.manual_seed(1)
    head = MedusaHead(MedusaConfig(32, VOCAB, 4))
    output = drafted(shared_target(), prompt(3), medusa(shared_target(), head))
    assert output.sequences.tolist() == plain(shared_target(), prompt(3))
    assert output.stats.drafted > 0


@pytest.mark.parametrize("tied", [True, False])
def test_heads_that_use_the_targets_output_matrix(tied: bool) -> None:
    model = make_target(tie_word_embeddings=tied)
    head = MedusaHead(MedusaConfig(32, None, 4, output="target"))
    head.begin_as_target(model.lm_head.weight)
    output = drafted(model, prompt(3), medusa(model, head))
    assert output.sequences.tolist() == plain(model, prompt(3))
    assert output.stats.drafted > 0
    assert output.stats.accepted > 0 or not tied


@pytest.mark.parametrize("tree", ["chain", "tree", "best-first"])
@pytest.mark.parametrize("seed", range(4))
def test_sampling_with_a_seed_gives_the_tokens_of_plain_sampling(seed: int, tree: str) -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 20}
    torch.manual_seed(seed)
    expected = plain(shared_target(), prompt(1), **options)
    torch.manual_seed(seed)
    output = drafted(shared_target(), prompt(1), medusa(shared_target(), shared_heads(1), **TREES[tree]), **options)
    assert output.sequences.tolist() == expected


def test_a_tree_that_is_deeper_than_there_are_heads_is_cut() -> None:
    head = memorised_heads(shared_target(), prompt(1), heads=2)
    shape = shape_of([(0,), (1,), (0, 0), (0, 1), (0, 0, 0), (0, 0, 0, 0)])
    drafter = medusa(shared_target(), head, shape=shape)
    assert drafter.policy.depth == 2
    output = drafted(shared_target(), prompt(1), drafter)
    assert output.sequences.tolist() == plain(shared_target(), prompt(1))
    assert 0 < max(step.accepted for step in output.stats.steps) <= 2


def observed(drafter: MedusaDrafter, rows: int, seed: int = 0) -> MedusaDrafter:
    """A drafter that has seen a prompt with a random last state in each row."""
    states = torch.randn(rows, 3, 32, generator=torch.Generator().manual_seed(seed))
    drafter.observe(Committed([[1, 2, 3]] * rows, taps={drafter.taps[0]: states}))
    return drafter


def propose(drafter: MedusaDrafter, rows: int, room: int = 99) -> TokenTree:
    return drafter.propose(torch.arange(rows), SamplingParams(), Chooser(), room)


def test_guesses_are_each_heads_best_for_the_last_state() -> None:
    torch.manual_seed(2)
    head = MedusaHead(MedusaConfig(32, VOCAB, 3))
    drafter = observed(medusa(shared_target(), head, budget=12, depth=3), rows=2)
    tree = propose(drafter, rows=2)
    states = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))[:, -1]
    ranked = head(states).argsort(-1, descending=True)
    for row, shape in enumerate(tree.shapes):
        for node in range(1, tree.num_nodes):
            rank = shape.children[shape.parents[node]].index(node)
            assert tree.tokens[row, node] == ranked[row, shape.depths[node] - 1, rank]
    assert tree.num_drafted == [12, 12]


def test_the_state_is_that_of_the_last_kept_node_of_each_row() -> None:
    drafter = observed(medusa(shared_target(), MedusaHead(MedusaConfig(32, VOCAB, 3))), rows=3)
    before = drafter._hidden
    assert before is not None
    kept = before[1].clone()
    states = torch.randn(3, 4, 32)
    tree = TokenTree(torch.zeros(3, 4, dtype=torch.long), (topology((-1, 0, 1, 0)),) * 3)
    drafter.observe(Committed([[0, 0, 0], [], [0]], [[0, 1, 2], [], [0]], tree, taps={drafter.taps[0]: states}))
    assert drafter._hidden is not None
    assert torch.equal(drafter._hidden, torch.stack([states[0, 2], kept, states[2, 0]]))
    drafter.select([2, 0])
    assert torch.equal(drafter._hidden, torch.stack([states[2, 0], states[0, 2]]))


def test_heads_run_once_for_a_step_and_only_as_many_as_the_tree_is_deep() -> None:
    head = MedusaHead(MedusaConfig(32, VOCAB, 4))
    ran: list[tuple[int, tuple[int, ...]]] = []
    for k in range(4):
        head.lm_heads[k].register_forward_hook(lambda _m, i, _o, k=k: ran.append((k, tuple(i[0].shape))))
    propose(observed(medusa(shared_target(), head, budget=10), rows=3), rows=3, room=2)
    assert ran == [(0, (3, 32)), (1, (3, 32))]


@pytest.mark.parametrize("tree", TREES)
def test_room_for_one_token_gives_one_level(tree: str) -> None:
    drafter = observed(medusa(shared_target(), shared_heads(1), **TREES[tree]), rows=2)
    assert propose(drafter, rows=2, room=1).depth == 1


def test_more_nodes_than_there_are_tokens_are_not_proposed() -> None:
    model = make_target(vocab_size=5, bos_token_id=1)
    drafter = observed(medusa(model, MedusaHead(MedusaConfig(32, 5, 2)), budget=500, depth=2), rows=1)
    tree = propose(drafter, rows=1)
    assert max(len(children) for children in tree.shapes[0].children) <= 5
    first = [int(tree.tokens[0, node]) for node in tree.shapes[0].children[0]]
    assert sorted(first) == sorted(set(first))


def swapped(model: Any, one: int, other: int) -> Any:
    """A copy in which two tokens have changed places."""
    copy = perturbed(model, 0.0)
    with torch.no_grad():
        for matrix in (copy.lm_head.weight, copy.model.embed_tokens.weight):
            matrix[[one, other]] = matrix[[other, one]].clone()
    return copy


def test_a_true_next_token_of_id_0_is_emitted_once_and_cached_rightly() -> None:
    base, inputs = shared_target(), prompt(3)
    text = torch.tensor(plain(base, inputs))[:, 12:]
    frequent = int(text[0].bincount(minlength=VOCAB).argmax())
    model = swapped(base, 0, frequent)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == frequent, 2)
    expected = plain(model, inputs, pad_token_id=1)
    assert sum(row[12:].count(0) for row in expected) >= 6, "id 0 must really be written"
    # Short leaves beside deep paths: where paths are padded with id 0, a pad would look like a hit.
    shape = shape_of([(0,), (1,), (2,), (3,), (0, 0), (0, 0, 0), (0, 0, 0, 0)])
    for heads in (memorised_heads(model, inputs), shared_heads(3)):
        output = drafted(model, inputs, medusa(model, heads, shape=shape), pad_token_id=1)
        assert output.sequences.tolist() == expected
    assert drafted(model, inputs, medusa(model, memorised_heads(model, inputs), shape=shape)).stats.accepted > 0


def test_nothing_follows_an_end_of_text_inside_an_accepted_path() -> None:
    model, inputs = shared_target(), prompt(1)
    drafter = medusa(model, shared_heads(1), budget=4, depth=4, width=1)
    free = drafted(model, inputs, drafter)
    text, inside = free.sequences[0, 12:].tolist(), 0
    for eos in sorted(set(text)):
        expected = plain(model, inputs, eos_token_id=eos)
        output = drafted(model, inputs, drafter, eos_token_id=eos)
        assert output.sequences.tolist() == expected
        assert expected[0][-1] == eos
        last = output.stats.steps[-1] if output.stats.steps else None
        inside += last is not None and last.emitted == last.accepted > 0  # it ended on a drafted token
    assert inside > 0, "no end of text came inside an accepted path"


def test_drafting_goes_on_until_the_targets_positions_are_full() -> None:
    model = make_target(max_position_embeddings=40)
    inputs = prompt(3)
    drafter = medusa(model, memorised_heads(model, inputs, new_tokens=28))
    output = drafted(model, inputs, drafter, max_new_tokens=28)
    assert output.sequences.shape[1] == 40
    assert output.sequences.tolist() == plain(model, inputs, max_new_tokens=28)


def written(folder: Path, head: MedusaHead, format_name: str = "native", model: Any = None) -> Path:
    target = {} if model is None else fingerprint(model)
    formats.write(HeadCheckpoint("medusa", head.config, head.state_dict(), target), folder, format_name)
    return folder


@pytest.mark.parametrize("format_name", ["native", "medusa_v1", "vllm_medusa"])
def test_a_directory_of_heads_is_a_drafter(format_name: str, tmp_path: Path) -> None:
    path = written(tmp_path / "heads", shared_heads(1), format_name)
    output = drafted(shared_target(), prompt(1), f"{path}:budget=9,depth=3")
    assert output.sequences.tolist() == plain(shared_target(), prompt(1))
    assert output.stats.accepted > 0
    loaded: Any = load_drafter(f"{path}:budget=9,depth=3", shared_target())
    assert (loaded.policy.depth, loaded.policy.shape.num_nodes) == (3, 10)
    again: Any = load_drafter(path, shared_target())
    assert loaded.head is again.head, "read once for a target"


def test_heads_take_the_targets_dtype(tmp_path: Path) -> None:
    path = written(tmp_path / "heads", shared_heads(1))
    model = make_target().to(torch.bfloat16)
    loaded: Any = load_drafter(path, model)
    assert {p.dtype for p in loaded.head.parameters()} == {torch.bfloat16}


def test_chosen_tokens_are_drafted_as_the_targets_ids() -> None:
    model, inputs = shared_target(), prompt(3)
    whole = shared_heads(3)
    often = torch.tensor(sorted({token for row in plain(model, inputs) for token in row[12:]}))
    head = MedusaHead(replace(whole.config, vocab_size=len(often), token_map=True))
    rows = {f"lm_heads.{k}.weight": whole.lm_heads[k].weight[often] for k in range(4)}
    head.load_state_dict({**whole.state_dict(), **rows, "token_map": often})
    for options in ({}, {"grow": "best-first"}, {"children": "drawn"}):
        output = drafted(model, inputs, medusa(model, head, **options))
        assert output.sequences.tolist() == plain(model, inputs)
        assert output.stats.accepted > 0


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MedusaConfig(16, VOCAB, 2), "hidden size 16, the target has 32"),
        (MedusaConfig(32, VOCAB + 1, 2), "vocabulary 101, the target has 100"),
    ],
)
@pytest.mark.parametrize("format_name", ["native", "medusa_v1"])
def test_heads_of_another_target_are_refused(config: MedusaConfig, said: str, format_name: str, tmp_path: Path) -> None:
    with pytest.raises(DrafterMismatch, match=said):
        medusa(shared_target(), MedusaHead(config))
    path = written(tmp_path / "heads", MedusaHead(config), format_name)
    with pytest.raises(DrafterMismatch) as caught:
        load_drafter(path, shared_target())
    assert "\n" not in str(caught.value)


def test_heads_of_a_target_with_other_layers_are_refused_by_their_fingerprint(tmp_path: Path) -> None:
    path = written(tmp_path / "heads", shared_heads(1), model=make_target(num_hidden_layers=2))
    with pytest.raises(DrafterMismatch, match="num_layers 4"):
        load_drafter(path, shared_target())


def test_a_drafter_of_another_model_is_refused_even_where_the_sizes_agree() -> None:
    drafter = medusa(shared_target(), shared_heads(1))
    with pytest.raises(DrafterMismatch, match="states of another model"):
        drafted(make_target(seed=1), prompt(1), drafter)


def test_a_weight_file_can_be_named_as_the_drafter(tmp_path: Path) -> None:
    path = written(tmp_path / "heads", shared_heads(1), "medusa_v1") / "medusa_lm_head.pt"
    loaded: Any = load_drafter(f"{path}:budget=3,depth=3,width=1", shared_target())
    assert loaded.policy.is_chain


def test_a_rewritten_file_does_not_change_heads_that_are_in_use(tmp_path: Path) -> None:
    path = written(tmp_path / "heads", shared_heads(1))
    loaded: Any = load_drafter(path, shared_target())
    before = {name: tensor.clone() for name, tensor in loaded.head.state_dict().items()}
    file = path / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(size // 2)
        opened.write(b"\xff" * (size // 2))
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.head.state_dict().items())


def test_a_token_map_beyond_the_targets_vocabulary_is_refused() -> None:
    head = MedusaHead(MedusaConfig(32, 3, 2, token_map=True))
    assert head.token_map is not None
    head.token_map.copy_(torch.tensor([1, VOCAB, 3]))
    with pytest.raises(DrafterMismatch, match=f"guess token {VOCAB}"):
        medusa(shared_target(), head)


@pytest.mark.parametrize("options", ["depth=0", "budget=0", "grow=wild", "children=all", "colour=red", "width=0"])
def test_options_out_of_range_are_refused(options: str, tmp_path: Path) -> None:
    path = written(tmp_path / "heads", shared_heads(1))
    with pytest.raises(UnknownDrafter):
        load_drafter(f"{path}:{options}", shared_target())


def test_full_models_draft_for_the_model_inside_and_no_other(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, path = tmp_path / "base", tmp_path / "medusa-2"
    shared_target().save_pretrained(base)
    checkpoint = HeadCheckpoint("medusa", shared_heads(1).config, shared_heads(1).state_dict(), base=base)
    formats.write(checkpoint, path, "medusa_2")
    inside: Any = AutoModelForCausalLM.from_pretrained(path)
    output = drafted(inside, prompt(1), path)
    assert output.sequences.tolist() == plain(inside, prompt(1)) == plain(shared_target(), prompt(1))
    assert output.stats.accepted > 0
    with pytest.raises(DrafterMismatch, match="the target is that model"):
        load_drafter(path, shared_target())


LENGTH = 4


@cache
def three_tokens() -> Any:
    return make_target(vocab_size=3, hidden_size=8, bos_token_id=None, pad_token_id=None)


def medusa_on_tables(**options: Any) -> Propose:
    """The real drafter, whose heads see a random state in each context."""
    torch.manual_seed(5)
    head = MedusaHead(MedusaConfig(8, 3, 3)).double()
    for output in head.lm_heads:
        torch.nn.init.normal_(output.weight)  # type: ignore[arg-type]
    drafter = MedusaDrafter(Target(three_tokens()), head, **options)

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        generator = torch.Generator().manual_seed(len(context))
        state = torch.randn(1, 1, 8, dtype=torch.float64, generator=generator)
        drafter.observe(Committed([[0]], taps={drafter.taps[0]: state}))
        return drafter.propose(torch.tensor([0]), SamplingParams(do_sample=True), chooser, LENGTH)

    return propose


def distance(propose: Propose) -> float:
    tables = Tables.random(3, LENGTH)
    law = law_after_one_step(tables, propose, by_rule("auto"), length=LENGTH)
    return total_variation(law, PLAIN.target_law(tables, LENGTH))


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 3, "depth": 3, "width": 1},
        {"budget": 6, "depth": 3},
        {"budget": 5, "grow": "best-first"},
        {"budget": 3, "depth": 3, "width": 1, "children": "drawn"},
        {"budget": 4, "depth": 2, "children": "drawn"},
    ],
    ids=str,
)
def test_one_step_has_the_targets_law_exactly(options: dict[str, Any]) -> None:
    assert distance(medusa_on_tables(**options)) < 1e-12


def test_best_guesses_that_pass_for_draws_have_another_law() -> None:
    choose, laws = medusa_on_tables(budget=4, depth=2), []

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        tree = choose(tables, context, chooser)
        laws.append(tree)
        flat: Tensor = torch.zeros(1, tree.num_nodes, 3, dtype=torch.float64)
        return replace(tree, log_q=flat)

    assert distance(propose) > 0.01
    assert laws
