"""Hydra and Hydra++ have the published shapes and compute what their papers say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from specdec.heads.hydra import HydraConfig, HydraHead
from specdec.heads.layer import LayerConfig
from specdec.heads.sequential import TargetEnds, guessed_tokens, teacher_forced

D, V = 16, 29
LAYER = LayerConfig(D, 24, 4, 2, 4, rms_norm_eps=1e-5)
HYDRA = HydraConfig(D, V, num_heads=3, num_layers=3)
VICUNA_7B = LayerConfig(4096, 11_008, 32, 32, 128)


def randomised(head: HydraHead) -> HydraHead:
    """With weights also where a fresh head has zeros."""
    torch.manual_seed(0)
    for parameter in head.parameters():
        nn.init.normal_(parameter, 0.0, 0.2)
    return head.eval()


def ends() -> TargetEnds:
    torch.manual_seed(1)
    return TargetEnds(nn.Embedding(V, D), lambda _: pytest.fail("has its own LM heads"))


def recomputed(tensors: dict[str, Tensor], config: HydraConfig, parts: list[Tensor]) -> Tensor:
    """Logits of one depth from its parts: state and embeddings, [D] each."""
    depth = len(parts) - 2
    z = torch.cat(parts) if config.grounded else parts[0]
    here = {k.removeprefix(f"heads.{depth}."): v for k, v in tensors.items() if k.startswith(f"heads.{depth}.")}
    out = F.silu(here["first.linear.weight"] @ z + here["first.linear.bias"])
    if config.grounded:
        out = out + here["first.res_connection.weight"] @ z + here["first.res_connection.bias"]
    else:
        out = out + z
    for index in range(config.num_layers - 1):
        name = f"rest.{0 if config.shared_blocks else index}.linear"
        out = out + F.silu(here[f"{name}.weight"] @ out + here[f"{name}.bias"])
    return here["lm_head.weight"] @ out + here["lm_head.bias"]


@pytest.mark.parametrize(
    "config",
    [HYDRA, replace(HYDRA, num_layers=1), replace(HYDRA, shared_blocks=False), replace(HYDRA, grounded=False)],
    ids=["shared blocks", "one layer", "own blocks", "ungrounded"],
)
def test_it_computes_its_blocks_on_the_concatenation(config: HydraConfig) -> None:
    head, shared = randomised(HydraHead(config)), ends()
    hidden, text = torch.randn(2, 8, D), torch.randint(0, V, (2, 8))
    states = list(teacher_forced(head, hidden, text, shared))
    for depth in range(3):
        for t in range(3):
            parts = [hidden[1, t], *(shared.embedding(text[1, t + 1 + i]) for i in range(depth + 1))]
            expected = recomputed(head.state_dict(), config, parts)
            got = head.logits(depth, states[depth][1, t], shared)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_prefix_layer_is_a_llama_model_of_one_layer() -> None:
    head, shared = randomised(HydraHead(replace(HYDRA, prefix=LAYER))), ends()
    assert head.prefix is not None
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-5, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    missing = llama.load_state_dict(head.prefix.state_dict(), strict=False)
    assert missing.missing_keys == ["embed_tokens.weight"]
    assert not missing.unexpected_keys
    hidden, text = torch.randn(2, 9, D), torch.randint(0, V, (2, 9))
    with torch.no_grad():
        prefixed = llama(inputs_embeds=hidden[:, :-1]).last_hidden_state
    for depth, states in enumerate(teacher_forced(head, hidden, text, shared)):
        parts = [prefixed[0, 4], *(shared.embedding(text[0, 5 + i]) for i in range(depth + 1))]
        got = head.logits(depth, states[0, 4], shared)
        torch.testing.assert_close(got, recomputed(head.state_dict(), HYDRA, parts), atol=1e-5, rtol=1e-5)


def test_hydra_plus_plus_for_a_7b_target_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        head = HydraHead(HydraConfig(4096, 32_000, 4, 4, prefix=VICUNA_7B))
    d, v, inner = 4096, 32_000, 11_008
    first_blocks = sum(2 * ((k + 2) * d * d + d) for k in range(4))
    layer = 4 * d * d + 3 * d * inner + 2 * d + d
    expected = first_blocks + 4 * (d * d + d) + 4 * (v * d + v) + layer
    assert sum(p.numel() for p in head.parameters()) == expected == 1_263_723_520


def test_a_fresh_head_has_zero_weights_where_the_published_one_has_and_a_projection_for_residual() -> None:
    head = HydraHead(HYDRA)
    weights = {name: tensor for name, tensor in head.state_dict().items() if name.endswith("linear.weight")}
    assert len(weights) == 6
    assert not any(tensor.any() for tensor in weights.values())
    table = torch.randn(V, D)
    head.begin_as(table)
    assert all(torch.equal(head.state_dict()[f"heads.{k}.lm_head.weight"], table) for k in range(3))


@pytest.mark.parametrize("shift", [0, 1])
def test_on_a_text_that_counts_each_depth_guesses_the_next_number(shift: int) -> None:
    """Heads that add one to the last token they were fed are right everywhere, and nowhere when off by one."""
    config = HydraConfig(V, V, num_heads=3)
    head, one_hot = HydraHead(config).eval(), TargetEnds(lambda t: F.one_hot(t, V).float(), lambda h: h)
    for depth, parts in enumerate(head.heads):
        for parameter in parts.parameters():
            nn.init.zeros_(parameter)
        parts.first.res_connection.weight.data[:, -V:] = torch.eye(V)  # type: ignore[union-attr]
        parts.lm_head.weight.data[:] = torch.eye(V).roll(1, 0)  # type: ignore[union-attr]
        assert depth < 3
    text = torch.arange(20)[None]
    for depth, states in enumerate(teacher_forced(head, torch.zeros(1, 20, V), text, one_hot)):
        guesses = head.logits(depth, states, one_hot).argmax(-1)[:, :-1]
        labels = guessed_tokens(text, depth).roll(shift, 1)
        assert guesses.shape == labels.shape == (1, 18 - depth)
        assert (guesses == labels).float().mean() == (0.0 if shift else 1.0)
