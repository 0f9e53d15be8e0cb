"""Online learning: a drafter that learns from what verification computes anyway (Liu et al., arXiv 2310.07177).

    drafter = LearningDrafter(specdec.load_drafter("path/to/draft", model))
    specdec.generate(model, **inputs, drafter=drafter)

The output keeps the target's law whatever the weights do. A tree carries the law that its children were drawn from, and
verification reads that law and never the weights; chosen children need none. So weights may change between any two
steps. They change between generations only: in the middle of one, the cached keys and values of the text so far would
be of the old weights and those of new tokens of the new ones, a model that nobody trained. What learns draws from no
generator of the text, so that a seed gives the tokens that it gives without learning wherever it does so at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed, Drafter
from specdec.errors import BadCheckpoint, BadRecipe
from specdec.sampling import Chooser, SamplingParams
from specdec.train.bucket import BucketObjective
from specdec.train.checkpoint import Checkpoints, read_state
from specdec.train.learner import Learner, LearningRate, Update
from specdec.train.objective import Objective
from specdec.train.order import derived_seed
from specdec.train.passage import Passage
from specdec.train.recorder import Recorder
from specdec.train.replay import Keep, ReplayBuffer
from specdec.train.replay_file import read_replay, write_replay
from specdec.train.topics import Accepted, Rolling, Topic, steps_of
from specdec.train.worker import Worker
from specdec.tree import TokenTree

REPLAY = "replay.safetensors"


@dataclass(frozen=True)
class OnlineSettings:
    """When and how a LearningDrafter learns.

    Attributes:
        learn_every: positions with a law that wait before an update is due; about one for each generated token.
        max_age: seconds after which an update is due however few wait; None for never.
        steps: optimizer steps of an update, more where each waiting passage would not come once.
        rows: passages in a step.
        rows_at_once: of one forward; the rest of a step is accumulated.
        replay_share: of a step's rows that come from older passages, so that what was learned is not forgotten.
        learning: of AdamW.
        divergence, decay, temperature: the objective. A temperature other than 1 needs whole laws.
        top_k: tokens kept of each law, the others as one bucket; None keeps whole laws.
        only_rejected: learn only where drafted tokens were rejected, not from accepted ones.
        row_length: most tokens of a passage; longer texts are cut.
        buffer_tokens, keep: of the replay buffer.
        background: learn in a thread of the lowest priority, instead of between two generations.
        window: verifications that rolling figures look back on.
        seed: of everything that is drawn here.

    Raises:
        BadRecipe: a number out of range.
    """

    learn_every: int = 512
    max_age: float | None = 60.0
    steps: int = 4
    rows: int = 8
    rows_at_once: int = 8
    replay_share: float = 0.5
    learning: LearningRate = field(default_factory=LearningRate)
    divergence: str = "forward-kl"
    decay: float = 1.0
    temperature: float = 1.0
    top_k: int | None = 64
    only_rejected: bool = False
    row_length: int = 512
    buffer_tokens: int = 65536
    keep: Keep = "newest"
    background: bool = False
    window: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one = ("learn_every", "steps", "rows", "rows_at_once", "window")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise BadRecipe(f"{name} of online learning is at least 1, got {getattr(self, name)}")
        if self.top_k is not None and self.top_k < 1:
            raise BadRecipe(f"top_k of online learning is at least 1, or None for whole laws, got {self.top_k}")
        if not 0 <= self.replay_share < 1:
            raise BadRecipe(f"replay_share is at least 0 and below 1, got {self.replay_share}")
        if self.row_length < 4 or self.buffer_tokens < 2 * self.row_length:
            raise BadRecipe(
                f"a passage has 4 tokens or more and fits half of the buffer, got row_length={self.row_length} and "
                f"buffer_tokens={self.buffer_tokens}"
            )

    @property
    def objective(self) -> Objective:
        """The loss."""
        make = Objective if self.top_k is None else BucketObjective
        return make(self.divergence, self.decay, self.temperature)


class LearningDrafter:
    """Proposes what another drafter proposes, whose weights learn meanwhile.

    Works around the drafter of a draft model or of a head. Its weights are copied first, so that what else was loaded
    by the same name stays as it is; beside the copy that drafts there are fp32 masters, gradients and two moments, 18
    bytes for each bf16 weight in all. An update that is due runs when the next generation begins, or at once in
    `finish`.

    Args:
        drafter: of a draft model or a head.
        settings: when and how to learn.
        training: options of the head's Training class, such as {"steps": 4} for EAGLE-3.
        clock: seconds; for `max_age`.

    Raises:
        UnknownDrafter: a drafter that has no weights of its own.
        BadRecipe: settings that do not fit.
    """

    def __init__(
        self,
        drafter: Drafter,
        settings: OnlineSettings | None = None,
        *,
        training: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings = settings or OnlineSettings()
        self.learner = Learner(
            drafter, settings.objective, settings.learning, seed=settings.seed, rows_at_once=settings.rows_at_once,
            only_rejected=settings.only_rejected, options=training,
        )  # fmt: skip
        self.drafter: Drafter = self.learner.drafter
        self.taps: tuple[int, ...] = tuple(dict.fromkeys((*self.drafter.taps, *self.learner.learning.taps)))
        self.buffer = ReplayBuffer(settings.buffer_tokens, settings.keep, settings.seed)
        self.updates: list[Update] = []
        self.topics: dict[str | None, Topic] = {}
        self._recorder = Recorder(self.learner.learning.taps, settings.top_k, settings.row_length)
        self._rolling = Rolling(settings.window)
        self._topic: str | None = None
        self._running_topic = Topic(settings.window, 0)
        self._clock = clock
        self._waiting_since: float | None = None
        self._worker: Worker[Update] | None = Worker() if settings.background else None

    # --- The drafter's calls ------------------------------------------------------------------------------

    def reset(self, batch_size: int, context: Context) -> None:
        """A generation begins: what the last one left is learned from if that is due, and new weights come in."""
        self.finish()
        self.learner.target_is(context.target)
        ends = [length - start for length, start in zip(context.lengths, context.starts, strict=True)]
        self._recorder.begin(ends, self._topic)
        self._running_topic = self.topics.setdefault(self._topic, Topic(self.settings.window, self.learner.published))
        self._running_topic.requests += 1
        self.drafter.reset(batch_size, context)

    def observe(self, committed: Committed) -> None:
        """Take down laws and taps, then let the drafter observe."""
        if committed.nodes is not None:
            for step in steps_of(committed):
                self._rolling.add(step)
                self._running_topic.add(step, self.learner.published)
        self._recorder.observe(committed)
        self.drafter.observe(committed)

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """The drafter's trees."""
        return self.drafter.propose(root, params, chooser, room)

    def select(self, rows: list[int]) -> None:
        """Rows that finished leave their passages."""
        self._keep(self._recorder.select(rows))
        self.drafter.select(rows)

    # --- Learning -----------------------------------------------------------------------------------------

    @contextmanager
    def topic(self, name: str) -> Iterator[None]:
        """Generations that begin in this block are of a topic; its acceptance is reported by itself."""
        before, self._topic = self._topic, name
        try:
            yield
        finally:
            self._topic = before

    @property
    def due(self) -> bool:
        """Whether enough waits to be learned from, or has waited long enough."""
        waiting, settings = self.buffer.waiting_laws, self.settings
        if not waiting:
            return False
        since = self._clock() if self._waiting_since is None else self._waiting_since
        too_old = settings.max_age is not None and self._clock() - since >= settings.max_age
        return waiting >= settings.learn_every or too_old

    def finish(self) -> None:
        """The last generation is over: draft with what was learned, and learn from what it left if an update is due.

        Called when the next generation begins; calling it sooner moves the time that learning takes out of that one.
        In background mode it starts the update and returns; what that learns comes in at the next call.
        In the middle of a generation it does no harm to the text, but the rest of that one teaches nothing.

        Raises:
            Exception: whatever went wrong in the background.
        """
        self._keep(self._recorder.close())
        self._take(wait=False)
        self._publish()
        if self.due:
            self.learn()

    def learn(self) -> None:
        """Learn now from all that waits, between two generations; in background mode unless an update is running."""
        if self._worker is None:
            self.updates.append(self.learner.update(self._plan()))
            self._publish()
        elif not self._worker.busy:
            plan = self._plan()
            self._worker.start(lambda: self.learner.update(plan))

    def wait(self) -> None:
        """Until no update is running.

        With a `wait` after each `finish`, a background thread learns exactly what learning between generations does.
        """
        self._take(wait=True)

    def _plan(self) -> list[list[Passage]]:
        settings, number = self.settings, self.learner.updates
        self._waiting_since = None
        return self.buffer.plan(
            steps=settings.steps, rows=settings.rows, share=settings.replay_share,
            seed=derived_seed(settings.seed, "plan", number),
        )  # fmt: skip

    def _keep(self, passages: list[Passage]) -> None:
        for passage in passages:
            self.buffer.add(passage)
        if passages and self._waiting_since is None:
            self._waiting_since = self._clock()

    def _take(self, *, wait: bool) -> None:
        update = None if self._worker is None else self._worker.take(wait=wait)
        if update is not None:
            self.updates.append(update)

    def _publish(self) -> None:
        """New weights come in, but not while they are being changed."""
        running = self._worker is not None and self._worker.busy
        if not running and self.learner.published != self.learner.updates:
            self.learner.publish()

    # --- Reports and files --------------------------------------------------------------------------------

    @property
    def rolling(self) -> Accepted:
        """What the last verifications emitted and accepted, over all topics."""
        return self._rolling.accepted

    def summary(self) -> dict[str, Any]:
        """What was learned so far, in plain numbers for JSON."""
        last = self.updates[-1] if self.updates else None
        return {
            "kind": self.learner.kind,
            "rolling": self.rolling.summary(),
            "topics": {name or "": topic.summary() for name, topic in self.topics.items()},
            "updates": self.learner.updates,
            "last_update": None if last is None else asdict(last),
            "learning_seconds": round(sum(update.seconds for update in self.updates), 3),
            "buffer": {"tokens": self.buffer.tokens, "bytes": self.buffer.nbytes, "waiting": self.buffer.waiting_laws},
        }

    def save(
        self,
        folder: str | Path,
        *,
        replay: bool = True,
        number: int | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint, whole or not at all: `folder/latest/drafter` is a drafter directory to load.

        Args:
            folder: of the checkpoints; the last two are kept.
            replay: with the replay buffer, as far as it waits or was learned from.
            number: of the checkpoint, rising; that of the updates by default.
            more: kept beside what was learned, for `restore` to return; plain values for JSON.
        """
        self.finish()
        self.wait()

        def write(path: Path) -> None:
            self.learner.write(path)
            if replay:
                write_replay(self.buffer, path / REPLAY)

        state = {"kind": self.learner.kind, **self.learner.counters(), "summary": self.summary(), **(more or {})}
        return Checkpoints(Path(folder)).save(self.learner.updates if number is None else number, write, state)

    def restore(self, folder: str | Path) -> dict[str, Any]:
        """Go on from the newest checkpoint in a folder; drafts with its weights from the next generation on.

        Returns:
            the checkpoint's state, with what `save` was given to keep.

        Raises:
            BadCheckpoint: there is none, or it is of another drafter.
        """
        self.finish()
        self.wait()
        path = Checkpoints(Path(folder)).latest()
        if path is None:
            raise BadCheckpoint(f"{folder} holds no checkpoint of a LearningDrafter; `save` writes one")
        state = read_state(path)
        if state.get("kind") != self.learner.kind:
            raise BadCheckpoint(f"{path} is of a {state.get('kind')}, this drafter is a {self.learner.kind}")
        self.learner.read(path)
        self.learner.set_counters(state)
        self.learner.publish()
        if (path / REPLAY).is_file():
            read_replay(self.buffer, path / REPLAY)
        return state

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a LearningDrafter learns for all that use it and cannot be copied or pickled; save() and restore() it"
        )
