"""Exactness: every answer against the plain one to the same prompt, by token ids.

    exact          the same ids
    near-tie       the first differing tokens both score within rounding of the target's best one there, and what
                   the method wrote after them is the target's choice within rounding, too
    wrong          anything else, such as an answer that ends elsewhere
    not-compared   with the reason: another prompt, an error, or draws that are equal in law only

The rounding allowed is that of the target's dtype: ULPS units in the last place at the size of the best score. A
difference in float32 that is no tie is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypedDict, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.bench.methods import PLAIN, Decoding, Method
from specdec.bench.record import Record, RecordKey, key_of
from specdec.bench.sent import SentPrompts

EXACTNESS_FILE = "exactness.jsonl"
ULPS = {torch.float64: 256, torch.float32: 64}
"""Of the dtype in which all sums are made; they add up over the layers."""
ULPS_OF_HALF = 4
"""Of bfloat16 and float16, where sums are made in float32 and only results are rounded."""

Class = Literal["exact", "near-tie", "wrong", "not-compared"]


class Verdict(TypedDict):
    """How one record compares with the plain one.

    Attributes:
        position: new token at which they first differ, or at which the method left the target's choice.
        gap: how far the worse of the two tokens scores below the best one there, in logits.
        tolerance: the largest gap that counts as a tie there.
        reason: why it is wrong, or why nothing was compared.
        lossy: of the record; a wrong answer of a lossy method is no failure.
    """

    method: str
    question_id: str | int
    turn: int
    repeat: int
    verdict: Class
    position: int | None
    gap: float | None
    tolerance: float | None
    reason: str | None
    lossy: str | None


@dataclass(frozen=True)
class _Finding:
    verdict: Class
    position: int | None = None
    gap: float | None = None
    tolerance: float | None = None
    reason: str | None = None


EXACT = _Finding("exact")


class Judge:
    """Compares records with the plain ones; asks the target only where tokens differ.

    Args:
        model: the target.
        decoding: how the records were decoded.
        sent: their prompts.
        methods: the run's, which say whether their draws repeat the plain ones.
    """

    def __init__(
        self, model: PreTrainedModel, decoding: Decoding, sent: SentPrompts, methods: Iterable[Method]
    ) -> None:
        self.model, self.decoding, self.sent = model, decoding, sent
        self._repeats_draws = {method.name: method.repeats_plain_draws for method in methods}

    def verdicts(self, records: Sequence[Record]) -> list[Verdict]:
        """One for each record that is not the plain method's, in their order."""
        plain = {key_of(record): record for record in records if record["method"] == PLAIN}
        found = []
        for record in records:
            if record["method"] != PLAIN:
                key = RecordKey(PLAIN, *key_of(record)[1:])
                found.append(_verdict(record, self._judge(record, plain.get(key))))
        return found

    def _judge(self, record: Record, plain: Record | None) -> _Finding:
        reason = self._incomparable(record, plain)
        if reason is not None:
            return _Finding("not-compared", reason=reason)
        assert plain is not None
        position = first_difference(record["token_ids"], plain["token_ids"])
        if position is None:
            return EXACT
        lengths = len(record["token_ids"]), len(plain["token_ids"])
        if position == min(lengths):
            return _Finding("wrong", position, reason=f"{lengths[0]} tokens where plain has {lengths[1]}")
        return self._tie_or_wrong(record, plain, position)

    def _incomparable(self, record: Record, plain: Record | None) -> str | None:
        if plain is None:
            return "there is no plain answer"
        if record["error"] is not None or plain["error"] is not None:
            return "the plain method failed" if plain["error"] is not None else "the method failed"
        if record["prompt"]["sha256"] != plain["prompt"]["sha256"]:
            return "another prompt: the answers to an earlier turn differ"
        if not self.decoding.samples:
            return None
        if record["batch"]["size"] > 1:
            return "rows of a batch draw in another order; equal in law only"
        if record["children"] == "drawn" or not self._repeats_draws[record["method"]]:
            return "drafting draws, too; equal in law only"
        return None

    def _tie_or_wrong(self, record: Record, plain: Record, position: int) -> _Finding:
        prompt = self.sent.ids(record["prompt"]["sha256"])
        ours, theirs = record["token_ids"], plain["token_ids"]
        scores = self._scores(prompt + ours[:position])
        tolerance = tie_tolerance(self.model.dtype, float(scores.max()))
        if record["seed"] is not None:
            scores = scores.log_softmax(-1) + self._gumbel_noise(scores, record["seed"], position)
            if int(scores.argmax()) not in (ours[position], theirs[position]):
                return _Finding("not-compared", position, reason="the plain draw cannot be replayed on this device")
        gap = float(scores.max() - scores[[ours[position], theirs[position]]].min())
        if not gap <= tolerance:
            return _Finding("wrong", position, gap, tolerance, "another token, and no tie")
        later = None if record["seed"] is not None else self._first_departure(prompt, ours, position + 1)
        return later or _Finding("near-tie", position, gap, tolerance)

    @torch.no_grad()
    def _scores(self, prefix: list[int]) -> Tensor:
        """Scores [V] of the next token as plain `generate` processes them, in float32."""
        ids = torch.tensor([prefix], device=self.model.device)
        output = cast(Any, type(self.model)).generate(
            self.model,
            ids,
            **{**self.decoding.arguments(self.model), "attention_mask": torch.ones_like(ids), "max_new_tokens": 1},
            output_scores=True,
            return_dict_in_generate=True,
        )
        return output.scores[0][0]

    def _gumbel_noise(self, scores: Tensor, seed: int, position: int) -> Tensor:
        """The noise with which the plain draw at this place was made.

        `torch.multinomial` takes the argmax of p / e with e exponential, one e for each token of the vocabulary.
        """
        torch.manual_seed(seed)
        noise = torch.empty_like(scores[None])
        for _ in range(position + 1):
            noise.exponential_()
        return -noise[0].log()

    @torch.no_grad()
    def _first_departure(self, prompt: list[int], tokens: list[int], start: int) -> _Finding | None:
        """Where a greedy answer leaves the target's choice, given its own beginning; None when it never does.

        One forward over all of it. Where the generation config changes scores, raw logits decide nothing: None.
        """
        ids = torch.tensor([prompt + tokens], device=self.model.device)
        logits = self.model(ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1].float()
        # Logits that generate's scores do not resemble went through processors.
        if not torch.allclose(logits[start - 1], self._scores(prompt + tokens[: start - 1]), atol=0.5, rtol=0.05):
            return None
        best = logits.max(-1).values
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        for position in range(start, len(tokens)):
            gap, tolerance = (
                float(best[position] - chosen[position]),
                tie_tolerance(self.model.dtype, float(best[position])),
            )
            if gap > tolerance:
                return _Finding("wrong", position, gap, tolerance, "after a tie, not the target's choice")
        return None


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first place at which two sequences differ, an end included; None when they are equal."""
    pairs = enumerate(zip_longest(ours, theirs))
    return next((place for place, (a, b) in pairs if a != b), None)


def tie_tolerance(dtype: torch.dtype, best: float) -> float:
    """The largest gap between two scores that rounding in this dtype explains, where the best one is this large."""
    unit = 2.0 ** math.floor(math.log2(max(abs(best), 1.0))) * torch.finfo(dtype).eps
    return ULPS.get(dtype, ULPS_OF_HALF) * unit


def failures(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Wrong answers of methods that promise to be lossless."""
    return [verdict for verdict in verdicts if verdict["verdict"] == "wrong" and verdict["lossy"] is None]


def _verdict(record: Record, finding: _Finding) -> Verdict:
    return Verdict(
        method=record["method"],
        question_id=record["question_id"],
        turn=record["turn"],
        repeat=record["repeat"],
        verdict=finding.verdict,
        position=finding.position,
        gap=finding.gap,
        tolerance=finding.tolerance,
        reason=finding.reason,
        lossy=record["lossy"],
    )
