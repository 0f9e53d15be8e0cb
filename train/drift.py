"""How far an adapted target has moved from the original one, on held-out text."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from specdec.api import generate
from specdec.target import Target
from specdec.train.divergence import Laws, forward_kl

KL, AGREEMENT = "kl_to_original", "top1_agreement"


class Drift:
    """Compares laws where the original target goes on from held-out prompts, greedily.

    Args:
        target: with adapters.
        original: a context in which it is the original one.
        prompts: ids of each.
        new_tokens: of each continuation; one law for each is kept on the host.
    """

    def __init__(
        self, target: Target, original: AbstractContextManager[None], prompts: list[list[int]], new_tokens: int
    ) -> None:
        with original, torch.no_grad():
            self.texts = [self._continued(target, prompt, new_tokens) for prompt in prompts]
            self.target, self.starts = target, [len(prompt) for prompt in prompts]
            self.laws = [self._laws(number).cpu() for number in range(len(prompts))]

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Mean KL(original || adapted), and the share of positions with the same most probable token."""
        distances, same = [], []
        for number, original in enumerate(self.laws):
            original, adapted = original.to(self.target.device), self._laws(number)
            laws = Laws(adapted, original)
            distances.append(forward_kl(laws).double().cpu())
            same.append(laws.agree().double().cpu())
        return {KL: round(torch.cat(distances).mean().item(), 6), AGREEMENT: round(torch.cat(same).mean().item(), 4)}

    def _laws(self, number: int) -> Tensor:
        """Logits [n, V] of the n tokens behind one prompt."""
        output = self.target.call((), input_ids=self.texts[number], use_cache=False)
        return output.logits[0, self.starts[number] - 1 : -1]

    @staticmethod
    def _continued(target: Target, prompt: list[int], new_tokens: int) -> Tensor:
        ids = torch.tensor([prompt], device=target.device)
        mask = torch.ones_like(ids)
        text = generate(target.model, ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        return cast(Tensor, text)
