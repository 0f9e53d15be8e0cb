"""The top of a report: the verdict, what could spoil it, and one line a method."""

from __future__ import annotations

from typing import Any

from specdec.bench.report.document import Block, Callout, Card, Cards, Heading, Paragraph, Table, Tone
from specdec.bench.report.words import (
    MISSING,
    Summary,
    count,
    exact_cell,
    interval,
    label,
    labels,
    number,
    percent,
    ratio_cell,
)
from specdec.bench.statistics.bootstrap import FEWEST

FEW_PROMPTS = 10
"""Below this an interval over prompts says little."""
ERROR_LENGTH = 200
"""More of an error is in summary.json."""


def headline(summary: Summary) -> list[Block]:
    """Title, what was measured, the verdict in one line and in large numbers, and every caution."""
    manifest = summary["manifest"]
    target = manifest.get("target") or {}
    blocks: list[Block] = [
        Heading(f"specdec bench: {target.get('name') or 'target not recorded'}", 1),
        Paragraph(" · ".join(_circumstances(summary)), small=True),
    ]
    best = best_method(summary)
    if best is not None:
        blocks += _verdict(summary, best)
    return [*blocks, *cautions(summary)]


def best_method(summary: Summary) -> str | None:
    """The fastest lossless method that drafts; failing that the fastest one that drafts."""
    speeds = {name: geometric_mean(method) for name, method in summary["methods"].items()}
    drafting = {
        name: estimate["value"]
        for name, estimate in speeds.items()
        if estimate and name not in (summary["baseline"], summary["loop"])
    }
    lossless = {name: value for name, value in drafting.items() if not summary["methods"][name]["lossy"]}
    return max(lossless or drafting, key=(lossless or drafting).__getitem__, default=None)


def geometric_mean(method: dict[str, Any]) -> dict[str, Any] | None:
    """A method's speed-up over all prompts."""
    return method["overall"]["speedup"].get("geometric_mean")


def verdict_line(summary: Summary, name: str) -> str:
    """Such as: lookup: 1.83x plain generation (95 % interval 1.79 to 1.88), 480/480 exact."""
    method = summary["methods"][name]
    estimate = geometric_mean(method)
    assert estimate is not None
    exact = exact_cell(method["overall"]["exactness"]["questions"], not method["lossy"]).text
    judged = "exactness not judged" if exact == MISSING else f"{exact} exact"
    if "," in exact:
        judged = f"exact: {exact}"
    return f"{label(name, method)}: {estimate['value']:.2f}x plain generation ({_width(estimate)}), {judged}"


def cautions(summary: Summary) -> list[Block]:
    """What a reader must know before believing a number."""
    found: list[Block] = []
    for name, method in summary["methods"].items():
        wrong = method["overall"]["exactness"]["questions"]["wrong"]
        if wrong and not method["lossy"]:
            found.append(
                Callout(f"{name} is lossless by design, but {count(wrong, 'question')} came out wrong.", "bad")
            )
        if method["errors"]["count"]:
            found.append(Callout(_failed(label(name, method), method), "warn"))
    baseline = summary["methods"].get(summary["baseline"])
    if baseline is None or not baseline["overall"]["requests"]:
        found.append(Callout("Without answers of the baseline there are no speed-ups.", "bad"))
    if summary["questions"] < FEW_PROMPTS:
        advice = "there are no intervals" if summary["questions"] < FEWEST else "read the intervals with caution"
        found.append(Callout(f"Only {count(summary['questions'], 'question')}: {advice}.", "warn"))
    if summary["manifest"].get("finished", True) is None:
        found.append(Callout("The run is not finished: these are the records so far.", "warn"))
    return found


def overview(summary: Summary) -> list[Block]:
    """One line a method."""
    head = [
        "method",
        "speed-up, geometric mean",
        "speed-up, total time",
        "prompts faster",
        "tau",
        "accepted / drafted",
        "tokens/s",
        "decode tokens/s",
        "exact questions",
    ]
    rows = []
    for name, method in summary["methods"].items():
        all_of_it, speed = method["overall"], method["overall"]["speedup"]
        fates = all_of_it["acceptance"]
        is_base = name == summary["baseline"]
        rows.append(
            [
                labels(summary)[name],
                "1 (baseline)" if is_base else ratio_cell(speed.get("geometric_mean")),
                "1" if is_base else ratio_cell(speed.get("total_time_ratio")),
                f"{speed['prompts_faster']}/{speed['prompts']}" if speed else MISSING,
                interval(fates.get("tau")) if fates else MISSING,
                percent(fates.get("acceptance_rate")),
                number(all_of_it["throughput"]["tokens_per_second"], 1),
                number(all_of_it["throughput"]["decode_tokens_per_second"], 1),
                "reference" if is_base else exact_cell(all_of_it["exactness"]["questions"], not method["lossy"]),
            ]
        )
    note = "Brackets hold 95 % intervals; green or red where the interval excludes 1. Speed-ups are end to end."
    return [Heading("Overview"), Table(head, rows), Paragraph(note, small=True), *_other_lengths(summary)]


def _verdict(summary: Summary, name: str) -> list[Block]:
    method, base = summary["methods"][name], summary["methods"][summary["baseline"]]
    estimate = geometric_mean(method) or {}
    tone: Tone = "warn"
    if estimate["low"] is not None and not estimate["low"] <= 1 <= estimate["high"]:
        tone = "good" if estimate["low"] > 1 else "bad"
    exact = exact_cell(method["overall"]["exactness"]["questions"], not method["lossy"])
    exact_count, _, others = exact.text.partition(", ")
    tau = method["overall"]["acceptance"].get("tau")
    speeds = [part["overall"]["throughput"]["tokens_per_second"] for part in (base, method)]
    cards = [
        Card(f"{estimate['value']:.2f}x", f"{label(name, method)} over plain, {_width(estimate)}", tone),
        Card(exact_count, "questions exact, token for token" + (f"; {others}" if others else ""), exact.tone),
        Card(number(tau["value"] if tau else None), "tau: tokens per target call, next_token included"),
        Card(f"{number(speeds[0], 0)} → {number(speeds[1], 0)}", "tokens per second, plain and with it"),
    ]
    sure = (
        " The interval contains 1: no difference was shown." if tone == "warn" and estimate["low"] is not None else ""
    )
    return [Callout(f"{verdict_line(summary, name)}.{sure}", "bad" if exact.tone == "bad" else tone), Cards(cards)]


def _width(estimate: dict[str, Any]) -> str:
    if estimate["low"] is None:
        return "too few prompts for an interval"
    return f"95 % interval {estimate['low']:.2f} to {estimate['high']:.2f}"


def _circumstances(summary: Summary) -> list[str]:
    manifest = summary["manifest"]
    settings, hardware = manifest.get("settings") or {}, manifest.get("hardware") or {}
    versions = manifest.get("versions") or {}
    questions = (manifest.get("questions") or {}).get("name")
    found = [
        count(summary["questions"], "question") + (f" of {questions}" if questions else ""),
        *(f"{words} {settings[key]}" for key, words in _SETTINGS.items() if key in settings),
        (hardware.get("gpu") or {}).get("name") or hardware.get("cpu"),
        *(f"{name} {versions[name]}" for name in ("specdec", "torch", "transformers") if name in versions),
    ]
    return [str(part) for part in found if part]


_SETTINGS = {
    "repeats": "repeats",
    "batch_size": "batch",
    "temperature": "temperature",
    "max_new_tokens": "new tokens at most",
}


def _failed(name: str, method: dict[str, Any]) -> str:
    many, first = method["errors"]["count"], method["errors"]["first"][0]
    share = f"{many} of {method['records']} records failed and {'is' if many == 1 else 'are'} left out"
    return f"{name}: {share}; the first, question {first['question_id']}: {_cut(first['error'])}"


def _cut(text: str) -> str:
    return text if len(text) <= ERROR_LENGTH else f"{text[:ERROR_LENGTH]}..."


def _other_lengths(summary: Summary) -> list[Block]:
    odd = {
        labels(summary)[name]: method["overall"]["speedup"].get("prompts_of_other_length", 0)
        for name, method in summary["methods"].items()
    }
    told = ", ".join(f"{name} ({many})" for name, many in odd.items() if many)
    if not told:
        return []
    return [Paragraph(f"Answers of another length than plain's, compared by time per token: {told}.", small=True)]
