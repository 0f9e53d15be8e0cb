"""A DFlash head computes what its equations say; features in pieces, and many blocks at once, change nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.cache import KVCache
from specdec.heads.dflash import (
    FULL,
    SLIDING,
    DFlashConfig,
    DFlashHead,
    InjectedFeatures,
    Masks,
    anchored_masks,
    block_ids,
    causal_in_block,
    default_taps,
)
from specdec.heads.layer import LayerConfig
from tests.heads import raw

D, V, E, Q, WINDOW = 16, 40, 6, 4, 5
LAYER = LayerConfig(D, 24, 4, 2, E, qk_norm=True, rope_theta=1000.0)
CONFIG = DFlashConfig(LAYER, 2, (1, 3, 4), Q, 39, V)
SLIDES = {"sliding_layers": (1,), "sliding_window": WINDOW}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding causal": SLIDES,
    "sliding both ways": {**SLIDES, "causal": False},
    "all causal": {**SLIDES, "causal": True},
    "all sliding": {"sliding_layers": (0, 1), "sliding_window": WINDOW},
}


def head_of(config: DFlashConfig, seed: int = 0) -> DFlashHead:
    torch.manual_seed(seed)
    head = DFlashHead(config)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return head


def inputs(length: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Taps [1, S, 3 D] of a text, and block embeddings [1, Q, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, length, 3 * D, generator=generator), torch.randn(1, Q, D, generator=generator)


def draft_masks(config: DFlashConfig, length: int) -> Masks:
    """One block after a text of this length, each kind by its definition."""
    masks = {}
    for kind in (FULL, SLIDING):
        mask = torch.zeros(1, 1, Q, length + Q)
        if kind == SLIDING:
            for query in range(Q):
                mask[..., query, : max(length + query - WINDOW + 1, 0)] = torch.finfo(torch.float32).min
        masks[kind] = causal_in_block(mask, Q) if config.is_causal(kind) else mask
    return masks


def recomputed(config: DFlashConfig, tensors: dict[str, Tensor], taps: Tensor, block: Tensor) -> Tensor:
    """Normed states [Q, D] of a block after a text, from raw tensors."""
    features = raw.rms_norm(taps @ tensors["fc.weight"].T, tensors["hidden_norm.weight"])
    states, length = block, len(taps)
    for i in range(config.num_layers):
        slides = i in config.sliding_layers
        causal = slides if config.causal is None else config.causal

        def sees(query: int, key: int, slides: bool = slides, causal: bool = causal) -> bool:
            if slides and query - key >= WINDOW:
                return False
            return key <= query or not causal

        name = f"layers.{i}"
        normed = raw.rms_norm(states, tensors[f"{name}.input_layernorm.weight"])
        states = states + raw.attention(
            tensors, f"{name}.self_attn", normed, torch.cat([features, normed]), list(range(length + Q)), sees,
            head_dim=E, theta=1000.0,
        )  # fmt: skip
        normed = raw.rms_norm(states, tensors[f"{name}.post_attention_layernorm.weight"])
        states = states + raw.gated_mlp(tensors, f"{name}.mlp", normed)
    return raw.rms_norm(states, tensors["norm.weight"])


def drafted(head: DFlashHead, taps: Tensor, block: Tensor, cuts: list[int]) -> Tensor:
    """States [Q, D] with the features injected in pieces that end at `cuts`, and a block run and dropped after each."""
    cache, start = KVCache(head.config.num_layers), 0
    states = torch.empty(0)
    for end in cuts:
        positions = torch.arange(start, end)[None]
        head.inject(head.features(taps[:, start:end]), positions, cache)
        states = head(block, torch.arange(end, end + Q)[None], draft_masks(head.config, end), cache)[0]
        cache.cut(end)
        start = end
    return states


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [[9], [1, 4, 5, 9]], ids=["at once", "in pieces"])
@torch.no_grad()
def test_a_block_after_a_text_is_what_the_raw_tensors_say(variant: str, cuts: list[int]) -> None:
    head = head_of(replace(CONFIG, **VARIANTS[variant]))
    taps, block = inputs(9)
    expected = recomputed(head.config, dict(head.state_dict()), taps[0], block[0])
    torch.testing.assert_close(drafted(head, taps, block, cuts), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_variants_are_different_functions() -> None:
    taps, block = inputs(9)
    states = [drafted(head_of(replace(CONFIG, **fields)), taps, block, [9]) for fields in VARIANTS.values()]
    for i, one in enumerate(states):
        for other in states[:i]:
            assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_many_blocks_in_one_training_forward_are_those_of_drafting(variant: str) -> None:
    head = head_of(replace(CONFIG, **VARIANTS[variant]))
    taps, _ = inputs(12)
    embedding = torch.randn(V, D, generator=torch.Generator().manual_seed(2))
    tokens, anchors = torch.arange(12) * 3 % V, torch.tensor([3, 0, 7, 11])
    ids = block_ids(tokens[anchors], head.config)
    cache = InjectedFeatures()
    head.inject(head.features(taps), torch.arange(12)[None], cache)
    positions = (anchors[:, None] + torch.arange(Q)).flatten()[None]
    masks = anchored_masks(head.config, anchors, 12, torch.float32)
    together = head(head.embed(ids.flatten()[None], embedding), positions, masks, cache)[0].unflatten(0, (4, Q))
    for anchor, block, states in zip(anchors.tolist(), ids, together, strict=True):
        alone = KVCache(2)
        if anchor:
            head.inject(head.features(taps[:, :anchor]), torch.arange(anchor)[None], alone)
        embedded = head.embed(block[None], embedding)
        expected = head(embedded, torch.arange(anchor, anchor + Q)[None], draft_masks(head.config, anchor), alone)[0]
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter_through_injected_features() -> None:
    head = head_of(CONFIG)
    taps, block = inputs(6)
    cache = InjectedFeatures()
    head.inject(head.features(taps), torch.arange(6)[None], cache)
    head(block, torch.arange(6, 6 + Q)[None], {}, cache).square().sum().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_what_a_block_appends_to_injected_features_is_forgotten() -> None:
    head = head_of(CONFIG)
    taps, block = inputs(6)
    cache = InjectedFeatures()
    head.inject(head.features(taps), torch.arange(6)[None], cache)
    positions = torch.arange(6, 6 + Q)[None]
    assert torch.equal(head(block, positions, {}, cache), head(block, positions, {}, cache))


def test_a_block_is_the_anchor_and_masks() -> None:
    assert block_ids(torch.tensor([7, 0]), CONFIG).tolist() == [[7, 39, 39, 39], [0, 39, 39, 39]]
    assert block_ids(torch.tensor([7]), CONFIG, 2).tolist() == [[7, 39]]


@torch.no_grad()
def test_embeddings_and_logits_are_scaled_and_capped_as_the_config_says() -> None:
    config = replace(CONFIG, embedding_scale=2.0, logit_scale=0.5, logit_softcap=3.0)
    head, weight = head_of(config), torch.randn(V, D, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[1, 39]])
    torch.testing.assert_close(head.embed(ids, weight), 2.0 * weight[ids])
    states = torch.randn(1, 2, D, generator=torch.Generator().manual_seed(3))
    expected = 3.0 * torch.tanh(states @ weight.T * 0.5 / 3.0)
    torch.testing.assert_close(head.logits(states, lambda x: x @ weight.T), expected)


@torch.no_grad()
def test_a_vocabulary_of_its_own_leaves_other_tokens_without_mass() -> None:
    head = head_of(replace(CONFIG, draft_vocab_size=3))
    assert head.d2t is not None
    assert head.lm_head is not None
    head.d2t.copy_(torch.tensor([0, 4, 20]))
    assert head.token_ids.tolist() == [0, 5, 22]
    states = torch.randn(2, D, generator=torch.Generator().manual_seed(3))
    logits = head.logits(states, lambda x: pytest.fail("the target's output matrix is not read"))
    assert logits.shape == (2, V)
    torch.testing.assert_close(logits[:, [0, 5, 22]], states @ head.lm_head.weight.T)
    assert logits.isfinite().sum(-1).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("layers", "drafts", "taps"),
    [(36, 5, (2, 10, 18, 26, 34)), (36, 1, (19,)), (28, 5, (2, 8, 14, 20, 26)), (4, 5, (2,)), (2, 5, (2,)),
     (1, 2, (1,))],
)  # fmt: skip
def test_default_taps_are_spread_as_published(layers: int, drafts: int, taps: tuple[int, ...]) -> None:
    assert default_taps(layers, drafts) == taps


def test_the_size_of_the_drafter_for_an_8b_target() -> None:
    layer = LayerConfig(4096, 12288, 32, 8, 128, qk_norm=True)
    with torch.device("meta"):
        head = DFlashHead(DFlashConfig(layer, 5, default_taps(36, 5), 16, 151669, 151936))
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 2 * 128
    per_layer = attention + 3 * 4096 * 12288 + 2 * 4096
    assert sum(p.numel() for p in head.parameters()) == 5 * per_layer + 5 * 4096 * 4096 + 2 * 4096


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"taps": ()}, "taps"),
        ({"taps": (-1,)}, "taps"),
        ({"block_size": 1}, "drafts nothing"),
        ({"mask_token_id": V}, "outside"),
        ({"sliding_layers": (1,)}, "sliding_window is None"),
        ({"sliding_layers": (2,), "sliding_window": 4}, "more than the 2 layers"),
        ({"draft_vocab_size": V + 1}, "exceeds"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(CONFIG, **fields)


def test_a_block_whose_anchor_drafts_has_one_token_more() -> None:
    assert (CONFIG.max_depth, replace(CONFIG, sample_from_anchor=True).max_depth) == (Q - 1, Q)
    assert replace(CONFIG, block_size=1, sample_from_anchor=True).max_depth == 1
