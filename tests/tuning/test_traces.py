"""Traces: what they tell of a shape is what decoding with that shape does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specdec.api import generate
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.load import load_drafter
from specdec.errors import SpecdecError
from specdec.grow.accuracy import AcceptanceCounts
from specdec.grow.shape import Shape, best_shape, chain, shape_of
from specdec.probe import target_of
from specdec.sampling import SamplingParams
from specdec.stats import DecodeStats
from specdec.tree import topology
from specdec.tuning.traces import Step, Trace, accepted_nodes, traced
from specdec.tuning.tune import rank_paths, widest_shape
from tests.tiny import perturbed, prompt, shared_draft, shared_target

CAP = 40
WIDEST = widest_shape(4, 10)
SHAPES = {
    "chain of 1": chain(1),
    "chain of 4": chain(4),
    "tree of 6": best_shape(6, 3),
    "tree of 10": best_shape(10, 4),
}


def decoded(shape: Shape, ids: torch.Tensor, **more: Any) -> DecodeStats:
    stats = DecodeStats()
    drafter = DraftModelDrafter(target_of(shared_draft()), shape=shape)
    mask = torch.ones_like(ids)
    generate(shared_target(), ids, drafter=drafter, stats=stats, max_new_tokens=CAP, attention_mask=mask, **more)
    return stats


def text_of(ids: torch.Tensor, **more: Any) -> list[int]:
    output: Any = generate(shared_target(), ids, drafter=None, max_new_tokens=CAP, attention_mask=torch.ones_like(ids),
                           **more)  # fmt: skip
    return output[0, ids.shape[1] :].tolist()


def trace_of(ids: torch.Tensor, text: list[int], counts: AcceptanceCounts | None = None, **params: Any) -> Trace:
    drafter = DraftModelDrafter(target_of(shared_draft()), shape=WIDEST)
    sampling = SamplingParams(**params)
    return traced(target_of(shared_target()), drafter, ids[0].tolist(), text, CAP, sampling, counts)


@pytest.mark.parametrize("name", SHAPES)
def test_a_trace_tells_every_step_of_decoding_with_a_part_of_its_tree(name: str):
    ids = prompt(1)["input_ids"]
    steps = list(trace_of(ids, text_of(ids)).steps(SHAPES[name]))
    real = decoded(SHAPES[name], ids).steps
    assert [(step.nodes, step.emitted) for step in steps] == [(step.drafted, step.emitted) for step in real]
    assert [step.context for step in steps] == [
        ids.shape[1] + sum(s.emitted for s in real[:n]) for n in range(len(real))
    ]
    assert sum(step.emitted for step in steps) == CAP - 1


def test_it_does_so_for_sampling_with_a_seed_and_for_an_end_of_text():
    ids = prompt(1)["input_ids"]
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    torch.manual_seed(5)
    text = text_of(ids, **sampling)
    end = text[17]
    torch.manual_seed(5)
    short = text_of(ids, eos_token_id=end, **sampling)
    assert len(short) < CAP
    steps = list(trace_of(ids, short, do_sample=True).steps(chain(4)))
    torch.manual_seed(5)
    real = decoded(chain(4), ids, eos_token_id=end, **sampling).steps
    assert [(step.nodes, step.emitted) for step in steps] == [(step.drafted, step.emitted) for step in real]


def test_a_wider_tree_than_was_traced_accepts_no_less_than_is_told():
    ids = prompt(1)["input_ids"]
    narrow = DraftModelDrafter(target_of(shared_draft()), shape=chain(4))
    trace = traced(target_of(shared_target()), narrow, ids[0].tolist(), text_of(ids), CAP)
    told = list(trace.steps(SHAPES["tree of 10"]))
    assert len(told) >= len(decoded(SHAPES["tree of 10"], ids).steps)


@pytest.mark.parametrize("spec", ["early-exit:layer=3,depth=2,budget=5", "recycling", "lookup"])
def test_drafters_that_read_the_targets_states_follow_a_trace_too(spec: str):
    ids = prompt(1)["input_ids"]
    drafter = load_drafter(spec, shared_target())
    assert drafter is not None
    trace = traced(target_of(shared_target()), drafter, ids[0].tolist(), text_of(ids), CAP)
    assert len(trace.paths) == CAP - 1
    assert any(trace.paths), "something was accepted"


@pytest.mark.parametrize("spec", ["draft", "early-exit:layer=3,depth=2,budget=5"])
def test_scoring_roots_alone_gives_the_same_trace(spec: str):
    ids = prompt(1)["input_ids"]
    text, target = text_of(ids)[:12], target_of(shared_target())
    traces = []
    for roots_only in (False, True):
        drafter: Any = (
            DraftModelDrafter(target_of(shared_draft()), shape=WIDEST)
            if spec == "draft"
            else load_drafter(spec, shared_target())
        )
        traces.append(traced(target, drafter, ids[0].tolist(), text, CAP, roots_only=roots_only))
    assert traces[0] == traces[1]
    assert any(traces[0].paths), "nothing accepted would show nothing"


def test_counts_are_those_of_the_traced_positions():
    ids = prompt(1)["input_ids"]
    counts = AcceptanceCounts(4, 16)
    trace = trace_of(ids, text_of(ids), counts)
    assert counts.hits.sum() == sum(map(len, trace.paths))
    assert counts.trials[0, 0] == CAP - 1, "each position with a token behind it is one trial"


def test_drawn_children_are_refused():
    ids = prompt(1)["input_ids"]
    drafter = DraftModelDrafter(target_of(perturbed(shared_target())), children="drawn")
    with pytest.raises(SpecdecError, match="chosen"):
        traced(target_of(shared_target()), drafter, ids[0].tolist(), text_of(ids), CAP, SamplingParams(do_sample=True))


def test_steps_by_hand():
    trace = Trace(prompt=5, paths=((0, 0, 1), (), (0,), (1,), ()), cap=6)
    tree = shape_of([[0], [1], [0, 0]])
    # (0, 0) of (0, 0, 1) is in the tree: 3 tokens from position 0; (1,) is: 2 tokens from position 3, the text's end.
    assert list(trace.steps(tree)) == [Step(5, 3, 2, 3), Step(8, 2, 1, 2)]
    assert [step.emitted for step in trace.steps(chain(1))] == [2, 2, 1]


def test_accepted_nodes_by_hand():
    shape = topology((-1, 0, 0, 1, 3))
    assert accepted_nodes(shape, [9, 5, 6, 7, 8], [5, 7, 1]) == [1, 3]
    assert accepted_nodes(shape, [9, 5, 6, 7, 8], [6, 7]) == [2]
    assert accepted_nodes(shape, [9, 5, 6, 7, 8], []) == []


def test_the_widest_tree_holds_chains_and_all_default_trees_of_its_budget():
    paths = {tuple(path) for path in rank_paths(widest_shape(6, 24))}
    for shape in (chain(6), best_shape(24, 6), best_shape(24, 3)):
        assert paths.issuperset(map(tuple, rank_paths(shape)))
