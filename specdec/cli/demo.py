"""`specdec demo`: plain and speculative generation side by side, on the pair that ships with specdec."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec import optimize as optimized
from specdec.cli.console import FAILURE, out
from specdec.cli.model import load_model, load_tokenizer, tokens_within_limit
from specdec.cli.options import DRAFTER_HELP, ON_OR_OFF, Json, MaxNewTokens, Prompt, PromptFile, within
from specdec.cli.recording import Recording, Side, choose_threads, compare
from specdec.cli.replay import Panel, print_once, replay
from specdec.cli.text import prompt_ids, read_prompt, text_pieces
from specdec.demo import prompts
from specdec.drafters.load import load_drafter

DEFAULT_EXAMPLE = "ordering"
DEFAULT_DRAFTER = "suffix"
BAR = 20
"""Characters of a full bar in the acceptance chart."""


def _known_example(name: str) -> str:
    if name not in prompts():
        raise typer.BadParameter(f"no prompt {name!r}; choose one of {', '.join(prompts())}")
    return name


Drafters = Annotated[
    list[str] | None,
    typer.Option("--drafter", "-d", help=DRAFTER_HELP + " May be given several times.", show_default=DEFAULT_DRAFTER),
]
Example = Annotated[
    str, typer.Option("--example", help=f"Which shipped prompt: {', '.join(prompts())}.", callback=_known_example)
]
Repeats = Annotated[int, typer.Option(callback=within(1), help="Timed runs of each side; the median one is shown.")]
Optimize = Annotated[
    bool,
    typer.Option(
        "--optimize/--no-optimize",
        help="Call specdec.optimize(model), for both sides alike.",
        rich_help_panel=ON_OR_OFF,
    ),
]
SlowMotion = Annotated[float, typer.Option(callback=within(0.1), help="Show the recordings this many times slower.")]
Threads = Annotated[
    int | None,
    typer.Option(
        callback=within(1), help="CPU threads; the faster of 1 and all, found by a trial.", show_default=False
    ),
]


def demo(
    drafter: Drafters = None,
    example: Example = DEFAULT_EXAMPLE,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    max_new_tokens: MaxNewTokens = 256,
    repeats: Repeats = 3,
    use_optimized: Optimize = True,
    slow_motion: SlowMotion = 1.0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare plain and speculative generation on the model that ships with specdec. Needs no network.

    Both are recorded first, without drawing anything, then replayed together.
    Exit status 1 when the texts differ.

    Example: specdec demo --drafter suffix --drafter demo-draft:depth=4,budget=12
    """
    text = prompts()[example] if prompt is None and prompt_file is None else read_prompt(prompt, prompt_file)
    model, tokenizer = load_model("demo", "float32", "cpu"), load_tokenizer("demo")
    if use_optimized:
        optimized(model)
    ids = prompt_ids(tokenizer, text, chat=False)
    if threads:
        torch.set_num_threads(threads)
    else:
        choose_threads(model, ids)
    max_new_tokens = tokens_within_limit(model, ids.shape[1], max_new_tokens)
    specs = _checked(drafter or [DEFAULT_DRAFTER], model)
    with nullcontext() if as_json else out.status("recording both sides ..."):
        plain, sides = compare(model, ids, specs, max_new_tokens, repeats)
    conditions = _conditions(model, ids.shape[1], use_optimized, len(plain.recordings))
    if as_json:
        print(json.dumps(_report(text, plain, sides, conditions)))
    else:
        fastest = max(sides, key=lambda side: side.typical.tokens_per_second)
        _show(text, _panels(plain, fastest, ids[0].tolist(), tokenizer), slow_motion)
        _print_results(plain, sides, fastest, conditions)
    if not all(side.identical_to(plain) for side in sides):
        raise typer.Exit(FAILURE)


def _checked(drafters: list[str], model: PreTrainedModel) -> list[str]:
    """Each drafter once; a wrong name is found before anything takes time."""
    specs = list(dict.fromkeys(drafters))
    for spec in specs:
        load_drafter(spec, model)
    return specs


def _panels(plain: Side, fastest: Side, prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> list[Panel]:
    return [
        Panel(title, side.typical, text_pieces(tokenizer, prompt, side.typical.tokens))
        for title, side in (("plain generate()", plain), (f"specdec, {fastest.drafter}", fastest))
    ]


def _show(text: str, panels: list[Panel], slow_motion: float) -> None:
    """Replay the recordings on a terminal; elsewhere print their ends."""
    show = replay if out.is_terminal else print_once
    show(out, text, panels, slow_motion)


def _conditions(model: PreTrainedModel, prompt_tokens: int, is_optimized: bool, repeats: int) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    return {
        "target": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "optimized": is_optimized,
        "decoding": "greedy",
        "prompt_tokens": prompt_tokens,
        "repeats": repeats,
    }


def _report(text: str, plain: Side, sides: list[Side], conditions: dict[str, Any]) -> dict[str, Any]:
    """Everything that the screen shows, for machines."""
    return {
        "prompt": text,
        "conditions": conditions,
        "plain": {"new_tokens": len(plain.typical.tokens), **_speed(plain)},
        "speculative": [
            {
                "drafter": side.drafter,
                "identical": side.identical_to(plain),
                "speedup": round(_speedup(side, plain), 3),
                **_speed(side),
                "statistics": side.typical.stats.summary() if side.typical.stats else None,
            }
            for side in sides
        ],
    }


def _speed(side: Side) -> dict[str, Any]:
    return {
        "tokens_per_second": round(side.typical.tokens_per_second, 2),
        "all_runs": [round(recording.tokens_per_second, 2) for recording in side.recordings],
    }


def _speedup(side: Side, plain: Side) -> float:
    return side.typical.tokens_per_second / plain.typical.tokens_per_second


def _print_results(plain: Side, sides: list[Side], fastest: Side, conditions: dict[str, Any]) -> None:
    out.print(_table(plain, sides))
    out.print(f"\nacceptance by depth, {fastest.drafter}")
    for line in acceptance_chart(fastest.typical):
        out.print(line)
    out.print(f"\n{_legend(conditions, len(plain.typical.tokens))}", style="dim")


def _table(plain: Side, sides: list[Side]) -> Table:
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "left", "right", "right", "right"):
        table.add_column(justify=justify, overflow="fold")
    table.add_row("", "identical", "tau", "tokens/s", "speed", style="dim")
    table.add_row("plain generate()", "", "", f"{plain.typical.tokens_per_second:.0f}", "1.00x")
    for side in sides:
        verdict = "[green]yes[/green]" if side.identical_to(plain) else "[bold red]NO[/bold red]"
        stats = side.typical.stats
        assert stats is not None
        speed = f"{side.typical.tokens_per_second:.0f}", f"[bold]{_speedup(side, plain):.2f}x[/bold]"
        table.add_row(side.drafter, verdict, f"{stats.tau:.2f}", *speed)
    return table


def _legend(conditions: dict[str, Any], new_tokens: int) -> str:
    """The conditions in words."""
    state = "optimized" if conditions["optimized"] else "not optimized"
    runs = f"median of {conditions['repeats']} runs in turns" if conditions["repeats"] > 1 else "one run of each"
    threads = "1 thread" if conditions["threads"] == 1 else f"{conditions['threads']} threads"
    return (
        f"{conditions['target']} of {conditions['parameters'] / 1e6:.1f} million parameters, {conditions['dtype']}, "
        f"{state} on both sides, {conditions['device']} with {threads}; greedy; "
        f"{conditions['prompt_tokens']} prompt and {new_tokens} new tokens; "
        f"{runs} after a warm-up. "
        "tau: tokens per target call. A small model repeats itself more than a large one, which helps drafters."
    )


def acceptance_chart(recording: Recording) -> list[str]:
    """One line per depth: how often a token drafted there was accepted, given that its parent was."""
    stats = recording.stats
    if stats is None or not stats.alpha:
        return ["  nothing was drafted"]
    tried = [sum(step.tried > depth for step in stats.steps) for depth in range(len(stats.alpha))]
    return [
        f"  {depth:2}  {'█' * round(BAR * rate):░<{BAR}}  {rate:.2f}  of {count}"
        for depth, (rate, count) in enumerate(zip(stats.alpha, tried, strict=True), 1)
    ]
