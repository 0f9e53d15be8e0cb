"""Memory of a commit, and a training step, on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specdec.context import Context
from specdec.probe import target_of
from specdec.target import Target
from specdec.train.batch import TrainBatch
from specdec.train.features import TargetFeatures
from specdec.train.kinds.draft_model import DraftModelTraining
from specdec.train.kinds.eagle import Eagle3Training
from specdec.train.kinds.medusa import MedusaTraining
from specdec.train.kinds.sequential import HydraTraining
from specdec.train.objective import Objective
from specdec.train.order import Piece
from specdec.train.prepared import MemoryData
from specdec.tree import TokenTree
from tests.tiny import make_target, perturbed

# --- Memory ----------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of new storages that operators made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in old:
                self.bytes += tensor.untyped_storage().nbytes()
        return result


BRANCHING = [(0, 5), (0, 6), (1, 7), (2, 8), (4, 9), (3, 10), (5, 11)]


@torch.no_grad()
def commit_bytes(target: Target, past: int, device: torch.device) -> tuple[int, int]:
    """What committing a branch of an 8-node tree allocates behind so many tokens: all of it, and the device's peak."""
    context = Context(target, past + 64)
    context.prefill([(torch.arange(past) % 90 + 5).tolist()] * 2)
    tree = TokenTree.of_nodes(torch.tensor([7, 7], device=device), [BRANCHING] * 2)
    context.run(tree.tokens, tree.depths(), tree.ancestors())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with Allocations() as allocations:
        context.keep([[0, 2, 4, 5]] * 2)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    assert context.lengths == [past + 4] * 2
    return allocations.bytes, peak


def test_a_commit_allocates_the_columns_that_move_and_not_the_past(device: torch.device) -> None:
    model = make_target(max_position_embeddings=4096).to(device)
    target = target_of(model)
    moved = 2 * 2 * 4 * 4 * target.config.num_key_value_heads * 8 * 4  # k and v, rows, columns, layers, heads, E, fp32
    short, long = (commit_bytes(target, past, device) for past in (50, 1500))
    assert short == long
    assert 0 < long[0] <= 4 * moved
    assert long[1] <= 4 * moved + 20 * 512  # CUDA allocates in blocks of 512 bytes


# --- Training --------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Target], Any]] = {
    "medusa": lambda target: MedusaTraining(target, num_heads=3),
    "hydra": lambda target: HydraTraining(target, num_heads=2),
    "eagle3": lambda target: Eagle3Training(target, steps=3, draft_vocab_size=40),
    "draft-model": lambda target: DraftModelTraining(target, perturbed(target.model, 0.05)),
}


def two_steps(kind: str, device: torch.device, *, bf16: bool = False) -> tuple[list[float], Tensor]:
    """Losses of two steps, and all weights after them, on the host."""
    target = target_of(make_target(seed=4).to(device))
    torch.manual_seed(0)
    training = KINDS[kind](target)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 100, (24,), generator=generator) for _ in range(4)]
    data = MemoryData([(text, torch.arange(24) >= 6) for text in texts])
    rows = [(Piece(n, 0, 24), Piece(n + 1, 0, 24)) for n in (0, 2)]
    batch = TargetFeatures(target, training.taps)(TrainBatch.of_rows(data, rows, [0, 1], 48))
    optimizer = torch.optim.AdamW([p for p in training.module.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)
    losses = []
    for _ in range(2):
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            terms = training.terms(batch, Objective())
        loss = torch.stack([term.total for term in terms]).sum() / batch.num_supervised
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, torch.cat([parameter.detach().flatten().cpu() for parameter in training.module.parameters()])


@pytest.mark.parametrize("kind", KINDS)
def test_training_steps_are_those_of_the_cpu(device: torch.device, kind: str) -> None:
    """fp32 sums are ordered differently; AdamW's eps is raised so that it does not blow rounding up to whole steps."""
    losses, weights = two_steps(kind, device)
    expected_losses, expected = two_steps(kind, torch.device("cpu"))
    assert losses[0] != losses[1], "nothing was learned: no test"
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_fp32_weights_and_comes_near(device: torch.device, kind: str) -> None:
    losses, weights = two_steps(kind, device, bf16=True)
    expected, _ = two_steps(kind, device)
    assert weights.dtype == torch.float32
    assert losses[1] < losses[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0.05, atol=0.05)
