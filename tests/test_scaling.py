"""scripts/scaling.py: sizes and times by hand, operations by torch's own counter, and the page that shows them."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from specdec.heads.dflash import DFlashConfig, DFlashHead, InjectedFeatures
from specdec.probe import target_of
from specdec.train.batch import TrainBatch
from specdec.train.features import TargetFeatures
from specdec.train.kinds.draft_model import DraftModelTraining
from specdec.train.kinds.eagle import Eagle3Training
from specdec.train.kinds.medusa import MedusaTraining
from specdec.train.kinds.sequential import HydraTraining
from specdec.train.objective import Objective
from specdec.train.order import Piece
from specdec.train.prepared import MemoryData
from tests.tiny import VOCAB, make_target

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
scaling: Any = import_module("scaling")
scaling_work: Any = import_module("scaling_work")
sys.path.remove(str(ROOT / "scripts"))

ROW = 64


@pytest.fixture(scope="module")
def rates() -> dict[str, Any]:
    return json.loads(scaling.RATES.read_text())


def batch_of(target: Any, taps: tuple[int, ...]) -> TrainBatch:
    """Two rows in which every token is supervised, with features."""
    texts = torch.randint(3, VOCAB, (2, ROW), generator=torch.Generator().manual_seed(0))
    data = MemoryData([(text, torch.ones(ROW, dtype=torch.bool)) for text in texts])
    rows = [(Piece(0, 0, ROW),), (Piece(1, 0, ROW),)]
    return TargetFeatures(target, taps)(TrainBatch.of_rows(data, rows, [0, 1], ROW))


def counted(training: Any, target: Any) -> float:
    """Operations for each token of a real training step, target aside, by torch, which sees no fused attention."""
    batch = batch_of(target, training.taps)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        terms = training.terms(batch, Objective())
        torch.stack([term.total for term in terms]).sum().backward()
    return counter.get_total_flops() / (2 * ROW)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("medusa", lambda target: MedusaTraining(target)),
        ("medusa", lambda target: MedusaTraining(target, num_layers=2, output="own")),
        ("hydra", lambda target: HydraTraining(target)),
        ("eagle3", lambda target: Eagle3Training(target, draft_vocab_size=40)),
        ("eagle3", lambda target: Eagle3Training(target, draft_vocab_size=40, steps=3)),
        ("draft-model", lambda target: DraftModelTraining(target, make_target(2, num_hidden_layers=2))),
    ],
)
def test_operations_are_those_that_torch_counts_on_a_real_step(kind: str, make: Any):
    """The last tokens of a row have no successor to guess: up to 8 of 64 positions are missing in a real step.

    Causal attention counts half a row in ours, and all of it in torch's count of unfused attention.
    """
    target = target_of(make_target(hidden_size=64, intermediate_size=128))
    training = make(target)
    if kind == "draft-model":
        ours = scaling_work.draft_model_flops(training.module, 2 * ROW)
    else:
        ours = scaling_work.head_flops(kind, training.module, target, ROW, getattr(training, "steps", 1))
    assert 0.85 < counted(training, target) / ours < 1.1


def test_operations_of_a_block_drafter_are_those_that_torch_counts():
    target = target_of(make_target(hidden_size=64, intermediate_size=128))
    config = DFlashConfig.of(target.config, mask_token_id=2, num_layers=2, block_size=16)
    head = DFlashHead(config)
    features = InjectedFeatures()
    taps = torch.randn(1, ROW, len(config.taps) * 64)
    positions = torch.arange(ROW)[None]
    output = torch.nn.Linear(64, VOCAB, bias=False).requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        head.inject(head.features(taps), positions, features)  # type: ignore[arg-type]
        states = head(torch.randn(1, ROW, 64), positions, {}, features)
        drafted = states.view(1, -1, 16, 64)[:, :, 1:]
        head.logits(drafted, output).sum().backward()
    assert 0.85 < counter.get_total_flops() / ROW / scaling_work.dflash_flops(head, VOCAB, ROW) < 1.1


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [
        ("eagle3", "8b", (3 + 1) * 4096 * 2 + 4),  # three taps, the last layer before the norm, an id
        ("eagle3", "70b", (3 + 1) * 8192 * 2 + 4),
        ("dflash", "8b", (5 + 1) * 4096 * 2 + 4),
        ("medusa", "8b", 4096 * 2 + 4),
        ("draft-model", "70b", 8192 * 2 + 4),
    ],
)
def test_bytes_for_each_token_by_hand(kind: str, target: str, expected: int):
    assert scaling_work.work_of(kind, target).bytes_per_token == expected


def test_parameters_are_those_of_the_public_models():
    sizes = {name: scaling_work.target_of_shape(name).model.num_parameters() for name in scaling_work.TARGETS}
    assert sizes == {"8b": 8_030_261_248, "70b": 70_553_706_496}
    assert scaling_work.work_of("draft-model", "8b").parameters == 1_235_814_400
    d, i, kv, n = 4096, 14336, 1024, 32000  # EAGLE-3: fc, attention over 2 D, MLP, output matrix, four norms
    by_hand = 3 * d * d + 2 * d * (d + 2 * kv) + d * d + 3 * d * i + n * d + 4 * d
    assert scaling_work.work_of("eagle3", "8b").parameters == by_hand


def test_hours_by_hand(rates: dict[str, Any]):
    work = scaling_work.work_of("medusa", "8b")
    forward = (2 * 8.03e9 + 4 * 1024 * 4096 * 32) / (989e12 * 0.5)  # and kernel latencies, less than 1 % at 8192 tokens
    ratio = rates["training"]["medusa"]["fraction"] / rates["forward"]["fraction"]
    head = (4 * 4 * 4096**2 + 4 * 4 * 128256 * 4096) / (989e12 * 0.5 * ratio)
    expected = 1.5e9 * (forward + head) / 16 / 3600
    hours = scaling_work.hours(1.5e9, scaling_work.online_seconds(work, 0.5, rates))
    assert hours == pytest.approx(expected, rel=0.01)


def test_the_page_shows_what_the_script_prints(rates: dict[str, Any]):
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert set(re.findall(r"<!-- table (\w+) -->", page)) == set(scaling.TABLES)
    assert scaling.filled(page, rates) == page, "run: python scripts/scaling.py --doc docs/scaling.md"
    other = {**rates, "training": {kind: {"fraction": 0.1} | rate for kind, rate in rates["training"].items()}}
    other["kept_bytes"] = rates["kept_bytes"] + 1
    assert scaling.filled(page, other) != page
