"""Clover-2 has the published shapes and computes what its paper says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from specdec.heads.clover import CloverConfig, CloverHead
from specdec.heads.layer import LayerConfig
from specdec.heads.sequential import TargetEnds, teacher_forced

D, V, H = 16, 29, 4
LAYER = LayerConfig(D, 24, H, 2, 4, rms_norm_eps=1e-5)
CLOVER = CloverConfig(LAYER, V, num_heads=4)


def ends() -> TargetEnds:
    torch.manual_seed(1)
    return TargetEnds(lambda _: pytest.fail("has its own embedding"), nn.Linear(D, V, bias=False))


def randomised(head: CloverHead) -> CloverHead:
    torch.manual_seed(0)
    for parameter in head.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return head.eval()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def attended(tensors: dict[str, Tensor], name: str, state: Tensor, embedded: Tensor) -> Tensor:
    """h + v * cos(q, k), head by head."""
    part = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
    query = part["q.weight"] @ rms(state, part["input_layernorm.weight"]) + part["q.bias"]
    key, value = (part[f"{n}.weight"] @ embedded + part[f"{n}.bias"] for n in "kv")
    out = state.clone()
    for head in range(H):
        at = slice(head * D // H, (head + 1) * D // H)
        cosine = query[at] @ key[at] / (query[at].norm() * key[at].norm())
        out[at] = out[at] + value[at] * cosine
    return out


@torch.no_grad()
def recomputed(head: CloverHead, hidden: Tensor, text: list[int], t: int, lm_head: Tensor) -> list[Tensor]:
    """Logits of every depth of pair t from states [S, D] and the text, on raw tensors, with Llama's own layers."""
    tensors = head.state_dict()
    table = tensors["embed_tokens.weight"]
    mixed = [attended(tensors, "first_attention", hidden[i], table[text[i + 1]]) for i in range(t + 1)]
    config = LlamaConfig(
        vocab_size=3, hidden_size=D, intermediate_size=24, num_hidden_layers=2, num_attention_heads=H,
        num_key_value_heads=2, rms_norm_eps=1e-5,
    )  # fmt: skip
    llama = LlamaModel(config).eval()
    llama.load_state_dict(head.text.state_dict(), strict=False)
    state = llama(inputs_embeds=torch.stack(mixed)[None]).last_hidden_state[0, -1]
    projected = tensors["first_projection.weight"] @ state + tensors["first_projection.bias"]
    logits = [lm_head @ rms(projected, tensors["head_norm.weight"])]
    for depth in range(1, head.depth):
        embedded = table[text[t + 1 + depth]]
        state = attended(tensors, "later_attention", state, embedded)
        joined = torch.cat([state, embedded])
        projected = tensors["later_projection.weight"] @ joined + tensors["later_projection.bias"]
        logits.append(lm_head @ rms(projected, tensors["head_norm.weight"]))
    return logits


@pytest.mark.parametrize("own_lm_head", [True, False])
def test_it_computes_regressive_attention_and_augmenting_block(own_lm_head: bool) -> None:
    head, shared = randomised(CloverHead(replace(CLOVER, own_lm_head=own_lm_head))), ends()
    lm_head = head.lm_head if own_lm_head else shared.lm_head
    assert isinstance(lm_head, nn.Linear)
    hidden, text = torch.randn(1, 11, D), torch.randint(0, V, (1, 11))
    states = list(teacher_forced(head, hidden, text, shared))
    for t in (0, 3, 5):
        expected = recomputed(head, hidden[0], text[0].tolist(), t, lm_head.weight)
        for depth, logits in enumerate(expected):
            got = head.logits(depth, states[depth][0, t], shared)
            torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-4)


def test_a_7b_target_s_clover_has_about_half_a_billion_trainable_parameters() -> None:
    config = CloverConfig(LayerConfig(4096, 11_008, 32, 32, 128), 32_000)
    with torch.device("meta"):
        head = CloverHead(config)
    frozen = {"embed_tokens.weight", "lm_head.weight"}
    d, inner = 4096, 11_008
    layers = 2 * (4 * d * d + 3 * d * inner + 2 * d)
    attentions = 2 * (3 * (d * d + d) + d)
    expected = layers + attentions + (d * d + d) + (2 * d * d + d) + 2 * d
    assert sum(p.numel() for name, p in head.named_parameters() if name not in frozen) == expected == 555_810_816


def test_a_fresh_head_passes_the_state_on_almost_unchanged() -> None:
    torch.manual_seed(0)
    head = CloverHead(CLOVER)
    table = torch.randn(V, D)
    head.begin_as(table, table)
    assert head.lm_head is not None
    assert torch.equal(head.embed_tokens.weight, table)
    assert torch.equal(head.lm_head.weight, table)
    states, embedded = torch.randn(3, D), torch.randn(3, D)
    assert (head.later_attention(states, embedded) - states).abs().max() < 0.25
    assert (head.first_projection(states) - states).abs().max() < 0.25


def test_depths_after_the_first_share_their_weights() -> None:
    head, shared = randomised(CloverHead(CLOVER)), ends()
    state, token = torch.randn(D), torch.tensor(5)
    one, other = (head.step(depth, state, token, shared)[1] for depth in (1, 3))
    torch.testing.assert_close(one, other)
    assert not torch.allclose(one, head.step(0, state, token, shared)[1])
