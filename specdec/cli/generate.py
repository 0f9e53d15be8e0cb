"""`specdec generate`: continue a prompt, streaming text to stdout."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.api import SpeculativeOutput
from specdec.api import generate as generate_ids
from specdec.cli.console import note
from specdec.cli.model import dtype_of, load_model, load_tokenizer, tokens_within_limit
from specdec.cli.options import (
    ON_OR_OFF,
    Device,
    DrafterOrNone,
    Dtype,
    DtypeOption,
    Json,
    MaxNewTokens,
    Prompt,
    PromptFile,
    TargetName,
    Threads,
    within,
)
from specdec.cli.text import TextStream, prompt_ids, read_prompt, text_pieces
from specdec.drafter import Drafter
from specdec.drafters.load import load_drafter
from specdec.stats import DecodeStats

Temperature = Annotated[
    float,
    typer.Option(callback=within(0), help="0 takes the most probable token; above 0 draws from the distribution."),
]
TopP = Annotated[
    float | None, typer.Option(callback=within(0, 1), help="Draw from the smallest set of tokens with this mass.")
]
TopK = Annotated[int | None, typer.Option(callback=within(0), help="Draw from the k most probable tokens; 0 for all.")]
MinP = Annotated[
    float | None, typer.Option(callback=within(0, 1), help="Drop tokens below this share of the most probable one.")
]
Seed = Annotated[int | None, typer.Option(help="Makes drawing repeatable.", show_default=False)]
Continuations = Annotated[int, typer.Option(callback=within(1), help="Continuations of the same prompt.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat", help="Use the chat template; by default when there is one.", rich_help_panel=ON_OR_OFF,
        show_default=False,
    ),
]  # fmt: skip
Stats = Annotated[bool, typer.Option("--stats", help="Print tau, speed and acceptance on stderr.")]


def generate(
    target: TargetName,
    drafter: DrafterOrNone = "suffix",
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    num_return_sequences: Continuations = 1,
    chat: Chat = None,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    threads: Threads = None,
    stats: Stats = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt. The text streams to stdout; it is what plain generate() would write.

    Example: specdec generate demo --drafter suffix --prompt "class Stack:" --stats
    """
    sampling = _sampling(temperature, top_p, top_k, min_p, num_return_sequences)
    text = read_prompt(prompt, prompt_file)
    if threads:
        torch.set_num_threads(threads)
    model, tokenizer = load_model(target, dtype_of(target, dtype), device), load_tokenizer(target)
    loaded = None if drafter == "none" else load_drafter(drafter, model)
    ids = prompt_ids(tokenizer, text, chat).to(model.device)
    if seed is not None:
        torch.manual_seed(seed)
    stream = TextStream(tokenizer, _write) if not as_json and num_return_sequences == 1 else None
    output = _continued(model, ids, loaded, stream, max_new_tokens, sampling)
    assert output.stats is not None
    sequences = [_described(row, ids[0].tolist(), model, tokenizer) for row in output.sequences.tolist()]
    if as_json:
        print(json.dumps(_report(target, drafter, ids.shape[1], sequences, output.stats)))
    elif stream is not None:
        print(flush=True)
    else:
        _print_numbered(sequences)
    if stats:
        _print_stats(output.stats)


def _sampling(
    temperature: float, top_p: float | None, top_k: int | None, min_p: float | None, count: int
) -> dict[str, Any]:
    """Arguments of `generate`; what is not given is left to the model's generation config."""
    given = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
    given = {name: value for name, value in given.items() if value is not None}
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature, "num_return_sequences": count, **given}
    if given:
        option = "--" + next(iter(given)).replace("_", "-")
        raise typer.BadParameter("has no effect at temperature 0; add --temperature 1", param_hint=option)
    if count > 1:
        raise typer.BadParameter(
            "all would be the same at temperature 0; add --temperature 1", param_hint="--num-return-sequences"
        )
    return {"do_sample": False}


def _continued(
    model: PreTrainedModel,
    ids: torch.Tensor,
    drafter: Drafter | None,
    stream: TextStream | None,
    max_new_tokens: int,
    sampling: dict[str, Any],
) -> SpeculativeOutput:
    """Call `specdec.generate` with as many new tokens as the model has room for."""
    output = generate_ids(
        model, ids, attention_mask=torch.ones_like(ids), drafter=drafter, streamer=stream,
        max_new_tokens=tokens_within_limit(model, ids.shape[1], max_new_tokens), pad_token_id=_pad_token(model),
        return_dict_in_generate=True, **sampling,
    )  # fmt: skip
    assert isinstance(output, SpeculativeOutput)
    return output


def _pad_token(model: PreTrainedModel) -> int | None:
    """The model's own, else its end of text, which plain `generate` would choose with a warning."""
    config = model.generation_config
    if config.pad_token_id is not None:
        return config.pad_token_id
    ends = config.eos_token_id
    return ends[0] if isinstance(ends, list) else ends


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _described(
    row: list[int], prompt: list[int], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Text and ids of one continuation, without the padding after its end of text."""
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    new = row[len(prompt) :]
    length = next((place + 1 for place, token in enumerate(new) if token in ends), len(new))
    return {"text": "".join(text_pieces(tokenizer, prompt, new[:length])), "token_ids": new[:length]}


def _report(
    target: str, drafter: str, prompt_tokens: int, sequences: list[dict[str, Any]], stats: DecodeStats
) -> dict[str, Any]:
    content = sequences[0] if len(sequences) == 1 else {"sequences": sequences}
    header = {"target": target, "drafter": drafter, "prompt_tokens": prompt_tokens}
    return {**header, **content, "statistics": stats.summary()}


def _print_numbered(sequences: list[dict[str, Any]]) -> None:
    for number, sequence in enumerate(sequences, 1):
        print(f"--- {number}\n{sequence['text']}")


def _print_stats(stats: DecodeStats) -> None:
    acceptance = ", ".join(f"{rate:.2f}" for rate in stats.alpha) or "nothing was drafted"
    note(f"{stats.new_tokens} tokens, {stats.target_calls} target calls, tau {stats.tau:.2f}")
    note(f"{stats.tokens_per_second:.1f} tokens/s, {stats.total_time:.2f} s, prefill {stats.prefill_time:.2f} s of it")
    note(f"acceptance by depth: {acceptance}")
