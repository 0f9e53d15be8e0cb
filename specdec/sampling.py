"""Sampling parameters, the source of randomness, and what the target's logits processors need.

p and q are always the distributions as used for drawing: after processors, temperature and truncation.

Dimensions: B sequences, M laws, K draws of each, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as lp

from specdec.draws import drawn_without_replacement
from specdec.errors import SpecdecError

LIKELIEST = 512
"""Tokens that are sorted for top-p before the whole vocabulary is."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn in one generation; drafters warp their own logits with the same values.

    Attributes:
        do_sample: False for argmax.
        temperature: divides logits; above 0.
        top_k: keep the k most probable tokens; None or 0 for all.
        top_p: keep the smallest set of tokens with this mass; None or 1 for all.
        min_p: drop tokens below this share of the most probable one; None for off.
        generator: source of randomness; None for torch's global one.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.do_sample and not self.temperature > 0:
            raise SpecdecError(
                f"temperature must be above 0 when sampling, got {self.temperature}; use do_sample=False"
            )

    @staticmethod
    def of(config: GenerationConfig, generator: torch.Generator | None = None) -> SamplingParams:
        """The values of a prepared generation config."""
        return SamplingParams(
            do_sample=bool(config.do_sample),
            temperature=1.0 if config.temperature is None else float(config.temperature),
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            generator=generator,
        )

    def warp(self, logits: Tensor) -> Tensor:
        """Draft logits [..., V] as the draft law in log space, in float32 (float64 stays).

        Warping a draft like its target is optional for losslessness and raises acceptance; what counts is
        that verification sees the very law that was drawn from, which is this one.
        """
        rows = logits if logits.dtype == torch.float64 else logits.float()
        if self.temperature != 1.0:
            rows = rows / self.temperature
        cut = self._cut(rows)
        return rows if cut is None else torch.where(rows < cut, -torch.inf, rows)

    def _cut(self, rows: Tensor) -> Tensor | None:
        """The least log-probability [..., 1] that truncation leaves; None without truncation.

        transformers' order: top-k, top-p, min-p. One pass in place of one for each, and no vocabulary is sorted where
        its likeliest tokens tell.
        """
        size = rows.shape[-1]
        k = min(self.top_k or size, size)
        cut = None
        if self.top_p is not None and self.top_p < 1.0:
            cut = _top_p_cut(rows, k, self.top_p)
        elif k < size:
            cut = rows.topk(k, dim=-1).values[..., -1:]
        if self.min_p:
            least = rows.amax(-1, keepdim=True) + math.log(self.min_p)
            cut = least if cut is None else cut.maximum(least)
        return cut


def _top_p_cut(rows: Tensor, k: int, top_p: float) -> Tensor:
    """The least log-probability [..., 1] of the smallest set with this mass among the k likeliest tokens."""
    size = rows.shape[-1]
    best = rows.topk(min(k, LIKELIEST) if k == size else k, dim=-1).values
    total = (rows if k == size else best).logsumexp(-1, keepdim=True)
    mass = (best - total).exp().cumsum(-1)
    if best.shape[-1] < k and not bool((mass[..., -1] >= top_p).all()):  # flat laws: now everything is sorted
        best = rows.sort(dim=-1, descending=True).values
        mass = (best - total).exp().cumsum(-1)
    others = (mass[..., :-1] < top_p).sum(-1, keepdim=True)  # a token stays where those above it lack mass
    return best.gather(-1, others)


class Chooser:
    """Every random decision of drafting and verification goes through here.

    Tests replace it by one that enumerates all outcomes with their probabilities, so that the law of the
    very code that runs is computed exactly.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def accept(self, probability: Tensor) -> Tensor:
        """Bool of the same shape, True with the given probability; independent per entry.

        Strict comparison with u in [0, 1): a probability of 0 is never accepted, one of 1 always is.
        """
        u = torch.rand(probability.shape, dtype=torch.float64, device=probability.device, generator=self.generator)
        return u < probability.double()

    def draw(self, p: Tensor) -> Tensor:
        """One token per row from probabilities [B, V]; returns [B]."""
        return torch.multinomial(p, 1, generator=self.generator).squeeze(1)

    def one_of(self, chances: Tensor) -> Tensor:
        """An entry of each row of [B, N], by its share of the row; returns [B].

        Halves are accepted or refused until one entry is left: log N decisions for all rows, and no host sync.
        """
        rows, count = chances.shape
        size = 1 << (count - 1).bit_length()
        ends = torch.nn.functional.pad(chances.double().cumsum(1), (1, 0))
        ends = torch.cat([ends, ends[:, -1:].expand(-1, size - count)], 1)  # [B, size + 1]
        at = torch.zeros(rows, 1, dtype=torch.long, device=chances.device)
        while size > 1:
            size //= 2
            before, middle, after = (ends.gather(1, at + step) for step in (0, size, 2 * size))
            at = torch.where(self.accept((middle - before) / (after - before)), at, at + size)
        return at[:, 0]

    def draw_without_replacement(self, log_q: Tensor, count: int) -> Tensor:
        """Token ids [..., count] drawn successively without replacement from log-laws [..., V], in draw order.

        Where fewer than `count` tokens have mass, the surplus ids are arbitrary and have `log_q` of minus infinity.
        """
        return drawn_without_replacement(log_q, count, self.generator)


_IGNORES_HISTORY = (
    lp.TemperatureLogitsWarper, lp.TopKLogitsWarper, lp.TopPLogitsWarper, lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper, lp.EpsilonLogitsWarper, lp.EtaLogitsWarper, lp.TopHLogitsWarper,
    lp.SuppressTokensLogitsProcessor, lp.InfNanRemoveLogitsProcessor, lp.LogitNormalization,
)  # fmt: skip
_ROW_WISE = (
    *_IGNORES_HISTORY,
    lp.RepetitionPenaltyLogitsProcessor, lp.NoRepeatNGramLogitsProcessor, lp.NoBadWordsLogitsProcessor,
    lp.SequenceBiasLogitsProcessor, lp.SuppressTokensAtBeginLogitsProcessor, lp.MinLengthLogitsProcessor,
    lp.MinNewTokensLengthLogitsProcessor, lp.ForcedBOSTokenLogitsProcessor, lp.ForcedEOSTokenLogitsProcessor,
    lp.ExponentialDecayLengthPenalty, lp.WatermarkLogitsProcessor,
)  # fmt: skip


def is_row_wise(processor: lp.LogitsProcessor) -> bool:
    """True when a row's result depends on that row's ids and logits alone.

    Known for transformers' own classes; a custom processor may say so with an attribute `row_wise = True`.
    What is not row-wise (a prefix function that gets a batch index, classifier-free guidance and SynthID with
    state, anything custom) is called with the whole batch in step, exactly as plain `generate` calls it.
    """
    return type(processor) in _ROW_WISE or bool(getattr(processor, "row_wise", False))


def for_row(processors: lp.LogitsProcessorList, row: int) -> lp.LogitsProcessorList:
    """The same processors for one row of the batch alone: settings that are kept per row are cut to that row."""
    return lp.LogitsProcessorList(_for_row(processor, row) for processor in processors)


def _for_row(processor: lp.LogitsProcessor, row: int) -> lp.LogitsProcessor:
    if type(processor) is lp.RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length  # left padding of each row, which the penalty skips
        if isinstance(ignored, Tensor) and ignored.shape[0] > 1:
            return lp.RepetitionPenaltyLogitsProcessor(processor.penalty, ignored[row : row + 1])
    return processor


def ignores_history(processor: lp.LogitsProcessor) -> bool:
    """True when the result does not depend on the ids, so that all nodes of a tree can be processed at once."""
    return type(processor) in _IGNORES_HISTORY
