"""How many answers are the baseline's, token for token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

VERDICTS = ("exact", "near-tie", "wrong", "not-compared")
_WORST_FIRST = ("wrong", "near-tie", "not-compared", "exact")
LISTED = 10
"""How many differences a report names."""


def exactness(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts by question and by record, the widest gap of a near tie, and the first differences.

    A question is as bad as its worst record; one whose second turn could not be compared is not called exact.
    """
    of_question: dict[Hashable, str] = {}
    for entry in verdicts:
        seen = of_question.get(entry["question_id"], "exact")
        of_question[entry["question_id"]] = min(seen, entry["verdict"], key=_WORST_FIRST.index)
    gaps = [entry["gap"] for entry in verdicts if entry["verdict"] == "near-tie" and entry.get("gap") is not None]
    differing = [entry for entry in verdicts if entry["verdict"] in ("wrong", "near-tie")]
    differing.sort(key=lambda entry: _WORST_FIRST.index(entry["verdict"]))
    return {
        "questions": _counted(of_question.values()),
        "records": _counted(entry["verdict"] for entry in verdicts),
        "widest_near_tie": max(gaps, default=None),
        "differences": [_difference(entry) for entry in differing[:LISTED]],
        "reasons": sorted({str(e["reason"]) for e in verdicts if e["verdict"] == "not-compared" and e.get("reason")}),
    }


def _counted(verdicts: Iterable[str]) -> dict[str, int]:
    counts = Counter(verdicts)
    return {verdict: counts[verdict] for verdict in VERDICTS}


def _difference(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry.get(key) for key in ("verdict", "question_id", "turn", "repeat", "position", "gap", "reason")}
