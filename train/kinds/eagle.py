"""EAGLE-1 and EAGLE-3 learn by training-time test: the head is run on its own outputs, as it will be when drafting.

Step k = 1, 2, ... stands at position t + k - 1 of the chain that starts after position t. It reads the token
x_{t+k} and a state: at step 1 the target's own at t, later the head's output of the step before; it guesses
x_{t+k+1}, the tree's depth k. Its attention sees what it sees when drafting: columns of step 1 up to t (the
committed text) and those of its own chain's steps 2 to k. One step is EAGLE-1's recipe (arXiv 2401.15077), seven are
EAGLE-3's (2503.01840, section 3.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.heads.eagle import EagleConfig, EagleHead, Fusion
from specdec.heads.eagle3 import Eagle3Config, Eagle3Head, standard_taps
from specdec.heads.layer import LayerConfig
from specdec.target import BEFORE_NORM, Target
from specdec.train.batch import TrainBatch
from specdec.train.kinds.head import HeadTraining, checked_taps
from specdec.train.mask import additive, document_mask
from specdec.train.objective import Objective, Term


class GrowingKeys:
    """Keys and values of all steps so far, side by side; unlike a decoding cache it passes gradients."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """Append [B, G, S, E] to one layer; returns all of its keys and values."""
        if layer_idx in self._layers:
            keys, values = self._layers[layer_idx]
            key_states, value_states = torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        self._layers[layer_idx] = key_states, value_states
        return key_states, value_states


class EagleTraining(HeadTraining):
    """EAGLE-1, with Dovetail's gate as an option.

    Args:
        target: probed.
        num_layers: of the head.
        fusion: "linear", or "gate" (Dovetail).
        steps: of training-time test.
        noise: features get uniform noise of this width times 512 over the row length, as published for EAGLE-1.
        feature_weight: of the smooth L1 loss between the head's states and the target's.
        law_weight: of the objective.
        head: continue from this one instead of a fresh one.
        options: of the drafter that validation decodes with.
    """

    kind = "eagle"

    def __init__(
        self,
        target: Target,
        *,
        num_layers: int = 1,
        fusion: Fusion = "linear",
        steps: int = 1,
        noise: float = 0.2,
        feature_weight: float = 1.0,
        law_weight: float = 0.1,
        head: EagleHead | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if head is None:
            layer = LayerConfig.of(target.config)
            head = EagleHead(
                EagleConfig(layer, target.vocab_size, num_layers, fusion=fusion, fc_bias=fusion == "linear")
            )
        super().__init__(target, head, (target.num_layers,), options)
        self.steps, self.noise = steps, noise
        self.feature_weight, self.law_weight = feature_weight, law_weight

    def terms(self, batch: TrainBatch, objective: Objective) -> list[Term]:
        """For each step a term of laws and one of features."""
        features = batch.taps[self.taps[0]].float()
        terms = []
        states = features + self._noise(batch, features)
        for step, drafted in enumerate(unrolled(self.module, states, batch, self.target, self.steps), start=1):
            here = batch.drafts(step + 1)
            chosen = drafted[here]
            logits = self.logits(chosen, self.target_logits)
            terms.append(objective.term(step, logits, self.laws(batch, step + 1), weight=self.law_weight))
            wanted = features.roll(-step, 1)[here]
            losses = F.smooth_l1_loss(chosen, wanted, reduction="none").mean(-1)
            terms.append(Term(f"features {step}", losses, self.feature_weight * objective.decay ** (step - 1)))
        return terms

    def _noise(self, batch: TrainBatch, features: Tensor) -> Tensor:
        """Uniform in +-noise * 512 / S / 2, from each row's own generator."""
        width = self.noise * 512 / features.shape[1]
        rows = [
            (torch.rand(features.shape[1:], generator=batch.generator(row, "feature noise")) - 0.5) * width
            for row in range(features.shape[0])
        ]
        return torch.stack(rows).to(features)


class Eagle3Training(HeadTraining):
    """EAGLE-3.

    Args:
        target: probed.
        steps: of training-time test.
        draft_vocab_size: tokens that the head can guess; None for all. See `choose_vocabulary`.
        own_lm_head: an output matrix of the head's own; False uses the target's, for small packages.
        num_layers: of the head.
        taps: three hidden states of the target, by `hidden_states` index, the number of layers for the last one before
            the final norm; None for the published ones, which leave out more of a target the fewer layers it has.
        head: continue from this one instead of a fresh one.
        options: of the drafter that validation decodes with.

    Raises:
        BadRecipe: taps that the target does not have.
    """

    kind = "eagle3"

    def __init__(
        self,
        target: Target,
        *,
        steps: int = 7,
        draft_vocab_size: int | None = None,
        own_lm_head: bool = True,
        num_layers: int = 1,
        taps: list[int] | None = None,
        head: Eagle3Head | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        fresh = head is None
        if head is None:
            fused = standard_taps(target.num_layers) if taps is None else checked_taps(target, taps, 3)
            head = Eagle3Head(
                Eagle3Config(
                    LayerConfig.of(target.config), target.vocab_size, draft_vocab_size or target.vocab_size, num_layers,
                    taps=fused, own_lm_head=own_lm_head,
                )
            )  # fmt: skip
        states = head.config.taps or standard_taps(target.num_layers)
        read = tuple(BEFORE_NORM if tap == target.num_layers else tap for tap in states)
        super().__init__(target, head, read, options)
        self.steps = steps
        if fresh:
            self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """The head's own output matrix begins as the target's rows of the tokens that it guesses."""
        head = cast(Eagle3Head, self.module)
        if head.lm_head is not None:
            guesses = head.to_token_ids(torch.arange(head.guessed, device=self.target.device))
            head.lm_head.weight.copy_(self.target.logit_weight[guesses])

    def choose_vocabulary(self, counts: Counter[int]) -> None:
        """Let the head guess the most frequent tokens of the supervised text; low ids fill up what was never seen."""
        head = cast(Eagle3Head, self.module)
        if head.d2t is None:
            return
        seen = [token for token, _ in counts.most_common(head.guessed)]
        known = set(seen)
        rest = (token for token in range(head.config.vocab_size) if token not in known)
        head.choose_vocabulary([*seen, *(next(rest) for _ in range(head.guessed - len(seen)))])
        self._begin()

    def terms(self, batch: TrainBatch, objective: Objective) -> list[Term]:
        """One term for each step. Where the target's favourite cannot be guessed the law says nothing: left out."""
        head = cast(Eagle3Head, self.module)
        states = head.encode(torch.cat([batch.taps[tap] for tap in self.taps], -1).float())
        guesses = head.to_token_ids(torch.arange(head.guessed, device=states.device))
        terms = []
        for step, drafted in enumerate(unrolled(head, states, batch, self.target, self.steps), start=1):
            logits = self.logits(
                drafted[batch.drafts(step + 1)], lambda states: head.logits(states, self.target_logits)
            )
            laws = self.laws(batch, step + 1)
            if head.t2d is not None:
                known = head.t2d[laws.argmax(-1)]
                logits, laws = logits[known], laws[known][:, guesses]
            terms.append(objective.term(step, logits, laws))
        return terms


def unrolled(head: Any, states: Tensor, batch: TrainBatch, target: Target, steps: int) -> Iterator[Tensor]:
    """The head's output states [R, S, D] at each step, column t belonging to the chain that starts after t.

    Args:
        head: EagleHead or Eagle3Head.
        states: at step 1, [R, S, D].
        batch: tokens, positions and documents.
        target: whose embedding is used where the head has none.
        steps: how often the head is run.
    """
    own = head.embed_tokens if head.embed_tokens is not None else target.embedding
    keys = GrowingKeys()
    mask = document_mask(batch, states)
    own_chain = additive(torch.eye(states.shape[1], dtype=torch.bool), states)[None, None]
    for step in range(1, steps + 1):
        if step > 1:
            mask = torch.cat([mask, own_chain.expand(mask.shape[0], -1, -1, -1)], -1)
        embeddings = own(batch.ids.roll(-step, 1)).float()  # the last columns wrap around; no chain is scored there
        states = head(embeddings, states, batch.positions + step - 1, mask, keys)
        yield states
