"""Medusa heads as a module: published sizes, the function of the raw tensors, what training begins with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from specdec.heads.medusa import MedusaConfig, MedusaHead
from tests.formats.published import block

D, V, K = 16, 40, 3
OUTPUTS: list[Any] = ["own", "one", "target"]


def test_five_heads_for_a_7b_target_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        own = MedusaHead(MedusaConfig(4096, 32000, 5))
        shared = MedusaHead(MedusaConfig(4096, None, 5, output="target"))
    assert sum(p.numel() for p in own.parameters()) == 739_266_560
    assert sum(p.numel() for p in shared.parameters()) == 5 * (4096 * 4096 + 4096)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_those_of_the_raw_tensors_for_whole_sequences_and_single_states(
    output: Any, layers: int, bias: bool
) -> None:
    torch.manual_seed(0)
    head = MedusaHead(MedusaConfig(D, V, K, layers, bias=bias, output=output))
    lm_head = nn.Linear(D, V, bias=False)
    hidden, raw = torch.randn(2, 7, D), head.state_dict()
    got = head(hidden, lm_head)
    for k in range(K):
        state = hidden
        for j in range(layers):
            state = block(raw, f"blocks.{k}.{j}.linear", state)
        outputs = {"own": f"lm_heads.{k}.weight", "one": "lm_heads.0.weight"}
        matrix = lm_head.weight if output == "target" else raw[outputs[output]]
        assert (got[:, :, k] - state @ matrix.T).abs().max() < 1e-5
    assert torch.allclose(head(hidden[0, 3], lm_head), got[0, 3], atol=1e-5)


def test_only_the_heads_that_are_asked_for_run() -> None:
    head = MedusaHead(MedusaConfig(D, V, K))
    ran: list[int] = []
    for k in range(K):
        head.lm_heads[k].register_forward_hook(lambda _m, _i, _o, k=k: ran.append(k))
    logits = head(torch.randn(2, D), num_heads=2)
    assert logits.shape == (2, 2, V)
    assert ran == [0, 1]


@pytest.mark.parametrize("output", OUTPUTS)
def test_before_training_every_head_guesses_what_the_target_does(output: Any) -> None:
    head, lm_head = MedusaHead(MedusaConfig(D, V, K, output=output)), nn.Linear(D, V, bias=False)
    hidden = torch.randn(5, D)
    assert not torch.allclose(head(hidden, lm_head)[:, 1], lm_head(hidden)), "as made, the blocks are not the identity"
    head.begin_as_target(lm_head.weight)
    assert torch.equal(head(hidden, lm_head), lm_head(hidden)[:, None].expand(-1, K, -1))


def test_chosen_tokens_are_rows_of_the_targets_matrix_and_map_back_to_its_ids() -> None:
    head, lm_head = MedusaHead(MedusaConfig(D, 4, K, token_map=True)), nn.Linear(D, V, bias=False)
    assert head.token_map is not None
    head.token_map.copy_(torch.tensor([30, 0, 7, 39]))
    head.begin_as_target(lm_head.weight)
    hidden = torch.randn(2, D)
    assert torch.allclose(head(hidden)[:, 0], lm_head(hidden)[:, [30, 0, 7, 39]])
    assert head.to_token_ids(torch.tensor([[3, 1]])).tolist() == [[39, 0]]
    assert "token_map" in head.state_dict()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"hidden_size": 0, "vocab_size": V, "num_heads": 1}, "hidden_size is at least 1"),
        ({"hidden_size": D, "vocab_size": V, "num_heads": 0}, "num_heads is at least 1"),
        ({"hidden_size": D, "vocab_size": V, "num_heads": 1, "num_layers": 0}, "num_layers is at least 1"),
        ({"hidden_size": D, "vocab_size": None, "num_heads": 1}, "vocab_size is needed"),
        ({"hidden_size": D, "vocab_size": 3, "num_heads": 1, "output": "target", "token_map": True}, "token map"),
    ],
)
def test_sizes_that_make_no_heads_are_refused(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MedusaConfig(**sizes)
