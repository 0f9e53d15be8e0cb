"""Which causal language models of the installed transformers decode trees, and is the text always theirs?

Builds every type of the causal-LM auto mapping with a shrunken config and random weights, lets the probe decide
its form, decodes with trees (token recycling and a perturbed copy as draft model), alone and in a left-padded
batch, and compares every token with plain `generate` in float32. Writes a table; exits with 1 if any type
that the probe let through gives other text, or if fewer types than `--least` decode trees.

    python scripts/sweep_families.py [--only NAME ...] [--out docs/families.md]

Every type runs in a process of its own with limits on time and memory, so that one crash is one line of the table.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import resource
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("SPECDEC_CACHE", tempfile.mkdtemp(prefix="specdec-sweep-"))

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from shrunken_models import DEVIATION, VOCAB, build
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import specdec
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import SpecdecError, UnsupportedModel
from specdec.probe import probe
from specdec.target import Target, refuse_unsupported

NEW_TOKENS = 40
CLEAR_GAP = 1e-4
CPU_LIMIT = 90
WALL_LIMIT = 600
MEMORY_LIMIT = 8 << 30


@dataclass
class Row:
    """One line of the table."""

    model_type: str
    form: str
    why: str
    identical: bool | None = None
    attention: str = ""
    accepted: str = ""


def examined(model_type: str) -> Row:
    """Build, probe, decode and compare one type with every attention implementation it has."""
    try:
        model = build(model_type, None)
    except Exception as error:
        return _unbuilt_or_refused(model_type, error)
    try:
        form, why = _form(model)
        own_windows_form = form if form == "refused" else _form(build(model_type, None, windows=False))[0]
    except Exception as error:
        return Row(model_type, "not built", _one_line(error))
    if form == "refused":
        return Row(model_type, form, why)
    default_attention = str(model.config.get_text_config(decoder=True)._attn_implementation)
    row = Row(model_type, form, why, True, default_attention)
    if own_windows_form != form:
        row.identical = False
        row.why = f"the probe says {own_windows_form} with windows longer than the text and {form} with short ones"
        return row
    accepted = drafted = 0
    for attention in dict.fromkeys([default_attention, "eager"]):
        if attention != default_attention:
            model = build(model_type, attention)
            row.attention += f", {attention}"
        try:
            difference, stats = _compared(model)
        except SpecdecError as error:
            if attention == default_attention:
                return Row(model_type, "refused", _one_line(error))
            row.why += f"; refused with {attention}: {_one_line(error)}"
            continue
        if difference is not None:
            row.identical, row.why = False, f"{attention}: {difference}"
            return row
        accepted, drafted = accepted + stats[0], drafted + stats[1]
    row.accepted = f"{accepted}/{drafted}"
    return row


def _unbuilt_or_refused(model_type: str, error: Exception) -> Row:
    """What does not run small may still be refused for what it is, on empty weights of the default size."""
    try:
        with torch.device("meta"):
            refuse_unsupported(AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type]()))
    except UnsupportedModel as refusal:
        return Row(model_type, "refused", _one_line(refusal))
    except Exception:
        pass
    return Row(model_type, "not built", _one_line(error))


def _form(model: PreTrainedModel) -> tuple[str, str]:
    try:
        answer = probe(Target(model))
    except UnsupportedModel as error:
        return "refused", _one_line(error)
    return ("refused" if answer.form == "refuse" else answer.form), answer.reason


def _compared(model: PreTrainedModel) -> tuple[str | None, tuple[int, int]]:
    """What differs from plain generate (None for nothing), and (accepted, drafted) of all runs."""
    draft = _perturbed(model)
    form = specdec.target_of(model).form
    accepted = drafted = 0
    for lengths in ([14], [14, 9, 12]):
        ids, mask, expected = _reference(model, lengths)
        for name in ("recycling", "draft model"):
            drafter: Any = "recycling:budget=10,depth=4"
            if name == "draft model":
                draft_target = Target(draft)
                draft_target.form = form
                drafter = DraftModelDrafter(draft_target, depth=3, budget=6 if form == "tree" else None)
            output: Any = specdec.generate(
                model, ids, attention_mask=mask, drafter=drafter, max_new_tokens=NEW_TOKENS, do_sample=False,
                return_dict_in_generate=True,
            )  # fmt: skip
            accepted, drafted = accepted + output.stats.accepted, drafted + output.stats.drafted
            if output.sequences.shape != expected.shape or not bool((output.sequences == expected).all()):
                return f"{name}, batch {len(lengths)}: other text than plain generate", (accepted, drafted)
    return None, (accepted, drafted)


@torch.no_grad()
def _perturbed(model: PreTrainedModel) -> PreTrainedModel:
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in draft.parameters():
        if parameter.ndim >= 2:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05 * DEVIATION)
    return draft


def _reference(model: Any, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompt ids, mask and greedy text, of the first prompts on which rounding cannot decide a token."""
    best: tuple[float, Any] = (-1.0, None)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        width = max(lengths)
        ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
        padding = torch.arange(width) < width - torch.tensor(lengths)[:, None]
        ids[padding] = 0
        mask = (~padding).long()
        output: Any = model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        top = torch.stack(output.logits).topk(2).values
        gap = float((top[..., 0] - top[..., 1]).min())
        if gap > best[0]:
            best = gap, (ids, mask, output.sequences)
        if gap > CLEAR_GAP:
            break
    return best[1]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = "" if isinstance(error, specdec.SpecdecError) else f"{type(error).__name__}: "
    return name + (text if len(text) <= 160 else text[:157] + "...")


# --- One process per type -----------------------------------------------------------------------------------


def _child(model_type: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT))
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        row = examined(model_type)
    except Exception as error:
        row = Row(model_type, "not built", _one_line(error))
    sender.send(row)


def in_own_process(model_type: str) -> Row:
    """Examine one type where a crash or an endless loop harms nobody."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(model_type, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(WALL_LIMIT):
            return receiver.recv()
        return Row(model_type, "not built", f"no answer within {WALL_LIMIT} s")
    except EOFError:
        process.join()
        return Row(model_type, "not built", f"the process died with exit status {process.exitcode}")
    finally:
        process.kill()
        process.join()


# --- The table ------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """The report as Markdown."""
    count = Counter(row.form for row in rows)
    wrong = [row.model_type for row in rows if row.identical is False]
    exact = sum(row.form == "tree" and row.identical is True for row in rows)
    lines = [
        "# Model families",
        "",
        "Every causal-LM type of transformers, with a shrunken random model: the form that the probe chose, and",
        f"whether greedy text in float32 equals plain `generate` token for token ({NEW_TOKENS} new tokens, recycling",
        "and draft-model drafters, batch 1 and a left-padded batch of 3, every listed attention implementation).",
        "",
        "Written by `python scripts/sweep_families.py --out docs/families.md` with "
        f"transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {sys.version.split()[0]}, specdec {specdec.__version__}.",
        "",
        f"{len(rows)} types: {exact} decode trees exactly, {count['chain']} decode chains, {count['refused']} are "
        f"refused, {count['not built']} could not be built small or do not run by themselves. "
        f"Silently wrong: {', '.join(wrong) or 'none'}.",
        "",
        "`accepted` counts drafted tokens that were accepted, out of all drafted.",
        "",
        "| type | form | identical | attention | accepted | why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    words = {True: "yes", False: "**no**", None: "-"}
    lines += [
        f"| {row.model_type} | {row.form} | {words[row.identical]} | {row.attention or '-'} | {row.accepted or '-'} "
        f"| {row.why.replace('|', '/')} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="examine only these types")
    parser.add_argument("--out", type=Path, help="write the table here; printed when left out")
    parser.add_argument("--least", type=int, default=60, help="fewest types that must decode trees (default 60)")
    arguments = parser.parse_args()
    known = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    unknown = sorted(set(arguments.only or []) - set(known))
    if unknown:
        parser.error(f"not a causal-LM type of transformers {transformers.__version__}: {', '.join(unknown)}")
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    rows: list[Row] = []
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("families", total=len(arguments.only or known))
        for model_type in arguments.only or known:
            progress.update(task, description=model_type)
            rows.append(in_own_process(model_type))
            progress.advance(task)
    text = table(rows)
    if arguments.out is None:
        print(text)
    else:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)
    wrong = [row for row in rows if row.identical is False]
    trees = sum(row.form == "tree" and row.identical is True for row in rows)
    for row in wrong:
        console.print(f"[red]{row.model_type}[/red] ({row.form}): {row.why}")
    enough = trees >= arguments.least or arguments.only
    console.print(f"{trees} types decode trees exactly, {len(wrong)} silently wrong")
    return 1 if wrong or not enough else 0


if __name__ == "__main__":
    sys.exit(main())
