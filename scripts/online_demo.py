"""A stream of prompts that changes its topic, decoded with the demo draft model as it is and with one that learns.

    python scripts/online_demo.py                          # everything: 4 x 60 requests, twice
    python scripts/online_demo.py --requests 3 --out build/online          # a quick look

Four parts: source of the standard library, prose of its docstrings, SQL that is made up here, and source again. Prompts
come from every machine's own files (modules that the demo target was trained on) or are made from a seed. Both drafters
see the same prompts. Written to --out: prompts.jsonl, one log for each drafter, summary.json, and the plot; with --plot
the plot alone goes elsewhere, such as docs/benchmarks.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from train_demo import corpus_files, read_texts
from transformers import AutoTokenizer, LlamaForCausalLM

import specdec
from specdec import demo
from specdec.bench.plots.canvas import WIDTH, Canvas, legend_height
from specdec.bench.plots.scale import Scale, short
from specdec.drafter import Drafter
from specdec.environment import hardware, versions
from specdec.train.learner import LearningRate
from specdec.train.online import LearningDrafter, OnlineSettings
from specdec.train.stream import Request, replay_stream
from specdec.train.stream_prompts import read_stream

PARTS = ("source", "docstrings", "SQL", "source")
NAMES = ("static", "learning")
TABLES = {
    "orders": ("id", "customer_id", "placed_at", "status", "total"),
    "customers": ("id", "name", "email", "country", "created_at"),
    "products": ("id", "title", "price", "stock", "category_id"),
    "invoices": ("id", "order_id", "amount", "paid_at", "currency"),
    "employees": ("id", "name", "salary", "department_id", "hired_at"),
}
STATEMENT = 6
"""Statements of SQL in a prompt."""


def source(generator: random.Random, texts: list[str], lines: int = 12) -> str:
    """Some lines of a module."""
    whole = generator.choice(texts).splitlines()
    start = generator.randrange(max(len(whole) - lines, 1))
    return "\n".join(whole[start : start + lines])


def docstring(generator: random.Random, texts: list[str]) -> str:
    """The beginning of a long docstring."""
    return generator.choice(texts)[:500]


def docstrings_of(texts: list[str], least: int = 400) -> list[str]:
    """Every docstring of so many characters, as prose: without the indent of its place."""
    found = []
    for text in texts:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        written = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        found += [doc for doc in written if doc is not None and len(doc) >= least and ">>>" not in doc]
    return found


def sql(generator: random.Random, _texts: list[str]) -> str:
    """Statements about a few tables, the last one cut in the middle."""
    text = "\n".join(_statement(generator) for _ in range(STATEMENT))
    return text[: len(text) - generator.randint(5, 25)]


def _statement(generator: random.Random) -> str:
    table = generator.choice(list(TABLES))
    first, second = generator.sample(TABLES[table], 2)
    value = generator.randint(1, 500)
    return generator.choice(
        (
            f"SELECT {first}, {second} FROM {table} WHERE {first} = {value} ORDER BY {second} DESC LIMIT 10;",
            f"INSERT INTO {table} ({first}, {second}) VALUES ({value}, {value + 1});",
            f"UPDATE {table} SET {first} = {value} WHERE {second} = {value};",
            f"SELECT COUNT(*) FROM {table} WHERE {second} > {value} GROUP BY {first};",
        )
    )


def write_prompts(file: Path, requests: int, seed: int) -> None:
    """The stream, so many requests in each part."""
    modules = read_texts(corpus_files()[0])
    kinds: dict[str, tuple[Callable[[random.Random, list[str]], str], list[str]]] = {
        "source": (source, [text for text in modules if len(text) > 2000]),
        "docstrings": (docstring, docstrings_of(modules)),
        "SQL": (sql, []),
    }

    def lines() -> Iterator[str]:
        generator = random.Random(seed)
        for topic in PARTS:
            make, texts = kinds[topic]
            for _ in range(requests):
                prompt = make(generator, texts)
                while not prompt.strip():
                    prompt = make(generator, texts)
                yield json.dumps({"prompt": prompt, "topic": topic}) + "\n"

    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines()))


def smoothed(requests: list[Request], window: int) -> list[float]:
    """tau over the last requests of the same part, weighted by step."""
    per_part = len(requests) // len(PARTS)
    values = []
    for number in range(len(requests)):
        first = max(number - window + 1, number // per_part * per_part)
        last = requests[first : number + 1]
        values.append(sum(r.tau * r.steps for r in last) / max(sum(r.steps for r in last), 1))
    return values


def plot(runs: dict[str, list[Request]], window: int) -> str:
    """tau by request, one curve a drafter, as SVG."""
    canvas = Canvas(330, "Tokens per target call along a stream that changes its topic")
    canvas.legend([f"{name} draft model" for name in runs], [f"var(--s{index})" for index in range(len(runs))], 0)
    top, bottom = legend_height(NAMES) + 18, 280
    curves = {name: smoothed(requests, window) for name, requests in runs.items()}
    count = len(next(iter(curves.values())))
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    across = Scale(0, max(count, 2), 44, WIDTH - 10)
    up = Scale(min(low * 0.97, 1.0), high * 1.03, bottom, top)
    for tick in up.ticks(6):
        canvas.line(across.first, up(tick), across.last, up(tick), "grid")
        canvas.text(across.first - 6, up(tick) + 4, short(tick), anchor="end", kind="muted")
    per_part = count // len(PARTS)
    for part, topic in enumerate(PARTS):
        x = across(part * per_part)
        canvas.line(x, top - 8, x, bottom, "mark" if part else "axis")
        canvas.text(x + 6, top - 2, topic, kind="strong")
        canvas.text(x, bottom + 17, str(part * per_part), anchor="middle", kind="muted")
    for index, values in enumerate(curves.values()):
        # A line across a change of topic would show a slope that is none.
        for part in range(len(PARTS)):
            here = range(part * per_part, (part + 1) * per_part)
            canvas.curve([(across(number + 0.5), up(values[number])) for number in here], f"var(--s{index})")
    says = f"request; tau over the last {window} requests of the part"
    canvas.text((across.first + across.last) / 2, bottom + 36, says, anchor="middle", kind="muted small")
    return canvas.svg()


def thirds(requests: list[Request]) -> list[dict[str, Any]]:
    """tau of each part in its first and its last third."""
    per_part = len(requests) // len(PARTS)
    rows = []
    for part, topic in enumerate(PARTS):
        here = requests[part * per_part : (part + 1) * per_part]
        size = max(per_part // 3, 1)
        rows.append({"topic": topic, "first": _tau(here[:size]), "last": _tau(here[-size:])})
    return rows


def _tau(requests: list[Request]) -> float:
    return round(sum(r.tau * r.steps for r in requests) / max(sum(r.steps for r in requests), 1), 3)


def drafter_named(name: str, model: Any, args: argparse.Namespace) -> Drafter:
    """The demo draft model, as it is or learning."""
    drafter = specdec.load_drafter(f"demo-draft:depth={args.depth}", model)
    assert drafter is not None
    if name == "static":
        return drafter
    settings = OnlineSettings(
        learn_every=args.learn_every, max_age=None, steps=args.steps, learning=LearningRate(args.learning_rate)
    )
    return LearningDrafter(drafter, settings)


def spoken(name: str, console: Console) -> Callable[[Request], None]:
    """Says every tenth request."""

    def report(request: Request) -> None:
        if request.number % 10 == 9:
            console.print(f"{name} {request.number + 1}: tau {request.tau}")

    return report


def main() -> None:
    """Write the stream, run both drafters, plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("build/online"))
    parser.add_argument("--plot", type=Path, help="where the plot goes; in --out by default")
    parser.add_argument("--requests", type=int, default=60, help="in each of the four parts")
    parser.add_argument("--tokens", type=int, default=64, help="new ones for each request")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--learn-every", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--window", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)
    write_prompts(args.out / "prompts.jsonl", args.requests, seed=0)
    model = LlamaForCausalLM.from_pretrained(demo.target_path(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo.target_path())
    runs: dict[str, list[Request]] = {}
    for name in NAMES:
        log = args.out / f"{name}.jsonl"
        log.unlink(missing_ok=True)
        drafter = drafter_named(name, model, args)
        runs[name] = replay_stream(
            model, drafter, read_stream([args.out / "prompts.jsonl"], tokenizer), log=log, max_new_tokens=args.tokens,
            temperature=args.temperature, stop_at_end=False, report=spoken(name, console),
        )  # fmt: skip
        for row in thirds(runs[name]):
            console.print(f"{name}, {row['topic']}: tau {row['first']} in the first third, {row['last']} in the last")
        if isinstance(drafter, LearningDrafter):
            console.print(drafter.summary())
    settings = {key: str(value) for key, value in vars(args).items()}
    summary = {"settings": settings, "parts": {name: thirds(run) for name, run in runs.items()}}
    seconds = {name: [sum(r.seconds for r in run), sum(r.learning_seconds for r in run)] for name, run in runs.items()}
    summary |= {
        "seconds_decoding_and_learning": seconds,
        "environment": {"hardware": hardware(model.device), **versions()},
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
    where = args.plot or args.out / "online.svg"
    where.write_text(plot(runs, args.window) + "\n")
    console.print(f"plot: {where}")


if __name__ == "__main__":
    main()
