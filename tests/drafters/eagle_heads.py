"""EAGLE heads for tiny targets: random ones, ones that know a text by heart, and their drafts without any cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.drafters.eagle import features_of
from specdec.heads.eagle import EagleConfig, EagleHead
from specdec.heads.eagle3 import Eagle3Config, Eagle3Head
from specdec.heads.layer import LayerConfig, causal_mask
from specdec.target import Target

Head = EagleHead | Eagle3Head


def random_head(kind: str, target: Target, *, seed: int = 0, **options: Any) -> Head:
    """A head of this kind for a target, with weights large enough to matter."""
    layer = replace(LayerConfig.of(target.config), **options.pop("layer", {}))
    torch.manual_seed(seed)
    if kind == "eagle":
        head: Head = EagleHead(EagleConfig(layer, target.vocab_size, **options))
    else:
        options.setdefault("draft_vocab_size", target.vocab_size)
        head = Eagle3Head(Eagle3Config(layer, target.vocab_size, **options))
        if head.d2t is not None:
            head.choose_vocabulary(torch.randperm(target.vocab_size)[: head.guessed].tolist())
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.15)
    return head.to(target.dtype).eval()


@torch.no_grad()
def features(head: Head, target: Target, rows: Tensor) -> Tensor:
    """The head's features [B, S, K T] of texts [B, S], by one forward of the model without a cache."""
    output = target.call(tuple(dict.fromkeys(features_of(head, target))), input_ids=rows, use_cache=False)
    return torch.cat([output.taps[tap] for tap in features_of(head, target)], -1)


def embedded(head: Head, target: Target, tokens: Tensor) -> Tensor:
    return (target.embedding if head.embed_tokens is None else head.embed_tokens)(tokens)


@torch.no_grad()
def logits_after(head: Head, target: Target, text: list[int], path: list[int], known: Tensor) -> Tensor:
    """Logits [V] of the head for what follows `path` below the last token of `text`; everything from scratch.

    `known` are the features of the text without its last token.
    """
    states = head.encode(known)
    tokens, rest = text[1:], list(path)
    while True:
        positions = torch.arange(len(tokens))[None]
        mask = causal_mask(len(tokens), states)
        window = getattr(head.config, "sliding_window", None)
        if window is not None:
            mask = mask + mask.new_full(mask.shape, torch.finfo(mask.dtype).min).tril(-window)
        made = head(embedded(head, target, torch.tensor([tokens])), states, positions, mask)[:, -1:]
        if not rest:
            break
        states, tokens = torch.cat([states, made], 1), [*tokens, rest.pop(0)]
    guessed = head.logits(made, target.logits_of)[0, 0]
    logits = guessed.new_full((target.vocab_size,), -torch.inf)
    logits[head.to_token_ids(torch.arange(head.guessed))] = guessed
    return logits


def fitted(head: Head, target: Target, rows: Tensor, steps: int = 60) -> Head:
    """The head after it has learned these texts [B, S] by heart, well enough to be right now and then."""
    feats, length = features(head, target, rows), rows.shape[1]
    ids = head.to_token_ids(torch.arange(head.guessed))
    place = torch.full((target.vocab_size,), -100)
    place[ids] = torch.arange(head.guessed)
    inside, follows = embedded(head, target, rows[:, 1:-1]).detach(), place[rows[:, 2:]]
    mask, positions = causal_mask(length - 2, feats), torch.arange(length - 2).expand(len(rows), -1)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(steps):
        logits = head.logits(head(inside, head.encode(feats[:, :-2]), positions, mask), target.logits_of)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), follows.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.requires_grad_(False).eval()
