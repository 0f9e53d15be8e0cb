"""A DFlash head drafts from the target's states of every committed token, and never changes the text."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, OPTConfig

import specdec
from specdec import formats
from specdec.cache import KVCache
from specdec.drafters.block import BlockDrafter
from specdec.drafters.load import load_drafter
from specdec.errors import DrafterMismatch, UnknownDrafter
from specdec.formats.checkpoint import HeadCheckpoint
from specdec.heads.dflash import FULL, SLIDING, DFlashConfig, DFlashHead, block_ids, causal_in_block
from specdec.pending import TapRun
from specdec.probe import target_of
from specdec.target import FLEX, Target
from tests.families import VOCAB, Reference, model_of, redraw, reference, sizes, tiny_model
from tests.tiny import make_target

NEW_TOKENS = 24
BLOCK = 5
BATCHES = {"batch-1": [13], "batch-3": [13, 6, 10]}
FAMILIES = ["llama", "qwen3", "gemma3-sliding", "gpt2"]
OPTIONS: dict[str, dict[str, Any]] = {
    "chain": {},
    "short chain": {"depth": 2},
    "tree": {"budget": 9},
    "best-first": {"budget": 9, "grow": "best-first"},
    "unsure": {"min_confidence": 0.3},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding": {"sliding_layers": (1,), "sliding_window": 6},
    "from anchor": {"sample_from_anchor": True, "causal": True},
}


@cache
def model_named(family: str) -> Any:
    return tiny_model(family, "sdpa")


@cache
def told(family: str, batch: str) -> Reference:
    return reference(model_named(family), BATCHES[batch], NEW_TOKENS)


def head_for(target: Target, **fields: Any) -> DFlashHead:
    """A random head whose mask is token 0."""
    sized = {"mask_token_id": 0, "num_layers": 2, "block_size": BLOCK, "taps": (1, target.num_layers), **fields}
    head = DFlashHead(DFlashConfig.of(target.config, **sized))
    redraw(head, 1)  # type: ignore[arg-type]
    return head.to(target.dtype)


def texts(one: Reference) -> list[list[int]]:
    """Prompt and reference text of each row, without padding."""
    padding = (one.prompts.mask == 0).sum(1).tolist()
    return [row[count:] for row, count in zip(one.sequences.tolist(), padding, strict=True)]


class KnowingDrafter(BlockDrafter):
    """Runs its random head, then is told the text: mostly as its best guess, sometimes as its second, or not at all."""

    def __init__(self, target: Target, head: DFlashHead, known: list[list[int]], **options: Any) -> None:
        super().__init__(target, head, **options)
        self.known, self.rows = known, list(range(len(known)))

    def marginals(self, root: Tensor, depth: int) -> Tensor:
        """Logits with the known tokens pushed up."""
        logits = super().marginals(root, depth).clone()
        for b, row in enumerate(self.rows):
            place = self._context.lengths[b] - self._context.starts[b]
            assert self.known[row][place] == int(root[b]), "the root stands behind what was digested"
            for k, token in enumerate(self.known[row][place + 1 : place + 1 + depth]):
                logits[b, k, token] += 100 * ((place + k) % 4 != 0)
                logits[b, k, (token + 1) % VOCAB] += 200 * ((place + k) % 4 == 1)
        return logits

    def select(self, rows: list[int]) -> None:
        """Rows keep their texts."""
        super().select(rows)
        self.rows = [self.rows[row] for row in rows]


def generate(model: Any, one: Reference, drafter: Any, **options: Any) -> Any:
    return specdec.generate(
        model, **one.prompts.inputs, drafter=drafter, return_dict_in_generate=True,
        **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **options},
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_head_keeps_its_own_attention_where_the_target_has_flex_attention() -> None:
    """The target is verified through block masks, the head gets additive ones."""
    model, one = tiny_model("llama", FLEX, layers=2), reference(tiny_model("llama", "sdpa", layers=2), [13, 6, 10], 10)
    target = target_of(model)
    for variant in VARIANTS.values():
        drafter = KnowingDrafter(target, head_for(target, **variant), texts(one), budget=9)
        output = generate(model, one, drafter, max_new_tokens=10)
        assert output.sequences.tolist() == one.sequences.tolist()
        assert 0 < output.stats.accepted < output.stats.drafted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_text_is_that_of_plain_generate(family: str, options: str) -> None:
    model = model_named(family)
    target, head = target_of(model), head_for(target_of(model))
    for batch in BATCHES:
        one = told(family, batch)
        drafter = KnowingDrafter(target, head, texts(one), **OPTIONS[options])
        output = generate(model, one, drafter)
        assert output.sequences.tolist() == one.sequences.tolist()
        assert 0 < output.stats.accepted < output.stats.drafted, "neither accepted nor rejected anything: no test"


def from_scratch(drafter: BlockDrafter, text: list[int], depth: int) -> Tensor:
    """Marginals [K, V] after a text whose last token is the root, with nothing kept from before."""
    head, target = drafter.head, drafter.target
    config, length = head.config, len(text) - 1
    with torch.no_grad():
        output = target.model(torch.tensor([text[:-1]]), output_hidden_states=True)
        taps = torch.cat([output.hidden_states[tap] for tap in config.taps], -1)
        kept = KVCache(config.num_layers)
        head.inject(head.features(taps), torch.arange(length)[None], kept)
        ids = block_ids(torch.tensor([text[-1]]), config, config.first_slot + depth)
        width = ids.shape[1]
        masks = {}
        for kind in (FULL, SLIDING):
            mask = torch.zeros(1, 1, width, length + width)
            if kind == SLIDING and config.sliding_window:
                for query in range(width):
                    mask[..., query, : max(length + query - config.sliding_window + 1, 0)] = torch.finfo(mask.dtype).min
            masks[kind] = causal_in_block(mask, width) if config.is_causal(kind) else mask
        embedding: Any = target.embedding
        states = head(head.embed(ids, embedding.weight), torch.arange(length, length + width)[None], masks, kept)
        return head.logits(states[0, -depth:], target.lm_head)


class ComparedDrafter(KnowingDrafter):
    """Compares every step with a computation from scratch."""

    largest, compared = 0.0, 0

    def marginals(self, root: Tensor, depth: int) -> Tensor:
        """The incremental ones."""
        logits = BlockDrafter.marginals(self, root, depth)
        for b, row in enumerate(self.rows):
            place = self._context.lengths[b] - self._context.starts[b]
            expected = from_scratch(self, self.known[row][: place + 1], depth)
            self.largest = max(self.largest, (logits[b] - expected).abs().max().item())
            self.compared += 1
        return super().marginals(root, depth)


@pytest.mark.parametrize("family", ["llama", "gemma3-sliding"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_step_s_laws_are_those_computed_from_scratch(family: str, variant: str) -> None:
    model, one = model_named(family), told(family, "batch-3")
    target = target_of(model)
    drafter = ComparedDrafter(target, head_for(target, **VARIANTS[variant]), texts(one), budget=9)
    output = generate(model, one, drafter)
    assert output.sequences.tolist() == one.sequences.tolist()
    assert output.stats.accepted > 0
    assert drafter.compared > 15
    assert drafter.largest < 2e-4


def test_features_at_the_wrong_positions_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TapRun.positions
    monkeypatch.setattr(TapRun, "positions", lambda self, ends: right(self, [max(end - 1, 0) for end in ends]))
    model, one = model_named("llama"), told("llama", "batch-3")
    drafter = ComparedDrafter(target_of(model), head_for(target_of(model)), texts(one))
    generate(model, one, drafter)
    assert drafter.largest > 1e-2


def test_rows_that_end_at_different_times_end_as_in_plain_generate() -> None:
    model, one = model_named("llama"), told("llama", "batch-3")
    new = one.sequences[:, one.prompts.ids.shape[1] :]
    ends = [row[index].item() for row, index in zip(new, (4, 11, 18), strict=True)]
    options: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": 0}
    expected = model.generate(**one.prompts.inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    lengths = {next(i for i, token in enumerate(row) if token in ends) for row in new.tolist()}
    assert len(lengths) > 1, "rows must end at different times"
    target = target_of(model)
    for shape in ({}, {"budget": 9}, {"budget": 9, "grow": "best-first"}):
        drafter = ComparedDrafter(target, head_for(target), texts(one), **shape)
        output = generate(model, one, drafter, **options)
        assert output.sequences.tolist() == expected.tolist()
        assert drafter.largest < 2e-4


def test_an_end_of_text_inside_an_accepted_path_ends_the_row() -> None:
    model, one = model_named("llama"), told("llama", "batch-1")
    new = one.sequences[0, one.prompts.ids.shape[1] :].tolist()
    inside = 0
    for place in range(2, 10):
        eos = new[place]
        if eos in new[:place]:
            continue
        options: dict[str, Any] = {"eos_token_id": eos, "pad_token_id": 0}
        expected = model.generate(**one.prompts.inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
        output = generate(
            model, one, KnowingDrafter(target_of(model), head_for(target_of(model)), texts(one)), **options
        )
        assert output.sequences.tolist() == expected.tolist()
        last = output.stats.steps[-1]
        inside += last.accepted == last.emitted < last.drafted
    assert inside, "no row ended on a proposed token with more below it"


@pytest.mark.parametrize("new_tokens", range(1, 8))
def test_a_block_is_no_longer_than_the_room(new_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, one = model_named("qwen3"), told("qwen3", "batch-3")
    seen = []
    right = BlockDrafter.marginals
    monkeypatch.setattr(
        BlockDrafter, "marginals", lambda self, root, depth: (seen.append(depth), right(self, root, depth))[1]
    )
    output = generate(
        model, one, BlockDrafter(target_of(model), head_for(target_of(model)), budget=9), max_new_tokens=new_tokens
    )
    assert output.sequences.tolist() == one.sequences[:, : 13 + new_tokens].tolist()
    assert seen[:1] == ([min(BLOCK - 1, new_tokens - 2)] if new_tokens > 2 else [])
    assert all(depth >= 1 for depth in seen)


def test_text_that_fills_the_target_s_positions_stays_exact() -> None:
    model = model_of(type(model_named("llama").config)(**sizes(max_position_embeddings=32)), "sdpa")
    one = reference(model, [13], 19)
    drafter = KnowingDrafter(target_of(model), head_for(target_of(model)), texts(one))
    assert generate(model, one, drafter, max_new_tokens=19).sequences.tolist() == one.sequences.tolist()


def test_text_that_outgrows_the_cache_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.cache.MIN_CAPACITY", 4)
    model, one = model_named("llama"), told("llama", "batch-3")
    drafter = ComparedDrafter(target_of(model), head_for(target_of(model)), texts(one))
    assert generate(model, one, drafter).sequences.tolist() == one.sequences.tolist()
    assert drafter.largest < 2e-4


def test_token_0_is_drafted_and_accepted_like_any_other() -> None:
    model = make_target(vocab_size=5, pad_token_id=None, initializer_range=0.5)
    ids = torch.tensor([[1, 3, 2, 4, 0, 3]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    target = target_of(model)
    drafter = BlockDrafter(target, head_for(target, block_size=3), grow="best-first", budget=30, width=5)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": True, "temperature": 8.0}
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model.generate(**inputs, **options)
        torch.manual_seed(seed)
        output: Any = specdec.generate(model, **inputs, drafter=drafter, return_dict_in_generate=True, **options)
        assert output.sequences.tolist() == expected.tolist()
        assert output.sequences[0, 6:].eq(0).any()
        assert output.stats.tau > 2.5, "a tree of all pairs of five tokens accepts two of them in every step"


@pytest.mark.parametrize("options", [{"budget": 9}, {"budget": 9, "grow": "best-first"}, {}], ids=str)
def test_with_a_seed_chosen_children_give_the_tokens_of_plain_sampling(options: dict[str, Any]) -> None:
    model, one = model_named("llama"), told("llama", "batch-1")
    drafter = BlockDrafter(target_of(model), head_for(target_of(model)), **options)
    torch.manual_seed(7)
    expected = model.generate(**one.prompts.inputs, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.7)
    torch.manual_seed(7)
    output = generate(model, one, drafter, do_sample=True, temperature=0.7)
    assert output.sequences.tolist() == expected.tolist()


def test_after_a_cache_that_was_passed_in_features_keep_their_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, one = model_named("llama"), told("llama", "batch-1")
    ids, target = one.prompts.ids, target_of(model)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=past, use_cache=True)
    asked: list[list[int]] = []
    right = DFlashHead.forward

    def forward(self: DFlashHead, block: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        asked.append(positions[0].tolist())
        return right(self, block, positions, *rest)

    monkeypatch.setattr(DFlashHead, "forward", forward)
    drafter = KnowingDrafter(target, head_for(target), texts(one))
    output = generate(model, one, drafter, past_key_values=past)
    assert output.sequences.tolist() == one.sequences.tolist()
    assert output.stats.accepted > 0
    assert asked[0] == list(range(13, 13 + BLOCK))


def test_a_drafter_serves_one_generation_after_the_other() -> None:
    model = model_named("llama")
    drafter = BlockDrafter(target_of(model), head_for(target_of(model)))
    outputs = [generate(model, told("llama", batch), drafter).stats.drafted for batch in ("batch-3", "batch-1") * 2]
    assert outputs[:2] == outputs[2:]


def test_bfloat16_runs() -> None:
    model = model_of(model_named("qwen3").config, "sdpa").bfloat16()
    head = head_for(target_of(model), draft_vocab_size=50)
    output = generate(model, told("qwen3", "batch-3"), BlockDrafter(target_of(model), head, budget=9))
    assert output.sequences.shape == (3, 13 + NEW_TOKENS)


def test_a_vocabulary_of_its_own_drafts_the_tokens_that_it_names() -> None:
    model, one = model_named("llama"), told("llama", "batch-1")
    head = head_for(target_of(model), draft_vocab_size=3)
    assert head.d2t is not None
    head.d2t.copy_(torch.tensor([5, 9, 70]))
    drafter = BlockDrafter(target_of(model), head, budget=30, grow="best-first")
    generate(model, one, drafter)
    drafted = drafter.marginals(torch.tensor([7]), 2)
    assert drafted.isfinite().nonzero()[:, 2].unique().tolist() == [5, 10, 72]


def test_a_head_for_another_target_is_refused() -> None:
    target = target_of(model_named("llama"))

    def refused(said: str, **fields: Any) -> None:
        head = DFlashHead(replace(head_for(target).config, **fields))
        with pytest.raises(DrafterMismatch, match=said):
            BlockDrafter(target, head)

    refused("hidden size 16, the target has 32", layer=replace(head_for(target).config.layer, hidden_size=16))
    refused("vocabulary 200, the target has 128", vocab_size=200)
    refused("hidden states 4, the target has 0 to 3", taps=(1, 4))


def test_embeddings_of_another_width_are_refused() -> None:
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256, pad_token_id=1,
    )  # fmt: skip
    target = target_of(model_of(config, "sdpa"))
    with pytest.raises(DrafterMismatch, match="embedding matrix in its hidden size 32, got 16"):
        BlockDrafter(target, head_for(target))


def test_more_levels_than_slots_are_refused() -> None:
    target = target_of(model_named("llama"))
    with pytest.raises(UnknownDrafter, match="drafts 4 tokens in its block of 5; depth is at most that, got 5"):
        BlockDrafter(target, head_for(target), depth=5)


def test_a_directory_is_a_drafter(tmp_path: Path) -> None:
    model, one = model_named("llama"), told("llama", "batch-1")
    head = head_for(target_of(model))
    for format in ("dflash", "native"):
        formats.write(HeadCheckpoint("dflash", head.config, head.state_dict()), tmp_path / format, format)
        drafter: Any = load_drafter(f"{tmp_path / format}:depth=3,budget=7,grow=best-first", model)
        assert (drafter.depth, drafter.policy.budget, drafter.head.config) == (3, 7, head.config)
        generate(model, one, drafter)
        ours = BlockDrafter(target_of(model), head)
        generate(model, one, ours)
        root = torch.tensor([7])
        torch.testing.assert_close(drafter.marginals(root, 3), ours.marginals(root, 3))
