"""Sampling parameters, the source of randomness, and what the target's logits processors need.

p and q are always the distributions as used for drawing: after processors, temperature and truncation.

Dimensions: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as lp

from specdec.errors import SpecdecError


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
        rows = logits.reshape(-1, logits.shape[-1])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        for warper in self._warpers():
            rows = warper(None, rows)  # type: ignore[arg-type]
        return rows.reshape(logits.shape)

    def _warpers(self) -> list[lp.LogitsProcessor]:
        # transformers' order: temperature, top-k, top-p, min-p.
        warpers: list[lp.LogitsProcessor] = []
        if self.temperature != 1.0:
            warpers.append(lp.TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(lp.TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            warpers.append(lp.TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            warpers.append(lp.MinPLogitsWarper(self.min_p))
        return warpers


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

    def draw_without_replacement(self, log_q: Tensor, count: int) -> Tensor:
        """Token ids [..., count] drawn successively without replacement from log-laws [..., V], in draw order.

        Adding independent Gumbel noise and taking the largest yields exactly the successive draws, in order
        (Efraimidis and Spirakis 2006; Kool et al., arXiv 1903.06059). Where fewer than `count` tokens have
        mass, the surplus ids are arbitrary and have `log_q` of minus infinity.
        """
        noise = torch.empty_like(log_q).exponential_(generator=self.generator)
        return (log_q - noise.log()).topk(min(count, log_q.shape[-1]), dim=-1).indices


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
