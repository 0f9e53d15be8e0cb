"""Tuning: which options of a drafter give the most tokens per second on these prompts, and whether any pays.

    1  decode plainly: the texts, and what plain decoding takes
    2  fixed shapes: one pass of traces tells every chain and tree of every size; a few are decoded for their costs
    3  trees that follow the text, and drafters without growth policies: decoded, on a few prompts
    4  finalists: the best of each kind are decoded on all prompts, and priced by what that showed
    5  the choice: the most expected tokens per second, or no speculation

With costs that are given, of another machine or another time, decoding only tells acceptance; nothing is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from specdec.bench.record import write_json
from specdec.costs.measure import CONTEXTS, Grid, measured_costs
from specdec.costs.table import Costs
from specdec.drafters.load import load_drafter
from specdec.errors import UnknownDrafter
from specdec.grow.accuracy import AcceptanceCounts
from specdec.grow.shape import DEFAULT_ACCEPTANCE, Shape, best_shape, chain, shape_of
from specdec.probe import target_of
from specdec.tuning.decoded import Decoded, Job, decode_all, tau_of, tokens_per_second
from specdec.tuning.pricing import Expectation, Prices, best_first, expectation, expectation_of
from specdec.tuning.settings import (
    BUDGETS,
    DEPTHS,
    NO_SPECULATION,
    Setting,
    Subject,
    chain_settings,
    deepest,
    drawn_chains,
    following_settings,
    length_settings,
    loadable,
    subject_of,
    text_settings,
    tree_settings,
)
from specdec.tuning.traces import Trace, traced

WIDEST = 16
"""Children of the root in the tree that is traced."""
TABLE_FILE = "acceptance.json"

Tell = Callable[[str, int, int], None]
"""Called with what happens next, what is done, and all there is to do."""


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        depths: levels.
        budgets: proposed nodes.
        few: prompts on which many settings are decoded.
        finalists: settings of each kind that are decoded on all prompts.
        repeats: of each verification.
    """

    depths: tuple[int, ...] = DEPTHS
    budgets: tuple[int, ...] = BUDGETS
    few: int = 4
    finalists: int = 3
    repeats: int = 9


@dataclass(frozen=True)
class Measured:
    """What decoding gave, by wall clock; with given costs, what it would take.

    Attributes:
        tokens_per_second: after each prompt's first token.
        plain_tokens_per_second: the same without speculation, prompt by prompt in turns.
        tau: tokens for each target call.
    """

    tokens_per_second: float
    plain_tokens_per_second: float
    tau: float


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        subject: the drafter.
        choice: `choice.setting.drafts` is False where speculation does not pay.
        plain: decoding without speculation.
        considered: every setting that was priced, best first; finalists count as decoded.
        finalists: those decoded on all prompts, best first.
        counts: measured acceptance by depth and rank; None where none was traced.
        costs: as known at the end.
        projected: the costs were given, so no time here is a measurement.
        measured: what the choice did when it was decoded once more.
    """

    subject: Subject
    choice: Expectation
    plain: Expectation
    considered: tuple[Expectation, ...]
    finalists: tuple[Expectation, ...]
    counts: AcceptanceCounts | None
    costs: Costs
    projected: bool
    measured: Measured | None = None

    @property
    def spec(self) -> str | None:
        """The choice as `load_drafter` takes it; None for no speculation."""
        return self.subject.spec(self.choice.setting)


@dataclass
class Tuner:
    """One search.

    Args:
        job: prompts, cap and sampling.
        subject: the drafter.
        prices: of steps.
        folder: where the table of measured acceptance lies meanwhile.
        effort: how much is tried.
        timed: learn prices from decoding.
        tell: told what happens.
    """

    job: Job
    subject: Subject
    prices: Prices
    folder: Path
    effort: Effort = field(default_factory=Effort)
    timed: bool = True
    tell: Tell | None = None
    counts: AcceptanceCounts | None = None

    def search(self) -> tuple[Expectation, list[Expectation], list[Expectation]]:
        """Plain decoding, everything that was priced best first, and the finalists best first."""
        plain = self._decode([NO_SPECULATION], self.job, "decoding plainly")[0]
        priced = self._fixed(plain) if self.subject.grows else []
        priced += self._decoded(priced)
        chosen = self._finalists(priced)
        runs = self._decode([NO_SPECULATION, *chosen], self.job, "decoding the finalists")
        finals = [expectation_of(s, r, self.prices) for s, r in zip([NO_SPECULATION, *chosen], runs, strict=True)]
        rest = [e for e in priced if e.setting not in chosen]
        return finals[0], best_first([*rest, *finals[1:]]), best_first(finals[1:])

    def _fixed(self, plain: Sequence[Decoded]) -> list[Expectation]:
        """Chains and fixed trees, from traces; none where children are drawn."""
        if not self.subject.is_traceable:
            return []
        most = deepest(self.subject, self.job.model, self.effort.depths)
        traces = self._traces(plain, most)
        settings = [*chain_settings(self.subject, most, self.effort.depths), *self._trees(most)]
        if self.timed and settings:
            anchors = _anchors(settings)
            self._decode(anchors, self.job.first(self.effort.few), "timing a few shapes")
        return [
            expectation(s, (step for trace in traces for step in trace.steps(s.shape)), self.prices)
            for s in settings
            if s.shape is not None
        ]

    def _traces(self, plain: Sequence[Decoded], most: int) -> list[Trace]:
        """One for each prompt, with the widest tree that the drafter can make; counts acceptance as well."""
        spec, shape = self._widest(most)
        self.counts = AcceptanceCounts(most, max(shape.width, 1))
        target, traces = target_of(self.job.model), []
        for number, (prompt, run) in enumerate(zip(self.job.prompts, plain, strict=True)):
            self._say("measuring acceptance", number, len(plain))
            drafter = load_drafter(spec, self.job.model)
            assert drafter is not None
            traces.append(
                traced(target, drafter, prompt, run.text, self.job.max_new_tokens, counts=self.counts, roots_only=True)
            )
        if bool(self.counts.trials[:1, :1].sum() > 0):
            self.counts.save(self.table)
        return traces

    @property
    def table(self) -> Path:
        """The file of measured acceptance."""
        return self.folder / TABLE_FILE

    def _widest(self, most: int) -> tuple[str | None, Shape]:
        """Specification and shape of the widest tree; of a chain where the models take no more."""
        for shape in (widest_shape(most, max(self.effort.budgets)), chain(most)):
            if shape.width > 1 and target_of(self.job.model).form == "chain":
                continue
            table = self.folder / "widest.json"
            write_json(table, rank_paths(shape))
            options = {"grow": "fixed", "depth": str(most), "budget": str(len(shape.children)), "table": str(table)}
            spec = replace(self.subject, given={**self.subject.given, **options}).spec(Setting())
            with suppress(UnknownDrafter):
                load_drafter(spec, self.job.model)
                return spec, shape
        raise UnknownDrafter(f"{self.subject.name} drafts no fixed trees; tune it with its own options only")

    def _trees(self, most: int) -> list[Setting]:
        if not self.table.is_file() or target_of(self.job.model).form == "chain":
            return []
        found = tree_settings(self.subject, most, self.table, self.effort.depths, self.effort.budgets)
        return loadable(found, self.subject, self.job.model)

    def _decoded(self, priced: Sequence[Expectation]) -> list[Expectation]:
        """Settings that only decoding tells of, on a few prompts."""
        settings = text_settings(self.subject) if not self.subject.grows else self._following(priced)
        job = self.job.first(self.effort.few)
        runs = self._decode(settings, job, "decoding settings")
        return [expectation_of(s, r, self.prices) for s, r in zip(settings, runs, strict=True)]

    def _following(self, priced: Sequence[Expectation]) -> list[Setting]:
        """Trees and chains that follow the text, of the size of the best fixed one or near it."""
        most = deepest(self.subject, self.job.model, self.effort.depths)
        best = next((e.setting.shape for e in best_first(priced) if e.setting.shape is not None), None)
        depth, nodes = (best.depth, len(best.children)) if best is not None else (4, 12)
        depths, budgets = near(self.effort.depths, depth)[-2:], near(self.effort.budgets, nodes)
        found = [*length_settings(self.subject, most, depths[-1:])]
        temperature = self.job.temperature
        if not self.subject.is_traceable:
            found += [
                replace(setting, shape=None) for setting in chain_settings(self.subject, most, self.effort.depths)
            ]
        else:
            found += drawn_chains(self.subject, most, self.effort.depths, temperature=temperature)
        if target_of(self.job.model).form == "tree":
            found += following_settings(self.subject, most, depths, budgets, temperature=temperature)
        return loadable(found, self.subject, self.job.model)

    def _finalists(self, priced: Sequence[Expectation]) -> list[Setting]:
        """The best few fixed ones and the best few that were decoded."""
        kinds: dict[bool, list[Setting]] = {}
        for entry in best_first(priced):
            kinds.setdefault(entry.setting.shape is not None, []).append(entry.setting)
        return [setting for settings in kinds.values() for setting in settings[: self.effort.finalists]]

    def _decode(self, settings: Sequence[Setting], job: Job, what: str) -> list[list[Decoded]]:
        """Decode settings in turns, and learn their prices."""
        specs = [self.subject.spec(setting) for setting in settings]
        runs = decode_all(job, specs, lambda done, total: self._say(what, done, total))
        if self.timed:
            self.prices.learn(list(zip(settings, runs, strict=True)))
        return runs

    def _say(self, what: str, done: int, total: int) -> None:
        if self.tell is not None:
            self.tell(what, done, total)


def tune(
    job: Job, spec: str, *, costs: Costs | None = None, effort: Effort | None = None, fresh: bool = False,
    folder: Path | None = None, tell: Tell | None = None,
) -> Tuned:  # fmt: skip
    """Choose a drafter's options for these prompts on this machine.

    Args:
        job: the target, prompts, cap and temperature.
        spec: the drafter; options that it carries stay as they are.
        costs: use these instead of measuring: of another machine, or of another time.
        effort: how much is tried.
        fresh: measure costs also where kept ones hold.
        folder: keeps the table of measured acceptance, on which the choice may depend; by default nobody does.
        tell: told what happens.

    Raises:
        SpecdecError: a drafter that does not serve, or has nothing to vary.
    """
    subject, effort = subject_of(spec, job.model), effort or Effort()
    timed = costs is None
    if costs is None:
        costs = measured_costs(target_of(job.model), cost_grid(job, effort), fresh=fresh, tell=tell)
    with tempfile.TemporaryDirectory(prefix="specdec-") as temporary:
        tuner = Tuner(job, subject, Prices(costs, timed=timed), folder or Path(temporary), effort, timed, tell)
        plain, considered, finalists = tuner.search()
        choice = best_first([plain, *finalists])[0]
        table = tuner.prices.table() if timed else costs
        found = Tuned(
            subject, choice, plain, tuple(considered), tuple(finalists), tuner.counts, table, not timed
        )  # fmt: skip
        return replace(found, measured=check(found, job, tuner.prices, tell))


def check(found: Tuned, job: Job, prices: Prices, tell: Tell | None = None) -> Measured:
    """Decode the choice once more, beside plain decoding."""
    say = None if tell is None else (lambda done, total: tell("decoding with the choice", done, total))
    plain, chosen = decode_all(job, [None, found.spec], say)
    tau = tau_of([step for run in chosen for step in run.steps])
    if found.projected:
        speed = expectation_of(found.choice.setting, chosen, prices).tokens_per_second
        return Measured(speed, expectation_of(NO_SPECULATION, plain, prices).tokens_per_second, tau)
    return Measured(tokens_per_second(chosen), tokens_per_second(plain), tau)


def cost_grid(job: Job, effort: Effort) -> Grid:
    """Verifications worth measuring for this job: up to the largest budget, and up to the longest text."""
    longest = max(map(len, job.prompts)) + job.max_new_tokens
    contexts = (CONTEXTS[0], max(CONTEXTS[1], 1 << (longest - 1).bit_length()))
    nodes = [n for n in Grid().nodes if n <= max(effort.budgets)]
    return Grid((*nodes, max(effort.budgets) + 1), contexts, repeats=effort.repeats)


def widest_shape(depth: int, budget: int) -> Shape:
    """A tree of which every fixed tree of the budget is a part, or nearly: best, longest and widest ones together."""
    ranks = (*DEFAULT_ACCEPTANCE, *[DEFAULT_ACCEPTANCE[-1] / 2] * (WIDEST - len(DEFAULT_ACCEPTANCE)))
    paths = [*rank_paths(best_shape(2 * budget, depth, ranks)), [0] * depth]
    return shape_of([*paths, *([rank] for rank in range(min(WIDEST, budget)))])


def rank_paths(shape: Shape) -> list[list[int]]:
    """Each node's ranks from the root down."""
    paths: list[list[int]] = [[]]
    for child in shape.children:
        paths.append([*paths[child.parent], child.rank])
    return paths[1:]


def near(values: Sequence[int], center: int) -> tuple[int, ...]:
    """The value nearest to `center` and its neighbours."""
    ordered = sorted(values)
    at = min(range(len(ordered)), key=lambda place: abs(ordered[place] - center))
    return tuple(ordered[max(at - 1, 0) : at + 2])


def _anchors(settings: Sequence[Setting]) -> list[Setting]:
    """A few settings that span levels and nodes."""
    by_size = sorted(
        (s for s in settings if s.shape is not None),
        key=lambda s: (s.shape.depth, len(s.shape.children)) if s.shape is not None else (0, 0),
    )
    corners = [by_size[0], by_size[-1], by_size[len(by_size) // 3], by_size[2 * len(by_size) // 3]]
    chains = [s for s in by_size if s.shape is not None and s.shape.width <= 1]
    return list({s.name: s for s in [*corners, *chains[-1:]]}.values())
