"""Training a drafter for an 8B and a 70B target on two machines, on paper: the tables of docs/scaling.md.

    python scripts/scaling.py                        # prints the tables
    python scripts/scaling.py --doc docs/scaling.md  # puts them into the page
    python scripts/scaling_rates.py --out rates.json # measures this machine anew, for --rates rates.json

Nothing here has run on such machines: all of it is projected. scaling_work.py counts; here stand the tables.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from scaling_work import (
    ASSUMED,
    BUDGETS,
    DRAFT_VOCABULARY,
    KINDS,
    MACHINE_OF,
    TARGETS,
    Work,
    cached_head_seconds,
    head_seconds,
    hours,
    machine,
    online_seconds,
    target_seconds,
    tokens_of,
    work_of,
)

from specdec.costs.roofline import machine_named
from specdec.train.feature_cache import FeaturePlan
from specdec.train.logits import ELEMENTS_AT_ONCE
from specdec.train.online import OnlineSettings
from specdec.train.plan import FP32, LOGITS_ALIVE, MOMENTS

RATES = Path(__file__).parents[1] / "docs" / "benchmarks" / "2026-11-28-scaling-rates.json"

Table = list[list[str]]
"""Rows of cells, the header first."""


def short(value: float) -> str:
    """Two significant digits without an exponent."""
    if value >= 100:
        return f"{round(value, 2 - len(str(int(value)))):,.0f}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def ends(values: Iterable[float], form: Callable[[float], str] = short) -> str:
    """A range from the least to the most, or one number where both print alike."""
    low, high = min(found := list(values)), max(found)
    return form(low) if form(low) == form(high) else f"{form(low)} to {form(high)}"


def gigabytes(size: float) -> str:
    return short(size / 1e9)


def works() -> Iterator[Work]:
    """Every kind for every target."""
    return (work_of(kind, target) for target in TARGETS for kind in KINDS)


def rates_table(rates: dict[str, Any]) -> Table:
    """What was measured here."""
    forward, disk = rates["forward"], rates["disk"]
    lines = [["what", "tokens/s", "share of the machine's matrix product", "of the forward's share",
              "time with `--gradient-checkpointing`"]]  # fmt: skip
    lines.append(["target's forward", short(forward["tokens_per_second"]), f"{forward['fraction']:.2f}", "1", ""])
    for kind, rate in rates["training"].items():
        relative = rate["fraction"] / forward["fraction"]
        share = f"{rate['fraction']:.2f}"
        again = f"{rate['recompute']:.2f} x"
        step = f"step of {kind}, target aside"
        lines.append([step, short(rate["tokens_per_second"]), share, f"{relative:.2f}", again])
    for name, words in {
        "write_with_target": "features computed and written", "write": "the same bytes written and synced",
        "read_cold": "read in random order from the disk", "read_warm": "read in random order from memory",
    }.items():  # fmt: skip
        lines.append([words, "", f"{disk[name] / 1e6:,.0f} MB/s", "", ""])
    lines.append(["kept by the loss for each token of a law and depth", "", f"{rates['kept_bytes']:.1f} bytes", "", ""])
    return lines


def work_table(rates: dict[str, Any]) -> Table:
    """Sizes, operations and bytes of every kind."""
    lines = [["target", "kind", "parameters that learn", "GFLOP/token, target", "GFLOP/token, drafter",
              "cached taps", "bytes/token", "TB, usual run"]]  # fmt: skip
    for work in works():
        described = machine(work.target, 1.0)
        size = described.model
        forward = 2 * size.parameters + 2 * ASSUMED.row_length * size.hidden_size * size.layers
        stored = BUDGETS["usual"][0] * ASSUMED.tokens_per_dialogue * work.bytes_per_token
        lines.append([
            work.target, work.kind, f"{work.parameters / 1e9:.2f} B", short(forward / 1e9), short(work.flops / 1e9),
            str(len(work.stored)), f"{work.bytes_per_token:,}", short(stored / 1e12),
        ])  # fmt: skip
    return lines


def online_table(rates: dict[str, Any]) -> Table:
    """Tokens per second and hours with the target in process."""
    header = [f"hours, {name} ({tokens_of(name) / 1e9:.2g} B tokens)" for name in BUDGETS]
    lines = [["target", "kind", f"tokens/s, {ASSUMED.devices} devices", *header]]
    for work in works():
        seconds = [online_seconds(work, mfu, rates) for mfu in ASSUMED.mfu]
        taken = [ends(hours(tokens_of(budget), each) for each in seconds) for budget in BUDGETS]
        lines.append([work.target, work.kind, ends(ASSUMED.devices / each for each in seconds), *taken])
    return lines


def offline_table(rates: dict[str, Any]) -> Table:
    """The usual run from a cache: what each stage takes by itself, and after how many epochs it is faster."""
    lines = [["target", "kind", "TB", "compute features, h", "write once, or read an epoch, h",
              "to the other machine, h", "train an epoch, h", "online epoch, h", "cache wins from epoch",
              "disk as fast as online, GB/s"]]  # fmt: skip
    tokens = BUDGETS["usual"][0] * ASSUMED.tokens_per_dialogue
    for work in works():
        size = tokens * work.bytes_per_token
        online = [online_seconds(work, mfu, rates) for mfu in ASSUMED.mfu]
        lines.append([
            work.target, work.kind, short(size / 1e12),
            ends(hours(tokens, target_seconds(work.target, mfu)) for mfu in ASSUMED.mfu),
            ends(size / rate / 3600 for rate in ASSUMED.disk), ends(size / rate / 3600 for rate in ASSUMED.network),
            ends(hours(tokens, cached_head_seconds(work, mfu, rates)) for mfu in ASSUMED.mfu),
            ends(hours(tokens, seconds) for seconds in online), break_even(work, rates, tokens),
            ends(work.bytes_per_token * ASSUMED.devices / seconds / 1e9 for seconds in online),
        ])  # fmt: skip
    return lines


def break_even(work: Work, rates: dict[str, Any], tokens: float) -> str:
    """Epochs from which computing, writing and reading the cache takes less time than online training.

    Writing overlaps with computing, and reading with training; at each end the slower of both counts.
    """
    found = []
    for mfu, disk in zip(ASSUMED.mfu, ASSUMED.disk, strict=True):
        moved = tokens * work.bytes_per_token / disk / 3600
        once = max(hours(tokens, target_seconds(work.target, mfu)), moved)
        epoch = max(hours(tokens, cached_head_seconds(work, mfu, rates)), moved)
        online = hours(tokens, online_seconds(work, mfu, rates))
        found.append(int(once / (online - epoch)) + 1 if online > epoch else None)
    slow, fast = ("never" if epochs is None else str(epochs) for epochs in found)
    return slow if slow == fast else f"{slow} (slow disk), {fast} (fast)"


def fixed_bytes(work: Work) -> float:
    """Of one device: its part of the target in 16 bits, fp32 weights, gradients and moments, autocast's copy."""
    model = machine(work.target, 1.0)
    target = model.model.parameters * model.model.bytes_per_value / model.device.count
    return target + work.parameters * (FP32 * (2 + MOMENTS) + 2)


def row_bytes(work: Work, rates: dict[str, Any], *, bounded: bool = False) -> float:
    """Of one row in one forward; `bounded` leaves out laws, but for the target's logits: they take `PART_BYTES`."""
    tokens, vocabulary = ASSUMED.row_length, TARGETS[work.target]["vocab_size"]
    taps = len(work.stored) * work.hidden_size * (2 + FP32)
    states = ASSUMED.activation_bytes_per_state * work.states + FP32 * work.mask_columns
    laws = work.laws * work.law_size * (rates["kept_bytes"] + FP32)
    return tokens * (taps + states + 2 * vocabulary + (0 if bounded else laws))


PART_BYTES = FP32 * LOGITS_ALIVE * ELEMENTS_AT_ONCE
"""Logits and laws that are made at a time, and again in the backward pass, with `--gradient-checkpointing`."""


def memory_table(rates: dict[str, Any]) -> Table:
    """Gigabytes of one device and the rows that fit."""
    lines = [["target", "kind", "target's part", "drafter, gradients, moments", f"a row of {ASSUMED.row_length}",
              "of it kept for laws", "rows at once in 80 GB", "laws made again"]]  # fmt: skip
    for work in works():
        model = machine(work.target, 1.0)
        usable = ASSUMED.usable_memory * model.device.memory_bytes - fixed_bytes(work)
        row, bare = row_bytes(work, rates), row_bytes(work, rates, bounded=True)
        target = model.model.parameters * 2 / model.device.count
        rows = [usable / row, (usable - PART_BYTES) / bare]
        lines.append([
            work.target, work.kind, gigabytes(target), gigabytes(fixed_bytes(work) - target), gigabytes(row),
            gigabytes(row - bare), *(str(max(int(count), 0)) for count in rows),
        ])  # fmt: skip
    return lines


def sharing_table(rates: dict[str, Any]) -> Table:
    """Ways to hold the target: seconds of one forward over 4 rows on each device's share, and what is moved for it."""
    lines = [["target", "layout", "weights on a device, GB", "tokens/s and device, target alone",
              "moved to a device for a micro-batch, GB", "seconds of it"]]  # fmt: skip
    tokens = 4 * ASSUMED.row_length
    for target in TARGETS:
        for count in (1, 2, 4, 8):
            name = f"{target}@{count}xh100"
            model = machine_named(name)
            weights = model.model.parameters * 2
            if weights / count > ASSUMED.usable_memory * model.device.memory_bytes:
                continue
            rate = ends(1 / target_seconds(target, mfu, name) for mfu in ASSUMED.mfu)
            moved = 2 * model.model.layers * tokens * model.model.hidden_size * 2 if count > 1 else 0
            seconds = moved / model.serving.link_bytes_per_second
            layout = "whole on every device" if count == 1 else f"layers shared by {count} devices"
            lines.append([target, layout, gigabytes(weights / count), rate, gigabytes(moved), f"{seconds:.2f}"])
        lines += fully_sharded(target, tokens)
    return lines


def fully_sharded(target: str, tokens: int) -> Table:
    """Weights cut over all devices and gathered for each layer, within one machine or over both."""
    model = machine_named(MACHINE_OF[target])
    weights = model.model.parameters * 2
    links = {
        ASSUMED.devices_per_machine: (model.serving.link_bytes_per_second,) * 2,
        ASSUMED.devices: ASSUMED.network,  # a ring passes all weights through each machine's network once
    }
    lines = []
    for count, link in links.items():
        gathered = weights * (count - 1) / count
        compute = [tokens * target_seconds(target, mfu, f"{target}@1xh100") for mfu in ASSUMED.mfu]
        seconds = [max(work, gathered / each) for work, each in zip(compute, link, strict=True)]
        rate = ends(tokens / value for value in seconds)
        moved = ends((gathered / each for each in link), "{:.2f}".format)
        lines.append([target, f"gathered from {count} devices (FSDP)", gigabytes(weights / count), rate,
                      gigabytes(gathered), moved])  # fmt: skip
    return lines


def gradients_table(rates: dict[str, Any]) -> Table:
    """What replicas of the drafter exchange in a step."""
    tokens = ASSUMED.rows_per_step * ASSUMED.row_length
    lines = [["target", "kind", "gradients, GB", "seconds between the machines", "seconds of computing a step"]]
    for work in works():
        size = 2 * FP32 * work.parameters
        lines.append([
            work.target, work.kind, gigabytes(FP32 * work.parameters),
            ends((size / rate for rate in ASSUMED.network), "{:.3f}".format),
            ends(tokens * online_seconds(work, mfu, rates) / ASSUMED.devices for mfu in ASSUMED.mfu),
        ])  # fmt: skip
    return lines


def answers_table(rates: dict[str, Any]) -> Table:
    """The target writes the usual run's answers, plainly and with a drafter that proposes chains."""
    total, context = ASSUMED.prompts * ASSUMED.answer_tokens, ASSUMED.tokens_per_dialogue
    lines = [["target", "instances", "rows at once", "plain, tokens/s", f"hours for {total / 1e9:.1f} B tokens",
              "speculative, tokens/s", "hours", "speed-up"]]  # fmt: skip
    for name in ("8b@h100", "70b@4xh100"):
        model = machine_named(name)
        instances = ASSUMED.devices // model.device.count
        for batch in (8, 32, 128, 256):
            if not model.fits(batch, context):
                continue
            plain = batch / (model.verify(1, batch, context) + model.overhead())
            step = model.verify(1 + ASSUMED.depth, batch, context) + model.overhead()
            step += model.draft(ASSUMED.depth, ASSUMED.depth, batch)
            fast = [tau * batch / step for tau in ASSUMED.tau]
            lines.append([
                name, str(instances), str(batch), short(instances * plain), short(total / instances / plain / 3600),
                ends(instances * rate for rate in fast),
                ends(total / instances / rate / 3600 for rate in fast),
                ends((rate / plain for rate in fast), "{:.2f}".format),
            ])  # fmt: skip
    return lines


def serving_table(rates: dict[str, Any]) -> Table:
    """Learning while serving: what a learned token costs beside the generated one."""
    settings, context = OnlineSettings(), ASSUMED.tokens_per_dialogue
    passes = settings.steps * settings.rows * settings.row_length / settings.learn_every
    lines = [["target", "kind", "rows served", "ms of devices for a token, serving", "learning it once",
              f"learning at the defaults (up to {passes:.0f} times)", "buffer, GB"]]  # fmt: skip
    for name, kind in (("8b@h100", "eagle3"), ("8b@h100", "draft-model"), ("70b@4xh100", "eagle3")):
        model, work = machine_named(name), work_of(kind, name.split("@")[0], settings.row_length)
        taps = 0 if kind == "draft-model" else (len(work.stored) - 1) * work.hidden_size * 2
        buffer = settings.buffer_tokens * (4 + 6 * (settings.top_k or 0) + 3 + taps)
        learned = [head_seconds(work, mfu, rates) for mfu in ASSUMED.mfu]
        for batch in (1, 32):
            step = model.verify(1 + ASSUMED.depth, batch, context) + model.overhead()
            step += model.draft(ASSUMED.depth, ASSUMED.depth, batch)
            tokens = [step * model.device.count / (batch * tau) * 1e3 for tau in ASSUMED.tau]
            lines.append([
                name, kind, str(batch), ends(tokens),
                ends((1e3 * each for each in learned), "{:.3f}".format),
                ends(1e3 * passes * each for each in learned), gigabytes(buffer),
            ])  # fmt: skip
    return lines


def assumptions_table(rates: dict[str, Any]) -> Table:
    """What is assumed, in words."""
    device = machine_named("8b@h100").device
    gb = [f"{low / 1e9:g} to {high / 1e9:g} GB/s" for low, high in (ASSUMED.disk, ASSUMED.network)]
    return [
        ["assumed", "value"],
        ["devices", f"{ASSUMED.machines} machines of {ASSUMED.devices_per_machine} ({device.about}), "
         f"{device.flops / 1e12:.0f} TFLOP/s dense in 16 bits"],
        ["share of that in forwards and training", f"{ASSUMED.mfu[0]} to {ASSUMED.mfu[1]}"],
        ["disk, both machines together", gb[0]],
        ["network, each machine and direction", gb[1]],
        ["rows", f"{ASSUMED.rows_per_step} of {ASSUMED.row_length} tokens in a step, every token supervised"],
        ["a dialogue", f"{ASSUMED.tokens_per_dialogue} tokens, {ASSUMED.answer_tokens} of them written by the target"],
        *[[f"{name} run", f"{count:,} dialogues, {epochs} epochs: {tokens_of(name) / 1e9:.2g} B tokens"]
          for name, (count, epochs) in BUDGETS.items()],
        ["draft vocabulary of eagle3", f"{DRAFT_VOCABULARY:,}"],
        ["tau of answers with a drafter", f"{ASSUMED.tau[0]} to {ASSUMED.tau[1]}, chains of {ASSUMED.depth}"],
        ["activations kept by a layer", f"{ASSUMED.activation_bytes_per_state} bytes for each hidden unit and token"],
    ]  # fmt: skip


def checks_table(rates: dict[str, Any]) -> Table:
    """Our bytes beside those that others publish of theirs."""
    llama = work_of("eagle3", "8b").bytes_per_token
    deepspec = FeaturePlan("", {}, tuple(range(6)), "bfloat16", 2560, 4096, True, 0, 0, ()).bytes_per_token
    return [
        ["published", "here"],
        ["speculators: 268 MB for 8,192 tokens of Llama-3.1-8B", f"{8192 * llama / 1e6:.0f} MB"],
        ["speculators: about 13 TB for 50,000 such samples", f"{50_000 * 8192 * llama / 1e12:.1f} TB"],
        ["DeepSpec: 38 TB for its Qwen3-4B data (5 taps and the last, D = 2560)",
         f"{deepspec:,} bytes a token, so {38e12 / deepspec / 1e9:.1f} B tokens"],
    ]  # fmt: skip


TABLES: dict[str, Callable[[dict[str, Any]], Table]] = {
    "assumptions": assumptions_table, "rates": rates_table, "work": work_table, "checks": checks_table,
    "online": online_table, "sharing": sharing_table, "gradients": gradients_table, "offline": offline_table,
    "memory": memory_table, "answers": answers_table, "serving": serving_table,
}  # fmt: skip


def markdown(table: Table) -> str:
    """A table of the page."""
    rows = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def filled(page: str, rates: dict[str, Any]) -> str:
    """The page with every `<!-- table NAME -->` block made anew."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{markdown(TABLES[match[2]](rates))}\n{match[4]}"

    return re.sub(r"(<!-- table (\w+) -->)\n(.*?)\n?(<!-- end -->)", block, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=Path, default=RATES)
    parser.add_argument("--doc", type=Path, help="rewrite the tables of this page")
    args = parser.parse_args()
    rates = json.loads(args.rates.read_text())
    if args.doc:
        args.doc.write_text(filled(args.doc.read_text(), rates))
        return
    for name, table in TABLES.items():
        print(f"{name}: {(table.__doc__ or '').splitlines()[0]}\n\n{markdown(table(rates))}\n")


if __name__ == "__main__":
    main()
