"""Medusa heads that nearly know by heart what a tiny target writes after a prompt: no training, a linear fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.heads.medusa import MedusaConfig, MedusaHead


@torch.no_grad()
def memorised_heads(model: Any, inputs: dict[str, Any], new_tokens: int = 40, heads: int = 4, **config: Any) -> Any:
    """Heads whose output matrices are the least-squares fit of token t + 2 + k on h_t, over plain greedy text."""
    text = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(text[:, inputs["input_ids"].shape[1] :])], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    states = model(text, attention_mask=mask, position_ids=positions, output_hidden_states=True).hidden_states[-1]
    size, vocabulary = states.shape[-1], model.config.get_text_config().vocab_size
    made = MedusaHead(MedusaConfig(size, vocabulary, heads, **config)).to(states.dtype)
    made.begin_as_target(torch.zeros(vocabulary, size, dtype=states.dtype))
    start = inputs["input_ids"].shape[1] - 1
    for k in range(heads):
        known = states[:, start : -(2 + k)].reshape(-1, size)
        told = torch.nn.functional.one_hot(text[:, start + 2 + k :].reshape(-1), vocabulary).to(known.dtype)
        made.lm_heads[k].weight.copy_(_fit(known, told))  # type: ignore[union-attr]
    return made.eval()


def _fit(states: Tensor, wanted: Tensor) -> Tensor:
    """Weight [V, D] with the smallest squared error, slightly damped so that few states do not make it explode."""
    x, y = states.double(), wanted.double()
    damped = x.T @ x + 1e-3 * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.solve(damped, x.T @ y).T.to(states.dtype)
