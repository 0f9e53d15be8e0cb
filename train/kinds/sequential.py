"""Hydra, Hydra++, Clover-2 and the MLP speculator learn with the text's own tokens fed at every depth.

Which state goes with which token is said in `specdec.heads.sequential`: depth k (counted from 0) of pair t has been fed
x_{t+1} ... x_{t+1+k} and guesses x_{t+2+k}, which is the tree's depth k + 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.heads.clover import CloverConfig, CloverHead
from specdec.heads.hydra import HydraConfig, HydraHead
from specdec.heads.layer import LayerConfig
from specdec.heads.mlp_speculator import MLPSpeculatorConfig, MLPSpeculatorHead
from specdec.heads.sequential import SequentialHead, TargetEnds, teacher_forced
from specdec.target import BEFORE_NORM, Target
from specdec.train.batch import TrainBatch
from specdec.train.kinds.head import HeadTraining
from specdec.train.mask import document_mask
from specdec.train.objective import Objective, Term


class SequentialTraining(HeadTraining):
    """Trains any sequential head on a frozen target.

    Args:
        target: probed.
        head: the module.
        feature_weight: of a smooth L1 loss between the head's states and the target's normed states one token later
            at each depth (Clover-2, Hydra's reconstruction); 0 leaves it out.
        options: of the drafter that validation decodes with.
    """

    def __init__(
        self, target: Target, head: nn.Module, *, feature_weight: float = 0.0, options: dict[str, Any] | None = None
    ) -> None:
        before = cast(SequentialHead, head).before_norm
        tap = BEFORE_NORM if before else target.num_layers
        taps = (tap, target.num_layers) if feature_weight and before else (tap,)
        super().__init__(target, head, taps, options)
        self.feature_weight = feature_weight

    @property
    def ends(self) -> TargetEnds:
        """The target's embedding and output matrix, for states of any dtype."""
        return TargetEnds(lambda tokens: self.target.embedding(tokens).float(), self.target_logits)

    def terms(self, batch: TrainBatch, objective: Objective) -> list[Term]:
        """One term for each depth, and one for its states where features are compared."""
        head, ends = cast(SequentialHead, self.module), self.ends
        hidden = batch.taps[self.taps[0]].float()
        mask = None if head.text is None else document_mask(batch, hidden)[:, :, :-1, :-1]
        terms = []
        guesses = teacher_forced(head, hidden, batch.ids, ends, positions=batch.positions[:, :-1], mask=mask)
        for index, guess in enumerate(guesses):
            ahead = index + 2
            here = batch.drafts(ahead)[:, : guess.shape[1]]
            states = guess[here]
            logits = self.logits(states, partial(head.logits, index, ends=ends))
            terms.append(objective.term(index + 1, logits, self.laws(batch, ahead)))
            if self.feature_weight:
                terms.append(self._features(batch, states, ahead, objective))
        return terms

    def _features(self, batch: TrainBatch, states: Tensor, ahead: int, objective: Objective) -> Term:
        """Distance to the state from which the target itself guesses the same token, that of token t + ahead - 1."""
        stands = torch.zeros_like(batch.supervised)
        stands[:, ahead - 1 :] = batch.drafts(ahead)[:, : batch.ids.shape[1] - ahead + 1]
        wanted = batch.taps[self.target.num_layers][stands].float()
        losses = F.smooth_l1_loss(states, wanted, reduction="none").mean(-1)
        return Term(f"features {ahead - 1}", losses, self.feature_weight * objective.decay ** (ahead - 2))


class HydraTraining(SequentialTraining):
    """Hydra, and with `prefix` Hydra++ (arXiv 2402.05109).

    Args:
        num_heads, num_layers: K heads of so many blocks.
        prefix: a decoder layer over the text in front (Hydra++).
        head: continue from this one instead of a fresh one.
    """

    kind = "hydra"

    def __init__(
        self,
        target: Target,
        *,
        num_heads: int = 4,
        num_layers: int = 1,
        prefix: bool = False,
        head: HydraHead | None = None,
        feature_weight: float = 0.0,
        options: dict[str, Any] | None = None,
    ) -> None:
        if head is None:
            layer = LayerConfig.of(target.config) if prefix else None
            head = HydraHead(HydraConfig(target.hidden_size, target.vocab_size, num_heads, num_layers, prefix=layer))
            head.begin_as(target.logit_weight)
        super().__init__(target, head, feature_weight=feature_weight, options=options)


class CloverTraining(SequentialTraining):
    """Clover-2 (arXiv 2408.00264): states are pulled to the target's, laws to the target's laws.

    Args:
        num_heads: depths.
        num_layers: of the augmenting block.
        head: continue from this one instead of a fresh one.
    """

    kind = "clover"

    def __init__(
        self,
        target: Target,
        *,
        num_heads: int = 4,
        num_layers: int = 2,
        head: CloverHead | None = None,
        feature_weight: float = 1.0,
        options: dict[str, Any] | None = None,
    ) -> None:
        if head is None:
            config = CloverConfig(LayerConfig.of(target.config), target.vocab_size, num_heads, num_layers)
            head = CloverHead(config)
            head.begin_as(cast(Any, target.lm_head).weight, target.logit_weight)
        super().__init__(target, head, feature_weight=feature_weight, options=options)


class MLPSpeculatorTraining(SequentialTraining):
    """The MLP speculator (arXiv 2404.19124).

    Args:
        num_heads: tokens guessed.
        inner_size: width of its states; None for the target's hidden size.
        tied: all depths share embedding, norm and output matrix.
        head: continue from this one instead of a fresh one.
    """

    kind = "mlp-speculator"

    def __init__(
        self,
        target: Target,
        *,
        num_heads: int = 3,
        inner_size: int | None = None,
        tied: bool = True,
        head: MLPSpeculatorHead | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if head is None:
            config = MLPSpeculatorConfig(
                hidden_size=target.hidden_size,
                vocab_size=target.vocab_size,
                inner_size=inner_size or target.hidden_size,
                n_predict=num_heads,
                tie_weights=tied,
                scale_input=True,
            )
            head = MLPSpeculatorHead(config)
        super().__init__(target, head, options=options)
