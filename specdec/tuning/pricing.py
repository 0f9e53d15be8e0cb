"""Expected tokens per second: what the steps of a setting emit, over what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from specdec.costs.interpolation import median_of
from specdec.costs.table import Costs, CostTable, DraftPoint
from specdec.tuning.decoded import Decoded, overhead_of, steady_seconds, typical, verify_ratios
from specdec.tuning.settings import Setting
from specdec.tuning.traces import Step


@dataclass(frozen=True)
class Expectation:
    """What a setting is expected to do.

    Attributes:
        setting: of the drafter.
        tau: tokens for each target call.
        nodes: proposed in the mean.
        step_seconds: of a step in the mean.
        tokens_per_second: after the prompt's first token.
    """

    setting: Setting
    tau: float
    nodes: float
    step_seconds: float
    tokens_per_second: float


@dataclass
class Prices:
    """Seconds of a step: those of a cost table, corrected by what decoding on this machine showed.

    Attributes:
        costs: a table of this machine, or of another one.
        draft_of: mean seconds of a proposal, by the name of a setting that was decoded.
        factor_of: verification within decoding over the table's, by growth; drafting uses the machine's caches in
            between, and new topologies want new masks.
        rest_of: (per step, per emitted token) outside of drafting and verification, by growth.
        timed: decoding happens on the machine in question, so that its own times go first.
    """

    costs: Costs
    draft_of: dict[str, float] = field(default_factory=dict)
    factor_of: dict[str, float] = field(default_factory=dict)
    rest_of: dict[str, tuple[float, float]] = field(default_factory=dict)
    timed: bool = False

    def step(self, setting: Setting, step: Step) -> float:
        """Seconds of one step."""
        verify = self.costs.verify(step.nodes + 1, 1, step.context) * self._factor(setting)
        return self._draft(setting, step) + verify + self._rest(setting, step)

    def _rest(self, setting: Setting, step: Step) -> float:
        known = self.rest_of.get(key_of(setting), self.rest_of.get("fixed"))
        return self.costs.overhead(step.emitted) if known is None else known[0] + known[1] * step.emitted

    def _factor(self, setting: Setting) -> float:
        return self.factor_of.get(key_of(setting), self.factor_of.get("fixed", 1.0))

    def _draft(self, setting: Setting, step: Step) -> float:
        if not setting.drafts:
            return 0.0
        if setting.name in self.draft_of:
            return self.draft_of[setting.name]
        if not step.nodes:
            return 0.0
        return self.costs.draft(levels_of(setting, step), step.nodes, 1, key_of(setting))

    def learn(self, decoded: Sequence[tuple[Setting, Sequence[Decoded]]]) -> None:
        """Take the times of settings that were decoded; the costs must be a table."""
        alike: dict[str, list[Decoded]] = {}
        points = []
        for setting, runs in decoded:
            alike.setdefault(key_of(setting), []).extend(runs)
            if setting.drafts:
                seconds = [time for run in runs for time in run.draft]
                self.draft_of[setting.name] = typical(seconds)
                points += _draft_points(setting, runs, median_of(seconds)[1] if seconds else 0.0)
        assert isinstance(self.costs, CostTable), "what is learned here goes into a table of this machine"
        for key, runs in alike.items():
            if ratios := verify_ratios(runs, self.costs):
                self.factor_of[key], _ = median_of(ratios)
                self.rest_of[key] = overhead_of(runs)
        self.costs = replace(self.costs, proposals=(*self.costs.proposals, *points))

    def table(self) -> CostTable:
        """All that is known as one table, verification as within decoding."""
        assert isinstance(self.costs, CostTable)
        factor = self.factor_of.get("fixed", self.factor_of.get("", 1.0))
        scaled = tuple(p._replace(seconds=p.seconds * factor) for p in self.costs.verifications)
        per_step, per_token = self.rest_of.get("fixed", self.rest_of.get("", (0.0, 0.0)))
        return replace(self.costs, verifications=scaled, per_step=per_step, per_token=per_token)


def _draft_points(setting: Setting, runs: Sequence[Decoded], spread: float) -> list[DraftPoint]:
    steps = [step for run in runs for step in run.steps]
    seconds = typical([time for run in runs for time in run.draft])
    if not steps or seconds <= 0:
        return []
    nodes = sum(step.nodes for step in steps) / len(steps)
    levels = setting.shape.depth if setting.shape is not None else int(setting.options.get("depth", 1))
    return [DraftPoint(key_of(setting), levels, nodes, 1, seconds, spread)]


def key_of(setting: Setting) -> str:
    """Settings that cost alike: by growth, fixed shapes being all the same; "" without speculation or growth."""
    if not setting.drafts:
        return ""
    if setting.shape is not None:
        return "fixed"
    return setting.options.get("length", setting.growth) or "text"


def levels_of(setting: Setting, step: Step) -> float:
    """Levels of a step's tree: as traced, else as many as the setting and the nodes allow."""
    return step.levels or min(float(setting.options.get("depth", setting.options.get("tokens", 1))), step.nodes)


def expectation(setting: Setting, steps: Iterable[Step], prices: Prices) -> Expectation:
    """Tokens over seconds of these steps."""
    steps = list(steps)
    return _expected(setting, steps, sum(prices.step(setting, step) for step in steps))


def expectation_of(setting: Setting, runs: Iterable[Decoded], prices: Prices) -> Expectation:
    """The same of a setting that was decoded: by the seconds that it took where those count, else by prices."""
    runs = list(runs)
    steps = [step for run in runs for step in run.steps]
    return _expected(setting, steps, steady_seconds(runs)) if prices.timed else expectation(setting, steps, prices)


def _expected(setting: Setting, steps: Sequence[Step], seconds: float) -> Expectation:
    tokens, count = sum(step.emitted for step in steps), max(len(steps), 1)
    nodes = sum(step.nodes for step in steps) / count
    return Expectation(setting, tokens / count, nodes, seconds / count, tokens / seconds if seconds else 0.0)


def best_first(expectations: Iterable[Expectation]) -> list[Expectation]:
    """By tokens per second; of equals the one with fewer nodes."""
    return sorted(expectations, key=lambda e: (-e.tokens_per_second, e.nodes))
