"""MLP speculators have the published sizes and compute the published recurrence."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.heads.mlp_speculator import MLPSpeculatorConfig, MLPSpeculatorHead
from specdec.heads.sequential import TargetEnds, teacher_forced

SIZES = {
    "llama2-7b": (MLPSpeculatorConfig(4096, 32_000, 4096, 3), 836_788_224),
    "llama3-8b": (MLPSpeculatorConfig(4096, 128_256, 3072, 4), 3_192_938_496),
    "llama3-70b": (MLPSpeculatorConfig(8192, 128_256, 3584, 4, tie_weights=True, scale_input=True), 961_551_360),
}
NO_ENDS = TargetEnds(lambda _: pytest.fail("has its own embedding"), lambda _: pytest.fail("has its own LM head"))


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_have_the_published_number_of_parameters(name: str) -> None:
    config, expected = SIZES[name]
    with torch.device("meta"):
        head = MLPSpeculatorHead(config)
    assert sum(p.numel() for p in head.parameters()) == expected


def recomputed(
    tensors: dict[str, Tensor], config: MLPSpeculatorConfig, hidden: Tensor, tokens: list[int]
) -> list[Tensor]:
    """Logits of every depth from one state [D] and the tokens fed, by the formulas on raw tensors."""
    state, logits = hidden.double(), []
    if config.scale_input:
        state = state / (state.pow(2).mean() + 1e-6).sqrt() / math.sqrt(2)
    keep = 0.5 ** (0.5 / config.n_predict)
    for depth, token in enumerate(tokens):
        table = 0 if config.tie_weights else depth
        projection = min(depth, 1) if config.tie_weights else depth
        moved = tensors[f"proj.{projection}.weight"].double() @ state
        ratio = math.sqrt(1 - keep**2) * math.sqrt(config.inner_size / 2) / keep
        moved = moved + ratio * tensors[f"emb.{table}.weight"][token].double()
        moved = moved / (moved.pow(2).mean() + 1e-6).sqrt()
        state = F.gelu(moved * tensors[f"ln.{table}.weight"].double() + tensors[f"ln.{table}.bias"].double())
        logits.append((tensors[f"head.{table}.weight"].double() @ state).float())
    return logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_it_computes_the_recurrence(tied: bool, scaled: bool) -> None:
    torch.manual_seed(0)
    config = MLPSpeculatorConfig(12, 31, 20, 4, tie_weights=tied, scale_input=scaled)
    head = MLPSpeculatorHead(config)
    for norm in head.ln:
        torch.nn.init.normal_(norm.weight)  # type: ignore[arg-type]
        torch.nn.init.normal_(norm.bias)  # type: ignore[arg-type]
    hidden, text = torch.randn(2, 9, 12), torch.randint(0, 31, (2, 9))
    states = list(teacher_forced(head, hidden, text, NO_ENDS))
    for row in range(2):
        for t in range(4):
            expected = recomputed(head.state_dict(), config, hidden[row, t], text[row, t + 1 : t + 5].tolist())
            for depth, logits in enumerate(expected):
                got = head.logits(depth, states[depth][row, t], NO_ENDS)
                torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-5)


def test_weights_of_state_and_token_are_those_of_the_depths_it_was_trained_for() -> None:
    """Not of the depths that are drafted: the first two depths of four are not those of a head made for two."""
    torch.manual_seed(0)
    four = MLPSpeculatorHead(MLPSpeculatorConfig(8, 17, 8, 4))
    two = MLPSpeculatorHead(MLPSpeculatorConfig(8, 17, 8, 2))
    two.load_state_dict({k: v for k, v in four.state_dict().items() if k.split(".")[1] in "01"})
    hidden, token = torch.randn(8), torch.tensor(3)
    of_four, of_two = (head.step(0, hidden, token, NO_ENDS)[0] for head in (four, two))
    expected = recomputed(four.state_dict(), four.config, hidden, [3])[0]
    torch.testing.assert_close(four.logits(0, of_four, NO_ENDS), expected, atol=1e-5, rtol=1e-5)
    assert (of_four - of_two).abs().max() > 0.01


def test_tied_weights_are_one_tensor_each_and_the_first_projection_stays_apart() -> None:
    names = set(MLPSpeculatorHead(MLPSpeculatorConfig(8, 17, 6, 5, tie_weights=True)).state_dict())
    assert names == {"emb.0.weight", "proj.0.weight", "proj.1.weight", "ln.0.weight", "ln.0.bias", "head.0.weight"}
