"""Any drafter under any length policy: the same text, limits kept, and nothing run where nothing is to be drafted."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec.bench.fresh import FreshDrafter
from specdec.context import Context
from specdec.demo import draft_path, target_path
from specdec.drafter import Committed, Drafter
from specdec.drafters.block import BlockDrafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.eagle import EagleDrafter
from specdec.drafters.early_exit import EarlyExitDrafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.kangaroo import KangarooDrafter
from specdec.drafters.limited import LimitedDrafter, acceptance_labels
from specdec.drafters.load import WORDS, load_drafter
from specdec.drafters.lookup import LookupDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.sequential import SequentialDrafter
from specdec.errors import UnknownDrafter
from specdec.grow.fixed import FixedGrowth
from specdec.grow.shape import chain
from specdec.heads.dflash import DFlashConfig, DFlashHead
from specdec.heads.hydra import HydraConfig, HydraHead
from specdec.heads.kangaroo import KangarooConfig, KangarooHead
from specdec.heads.layer import LayerConfig
from specdec.heads.medusa import MedusaConfig, MedusaHead
from specdec.lengths.acceptance_head import FILE, AcceptanceHead, AcceptanceLength, AcceptanceRecorder
from specdec.lengths.adaedl import AdaedlLength
from specdec.lengths.confidence import AdaptiveConfidenceLength, ConfidenceLength
from specdec.lengths.constant import ConstantLength
from specdec.lengths.goodput import GoodputLength
from specdec.lengths.heuristic import HeuristicLength
from specdec.lengths.named import LENGTHS, options_of
from specdec.lengths.policy import LengthPolicy, Step
from specdec.lengths.thompson import ThompsonLength
from specdec.probe import target_of
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree
from tests.drafters.eagle_heads import random_head
from tests.tiny import perturbed, prompt, shared_draft, shared_target

NEW_TOKENS = 24


class ByShare(AcceptanceHead):
    """Not trained: trusts the draft's own probability."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 4.0 * inputs[..., 0] + 3.0


class Rising(LengthPolicy):
    """Limits of every kind in turn, other ones for every row, 0 among them."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0

    def limits(self, rows: int, most: int) -> list[int]:
        self.turn += 1
        return [(self.turn + 2 * row) % (most + 1) for row in range(rows)]


POLICIES: dict[str, Callable[[], LengthPolicy]] = {
    "constant": lambda: ConstantLength(levels=2),
    "heuristic": lambda: HeuristicLength(start=1),
    "confidence": lambda: ConfidenceLength(stop_below=0.5),
    "path": lambda: ConfidenceLength(stop_below=0.3, of="path"),
    "adaptive confidence": AdaptiveConfidenceLength,
    "adaedl": lambda: AdaedlLength(stop_below=0.1, at_least=0),
    "acceptance": lambda: AcceptanceLength(weights=ByShare(), stop_above=0.5),
    "thompson": ThompsonLength,
    "goodput": GoodputLength,
    "recorder": AcceptanceRecorder,
    "rising": Rising,
}


def draft_model(**options: Any) -> DraftModelDrafter:
    return DraftModelDrafter(target_of(shared_draft()), **options)


def layer() -> LayerConfig:
    return LayerConfig.of(shared_target().config)


def seeded(head: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.15)
    return head.eval()


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "lookup": lambda: LookupDrafter(),
    "draft model": lambda: draft_model(depth=4),
    "draft model, tree": lambda: draft_model(depth=4, budget=10),
    "draft model, drawn": lambda: draft_model(depth=3, budget=7, children="drawn"),
    "draft model, eagle2": lambda: draft_model(depth=4, budget=8, width=3, grow="eagle2"),
    "draft model, dyspec": lambda: draft_model(depth=4, budget=8, width=3, grow="dyspec"),
    "draft model, calibrated": lambda: draft_model(depth=4, budget=8, width=3, grow="calibrated"),
    "early exit": lambda: EarlyExitDrafter(target_of(shared_target()), layer=3, depth=4),
    "early exit, opt-tree": lambda: EarlyExitDrafter(
        target_of(shared_target()), layer=3, depth=4, budget=8, width=3, grow="opt-tree"
    ),
    "eagle3": lambda: EagleDrafter(
        target_of(shared_target()), random_head("eagle3", target_of(shared_target()), draft_vocab_size=40)
    ),
    "medusa": lambda: MedusaDrafter(target_of(shared_target()), seeded(MedusaHead(MedusaConfig(32, 100, 3)))),
    "dflash": lambda: BlockDrafter(
        target_of(shared_target()),
        seeded(
            DFlashHead(
                DFlashConfig.of(shared_target().config, mask_token_id=0, num_layers=1, block_size=4, taps=(1, 4))
            )
        ),
    ),
    "hydra": lambda: SequentialDrafter(target_of(shared_target()), seeded(HydraHead(HydraConfig(32, 100)))),
    "kangaroo": lambda: KangarooDrafter(
        target_of(shared_target()), seeded(KangarooHead(KangarooConfig(layer(), exit_layer=2))), budget=8
    ),
}  # fmt: skip


def plain(**options: Any) -> list[list[int]]:
    return shared_target().generate(**prompt(3), max_new_tokens=NEW_TOKENS, do_sample=False, **options).tolist()


def speculative(drafter: Drafter, batch_size: int = 3, **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
    return specdec.generate(
        shared_target(), **prompt(batch_size), drafter=drafter, return_dict_in_generate=True, **options
    )


HEADS = ("eagle3", "medusa", "dflash", "hydra", "kangaroo")
PAIRS = [
    (name, policy)
    for name in DRAFTERS
    for policy in POLICIES
    if name not in HEADS or policy in ("confidence", "adaedl", "rising", "recorder")  # one of each way to decide
]


@pytest.mark.parametrize(("name", "policy"), PAIRS)
def test_greedy_text_of_a_ragged_batch_is_that_of_plain_generate(name: str, policy: str) -> None:
    length = POLICIES[policy]()
    if name == "lookup" and length.stops:
        with pytest.raises(UnknownDrafter, match="draft laws"):
            LimitedDrafter(DRAFTERS[name](), length)
        return
    expected = plain()
    eos = expected[0][18]  # rows end at different times
    drafter = LimitedDrafter(DRAFTERS[name](), length)
    assert speculative(drafter).sequences.tolist() == expected
    assert speculative(drafter, eos_token_id=eos).sequences.tolist() == plain(eos_token_id=eos)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["draft model", "draft model, tree", "draft model, eagle2", "early exit"])
def test_with_a_seed_chosen_children_give_the_tokens_of_plain_sampling(policy: str, name: str) -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.2, "max_new_tokens": NEW_TOKENS}
    drafter = LimitedDrafter(DRAFTERS[name](), POLICIES[policy]())
    torch.manual_seed(5)
    expected = shared_target().generate(**prompt(1), **options)
    torch.manual_seed(5)
    assert speculative(drafter, 1, **options).sequences.equal(expected)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["draft model, drawn", "draft model, dyspec"])
def test_drawn_children_are_served_by_the_rules_for_them(policy: str, name: str) -> None:
    torch.manual_seed(0)
    stats = speculative(LimitedDrafter(DRAFTERS[name](), POLICIES[policy]()), do_sample=True).stats
    assert stats.drawn
    assert stats.new_tokens == 3 * NEW_TOKENS


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_ever_accepted_of_a_drafter_that_is_always_wrong(policy: str) -> None:
    """The policies go on, and the text stays; those that learn draft less than at first."""
    wrong = perturbed(shared_target(), amount=3.0)
    drafter = LimitedDrafter(DraftModelDrafter(target_of(wrong), depth=4), POLICIES[policy]())
    output = speculative(drafter)
    assert output.sequences.tolist() == plain()
    if policy == "heuristic":
        assert [step.drafted for step in output.stats.steps][-6:-3] == [1, 1, 1]


@pytest.mark.parametrize("make", [LookupDrafter, lambda: draft_model(depth=4), DRAFTERS["early exit"]])
def test_length_0_is_plain_decoding_without_a_draft_forward(make: Callable[[], Drafter]) -> None:
    drafter = make()
    asked: list[int] = []
    inner, propose = drafter, drafter.propose
    inner.propose = lambda *arguments: asked.append(1) or propose(*arguments)  # type: ignore[method-assign]
    forwards: list[int] = []
    hook = shared_draft().model.register_forward_pre_hook(lambda *_: forwards.append(1))
    output = speculative(LimitedDrafter(drafter, ConstantLength(levels=0)))
    hook.remove()
    assert not asked
    assert not forwards
    assert output.sequences.tolist() == plain()
    assert output.stats.drafted == 0
    assert output.stats.target_calls == NEW_TOKENS


def test_once_all_rows_have_stopped_the_draft_model_is_not_run_again() -> None:
    forwards: list[int] = []
    hook = shared_draft().model.register_forward_pre_hook(lambda *_: forwards.append(1))
    never = LimitedDrafter(draft_model(depth=4), ConfidenceLength(stop_below=1.0))
    steps = speculative(never, 1).stats.target_calls - 1
    stopped, forwards[:] = len(forwards), []
    before = LimitedDrafter(draft_model(depth=4), AdaedlLength(stop_below=1.0, at_least=0, aim=0.0))
    output = speculative(before, 1)
    hook.remove()
    assert stopped in (steps - 1, steps)  # the forward that reads the root; none where no room is left
    assert output.stats.drafted == 0
    assert len(forwards) == output.stats.target_calls - 2


def grown(drafter: LimitedDrafter, room: int, rows: int = 3) -> TokenTree:
    torch.manual_seed(1)
    drafter.reset(rows, Context(target_of(shared_target())))
    drafter.observe(Committed([[5, 6, 7 + row] for row in range(rows)]))
    with torch.no_grad():
        return drafter.propose(torch.tensor([9, 40, 77][:rows]), SamplingParams(), Chooser(), room)


class Unequal(LengthPolicy):
    def limits(self, rows: int, most: int) -> list[int]:
        return [1, 0, 3][:rows]


@pytest.mark.parametrize("name", ["draft model", "draft model, tree", "draft model, eagle2", "draft model, dyspec"])
def test_rows_keep_to_limits_of_their_own(name: str) -> None:
    tree = grown(LimitedDrafter(DRAFTERS[name](), Unequal()), 4)
    depths = [max(shape.depths) for shape in tree.shapes]
    assert depths[:2] == [1, 0]
    assert depths[2] == 3 if "tree" in name or name == "draft model" else 1 < depths[2] <= 3


@pytest.mark.parametrize("policy", POLICIES)
def test_the_room_comes_before_the_length(policy: str) -> None:
    for name in ("draft model", "draft model, tree"):
        assert grown(LimitedDrafter(DRAFTERS[name](), POLICIES[policy]()), 1).depth <= 1
    drafter = LimitedDrafter(draft_model(depth=4), POLICIES[policy]())
    assert speculative(drafter, max_new_tokens=2).sequences.shape[1] == prompt(3)["input_ids"].shape[1] + 2


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_min_confidence_is_a_confidence_of_the_path(share: float) -> None:
    by_option = draft_model(depth=4, budget=10, min_confidence=share)
    by_length = LimitedDrafter(draft_model(depth=4, budget=10), ConfidenceLength(stop_below=share, of="path"))
    steps = [speculative(drafter).stats.steps for drafter in (by_option, by_length)]
    assert steps[0] == steps[1]
    assert len({step.drafted for step in steps[0]}) > 1


def test_kangaroos_confidence_is_one_of_the_last_token() -> None:
    target = target_of(shared_target())
    head = seeded(KangarooHead(KangarooConfig(layer(), exit_layer=2)))
    by_option = KangarooDrafter(target, head, confidence=0.3)
    by_length = LimitedDrafter(KangarooDrafter(target, head, confidence=0.0), ConfidenceLength(stop_below=0.3))
    assert speculative(by_option).stats.steps == speculative(by_length).stats.steps


class Watching(LengthPolicy):
    """Keeps what it is shown."""

    stops = watches_tokens = wants_labels = True

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def observe(self, step: Step) -> None:
        self.steps.append(step)


def test_policies_see_what_was_accepted_and_how_likely_each_token_was() -> None:
    watching = Watching()
    stats = speculative(LimitedDrafter(draft_model(depth=4, budget=10), watching), 1).stats
    assert len(watching.steps) == len(stats.steps)
    for step, record in zip(watching.steps[:-1], stats.steps[:-1], strict=True):
        (row,) = step.rows
        assert row is not None
        assert (row.accepted, row.tried) == (record.accepted, record.tried)
        assert step.nodes == record.drafted
        assert step.verify_seconds > 0
        if record.drafted:
            assert step.draft_seconds > 0
            assert step.tokens is not None
            assert sum(accepted for _, accepted in row.tokens) == record.accepted
            assert step.labels is not None
            accepted = [node for node, fate in row.tokens if fate]
            rejected = [node for node, fate in row.tokens if not fate]
            assert bool(step.labels[0, accepted].all())
            assert not bool(step.labels[0, rejected].any())  # temperature 0
            below_root = [n for n, parent in enumerate(step.tokens.parents[0].tolist()) if n and parent == 0]
            shares = step.tokens.shares[0, below_root]
            assert bool((shares.diff() <= 0).all())
            assert 0 < float(shares.sum()) <= 1.0001


def test_labels_are_the_chances_of_acceptance() -> None:
    root = torch.tensor([1])
    logits, log_q = torch.tensor([[[0.1, 0.6, 0.3]] * 3]).log(), torch.tensor([[[0.5, 0.3, 0.2]] * 3]).log()
    tree = TokenTree.of_chains(root, [[0, 1]])
    sampling = SamplingParams(do_sample=True)
    drawn = TokenTree(tree.tokens, tree.shapes, log_q)
    torch.testing.assert_close(acceptance_labels(tree, logits, sampling)[0, 1:], torch.tensor([0.1, 0.6]))
    torch.testing.assert_close(acceptance_labels(drawn, logits, sampling)[0, 1:], torch.tensor([0.2, 1.0]))
    assert acceptance_labels(tree, logits, SamplingParams())[0, 1:].tolist() == [0.0, 1.0]


def test_rows_in_which_another_drafter_was_verified_teach_nothing() -> None:
    watching = Watching()
    limited = LimitedDrafter(draft_model(depth=4), watching)
    limited.reset(2, Context(target_of(shared_target())))
    limited.observe(Committed([[5, 6], [5, 6]]))
    with torch.no_grad():
        ours = limited.propose(torch.tensor([7, 8]), SamplingParams(), Chooser(), 4)
    token = int(ours.tokens[1, 1])
    other = TokenTree.of_chains(torch.tensor([7, 8]), [ours.tokens[0, 1:3].tolist(), [(token + 1) % 100]])
    limited.observe(Committed([[7], [8]], [[0], [0]], other))
    first, second = watching.steps[0].rows
    assert first is not None
    assert (first.drafted, first.accepted, first.tried) == (2, 0, 1)
    assert second is None


@pytest.mark.parametrize("policy", POLICIES)
def test_under_a_hybrid_the_second_drafter_may_be_limited(policy: str) -> None:
    drafter = HybridDrafter(LookupDrafter(), LimitedDrafter(draft_model(depth=3), POLICIES[policy]()))
    assert speculative(drafter).sequences.tolist() == plain()


@pytest.mark.parametrize(("carry_over", "same"), [(False, True), (True, False)])
def test_every_generation_begins_anew_unless_asked(carry_over: bool, same: bool) -> None:
    drafter = LimitedDrafter(draft_model(depth=6), HeuristicLength(start=6, carry_over=carry_over))
    first, second = (speculative(drafter, 1, max_new_tokens=7).stats.steps for _ in range(2))
    assert (first == second) is same


def test_another_length_takes_the_place_of_the_first() -> None:
    once = LimitedDrafter(draft_model(depth=4), ConstantLength(levels=1))
    twice = LimitedDrafter(once, ConstantLength(levels=3))
    assert isinstance(twice.drafter, DraftModelDrafter)
    assert grown(twice, 9).depth == 3
    assert isinstance(twice.growth and twice.growth.growth, FixedGrowth)


@pytest.mark.parametrize("policy", [*LENGTHS])
def test_a_limited_drafter_can_begin_anew_for_every_question(policy: str) -> None:
    options: dict[str, Any] = {"weights": AcceptanceHead()} if policy == "acceptance" else {}
    drafter = LimitedDrafter(draft_model(depth=4), LENGTHS[policy](**options))
    copy = FreshDrafter(policy, drafter).copy()
    assert speculative(copy).sequences.tolist() == plain()
    pickle.dumps(drafter.length)


# --- By name ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_target() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(target_path()).eval()


@pytest.mark.parametrize(
    ("spec", "kind", "values"),
    [
        ("demo-draft:depth=8,length=adaedl,stop_below=0.25", AdaedlLength, {"start": 0.25}),
        ("demo-draft:length=heuristic,start=3,carry_over=true", HeuristicLength, {"start": 3, "carry_over": True}),
        ("demo-draft:length=confidence,of=path,stop-below=0.2", ConfidenceLength, {"of": "path", "threshold": 0.2}),
        ("demo-draft:length=thompson,seed=4,budget=9", ThompsonLength, {"seed": 4}),
        ("early-exit:length=constant,levels=1", ConstantLength, {"levels": 1}),
        ("lookup:tokens=5,length=goodput,memory=50", GoodputLength, {"memory": 50}),
        (f"{draft_path()}:length=adaptive-confidence,window=50", AdaptiveConfidenceLength, {"start": 0.4}),
    ],
)
def test_a_name_says_drafter_and_length(demo_target: Any, spec: str, kind: type, values: dict[str, Any]) -> None:
    drafter = load_drafter(spec, demo_target)
    assert isinstance(drafter, LimitedDrafter)
    assert type(drafter.length) is kind
    for name, value in values.items():
        assert getattr(drafter.length, name) == value
    assert load_drafter(drafter, demo_target) is drafter


def test_none_is_no_length_and_hybrids_limit_the_drafter_they_name(demo_target: Any) -> None:
    assert isinstance(load_drafter("demo-draft:length=none", demo_target), DraftModelDrafter)
    hybrid = load_drafter("suffix+demo-draft:length=constant", demo_target)
    assert isinstance(hybrid, HybridDrafter)
    assert isinstance(hybrid.second, LimitedDrafter)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("demo-draft:length=long", "there is no length 'long'"),
        ("demo-draft:length=constant,stop_below=0.3", "length=constant has no option 'stop_below'; it has: levels"),
        ("demo-draft:length=constant,levels=many", "levels='many' is not of type int"),
        ("demo-draft:levels=3", "has no option 'levels'"),
        ("lookup:length=adaedl", "draft laws"),
        ("demo-draft:length=acceptance", "needs weights=FILE"),
        ("demo-draft:length=goodput,costs=/nowhere.json", "nowhere.json"),
    ],
)
def test_what_a_name_gets_wrong_is_said_in_one_line(demo_target: Any, spec: str, says: str) -> None:
    with pytest.raises(specdec.SpecdecError, match=says) as refused:
        load_drafter(spec, demo_target)
    assert "\n" not in str(refused.value)


def test_a_drafter_directory_may_name_a_length_and_hold_its_head(demo_target: Any, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(draft_path(), tmp_path / "draft")
    file = tmp_path / "draft" / "drafter.json"
    described = json.loads(file.read_text())
    described["options"] = {"depth": "6", "length": "acceptance", "stop_above": "0.2"}
    file.write_text(json.dumps(described))
    with pytest.raises(UnknownDrafter, match="needs weights=FILE"):
        load_drafter(tmp_path / "draft", demo_target)
    AcceptanceHead().save(tmp_path / "draft" / FILE)
    drafter = load_drafter(tmp_path / "draft", demo_target)
    assert isinstance(drafter, LimitedDrafter)
    assert isinstance(drafter.length, AcceptanceLength)
    assert drafter.length.stop_above == 0.2
    assert drafter._depth() == 6
    other = load_drafter(f"{tmp_path / 'draft'}:length=constant,levels=2", demo_target)
    assert isinstance(other, LimitedDrafter)
    assert isinstance(other.length, ConstantLength)
    assert isinstance(load_drafter(f"{tmp_path / 'draft'}:length=none", demo_target), DraftModelDrafter)


def test_options_of_lengths_and_of_drafters_have_different_names() -> None:
    import inspect

    from specdec.drafters.load import HEAD_DRAFTERS

    ours = {option for word in LENGTHS for option in options_of(word)}
    for make in (*WORDS.values(), *HEAD_DRAFTERS.values()):
        assert not ours & set(inspect.signature(make).parameters)


def test_a_chain_is_as_deep_as_its_length() -> None:
    assert grown(LimitedDrafter(draft_model(shape=chain(6)), ConstantLength(levels=5)), 9).depth == 5
