"""What became of the drafted tokens: tau, rates by depth, nodes per step, and the identity that ties them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specdec.bench.statistics.bootstrap import Estimate, estimate, quotient
from specdec.bench.statistics.sample import PHASES, Question, Sample
from specdec.errors import SpecdecError

COUNTS = ("drafted", "accepted", "emitted", "tried")


def acceptance(samples: Sequence[Sample], units: Mapping[Question, int], stratified: bool = False) -> dict[str, Any]:
    """All acceptance numbers of one method for JSON; an empty dict where its steps are not known.

    Rates by depth run over every step of every row. `marginal[i]` is the share of steps whose accepted path reached
    depth i + 1; `conditional[i]` is that share among the steps where a token of depth i + 1 was there to be accepted.

    Raises:
        SpecdecError: the counts of a record contradict each other; the record is named.
    """
    for sample in samples:
        check_lengths(sample)
    known = [sample for sample in samples if sample.steps("emitted")]
    if not known:
        return {}
    emitted = _pooled(known, "emitted")
    numbers: dict[str, Any] = {
        "tau": tau(known, units, stratified).as_dict(),
        "tau_per_request": float(np.mean([np.mean(sample.steps("emitted")) for sample in known])),
        "steps": len(emitted),
        "tokens_per_step": {str(count): times for count, times in sorted(Counter(emitted.tolist()).items())},
    }
    if all(sample.knows("accepted") for sample in known):
        numbers |= _fate_of_drafts(known)
        _check_identity(numbers)
    return numbers


def tau(samples: Sequence[Sample], units: Mapping[Question, int], stratified: bool = False) -> Estimate:
    """Tokens emitted per target call and row, next_token included, every step weighing the same.

    The token of the prefill belongs to no step and is not counted.
    """
    columns = np.array([[sum(sample.steps("emitted")), len(sample.steps("emitted"))] for sample in samples], float)
    strata = [sample.column for sample in samples] if stratified else None
    return estimate(columns, quotient, [units[sample.question] for sample in samples], strata)


def check_lengths(sample: Sample) -> None:
    """All per-step lists that the method knows have one entry a step.

    Raises:
        SpecdecError: they have not; the record is named.
    """
    lengths = {name: len(sample.steps(name)) for name in (*COUNTS, *PHASES, "total") if sample.knows(name)}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{count} of {name}" for name, count in lengths.items())
        raise SpecdecError(
            f"record of {sample.name}: its steps have {got}; expected as many of each: "
            "the record is damaged, measure it again in a new directory"
        )


def check_steps(sample: Sample) -> None:
    """Each step emits what it accepted and one next_token; only the last may end inside the draft.

    Summed over the steps this is tau = 1 + sum of the marginal acceptances - share of steps that ended inside, for
    chains and trees alike: the accepted path is a chain.

    Raises:
        SpecdecError: a step that breaks it, named by record and position.
    """
    lists = [sample.steps(name) for name in COUNTS]
    last = len(lists[0]) - 1
    for step, (drafted, accepted, emitted, tried) in enumerate(zip(*lists, strict=True)):
        ended_inside = step == last and emitted == accepted > 0
        if (emitted != accepted + 1 and not ended_inside) or accepted > drafted or accepted > tried:
            raise SpecdecError(
                f"record of {sample.name}, step {step}: {emitted} tokens emitted, {accepted} of {drafted} drafted ones "
                f"accepted, depth {tried} tried; expected one more emitted than accepted (as many only in a last step "
                "that ends inside the draft), and no more accepted than drafted and tried: the record is damaged or "
                "its drafter counts wrongly"
            )


def _fate_of_drafts(samples: Sequence[Sample]) -> dict[str, Any]:
    for sample in samples:
        check_steps(sample)
    drafted, accepted = _pooled(samples, "drafted"), _pooled(samples, "accepted")
    emitted, tried = _pooled(samples, "emitted"), _pooled(samples, "tried")
    depths = range(1, int(tried.max()) + 1)
    reached = [int((accepted >= depth).sum()) for depth in depths]
    offered = [int((tried >= depth).sum()) for depth in depths]
    proposed, kept = int(drafted.sum()), int(accepted.sum())
    return {
        "drafted": proposed,
        "accepted": kept,
        "drafting_steps": int((drafted > 0).sum()),
        "ended_inside": int((emitted == accepted).sum()),
        "acceptance_rate": kept / proposed if proposed else None,
        "wasted_share": 1 - kept / proposed if proposed else None,
        "nodes_per_step": proposed / len(drafted),
        "accepted_at_depth": reached,
        "marginal": [count / len(accepted) for count in reached],
        "conditional": [count / chances for count, chances in zip(reached, offered, strict=True)],
        "chain": all(sample.record["chain"] for sample in samples),
    }


def _pooled(samples: Sequence[Sample], name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """One per-step count of all samples, one after another."""
    return np.concatenate([np.asarray(sample.steps(name), np.int64) for sample in samples])


def _check_identity(numbers: Mapping[str, Any]) -> None:
    """The published numbers themselves, after all sums: what `check_steps` holds for each record."""
    implied = 1 + sum(numbers["marginal"]) - numbers["ended_inside"] / numbers["steps"]
    if abs(numbers["tau"]["value"] - implied) > 1e-9:
        raise SpecdecError(
            f"tau is {numbers['tau']['value']:.9f}, but 1 + the sum of the marginal acceptances - the share of steps "
            f"that ended inside a draft is {implied:.9f}; they must be equal: the statistics are wrong, report it"
        )
