"""A stream of prompts replayed with a drafter that learns, as the command gives it.

OUT/recipe.json    every setting
OUT/run.json       what the run is about; command, versions, commit and hardware of every start
OUT/log.jsonl      a line for each request
OUT/static.jsonl   the same with the drafter as it was, where that was asked for
OUT/step-000040/   what was learned up to that request, and all that learning goes on from; `latest` leads to the newest
OUT/drafter        leads to the newest drafter

A run that was broken goes on behind its newest checkpoint. Requests decoded since then are decoded again: what they
taught is lost.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.drafter import Drafter
from specdec.drafters.directory import fingerprint
from specdec.drafters.load import load_drafter, parse_spec
from specdec.environment import weights_sample
from specdec.errors import BadCheckpoint, BadData, BadRecipe, SpecdecError
from specdec.json_lines import JsonLines, write_text
from specdec.probe import target_of
from specdec.train.checkpoint import Checkpoints, check_identity
from specdec.train.online import LearningDrafter
from specdec.train.online_recipe import OnlineRecipe
from specdec.train.run_starts import RUN, add_start, circumstances, read_run
from specdec.train.stop_signals import on_stop
from specdec.train.stream import Request, decode_request, decoding
from specdec.train.stream_prompts import StreamPrompt, read_stream
from specdec.train.stream_summary import accepted, by_topic

LOG, STATIC = "log.jsonl", "static.jsonl"
REQUEST, NOTE, FINISHED = "request", "note", "finished"
"""Events that a run reports, as JSON objects; `NOTE` and `FINISHED` as of `train.job`."""

Hear = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class OnlineJob:
    """What `specdec train --online` was told.

    Attributes:
        recipe: all settings.
        target: name of the target, as on the command line.
        sources: of prompts, see `read_stream`.
        out: directory of the run.
        begin_from: the drafter to begin with, as `--drafter` takes it.
        compare: decode every request with the drafter as it was, too.
        chat: see `read_stream`.
        fresh: refuse a directory with checkpoints.
        command: arguments of the command line, for the record.
    """

    recipe: OnlineRecipe
    target: str
    sources: tuple[str, ...]
    out: Path
    begin_from: str
    compare: bool = False
    chat: bool | None = None
    fresh: bool = False
    command: tuple[str, ...] = ()


def run_online(job: OnlineJob, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, hear: Hear) -> None:
    """Replay the stream, learn, save, and say what it was worth.

    Args:
        job: what to do.
        model: the target.
        tokenizer: the target's, for prompts.
        hear: hears of every request, and of the end.

    Raises:
        SpecdecError: settings, prompts, drafter or checkpoints that do not fit; says which.
        OSError: something cannot be written; the last checkpoint is whole.
    """
    prompts = prompts_of(job, model, tokenizer)
    learning = learning_drafter(job, model)
    static = load_drafter(job.begin_from, model) if job.compare else None
    identity = identity_of(job, model, learning)
    check_folder(job, identity)
    with ExitStack() as opened:
        log = opened.enter_context(JsonLines(job.out / LOG))
        other = opened.enter_context(JsonLines(job.out / STATIC)) if job.compare else None
        replay = _Replay(job, model, prompts, learning, static, log, other, hear)
        done = replay.take_up()
        write_text(job.out / "recipe.json", json.dumps(job.recipe.resolved(), indent=2) + "\n")
        start = {"after_request": done, **circumstances(job.command, model.device)}
        add_start(job.out / RUN, {"target": job.target, "prompts": list(job.sources), "identity": identity}, start)
        replay.run()
        replay.finish()


def prompts_of(job: OnlineJob, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[StreamPrompt]:
    """All prompts, so that one which cannot be used is found before the first request.

    Raises:
        BadData: names the file and line.
    """
    prompts = list(read_stream(job.sources, tokenizer, chat=job.chat))
    if not prompts:
        raise BadData(f"there is not a single prompt in {', '.join(job.sources)}; a stream has one in each line or row")
    limit, wanted = target_of(model).max_positions, job.recipe.stream.max_new_tokens
    long = [prompt for prompt in prompts if limit is not None and len(prompt.ids) + wanted > limit]
    if long:
        raise BadData(
            f"{long[0].place}: the prompt's {len(long[0].ids)} tokens and {wanted} new ones are more than the target's "
            f"{limit} positions; {len(long)} of {len(prompts)} prompts are so long. Leave them out, or lower "
            "--max-new-tokens"
        )
    return prompts


def learning_drafter(job: OnlineJob, model: PreTrainedModel) -> LearningDrafter:
    """The drafter to begin with, made to learn.

    Raises:
        UnknownDrafter, DrafterMismatch: no such drafter, or none that can learn.
        BadRecipe: one of another kind than the command names, or settings that it cannot have.
    """
    drafter = load_drafter(job.begin_from, model)
    assert drafter is not None, "names are never None"
    try:
        learning = LearningDrafter(drafter, job.recipe.online, training=job.recipe.head)
    except SpecdecError:
        raise
    except ValueError as error:  # of a configuration object
        raise BadRecipe(f"[head] of {job.recipe.kind}: {error}") from error
    wanted = "hydra" if job.recipe.kind == "hydra++" else job.recipe.kind
    if learning.learner.kind != wanted:
        raise BadRecipe(f"{job.begin_from} is a {learning.learner.kind}, the command trains {job.recipe.kind}")
    learning.learner.target_is(target_of(model))
    return learning


def identity_of(job: OnlineJob, model: PreTrainedModel, learning: LearningDrafter) -> dict[str, Any]:
    """What must agree on resume; the prompts are compared one by one, so that a stream may grow."""
    recipe = job.recipe.resolved()
    recipe["stream"] = {name: value for name, value in recipe["stream"].items() if name != "save_every"}
    _, options = parse_spec(job.begin_from.rpartition("+")[2])
    return {
        "target": {**fingerprint(model), "weights": weights_sample(model)},
        "drafter": {"weights": weights_sample(learning.learner.live), "options": options},
        **recipe,
    }


def check_folder(job: OnlineJob, identity: dict[str, Any]) -> None:
    """Refuse the directory of another run.

    Raises:
        BadCheckpoint: says what differs.
    """
    kept = read_run(job.out / RUN)
    there = bool(kept) or bool(Checkpoints(job.out).all())
    if there and job.fresh:
        raise BadCheckpoint(f"{job.out} holds checkpoints already; leave --fresh out, or choose another --out")
    if there and "identity" not in kept:
        raise BadCheckpoint(f"{job.out} holds a run that was not --online; choose another --out")
    if there:
        check_identity(kept["identity"], identity, job.out)


def name_for_use(job: OnlineJob) -> str:
    """What `--drafter` is told to draft as this run did, with what was learned: OUT in place of the first drafter."""
    match, plus, spec = job.begin_from.rpartition("+")
    name, _ = parse_spec(spec)
    return f"{match}{plus}{job.out}{spec.removeprefix(name)}"


class _Replay:
    """One stream under way."""

    def __init__(
        self, job: OnlineJob, model: PreTrainedModel, prompts: list[StreamPrompt], learning: LearningDrafter,
        static: Drafter | None, log: JsonLines, other: JsonLines | None, hear: Hear,
    ) -> None:  # fmt: skip
        self.job, self.model, self.prompts, self.hear = job, model, prompts, hear
        self.learning, self.static = learning, static
        self.log, self.other = log, other
        self.checkpoints = Checkpoints(job.out)
        stream = job.recipe.stream
        self.settings = decoding(stream.max_new_tokens, stream.temperature, stop_at_end=stream.stop_at_end)
        self.learned: list[Request] = []
        self.compared: list[Request] = []
        self.saved = 0
        self.stopping = False

    def take_up(self) -> int:
        """The newest checkpoint, and the requests before it; returns how many those are.

        Raises:
            BadCheckpoint: requests of other prompts, or a checkpoint that cannot be read.
        """
        done = 0
        if self.checkpoints.latest() is not None:
            done = int(self.learning.restore(self.job.out).get("requests", 0))
        if done > len(self.prompts):
            raise BadCheckpoint(
                f"{self.job.out} holds {done} requests, the stream has {len(self.prompts)}; it may only grow. "
                "Use another --out, or the prompts of that run"
            )
        self.log.keep(done)
        self.learned = self._requests(self.log)
        if len(self.learned) != done:
            raise BadCheckpoint(
                f"{self.log.path} has {len(self.learned)} requests, the newest checkpoint was made after {done}; "
                "restore the file, or choose another --out"
            )
        if self.other is not None:
            self.compared = self._requests(self.other)
        self.saved = done
        if done:
            self.hear({"event": NOTE, "text": f"going on after request {done} of {len(self.prompts)}"})
        return done

    def _requests(self, lines: JsonLines) -> list[Request]:
        """What a log holds, which must be of these prompts."""
        names = {field.name for field in fields(Request)}
        requests = []
        for row, prompt in zip(lines, self.prompts, strict=False):
            if row.get("prompt") != prompt.sha256 or not names <= row.keys():
                raise BadCheckpoint(
                    f"request {len(requests)} in {lines.path} had another prompt than {prompt.place}; a stream may "
                    "only grow at its end. Use another --out, or the prompts of that run"
                )
            requests.append(Request(**{name: row[name] for name in names}))
        return requests

    def run(self) -> None:
        """Every request that is missing, until a signal comes."""

        def stop() -> None:
            self.stopping = True

        with on_stop(stop):
            first = len(self.learned) if self.static is None else min(len(self.learned), len(self.compared))
            for number in range(first, len(self.prompts)):
                self._request(number)
                if len(self.learned) - self.saved >= self.job.recipe.stream.save_every:
                    self._save()
                if self.stopping:
                    break
            if len(self.learned) != self.saved or not self.checkpoints.all():
                self._save()

    def _request(self, number: int) -> None:
        event: dict[str, Any] = {"event": REQUEST, "of": len(self.prompts)}
        if self.static is not None and self.other is not None and number >= len(self.compared):
            self.compared.append(self._decoded(self.static, number, self.other))
        if number >= len(self.learned):
            self.learned.append(self._decoded(self.learning, number, self.log))
        static = {"static": asdict(self.compared[number])} if number < len(self.compared) else {}
        self.hear({**event, **asdict(self.learned[number]), **static, "updates": self.learning.learner.updates})

    def _decoded(self, drafter: Drafter, number: int, lines: JsonLines) -> Request:
        prompt, seed = self.prompts[number], self.job.recipe.online.seed
        request = decode_request(self.model, drafter, prompt, number, seed, self.settings)
        lines.append([{**asdict(request), "prompt": prompt.sha256}])
        return request

    def _save(self) -> None:
        done = len(self.learned)
        self.learning.save(self.job.out, number=done, more={"requests": done})
        self.checkpoints.offer()
        self.saved = done

    def finish(self) -> None:
        """Say where the drafter is and what it was worth."""
        topics = by_topic(self.learned, self.compared)
        drafter = self.checkpoints.offer()
        static = self.compared[: len(self.learned)]
        missing = len(self.prompts) - min(len(self.learned), len(static) if self.static else len(self.prompts))
        self.hear(
            {
                "event": FINISHED,
                "requests": len(self.learned),
                "of": len(self.prompts),
                "stopped": missing > 0,
                "drafter": None if drafter is None else str(drafter),
                "name": name_for_use(self.job),
                "updates": self.learning.learner.updates,
                "skipped_steps": sum(update.skipped for update in self.learning.updates),
                "learning": accepted(self.learned).summary(),
                "static": accepted(static).summary() if static else None,
                "topics": [topic.summary() for topic in topics],
                "seconds": {
                    "decoding": round(sum(request.seconds for request in self.learned), 3),
                    "learning": round(sum(request.learning_seconds for request in self.learned), 3),
                    "decoding_static": round(sum(request.seconds for request in static), 3) if static else None,
                },
            }
        )  # fmt: skip


def topics_of(prompts: list[StreamPrompt]) -> dict[str, int]:
    """How many requests each topic has."""
    return dict(Counter(prompt.topic or "" for prompt in prompts))
