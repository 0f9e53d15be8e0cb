"""Medusa heads learn from a frozen target (Medusa-1, arXiv 2401.10774, section 2.2.1).

Head k reads the state after the final norm at t and guesses token t + 2 + k, so the tree's depth d = k + 1 looks
d + 1 tokens ahead. It is compared with the target's own law of that token, given the text up to it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from specdec.heads.medusa import MedusaConfig, MedusaHead, Output
from specdec.target import Target
from specdec.train.batch import TrainBatch
from specdec.train.kinds.head import HeadTraining
from specdec.train.objective import Objective, Term


class MedusaTraining(HeadTraining):
    """Trains K heads on a frozen target.

    Args:
        target: probed.
        num_heads: K.
        num_layers: residual blocks of each head.
        output: "target" shares the target's output matrix, "own" gives every head one, as published.
        head: continue from these heads instead of fresh ones.
        options: of the drafter that validation decodes with.
    """

    kind = "medusa"

    def __init__(
        self,
        target: Target,
        *,
        num_heads: int = 4,
        num_layers: int = 1,
        output: Output = "target",
        head: MedusaHead | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if head is None:
            head = MedusaHead(MedusaConfig(target.hidden_size, target.vocab_size, num_heads, num_layers, output=output))
            head.begin_as_target(target.logit_weight)
        super().__init__(target, head, (target.num_layers,), options)

    def terms(self, batch: TrainBatch, objective: Objective) -> list[Term]:
        """One term for each head, at the positions whose guessed token is supervised.

        Heads with a token map are held to laws over what they can guess, where the target's favourite is among it.
        """
        head = cast(MedusaHead, self.module)
        hidden = batch.taps[self.taps[0]].float()
        terms = []
        for depth in range(1, head.config.num_heads + 1):
            logits = self.logits(hidden[batch.drafts(depth + 1)], partial(self._logits, head, depth - 1))
            laws = self.laws(batch, depth + 1)
            if head.token_map is not None:
                known = torch.isin(laws.argmax(-1), head.token_map)
                logits, laws = logits[known], laws[known][:, head.token_map]
            terms.append(objective.term(depth, logits, laws))
        return terms

    def _logits(self, head: MedusaHead, index: int, hidden: Tensor) -> Tensor:
        """What one head says: [M, V] for states [M, D]."""
        for block in cast(nn.ModuleList, head.blocks[index]):
            hidden = block(hidden)
        if head.config.output == "target":
            return self.target_logits(hidden) * head.config.logit_scale
        return head.lm_heads[index if head.config.output == "own" else 0](hidden) * head.config.logit_scale
