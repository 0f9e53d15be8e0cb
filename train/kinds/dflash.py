"""DFlash learns to fill blocks of mask tokens behind random anchors of the text (arXiv 2602.06036).

A block of Q slots is what drafting runs: the anchor, which stands for the last committed token, and mask tokens behind
it, at the positions that they will have. Its queries see the target's states of the tokens before the anchor, never
the anchor's own, which the target has not computed when the drafter is asked; and their own block. The slot of depth d
guesses the token d behind the anchor and is compared with the target's own law of it, given the text up to it.

Which tokens are anchors is drawn for each row from its number and the seed alone.

Dimensions: R rows, S row length, A anchors of a row, M of all rows, Q block tokens, K depths, D hidden size, V
vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from specdec.drafters.block import require_embedding
from specdec.errors import BadRecipe
from specdec.heads.dflash import DFlashConfig, DFlashHead, InjectedFeatures, anchored_masks, block_ids
from specdec.target import Target
from specdec.train.batch import TrainBatch
from specdec.train.kinds.head import HeadTraining, checked_taps
from specdec.train.logits import Logits
from specdec.train.objective import Objective, Term, confidence_weights

Weights = Literal["decay", "d-pace", "equal"]


PUBLISHED_LAYERS = 5


class DFlashTraining(HeadTraining):
    """Trains a block drafter on a frozen target.

    Args:
        target: probed.
        num_layers: of the head; None for the published 5, or a quarter of the target's where that is fewer: a head as
            deep as half its target drafts slowly and learns slowly.
        block_size: Q, the anchor included.
        taps: the target's hidden states that make a feature, by `hidden_states` index; None for as many as the head
            has layers, evenly spread as published.
        mask_token_id: what stands for a token to be drafted; None for one that texts end or are padded with.
        causal: block tokens are hidden from earlier ones of their block; not so as published.
        sample_from_anchor: the anchor's slot drafts, too: Q tokens and not Q - 1 (DSpark, arXiv 2607.05147).
        anchors: of a row, at most; a row with fewer places takes all of them.
        weights: of the depths, beside the objective's decay: "decay" for the published ones (`published_decay`),
            "d-pace" for the draft's own confidence (arXiv 2605.18810), "equal" for none.
        head: continue from this one instead of a fresh one.
        options: of the drafter that validation decodes with.

    Raises:
        BadRecipe: settings that do not fit.
        DrafterMismatch: the target's embedding has another width than its states.
    """

    kind = "dflash"

    def __init__(
        self,
        target: Target,
        *,
        num_layers: int | None = None,
        block_size: int = 16,
        taps: list[int] | None = None,
        mask_token_id: int | None = None,
        causal: bool = False,
        sample_from_anchor: bool = False,
        anchors: int = 64,
        weights: Weights = "decay",
        head: DFlashHead | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if anchors < 1:
            raise BadRecipe(f"[head] anchors is 1 or more, got {anchors}")
        if weights not in get_args(Weights):
            raise BadRecipe(f"[head] weights is one of {', '.join(get_args(Weights))}, got {weights!r}")
        require_embedding(target, target.hidden_size)
        if head is None:
            layers = min(PUBLISHED_LAYERS, max(1, target.num_layers // 4)) if num_layers is None else num_layers
            fields: dict[str, Any] = {"causal": True} if causal else {}
            if taps is not None:
                fields["taps"] = checked_taps(target, taps)
            head = DFlashHead(
                DFlashConfig.of(
                    target.config, mask_token_id=mask_for(target, mask_token_id), num_layers=layers,
                    block_size=block_size, sample_from_anchor=sample_from_anchor, **fields,
                )
            )  # fmt: skip
        super().__init__(target, head, tuple(dict.fromkeys(head.config.taps)), options)
        self.anchors, self.weights = anchors, weights

    def terms(self, batch: TrainBatch, objective: Objective) -> list[Term]:
        """One term for each depth, over the blocks whose text is supervised down to there."""
        head = cast(DFlashHead, self.module)
        blocks = draw_blocks(batch, head.config.max_depth, self.anchors)
        states = self._states(batch, blocks)
        logits = [
            self.logits(states[here, slot], self._logits)
            for slot, here in enumerate(blocks.counts, head.config.first_slot)
        ]
        weights = self._position_weights(batch, blocks, logits)
        decay = published_decay(head.config.block_size) if self.weights == "decay" else 1.0
        laws = (self.laws_at(batch, blocks.places(depth)) for depth in range(1, len(logits) + 1))
        return [
            self._term(objective, depth, drafted, wanted, weights[depth - 1], decay ** (depth - 1))
            for depth, (drafted, wanted) in enumerate(zip(logits, laws, strict=True), start=1)
        ]

    def _states(self, batch: TrainBatch, blocks: Blocks) -> Tensor:
        """The head's normed states [M, Q, D] of all blocks.

        Blocks run in groups of about as many tokens as a row has: a mask over all of them at once would be as wide as
        they are many, though no block sees another.
        """
        head = cast(DFlashHead, self.module)
        config, length = head.config, batch.ids.shape[1]
        taps = torch.cat([batch.taps[tap] for tap in config.taps], -1).float()
        text = InjectedFeatures()
        head.inject(head.features(taps), batch.positions, text)
        embedding = cast(Tensor, self.target.embedding.weight)
        slots = torch.arange(config.block_size, device=taps.device)
        states = []
        for columns in blocks.columns.split(max(1, length // config.block_size), 1):
            ids = block_ids(batch.ids.gather(1, columns), config).flatten(1)
            positions = (batch.positions.gather(1, columns)[..., None] + slots).flatten(1)
            masks = anchored_masks(config, columns, length, taps.dtype, documents=batch.documents)
            group = head(head.embed(ids, embedding).float(), positions, masks, text)
            states.append(group.unflatten(1, (-1, config.block_size)))
        return torch.cat(states, 1)[blocks.real]

    def _logits(self, states: Tensor) -> Tensor:
        """States [M', D] -> logits [M', V] as the drafter makes them: by the target's raw output matrix."""
        dtype = cast(Any, self.target.lm_head).weight.dtype
        return cast(DFlashHead, self.module).logits(states, lambda normed: self.target.lm_head(normed.to(dtype)))

    def _position_weights(self, batch: TrainBatch, blocks: Blocks, logits: list[Tensor | Logits]) -> list[Tensor]:
        """K weights, one for each block that counts at a depth: what a block stands for, times D-PACE's if asked."""
        weights = blocks.stands_for.expand(len(logits), -1)
        if self.weights == "d-pace":
            confidence = torch.zeros_like(weights)
            for depth, (drafted, here) in enumerate(zip(logits, blocks.counts, strict=True), start=1):
                confidence[depth - 1, here] = confidence_in(drafted, blocks.tokens(batch, depth))
            weights = weights * confidence_weights(confidence, blocks.counts)
        return [weight[here] for weight, here in zip(weights, blocks.counts, strict=True)]

    def _term(
        self,
        objective: Objective,
        depth: int,
        drafted: Tensor | Logits,
        laws: Tensor | Logits,
        weights: Tensor,
        weight: float,
    ) -> Term:
        """With a vocabulary of its own the head is held to the laws whose favourite it can guess, over what it can."""
        head = cast(DFlashHead, self.module)
        if head.t2d is not None:
            known, guesses = head.t2d[laws.argmax(-1)], head.token_ids
            drafted, laws, weights = drafted[known][:, guesses], laws[known][:, guesses], weights[known]
        return objective.term(depth, drafted, laws, position_weights=weights, weight=weight)


@torch.no_grad()
def confidence_in(drafted: Tensor | Logits, tokens: Tensor) -> Tensor:
    """The draft's probability [M] of tokens [M]."""
    if isinstance(drafted, Logits):
        made = ((drafted.make(drafted.states[rows]), tokens[rows]) for rows in drafted.slices())
        return torch.cat([confidence_in(logits, some) for logits, some in made])
    return drafted.float().softmax(-1).gather(1, tokens[:, None])[:, 0]


@dataclass(frozen=True)
class Blocks:
    """The blocks of a batch; M of them are real, in the order of rows and columns.

    Attributes:
        columns: [R, A] of the anchors; rows with fewer are filled up.
        real: bool [R, A].
        rows, starts: [M] each, where the anchors stand.
        counts: bool [K, M], whether the token of a depth is supervised, as are all before it.
        stands_for: [M], how many possible anchors of its row a drawn one stands for.
    """

    columns: Tensor
    real: Tensor
    rows: Tensor
    starts: Tensor
    counts: Tensor
    stands_for: Tensor

    def tokens(self, batch: TrainBatch, depth: int) -> Tensor:
        """The text's own tokens of this depth, one for each block that counts there."""
        here = self.counts[depth - 1]
        return batch.ids[self.rows[here], self.starts[here] + depth]

    def places(self, depth: int) -> tuple[Tensor, Tensor]:
        """Rows and columns [M'] where the target's own laws of those tokens stand."""
        here = self.counts[depth - 1]
        return self.rows[here], self.starts[here] + depth - 1


def draw_blocks(batch: TrainBatch, depths: int, anchors: int) -> Blocks:
    """Anchors drawn without replacement from each row's places, by the row's own generator.

    A place has a token before it in its document, as the drafter always has, and a supervised one behind it. The loss
    of a row whose anchors were drawn is that of all its places, in expectation.
    """
    places = batch.drafts(1)
    places[:, 1:] &= batch.documents[:, 1:] == batch.documents[:, :-1]
    places[:, 0] = False
    found = [row.nonzero()[:, 0].cpu() for row in places]
    drawn = [
        columns[torch.randperm(len(columns), generator=batch.generator(row, "anchors"))[:anchors]].sort().values
        for row, columns in enumerate(found)
    ]
    width = max(1, *(len(columns) for columns in drawn))  # a batch without any still runs one block of each row
    columns = torch.zeros(len(drawn), width, dtype=torch.long)
    real = torch.zeros(len(drawn), width, dtype=torch.bool)
    for row, chosen in enumerate(drawn):
        columns[row, : len(chosen)], real[row, : len(chosen)] = chosen, True
    columns, real = columns.to(places.device), real.to(places.device)
    rows = real.nonzero()[:, 0]
    starts = columns[real]
    supervised = torch.stack([batch.drafts(depth)[rows, starts] for depth in range(1, depths + 1)])
    shares = torch.tensor([len(row) / max(1, len(chosen)) for row, chosen in zip(found, drawn, strict=True)])
    return Blocks(columns, real, rows, starts, supervised.cumprod(0).bool(), shares.to(rows.device)[rows])


def published_decay(block_size: int) -> float:
    """exp(-1 / gamma), with which the published weights of a block fall from depth to depth.

    gamma is 4, 5 and 7 for blocks of 8, 10 and 16; linear between them and beyond.

        >>> [round(published_decay(size), 3) for size in (8, 10, 16)]
        [0.779, 0.819, 0.867]
    """
    gamma = block_size / 2 if block_size <= 10 else 5 + (block_size - 10) / 3
    return math.exp(-1 / gamma)


def mask_for(target: Target, chosen: int | None) -> int:
    """The mask token: the one that was chosen, or the first of padding, end and beginning of text, last of all ids.

    Raises:
        BadRecipe: the chosen one's embedding is zero: slots of the block could not be told apart.
    """
    weight = cast(Tensor, target.embedding.weight)

    def usable(token: Any) -> bool:
        return isinstance(token, int) and 0 <= token < len(weight) and bool(weight[token].any())

    if chosen is None:
        config: Any = target.config
        pad, end, begin = (getattr(config, f"{name}_token_id", None) for name in ("pad", "eos", "bos"))
        ends = end if isinstance(end, list) else [end]
        candidates = [pad, *ends, begin, *range(target.vocab_size - 1, -1, -1)]
        return next(int(token) for token in candidates if usable(token))
    if 0 <= chosen < len(weight) and not usable(chosen):
        raise BadRecipe(
            f"[head] mask_token_id {chosen} has an embedding of zeros, with which the tokens of a block cannot be told "
            "apart; choose another token that texts do not contain"
        )
    return chosen
