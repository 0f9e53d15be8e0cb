"""A draft model must mean the same by its token ids as the target does."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import specdec
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import DrafterMismatch
from specdec.probe import target_of
from specdec.vocabulary import check_vocabulary, fit_logits
from tests.tiny import VOCAB, make_target


def make_tokenizer(size):
    vocab = {f"t{i}": i for i in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="t0")))


def saved(tmp_path, name, model, size):
    """The model on disk with a tokenizer of `size` tokens beside it."""
    model.save_pretrained(tmp_path / name)
    make_tokenizer(size).save_pretrained(tmp_path / name)
    model.name_or_path = str(tmp_path / name)
    return model


def test_equal_widths_pass_without_tokenizers():
    check_vocabulary(make_target(1), make_target(0))


def test_other_widths_are_refused_without_tokenizers():
    with pytest.raises(DrafterMismatch, match="vocabulary of 90 tokens, the target one of 100"):
        check_vocabulary(make_target(1, vocab_size=90), make_target(0))


def test_same_tokens_allow_heads_padded_to_different_widths(tmp_path):
    draft = saved(tmp_path, "draft", make_target(1, vocab_size=VOCAB + 12), VOCAB)
    check_vocabulary(draft, saved(tmp_path, "target", make_target(0), VOCAB))


def test_other_tokens_are_refused_at_equal_widths(tmp_path):
    draft = saved(tmp_path, "draft", make_target(1), VOCAB - 5)
    with pytest.raises(DrafterMismatch, match=r"vocabulary .95 tokens. is another one"):
        check_vocabulary(draft, saved(tmp_path, "target", make_target(0), VOCAB))


def test_logits_are_cut_or_filled_with_no_mass():
    logits = torch.arange(6.0).reshape(1, 6)
    assert fit_logits(logits, 4).tolist() == [[0.0, 1.0, 2.0, 3.0]]
    assert fit_logits(logits, 8)[0, 6:].tolist() == [-torch.inf] * 2
    assert fit_logits(logits, 6) is logits


@pytest.mark.parametrize("width", [VOCAB - 20, VOCAB + 20])
@pytest.mark.parametrize("children", ["chosen", "drawn"])
def test_a_narrower_or_wider_draft_head_stays_exact(width, children):
    target = make_target(0)
    draft = target_of(make_target(0, vocab_size=width))
    drafter = DraftModelDrafter(draft, vocab_size=VOCAB, depth=3, budget=7, children=children)
    prompt = torch.arange(3, 12)[None] * 7 % VOCAB
    plain = target.generate(prompt, max_new_tokens=24, do_sample=False)
    ours = specdec.generate(target, prompt, drafter=drafter, max_new_tokens=24, do_sample=False)
    assert isinstance(ours, torch.Tensor)
    assert torch.equal(ours, plain)
    torch.manual_seed(0)
    sampled = specdec.generate(target, prompt, drafter=drafter, max_new_tokens=24, do_sample=True, temperature=2.0)
    assert isinstance(sampled, torch.Tensor)
    assert int(sampled.max()) < VOCAB
