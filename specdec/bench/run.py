"""A run: every method on every question, recorded as it goes, judged and exported at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.bench.exactness import EXACTNESS_FILE, Judge, Verdict, failures
from specdec.bench.manifest import FORMAT, Manifest, described_target, identity_sha256, is_finished
from specdec.bench.methods import (
    NONE,
    PLAIN,
    PLAIN_AGAIN,
    RESERVED,
    Method,
    SpeculativeMethod,
    TransformersMethod,
    assisted,
    end_tokens,
    prompt_lookup,
)
from specdec.bench.prompts import PromptBuilder
from specdec.bench.questions import QuestionSet, load_questions
from specdec.bench.record import RECORDS_FILE, Record, RecordWriter, write_json, write_jsonl
from specdec.bench.runner import Progress, Runner
from specdec.bench.schedule import schedule
from specdec.bench.sent import SentPrompts
from specdec.bench.settings import Settings
from specdec.bench.spec_bench import all_answers, spec_bench_speedup, write_answers
from specdec.bench.warmup import warm_up_prompt
from specdec.drafter import Drafter
from specdec.environment import hardware, versions
from specdec.errors import SpecdecError

SPEC_BENCH_FILE = "spec_bench.json"
RUNS_FOLDER = Path("specdec-bench")

DrafterSpec = Drafter | PreTrainedModel | str | Path


@dataclass(frozen=True)
class BenchRun:
    """What a run left behind.

    Attributes:
        path: its directory.
        records: all of them, in the order in which they ran.
        verdicts: one for each record that is not the plain method's.
        found: records that were there before.
    """

    path: Path
    records: list[Record]
    verdicts: list[Verdict]
    found: int = 0

    @property
    def wrong(self) -> list[Verdict]:
        """Wrong answers of lossless methods."""
        return failures(self.verdicts)

    @property
    def errors(self) -> list[Record]:
        """Records of generations that failed."""
        return [record for record in self.records if record["error"] is not None]


def run_bench(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: QuestionSet | str | Path,
    drafters: Sequence[str] | Mapping[str, DrafterSpec] = (),
    *,
    out: Path | str | None = None,
    settings: Settings | None = None,
    assistant: PreTrainedModel | str | Path | None = None,
    lookup_tokens: int | None = None,
    against_itself: bool = False,
    template: str = "auto",
    system: str | None = None,
    target_name: str | None = None,
    progress: Progress | None = None,
) -> BenchRun:
    """Run drafters and baselines on the same questions, or finish a run that was interrupted.

    The methods `plain` (transformers' generate) and `none` (specdec's loop without a drafter) are always there.

    Args:
        model: the target, on its device, optimized or not; every method uses this very object.
        tokenizer: the target's.
        questions: a question set, its name, or a file.
        drafters: specifications, which are the methods' names too; or methods' names with what `load_drafter` takes.
        out: directory of the run. One that holds an unfinished run of the same identity is gone on with; one that
            holds another run is refused. None: a folder in specdec-bench/ named after target, questions and identity.
        settings: see Settings.
        assistant: also measure transformers' assisted generation with this draft model.
        lookup_tokens: also measure transformers' prompt lookup, drafting so many tokens.
        against_itself: also measure plain a second time, as the method `plain-again`.
        template, system: see PromptBuilder.
        target_name: in reports; the model's own path by default.
        progress: told before every generation.

    Returns:
        The run with all its records. A method that failed on a question has a record that says so.

    Raises:
        SpecdecError: a model, drafter, question set, setting or directory that does not serve.
    """
    settings = settings or Settings()
    chosen = questions if isinstance(questions, QuestionSet) else load_questions(questions)
    builder = PromptBuilder(tokenizer, template, system)
    methods = _methods(model, drafters, settings, assistant, lookup_tokens)
    if against_itself:
        methods.append(TransformersMethod(PLAIN_AGAIN, model, settings.decoding))
    name = target_name or str(model.name_or_path) or type(model).__name__
    identity = _identity(model, name, methods, chosen, builder, settings)
    folder = Path(out) if out is not None else _new_folder(name, chosen.name, identity)
    first_prompts = {tuple(builder.build([_user(q.turns[0])]).input_ids) for q in chosen.questions}
    manifest = Manifest(folder, identity)
    with RecordWriter(folder / RECORDS_FILE) as writer:
        found, sent = len(writer.records), SentPrompts(folder)
        units = schedule(
            chosen.questions,
            [method.name for method in methods],
            repeats=settings.repeats,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        runner = Runner(tokenizer, settings, methods, builder, sent, writer, progress)
        runner.go(units, manifest, warm_up_prompt(builder, first_prompts))
        verdicts = Judge(model, settings.decoding, sent, methods).verdicts(writer.records)
        write_jsonl(folder / EXACTNESS_FILE, verdicts)
        _export(folder, writer.records, name, model, tokenizer)
        manifest.finish()
        return BenchRun(folder, list(writer.records), verdicts, found)


def _methods(
    model: PreTrainedModel,
    drafters: Sequence[str] | Mapping[str, DrafterSpec],
    settings: Settings,
    assistant: PreTrainedModel | str | Path | None,
    lookup_tokens: int | None,
) -> list[Method]:
    """All methods by name; every drafter is loaded, so that a wrong name is found before anything takes time."""
    named = dict(drafters) if isinstance(drafters, Mapping) else {spec: spec for spec in drafters}
    for name in named:
        if name in RESERVED:
            raise SpecdecError(f"a drafter cannot be called {name!r}: that is a baseline; choose another name")
    decoding, carry_over = settings.decoding, settings.carry_over
    methods: list[Method] = [TransformersMethod(PLAIN, model, decoding)]
    methods.append(SpeculativeMethod(NONE, model, decoding, None))
    methods += [SpeculativeMethod(name, model, decoding, d, carry_over=carry_over) for name, d in named.items()]
    if assistant is not None:
        methods.append(assisted(model, decoding, assistant, carry_over=carry_over))
    if lookup_tokens is not None:
        methods.append(prompt_lookup(model, decoding, lookup_tokens))
    single = [method.name for method in methods if method.single_rows]
    if single and settings.batch_size > 1:
        raise SpecdecError(f"transformers' {single[0]} serves one row at a time; leave it out or set batch_size to 1")
    return methods


def _identity(
    model: PreTrainedModel,
    name: str,
    methods: Sequence[Method],
    questions: QuestionSet,
    builder: PromptBuilder,
    settings: Settings,
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "target": described_target(model, name),
        "methods": [method.describe() for method in methods],
        "questions": {
            "name": questions.name,
            "format": questions.format,
            "source": questions.source,
            "sha256": questions.sha256,
            "count": len(questions.questions),
            "ids": [question.id for question in questions.questions],
        },
        "prompts": builder.record(),
        "settings": settings.as_dict(),
        "hardware": hardware(model.device),
        "versions": versions(),
    }


def _new_folder(target: str, questions: str, identity: dict[str, Any]) -> Path:
    """The first folder of this identity that holds no finished run."""
    words = [Path(target).name, questions, identity_sha256(identity)[:8]]
    stem = "-".join(word for word in words if word)
    number = 1
    while is_finished(folder := RUNS_FOLDER / (stem if number == 1 else f"{stem}-{number}")):
        number += 1
    return folder


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _export(
    folder: Path, records: Sequence[Record], name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Answer files that Spec-Bench's scripts read, and its number for every method."""
    answers = all_answers(records, name, set(end_tokens(model)), time.time())
    write_answers(folder, answers)
    plain = answers[PLAIN]
    numbers = {method: spec_bench_speedup(own, plain, tokenizer) for method, own in answers.items() if method != PLAIN}
    write_json(folder / SPEC_BENCH_FILE, numbers)
