"""What is kept of verification: laws, where they stand, and how much of it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.api import generate
from specdec.context import Context
from specdec.drafter import Committed, Drafter
from specdec.errors import BadCheckpoint, BadRecipe
from specdec.sampling import Chooser, SamplingParams
from specdec.stats import DecodeStats
from specdec.train.bucket import BucketObjective, with_bucket
from specdec.train.divergence import DIVERGENCES, Laws, divergence
from specdec.train.passage import Passage, lay_out
from specdec.train.recorder import Recorder
from specdec.train.replay import ReplayBuffer
from specdec.train.replay_file import read_replay, write_replay
from specdec.train.stored_laws import StoredLaws
from specdec.tree import TokenTree
from tests.tiny import VOCAB, drafter_named, prompt, shared_target

torch.set_num_threads(1)


class Recording:
    """A drafter with a Recorder beside it; ends keep the passages."""

    def __init__(self, drafter: Drafter, recorder: Recorder) -> None:
        self.drafter, self.recorder = drafter, recorder
        self.taps = tuple(sorted({*drafter.taps, *recorder.taps}))
        self.passages: list[Passage] = []

    def reset(self, batch_size: int, context: Context) -> None:
        ends = [length - start for length, start in zip(context.lengths, context.starts, strict=True)]
        self.recorder.begin(ends)
        self.drafter.reset(batch_size, context)

    def observe(self, committed: Committed) -> None:
        self.recorder.observe(committed)
        self.drafter.observe(committed)

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        return self.drafter.propose(root, params, chooser, room)

    def select(self, rows: list[int]) -> None:
        self.passages += self.recorder.select(rows)
        self.drafter.select(rows)


def recorded(
    name: str, batch_size: int, *, top_k: int | None = None, row_length: int = 512, tap: bool = True, **options: Any
) -> list[Passage]:
    """Passages of one generation, rows in the order in which they ended."""
    taps = (shared_target().config.num_hidden_layers,) if tap else ()
    recording = Recording(drafter_named(name), Recorder(taps, top_k, row_length))
    inputs = prompt(batch_size)
    generate(shared_target(), **inputs, drafter=recording, max_new_tokens=24, **{"do_sample": False, **options})
    return recording.passages + recording.recorder.close()


@torch.no_grad()
def plain(passage: Passage) -> tuple[Tensor, Tensor]:
    """The target's own log-laws [n, V] and last states [n, D] along a passage that begins at position 0."""
    assert passage.first_position == 0
    output = shared_target()(passage.ids[None].long(), output_hidden_states=True)
    return output.logits[0].log_softmax(-1), output.hidden_states[-1][0]


def distance_at(passage: Passage, shift: int) -> float:
    """Largest difference of stored and true laws when law j is held against the text at start + j + shift."""
    here = torch.arange(len(passage.laws)) + passage.start + shift
    here = here[here < len(passage) - 1]
    return float((plain(passage)[0][here] - passage.laws.dense()[: len(here)]).abs().max())


# --- Where a law stands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["draft-model chain", "draft-model tree", "drawn tree", "lookup", "suffix"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_kept_law_is_the_targets_own_at_its_place_and_at_no_other(name: str, batch_size: int):
    passages = recorded(name, batch_size, do_sample=name == "drawn tree", tap=False)
    assert len(passages) == batch_size
    for passage in passages:
        assert len(passage) == passage.start + len(passage.laws) + 1
        assert distance_at(passage, 0) < 0.01, "fp16"
        assert min(distance_at(passage, -1), distance_at(passage, 1)) > 0.5, "off by one"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_laws_cover_every_generated_token_but_the_first(batch_size: int):
    for passage, padding in zip(recorded("draft-model chain", batch_size, eos_token_id=None), (0, 5, 2), strict=False):
        assert passage.start == 12 - padding
        assert len(passage.laws) in (23, 24), "24 tokens; the last step may have been cut short by the length limit"


def test_greedy_text_is_the_most_probable_token_of_the_law_one_column_before():
    for passage in recorded("draft-model tree", 3):
        laws, here = passage.laws.dense(), torch.arange(len(passage.laws)) + passage.start
        best, rows = laws.max(-1).values, torch.arange(len(laws))
        assert (best - laws[rows, passage.ids[here + 1].long()] < 0.01).all(), "fp16 may tie"
        assert (best - laws[rows, passage.ids[here].long()] > 1).any(), "the bug of an index too small"


def test_the_worked_example_lies_as_its_docstring_says():
    laws = StoredLaws.of(torch.eye(10)[[9, 2]] * 20, None)
    passage = Passage(torch.tensor([5, 6, 7, 8, 9, 2], dtype=torch.int32), 0, 3, laws, torch.tensor([False, True]))
    batch = lay_out([passage])
    assert batch.supervised[0].tolist() == [False, False, False, False, True, True]
    assert batch.places[0].tolist() == [-1, -1, -1, 0, 1, -1]
    assert batch.laws(1).argmax(-1).tolist() == batch.tokens(1).tolist() == [9, 2]
    assert batch.drafts(2)[0].tolist() == [False, False, True, True, False, False]
    assert batch.laws(2).argmax(-1).tolist() == batch.tokens(2).tolist() == [9, 2]
    rejected = lay_out([passage], only_rejected=True)
    assert rejected.supervised[0].tolist() == [False] * 5 + [True]
    assert rejected.laws(1).argmax(-1).tolist() == [2]


def test_padding_is_neither_read_nor_learned():
    """Rows of unequal length: a mask of ones over padding was a published implementation's bug."""
    passages = recorded("draft-model chain", 3, tap=False)
    together = lay_out(passages)
    assert len({len(passage) for passage in passages}) > 1
    for row, passage in enumerate(passages):
        alone = lay_out([passage])
        size = len(passage)
        assert not together.drafts(1)[row, size - 1 :].any()
        assert together.supervised[row, :size].tolist() == alone.supervised[0].tolist()
        assert (together.documents[row, size:] == -1).all()
    counts = [lay_out([passage]).num_supervised for passage in passages]
    assert together.num_supervised == sum(counts)
    rows = together.laws(1).split(counts)
    assert all(torch.equal(a, p.laws.dense()) for a, p in zip(rows, passages, strict=True))


def test_taps_are_the_states_at_their_own_tokens():
    layer = shared_target().config.num_hidden_layers
    for passage in recorded("draft-model tree", 3):
        states = passage.taps[layer]
        assert states.shape[0] == len(passage) - 1
        assert torch.allclose(states, plain(passage)[1][:-1], atol=1e-4)


def test_rejections_are_marked_where_a_drafted_token_lost():
    name = "draft-model chain"
    stats = DecodeStats()
    generate(shared_target(), **prompt(1), drafter=drafter_named(name), max_new_tokens=24, do_sample=False, stats=stats)
    steps = stats.steps
    ended = torch.tensor([step.emitted for step in steps]).cumsum(0) - 1
    lost = [int(at) for at, step in zip(ended, steps, strict=True) if step.accepted < step.tried]
    (passage,) = recorded(name, 1, tap=False)
    assert passage.rejected.nonzero()[:, 0].tolist() == lost
    assert 0 < len(lost) < len(steps)


def test_a_long_text_is_cut_into_passages_that_share_no_law():
    whole = recorded("draft-model chain", 1)[0]
    parts = recorded("draft-model chain", 1, row_length=16)
    assert len(parts) > 1
    assert all(len(part) <= 16 for part in parts)
    assert torch.equal(StoredLaws.joined([part.laws for part in parts]).dense(), whole.laws.dense())
    for part in parts:
        begin = part.first_position
        assert part.ids.tolist() == whole.ids[begin : begin + len(part)].tolist()
        tap = next(iter(part.taps))
        assert torch.equal(part.taps[tap], whole.taps[tap][begin : begin + len(part) - 1])
    assert torch.equal(torch.cat([part.rejected for part in parts]), whole.rejected)


def test_a_prompt_longer_than_a_passage_is_kept_as_far_as_it_fits():
    first = recorded("draft-model chain", 1, row_length=6)[0]
    assert first.first_position + len(first) > 12
    assert len(first) <= 6


def test_a_prompt_that_is_cached_already_gives_true_positions():
    inputs = prompt(1)
    output: Any = generate(
        shared_target(), **inputs, drafter="lookup", max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    ids = torch.cat([output.sequences, torch.tensor([[7, 8]])], 1)
    layer = shared_target().config.num_hidden_layers
    recording = Recording(drafter_named("draft-model chain"), Recorder((layer,), None, 512))
    generate(shared_target(), ids, attention_mask=torch.ones_like(ids), past_key_values=output.past_key_values,
             drafter=recording, max_new_tokens=8, do_sample=False)  # fmt: skip
    passage = recording.recorder.close()[0]
    assert passage.first_position > 0, "only the end of the prompt has run"
    assert passage.first_position + passage.start == ids.shape[1]
    with torch.no_grad():
        text = torch.cat([ids[0, : passage.first_position], passage.ids.long()])
        truth = shared_target()(text[None]).logits[0].log_softmax(-1)
    stands = torch.arange(len(passage.laws)) + ids.shape[1]
    assert (truth[stands] - passage.laws.dense()).abs().max() < 0.01


# --- Laws of which the top is kept --------------------------------------------------------------------------


def laws(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 50, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("top_k", [1, 7, 49, 50, 200, None])
def test_a_stored_law_has_its_top_tokens_and_the_mass_of_the_others(top_k: int | None):
    logits = laws()
    p, got = logits.softmax(-1), StoredLaws.of(logits, top_k).dense().softmax(-1)
    kept = p.topk(min(top_k or 50, 50), dim=-1)
    assert torch.allclose(got.gather(-1, kept.indices), kept.values, rtol=0.01, atol=1e-5)
    assert torch.allclose(got.sum(-1), torch.ones(6))
    assert got.argmax(-1).tolist() == p.argmax(-1).tolist()


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "ce"])
def test_a_filled_bucket_gives_value_and_gradient_of_the_bucket_as_one_outcome(name: str):
    draft = laws(seed=1).double().requires_grad_()
    stored = StoredLaws.of(laws(), 7)
    target = stored.dense().double()
    distance = divergence(name)
    kept = stored.tokens.long()  # type: ignore[union-attr]

    def as_one_outcome(log_law: Tensor) -> Tensor:
        others = log_law.scatter(-1, kept, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([log_law.gather(-1, kept), others], -1)

    filled = distance(Laws(draft, with_bucket(draft, target).double()))
    coarse = distance(Laws(as_one_outcome(draft.log_softmax(-1)), as_one_outcome(target.log_softmax(-1))))
    assert torch.allclose(filled, coarse, atol=1e-5)
    one, other = (torch.autograd.grad(value.sum(), draft)[0] for value in (filled, coarse))
    assert torch.allclose(one, other, atol=1e-5)
    assert (distance(Laws(draft, laws().double())) >= coarse - 0.01).all(), "a coarser law is never further away"


def test_renormalised_top_tokens_would_push_down_what_nothing_is_known_of():
    """Why there is a bucket: the draft has the right law already, and must not move."""
    logits = laws().requires_grad_()
    stored = StoredLaws.of(logits.detach(), 7)
    cut = logits.detach().masked_fill(stored.dense() == stored.dense().amin(-1, keepdim=True), -torch.inf)
    objective = BucketObjective()
    still = torch.autograd.grad(objective.term(1, logits, stored.dense()).total, logits)[0]
    moved = torch.autograd.grad(divergence("forward-kl")(Laws(logits, cut)).sum(), logits)[0]
    assert still.abs().max() < 0.005, "fp16"
    assert moved.abs().max() > 0.05


def test_whole_laws_give_the_same_term_with_and_without_a_bucket():
    draft, target = laws(seed=1), StoredLaws.of(laws(), None).dense()
    one, other = BucketObjective().term(1, draft, target), BucketObjective.__mro__[1]().term(1, draft, target)
    assert torch.allclose(one.losses, other.losses, atol=1e-5)
    assert one.alpha is not None
    assert torch.allclose(one.alpha, other.alpha, atol=1e-5)  # type: ignore[arg-type]


def test_cross_entropy_takes_its_label_from_the_kept_tokens():
    draft = torch.zeros(1, 50)
    draft[0, 40] = 30.0  # the bucket, filled as the draft spreads it, would be most probable there
    target = torch.full((1, 50), 0.0)
    target[0, 3] = 2.0
    term = BucketObjective("ce").term(1, draft, StoredLaws.of(target, 1).dense())
    assert float(term.losses) > 20


def test_laws_of_the_top_are_refused_at_another_temperature():
    with pytest.raises(BadRecipe, match="temperature 1"):
        BucketObjective(temperature=0.7)


# --- The buffer ---------------------------------------------------------------------------------------------


def passage(number: int, size: int = 10) -> Passage:
    count = 3
    stored = StoredLaws.of(torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(number)), 5)
    ids = torch.full((size,), number, dtype=torch.int32)
    return Passage(ids, number, size - count - 1, stored, torch.zeros(count, dtype=torch.bool), {}, f"topic {number}")


def names(passages: Any) -> list[int]:
    return [int(p.ids[0]) for p in passages]


@pytest.mark.parametrize("keep", ["newest", "reservoir"])
def test_the_buffer_never_holds_more_tokens_than_it_may(keep: Any):
    buffer = ReplayBuffer(95, keep)
    generator = random.Random(0)
    for number in range(60):
        buffer.add(passage(number, generator.randint(5, 20)))
        assert buffer.tokens <= 95
        assert buffer.nbytes == sum(p.nbytes for p in (*buffer.learned, *buffer.waiting))
        if number % 7 == 0:
            buffer.plan(steps=1, rows=4, share=0.5, seed=number)
    per_token = 4 + 3 / 5 * (5 * (2 + 4) + 2 + 1)  # id; 3 laws in 5 tokens at most: values, ids, rest, flag
    assert buffer.nbytes <= 95 * per_token


def test_a_row_that_is_cut_from_a_batch_does_not_hold_the_memory_of_the_others():
    for p in recorded("draft-model chain", 3, row_length=16, top_k=8):
        for tensor in (p.ids, p.laws.log_p, p.laws.tokens, p.rejected, *p.taps.values()):
            assert tensor is not None
            assert tensor.untyped_storage().nbytes() <= max(tensor.nbytes, 1)


def test_the_oldest_leave_and_those_that_wait_have_a_half_of_their_own():
    buffer = ReplayBuffer(60)
    for number in range(3):
        buffer.add(passage(number))
    buffer.plan(steps=1, rows=4, share=0.0, seed=0)
    for number in range(3, 7):
        buffer.add(passage(number))
    assert names(buffer.learned) == [0, 1, 2]
    assert names(buffer.waiting) == [4, 5, 6]
    buffer.plan(steps=1, rows=4, share=0.0, seed=0)
    assert names(buffer.learned) == [4, 5, 6]


def test_a_reservoir_keeps_every_passage_with_the_same_chance():
    """Ten of 50 stay, 400 times. Drawn without replacement the mean of 4000 numbers deviates by less than that of
    independent ones; five of those deviations come once in two million, and the seeds are fixed."""
    kept: list[int] = []
    for seed in range(400):
        buffer = ReplayBuffer(100, "reservoir", seed)
        for number in range(50):
            buffer.add(passage(number, 5))
            buffer.plan(steps=1, rows=1, share=0.0, seed=0)
        kept += names(buffer.learned)
    deviation = (50**2 / 12 / len(kept)) ** 0.5
    assert abs(sum(kept) / len(kept) - 24.5) < 5 * deviation


def test_a_plan_has_every_waiting_passage_and_the_share_of_old_ones():
    buffer = ReplayBuffer(10_000)
    for number in range(20):
        buffer.add(passage(number))
    first = buffer.plan(steps=2, rows=4, share=0.5, seed=1)
    assert {name for step in first for name in names(step)} == set(range(20))
    assert not buffer.waiting
    for number in range(20, 25):
        buffer.add(passage(number))
    second = buffer.plan(steps=2, rows=4, share=0.5, seed=2)
    for step in second:
        assert sum(name >= 20 for name in names(step)) == sum(name < 20 for name in names(step)) == 2
    assert {name for step in second for name in names(step) if name >= 20} == set(range(20, 25))
    assert buffer.plan(steps=2, rows=4, share=0.5, seed=3) == [], "nothing to learn from"


def test_the_same_seed_and_buffer_give_the_same_plan():
    plans = []
    for _ in range(2):
        buffer = ReplayBuffer(10_000)
        for number in range(9):
            buffer.add(passage(number))
        plans.append([names(step) for step in buffer.plan(steps=3, rows=4, share=0.5, seed=4)])
    assert plans[0] == plans[1]


@pytest.mark.parametrize(("tokens", "keep"), [(0, "newest"), (100, "oldest")])
def test_a_buffer_without_room_or_of_an_unknown_kind_is_refused(tokens: int, keep: Any):
    with pytest.raises(BadRecipe, match="replay buffer"):
        ReplayBuffer(tokens, keep)


@pytest.mark.parametrize("keep", ["newest", "reservoir"])
def test_a_buffer_comes_back_from_its_file_as_it_was(tmp_path: Any, keep: Any):
    buffer, other = ReplayBuffer(1000, keep), ReplayBuffer(1000, keep)
    for p in recorded("draft-model tree", 3, top_k=8):
        buffer.add(p)
    buffer.plan(steps=1, rows=1, share=0.0, seed=0)
    for p in recorded("draft-model tree", 1, top_k=8):
        buffer.add(p)
    write_replay(buffer, tmp_path / "replay.safetensors")
    read_replay(other, tmp_path / "replay.safetensors")
    assert (len(other.learned), len(other.waiting), other.added) == (3, 1, 4)
    for one, two in zip((*buffer.learned, *buffer.waiting), (*other.learned, *other.waiting), strict=True):
        assert torch.equal(one.ids, two.ids)
        assert torch.equal(one.laws.dense(), two.laws.dense())
        assert torch.equal(one.rejected, two.rejected)
        assert (one.start, one.first_position, one.topic) == (two.start, two.first_position, two.topic)
        assert all(torch.equal(states, two.taps[tap]) for tap, states in one.taps.items())
        assert buffer.key_of(one) == other.key_of(two)


def test_an_empty_buffer_comes_back_empty_and_a_broken_file_is_one_line(tmp_path: Any):
    buffer, file = ReplayBuffer(1000), tmp_path / "replay.safetensors"
    write_replay(buffer, file)
    read_replay(buffer, file)
    assert buffer.tokens == 0
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(BadCheckpoint, match="replay"):
        read_replay(buffer, file)


def test_a_generation_in_inference_mode_leaves_tensors_that_gradients_can_pass():
    with torch.inference_mode():
        p = recorded("draft-model chain", 1)[0]
    assert not any(tensor.is_inference() for tensor in (p.ids, p.laws.log_p, *p.taps.values()))
