"""Validation by decoding: held-out prompts, the real drafter, the real loop, and what it would be worth in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from specdec.api import SpeculativeOutput, generate
from specdec.drafter import Drafter
from specdec.errors import BadData
from specdec.stats import DecodeStats
from specdec.train.report import Score
from specdec.train.trainable import Trainable


@dataclass(frozen=True)
class Measured:
    """Decoding of all prompts with one drafter.

    Attributes:
        tau: tokens per target call, next_token included, weighted by step.
        alpha: probability that a token drafted at depth 1, 2, ... is accepted given that its parent was.
        speedup: expected tokens per second over plain decoding: tau times the seconds of a plain step over those of
            a speculative one, all measured here.
        steps: verifications.
        tokens_per_second: decoding only.
    """

    tau: float
    alpha: list[float]
    speedup: float
    steps: int
    tokens_per_second: float

    def details(self) -> dict[str, Any]:
        """For logs."""
        return {
            "tau": round(self.tau, 4),
            "alpha": [round(a, 4) for a in self.alpha],
            "expected_speedup": round(self.speedup, 3),
            "tokens_per_second": round(self.tokens_per_second, 1),
        }


class Evaluator:
    """Decodes prompts and measures.

    Args:
        model: the target.
        prompts: ids of each prompt, no padding.
        max_new_tokens: for each prompt.
        temperature: 0 for greedy decoding.
        seed: of sampling; the same for every validation.
        stop_at_end: let texts end with the model's own end of text; otherwise all are of the same length.

    Raises:
        BadData: no prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        stop_at_end: bool = True,
    ) -> None:
        if not prompts or not all(prompts):
            raise BadData("validation needs prompts of at least one token")
        self.model = model
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self.stop_at_end = stop_at_end
        self._plain_step: float | None = None

    def __call__(self, trainable: Trainable) -> Score:
        """The score of a drafter in training: tau."""
        measured = self.measure(trainable.drafter())
        return Score(measured.tau, measured.details())

    def measure(self, drafter: Drafter | None) -> Measured:
        """Decode every prompt once."""
        if self._plain_step is None and drafter is not None:
            self._plain_step = self._seconds_per_step(self.decode_all(None))
        runs = self.decode_all(drafter)
        records = [step for run in runs for step in run.steps]
        together = DecodeStats(steps=records)
        per_step = self._seconds_per_step(runs)
        plain = per_step if self._plain_step is None else self._plain_step
        seconds = sum(run.decode_time for run in runs)
        emitted = sum(step.emitted for step in records)
        speedup = together.tau * plain / per_step if per_step else 0.0
        return Measured(together.tau, together.alpha, speedup, len(records), emitted / seconds if seconds else 0.0)

    def decode_all(self, drafter: Drafter | None) -> list[DecodeStats]:
        """What happened in each prompt's decoding; None decodes plainly."""
        return [self._decode(prompt, drafter, number) for number, prompt in enumerate(self.prompts)]

    def _decode(self, prompt: list[int], drafter: Drafter | None, number: int) -> DecodeStats:
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            settings |= {"temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        if not self.stop_at_end:
            settings["eos_token_id"] = None
        ids = torch.tensor([prompt], device=self.model.device)
        torch.manual_seed(self.seed + number)
        output = generate(
            self.model,
            ids,
            attention_mask=torch.ones_like(ids),
            drafter=drafter,
            return_dict_in_generate=True,
            **settings,
        )
        assert isinstance(output, SpeculativeOutput)
        assert output.stats is not None
        return output.stats

    @staticmethod
    def _seconds_per_step(runs: list[DecodeStats]) -> float:
        steps = sum(len(run.steps) for run in runs)
        return sum(run.decode_time for run in runs) / steps if steps else 0.0
