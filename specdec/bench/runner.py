"""The runner: serves the generations of a schedule that have no record yet, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from specdec.bench.clock import PeakMemory, probe_cost
from specdec.bench.conversation import Conversations
from specdec.bench.manifest import Manifest
from specdec.bench.methods import Generated, Method, Request
from specdec.bench.prompts import Prompt, PromptBuilder
from specdec.bench.question import Question
from specdec.bench.record import Batch, Record, RecordKey, RecordWriter, Seconds, Sent, Steps, key_of
from specdec.bench.schedule import Unit, seed_of
from specdec.bench.sent import SentPrompts
from specdec.bench.settings import Settings
from specdec.bench.warmup import warm_up
from specdec.errors import SpecdecError

Progress = Callable[[str, int, int], None]
"""Called with what happens next, finished generations, and all of them."""

NO_SECONDS = Seconds(total=0.0, prefill=None, draft=None, verify=None, accept=None, other=None, ttft=None)
NO_STEPS = Steps(
    drafted=None, accepted=None, emitted=[], tried=None, draft=None, verify=None, accept=None, total=[]
)  # fmt: skip


class Runner:
    """Serves a schedule.

    Args:
        tokenizer: the target's.
        settings: of the run.
        methods: all of them.
        builder: makes prompts.
        sent: keeps them.
        writer: keeps records.
        progress: told before every generation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        methods: Sequence[Method],
        builder: PromptBuilder,
        sent: SentPrompts,
        writer: RecordWriter,
        progress: Progress | None = None,
    ) -> None:
        self.tokenizer, self.settings, self.builder = tokenizer, settings, builder
        self.methods = {method.name: method for method in methods}
        self.sent, self.writer = sent, writer
        self._conversations = Conversations(settings.history, writer.records)
        self._tell = progress or (lambda what, done, total: None)

    def go(self, units: Sequence[Unit], manifest: Manifest, prompt: Prompt) -> None:
        """Serve every unit that has no record. The manifest is on disk before the first one.

        Args:
            units: the whole schedule.
            manifest: of the run.
            prompt: for warming up.

        Raises:
            SpecdecError: a method that does not even serve the warm-up prompt.
        """
        there = {key_of(record) for record in self.writer.records}
        left = [unit for unit in units if not there.issuperset(keys_of(unit))]
        if not left:
            return
        done = len(units) - len(left)
        manifest.start(len(self.writer.records), self._probe())
        manifest.add({"warm_up": [self._warm_up(method, prompt, done, len(units)) for method in self.methods.values()]})
        repeat = None
        for unit in left:
            if unit.repeat != repeat:
                repeat = unit.repeat
                for method in self.methods.values():
                    method.begin_pass()
            self._tell(unit.method, done, len(units))
            self._keep(self._serve(unit))
            done += 1
        self._tell("done", done, len(units))

    def _probe(self) -> dict[str, Any]:
        device = next(iter(self.methods.values())).model.device
        return {"probe": probe_cost(device), "peak_memory": PeakMemory(device).meaning}

    def _warm_up(self, method: Method, prompt: Prompt, done: int, total: int) -> dict[str, Any]:
        self._tell(f"warming up {method.name}", done, total)
        settings = self.settings
        seed = settings.seed if settings.decoding.samples else None
        try:
            return warm_up(method, prompt, rows=settings.batch_size, max_new_tokens=settings.max_new_tokens, seed=seed)
        except Exception as error:
            raise SpecdecError(f"{method.name} fails on the warm-up prompt: {_one_line(error)}") from error

    def _serve(self, unit: Unit) -> list[Record]:
        """One generation; a record for each of its questions, also when it fails."""
        method = self.methods[unit.method]
        method.prepare()
        seed = seed_of(self.settings.seed, unit) if self.settings.decoding.samples else None
        prompts: list[Prompt | None] = [None] * len(unit.questions)
        try:
            for row, question in enumerate(unit.questions):
                messages = self._conversations.messages(unit.method, question, unit.turn, unit.repeat)
                prompts[row] = self.builder.build(messages)
            request = Request([p.input_ids for p in prompts if p is not None], self.settings.max_new_tokens, seed)
            generated = method.generate(request)
        except Exception as error:  # a record says so, and the run goes on
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            generated = _failed(len(unit.questions))
            return [
                self._record(unit, row, prompt, seed, generated, _one_line(error)) for row, prompt in enumerate(prompts)
            ]
        return [self._record(unit, row, prompt, seed, generated, None) for row, prompt in enumerate(prompts)]

    def _record(
        self, unit: Unit, row: int, prompt: Prompt | None, seed: int | None, generated: Generated, error: str | None
    ) -> Record:
        question: Question = unit.questions[row]
        ids = [] if prompt is None else prompt.input_ids
        digest = "" if prompt is None else self.sent.add(prompt)
        return Record(
            method=unit.method,
            question_id=question.id,
            category=question.category,
            column=question.column,
            turn=unit.turn,
            repeat=unit.repeat,
            sequence=unit.sequence,
            batch=Batch(size=len(unit.questions), row=row, id=unit.batch),
            prompt=Sent(tokens=len(ids), sha256=digest, history=self.settings.history),
            max_new_tokens=self.settings.max_new_tokens,
            token_ids=generated.token_ids[row],
            text=str(self.tokenizer.decode(generated.token_ids[row], skip_special_tokens=True)),
            finish="error" if error is not None else generated.finish[row],
            error=error,
            seconds=generated.seconds,
            steps=generated.steps[row],
            children=generated.children,
            chain=generated.chain,
            target_calls=generated.target_calls,
            peak_memory_bytes=generated.peak_memory_bytes,
            lossy=generated.lossy,
            seed=seed,
        )

    def _keep(self, records: list[Record]) -> None:
        self.writer.append(records)
        for record in records:
            self._conversations.add(record)


def keys_of(unit: Unit) -> list[RecordKey]:
    """The records that a unit leaves behind."""
    return [RecordKey(unit.method, question.id, unit.turn, unit.repeat) for question in unit.questions]


def _failed(rows: int) -> Generated:
    return Generated([[]] * rows, ["error"] * rows, [NO_STEPS] * rows, NO_SECONDS, None, None, None, None, None)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
