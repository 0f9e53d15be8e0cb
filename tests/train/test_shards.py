"""Shards: parts and whole are the same module, and what one optimizer has learned another one goes on with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from specdec.errors import BadRecipe
from specdec.train.loop_settings import LoopSettings
from specdec.train.on_policy import MixedSource, TextShares, Writing
from specdec.train.order import Order
from specdec.train.shards import Shards, load_moments, whole_state
from tests.tiny import make_target
from tests.train.test_loop import ends_before_a_poisoned_step
from tests.train.toy import make_loop


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # type: ignore
    yield
    torch.distributed.destroy_process_group()


class Outermost(nn.Module):
    """What the loop wraps around a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, ids: Tensor) -> Tensor:
        """A loss."""
        return self.module(input_ids=ids).logits.logsumexp(-1).mean()


IDS = torch.arange(12).view(2, 6) + 5


def learn(outermost: nn.Module, module: nn.Module, steps: int, moments: Any = None) -> tuple[list[float], Any]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    if moments is not None:
        load_moments(optimizer, moments)
    losses = []
    for _ in range(steps):
        loss = outermost(IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, whole_state(optimizer.state_dict())


def test_parts_learn_what_the_whole_learns_and_go_on_from_its_moments(group: None) -> None:
    draft = cast(nn.Module, make_target(num_hidden_layers=2, tie_word_embeddings=True))
    plain = copy.deepcopy(draft)
    expected, moments = learn(Outermost(plain), plain, 3)
    between = {name: weight.clone() for name, weight in plain.state_dict().items()}
    later, _ = learn(Outermost(plain), plain, 2, copy.deepcopy(moments))

    shards = Shards(draft, torch.device("cpu"), 1)
    outermost = Outermost(shards.module)
    shards.spread(outermost)
    assert all(isinstance(part, DTensor) for part in shards.module.parameters())
    losses, gathered = learn(outermost, shards.module, 3)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert gathered["state"].keys() == moments["state"].keys()
    for index, values in moments["state"].items():
        for name, value in values.items():
            ours = gathered["state"][index][name]
            assert type(ours) is Tensor
            assert torch.allclose(ours, value, atol=1e-7)

    assert not torch.allclose(draft.state_dict()["lm_head.weight"], between["lm_head.weight"])  # not gathered yet
    shards.gather()
    state = draft.state_dict()
    assert state.keys() == between.keys()
    assert all(torch.allclose(state[name], between[name], atol=1e-6) for name in state)
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()  # still tied

    fresh = Shards(make_target(num_hidden_layers=2, tie_word_embeddings=True, seed=9), torch.device("cpu"), 1)
    outermost = Outermost(fresh.module)
    fresh.spread(outermost)
    fresh.whole.load_state_dict(between)
    fresh.scatter()
    assert learn(outermost, fresh.module, 2, moments)[0] == pytest.approx(later, rel=1e-6)


def test_weights_without_their_moments_would_be_noticed() -> None:
    plain = cast(nn.Module, make_target(num_hidden_layers=2))
    _, moments = learn(Outermost(plain), plain, 3)
    forgetful = copy.deepcopy(plain)
    assert learn(Outermost(plain), plain, 2, moments)[0] != pytest.approx(
        learn(Outermost(forgetful), forgetful, 2)[0], rel=1e-6
    )


@pytest.fixture
def alone(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one process may be divided: everything takes the way through shards."""
    monkeypatch.setattr(LoopSettings, "check", lambda _self, _processes: None)


def losses(folder: Path, stop: int = 0, **settings: Any) -> list[float]:
    """Of a run's steps, broken off after one of them or not."""
    reports: list[Any] = []
    loop = make_loop(folder, reports=reports, steps=6, **settings)
    loop.report = lambda report: (reports.append(report), report.step == stop and loop._stop())[0]
    loop.run()
    return [report.loss for report in reports]


def test_a_gradient_in_shards_that_is_no_number_ends_the_run(alone: None, tmp_path: Path) -> None:
    ends_before_a_poisoned_step(tmp_path, fsdp=True)


def test_a_loop_in_shards_learns_saves_and_goes_on_as_a_whole_one(alone: None, tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain", rows_at_once=2)
    assert losses(tmp_path / "shards", rows_at_once=2, fsdp=True) == pytest.approx(plain, rel=1e-6)
    broken = losses(tmp_path / "broken", stop=4, rows_at_once=2, fsdp=True)
    assert len(broken) == 4
    broken += losses(tmp_path / "broken", rows_at_once=2, fsdp=True)
    assert broken == losses(tmp_path / "again", rows_at_once=2, fsdp=True)
    for name in ("training.safetensors", "optimizer.pt"):
        whole, again, gone_on = (tmp_path / run / "latest" / name for run in ("plain", "again", "broken"))
        assert again.read_bytes() == gone_on.read_bytes()
        assert again.stat().st_size == whole.stat().st_size
    ours, theirs = (load_file(tmp_path / run / "latest" / "training.safetensors") for run in ("shards", "plain"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


def test_what_learns_beside_its_module_is_refused_and_not_left_untrained(alone: None, tmp_path: Path) -> None:
    loop = make_loop(tmp_path, fsdp=True)
    learning: Any = loop._learning
    learning.terms = loop.trainable.terms  # with the whole module
    with pytest.raises(BadRecipe, match="linears learns with weights beside its own module; leave --fsdp out"):
        loop.run()


def test_one_process_has_nobody_to_share_with() -> None:
    settings = LoopSettings(1, rows_at_once=4, fsdp=True)
    with pytest.raises(BadRecipe, match="choose --processes 2 or more"):
        settings.check(1)
    settings.check(2)


def test_weights_are_gathered_for_rows_that_the_draft_writes_and_no_others() -> None:
    order = Order((10,) * 8, 20, 0)

    def reads(shares: TextShares, *, speculative: bool = False) -> bool:
        pens: Any = None
        return MixedSource(cast(Any, None), order, shares, pens, Writing(speculative=speculative)).reads_weights([0, 1])

    assert not reads(TextShares())
    assert not reads(TextShares(fixed=1, target=1))
    assert reads(TextShares(fixed=0, target=1), speculative=True)
    assert reads(TextShares(fixed=0, draft=1))
    mixed = TextShares(fixed=1, draft=1)
    source = MixedSource(cast(Any, None), order, mixed, cast(Any, None))
    for number in range(8):
        assert source.reads_weights([number]) == (mixed.writer(0, number) == "draft")
