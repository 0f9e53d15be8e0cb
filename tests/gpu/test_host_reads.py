"""How often a step waits for the device: a fixed number of times, whatever the rows, the tree and the past.

One read waits for the target: the choice at its logits, `argmax(...).tolist()` in specdec.acceptance. Allowed beside
it are reads of small integer tensors that need no forward of the target: the tree's tokens, once, for the walk and all
that looks at them later (`TokenTree.ids`), and the root, once, by drafters that work on the host. READS holds the sum.

Uploads are not counted: the roots, positions, masks and the columns of a commit go to the device in every step. On the
CPU every tensor counts as one of the device, so the limits hold for a GPU too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specdec
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.probe import probed
from specdec.target import Target
from tests.families import perturbed, prompts, tiny_model
from tests.gpu.host_reads import Traffic, step_by_step

NEW_TOKENS = 24
READS = {"none": 2, "lookup": 3, "suffix:branches=3,budget=8": 3, "draft chain": 3, "early-exit:layer=1,depth=3": 2}


def steps(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, name: str, lengths: list[int]
) -> list[tuple[int, Traffic]]:
    model = tiny_model("llama", "sdpa", layers=2)
    drafter: Any = None if name == "none" else name
    if name == "draft chain":
        drafter = DraftModelDrafter(probed(Target(perturbed(model).to(device))), depth=3)
    model = model.to(device)
    asked = prompts(lengths).to(device)
    specdec.target_of(model)  # probed before anything is counted
    return step_by_step(
        monkeypatch, device,
        lambda: specdec.generate(
            model, **asked.inputs, drafter=drafter, max_new_tokens=NEW_TOKENS, do_sample=False
        ),
    )  # fmt: skip


@pytest.mark.parametrize("name", READS)
def test_a_step_reads_from_the_device_a_fixed_number_of_times(
    device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = {}
    for lengths in ([9], [9, 9, 9, 9], [40] * 4):
        with monkeypatch.context() as patch:
            seen = steps(patch, device, name, lengths)
        most[len(lengths), lengths[0]] = max(traffic.reads.total() for rows, traffic in seen if rows == len(lengths))
        for _, traffic in seen:
            assert traffic.warned <= traffic.reads.total() + traffic.uploads, "a wait that Python does not show"
    assert set(most.values()) == {READS[name]} or (device.type == "cuda" and max(most.values()) <= READS[name]), most


def test_a_read_that_somebody_adds_is_counted(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.verifier import Verifier

    right = Verifier.score

    def reading(self: Verifier, tree: Any) -> Any:
        output = right(self, tree)
        assert bool((output.logits > -1e9).any())
        assert output.logits.sum().item() == output.logits.sum().item()
        return output

    before = max(traffic.reads.total() for _, traffic in steps(monkeypatch, device, "lookup", [9]))
    monkeypatch.undo()
    monkeypatch.setattr(Verifier, "score", reading)
    after = max(traffic.reads.total() for _, traffic in steps(monkeypatch, device, "lookup", [9]))
    assert after >= before + 3
