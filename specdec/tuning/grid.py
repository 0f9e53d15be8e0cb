"""Every setting there is, decoded: what a choice is checked against, the slow way.

The grid is a race. All settings decode the first prompt in turns, the best quarter goes on to the next prompts, and so
on with twice as many prompts each time; the choice that is checked never drops out. At the end the best few and the
choice are decoded once more, in turns: the fastest of hundreds by one measurement owes some of it to chance, and the
fresh measurement does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from specdec.probe import target_of
from specdec.tuning.decoded import Decoded, Job, decode_all, decode_one, tokens_per_second
from specdec.tuning.pricing import Expectation, Prices, expectation_of
from specdec.tuning.settings import (
    Setting,
    Subject,
    chain_settings,
    deepest,
    drawn_chains,
    following_settings,
    length_settings,
    loadable,
    text_settings,
    tree_settings,
)
from specdec.tuning.tune import Effort, Tell, Tuned

GOES_ON = 4
"""One in so many settings goes on to the next prompts."""
LAST = 4
"""Settings that are decoded on all prompts, and once more."""


def full_grid(subject: Subject, job: Job, table: Path | None, effort: Effort) -> list[Setting]:
    """Every setting there is."""
    if not subject.grows:
        return text_settings(subject)
    most = deepest(subject, job.model, effort.depths)
    found = [*chain_settings(subject, most, effort.depths), *length_settings(subject, most, effort.depths)]
    if subject.is_traceable:
        found += drawn_chains(subject, most, effort.depths, temperature=job.temperature)
    if target_of(job.model).form == "tree":
        if table is not None and table.is_file() and subject.is_traceable:
            found += tree_settings(subject, most, table, effort.depths, effort.budgets)
        found += following_settings(subject, most, effort.depths, effort.budgets, temperature=job.temperature)
    return loadable(found, subject, job.model)


def measured_grid(found: Tuned, job: Job, settings: Sequence[Setting], tell: Tell | None = None) -> list[Expectation]:
    """Race settings, and say what each gave on the prompts that it came to; those that went furthest first.

    By wall clock, or where the costs were given by those.
    """
    settings = [*settings, *([found.choice.setting] if found.choice.setting not in settings else [])]
    runs: list[list[Decoded]] = [[] for _ in settings]
    racing, dropped, done = list(range(len(settings))), list[list[int]](), 0
    priced = [replace(found.choice, setting=setting) for setting in settings]
    for upto in rounds(len(job.prompts)):
        total = len(racing) * (upto - done)
        for count, (number, place) in enumerate((n, place) for n in range(done, upto) for place in racing):
            if tell is not None:
                tell(f"decoding the grid, {len(racing)} settings on {upto - done} prompts", count, total)
            runs[place].append(decode_one(job, found.subject.spec(settings[place]), number))
        for place in racing:
            priced[place] = _priced(found, settings[place], runs[place])
        done, ranked = upto, _by_speed(racing, priced)
        kept = ranked[: max(LAST, -(-len(ranked) // GOES_ON))] if upto < len(job.prompts) else ranked
        kept += [place for place in ranked[len(kept) :] if settings[place] == found.choice.setting]
        dropped.append([place for place in ranked if place not in kept])
        racing = kept
    if not found.projected:
        racing = _once_more(found, job, settings, racing, priced, tell)
    return [priced[place] for places in (racing, *reversed(dropped)) for place in places]


def rounds(prompts: int) -> list[int]:
    """How many of the prompts are done after each round: 1, 2, 4, ... all."""
    found = [1]
    while found[-1] < prompts:
        found.append(min(2 * found[-1], prompts))
    return found


def _once_more(
    found: Tuned, job: Job, settings: Sequence[Setting], ranked: list[int], priced: list[Expectation], tell: Tell | None
) -> list[int]:
    """Decode the best few and the choice again, and rank them by that; the others follow."""
    best = ranked[:LAST] + [place for place in ranked[LAST:] if settings[place] == found.choice.setting]
    say = None if tell is None else partial(tell, "decoding the best of the grid once more")
    for place, again in zip(best, decode_all(job, [found.subject.spec(settings[p]) for p in best], say), strict=True):
        priced[place] = _priced(found, settings[place], again)
    return [*_by_speed(best, priced), *(place for place in ranked if place not in best)]


def _by_speed(places: Sequence[int], priced: Sequence[Expectation]) -> list[int]:
    return sorted(places, key=lambda place: (-priced[place].tokens_per_second, priced[place].nodes))


def _priced(found: Tuned, setting: Setting, runs: Sequence[Decoded]) -> Expectation:
    priced = expectation_of(setting, runs, Prices(found.costs))
    return priced if found.projected else replace(priced, tokens_per_second=tokens_per_second(runs))
