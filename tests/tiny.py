"""One tiny random target, a draft model that agrees with it half of the time, prompts and a tokenizer."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec.drafter import Drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.load import load_drafter
from specdec.probe import target_of

VOCAB = 100
PAD, BOS = 0, 1


def make_target(seed: int = 0, **overrides: Any) -> Any:
    """Llama of 4 layers whose logits are far from uniform; no end-of-text token unless a test names one."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.15,
        "bos_token_id": BOS,
        "eos_token_id": None,
        "pad_token_id": PAD,
        **overrides,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


@cache
def shared_target() -> Any:
    """The target of most tests; tests that change a model make their own."""
    return make_target()


def perturbed(model: Any, amount: float = 0.01, seed: int = 1) -> Any:
    """A copy with noise on every weight."""
    torch.manual_seed(seed)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * amount)
    return draft


@cache
def shared_draft() -> Any:
    """A draft model for `shared_target`."""
    return perturbed(shared_target())


SPECS: dict[str, str] = {
    "lookup": "lookup",
    "suffix": "suffix:branches=3",
    "recycling": "recycling",
    "early-exit chain": "early-exit:layer=3,depth=3",
    "early-exit tree": "early-exit:layer=3,depth=3,budget=8",
}
DRAFT_MODELS: dict[str, dict[str, Any]] = {
    "draft-model chain": {"depth": 4},
    "draft-model tree": {"depth": 4, "budget": 10},
    "drawn chain": {"depth": 4, "children": "drawn"},
    "drawn tree": {"depth": 3, "budget": 8, "children": "drawn"},
}
CHOSEN = [*SPECS, "draft-model chain", "draft-model tree"]
"""Every drafter whose children are chosen."""


def drafter_named(name: str) -> Drafter:
    """A fresh drafter for `shared_target`."""
    if name in DRAFT_MODELS:
        return DraftModelDrafter(target_of(shared_draft()), **DRAFT_MODELS[name])
    drafter = load_drafter(SPECS[name], shared_target())
    assert drafter is not None
    return drafter


def prompt(batch_size: int, length: int = 12, seed: int = 3) -> dict[str, Any]:
    """input_ids and attention_mask; rows of a batch have 0, 5, 2 columns of left padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch_size):
        padding = (0, 5, 2)[row % 3]
        ids[row, :padding] = PAD
        mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One printable character for each of the 100 ids; the first three are special."""
    from tokenizers import Tokenizer, decoders, models

    characters = ["<pad>", "<bos>", "<eos>", " ", "\n", *map(chr, range(33, 127)), "é"]
    vocab = {token: index for index, token in enumerate(characters)}
    assert len(vocab) == VOCAB
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
