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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("SPECDEC_CACHE", tempfile.mkdtemp(prefix="specdec-sweep-"))

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import specdec
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import SpecdecError, UnsupportedModel
from specdec.probe import probe
from specdec.target import Target, refuse_unsupported

VOCAB, WIDTH, HEADS, HEAD, LAYERS, WINDOW = 128, 32, 4, 8, 4, 8
DEVIATION = 0.15
NEW_TOKENS = 40
CLEAR_GAP = 1e-4
CPU_LIMIT = 90
WALL_LIMIT = 600
MEMORY_LIMIT = 8 << 30
MOST_PARAMETERS = 20_000_000

# --- Shrinking a config ----------------------------------------------------------------------------------

LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_blocks",
)
SIZES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (VOCAB, ("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "ngram_vocab_size_base")),
    (WIDTH, (
        "hidden_size", "d_model", "n_embd", "dim_model_base", "embedding_dim", "embedding_size", "word_embed_proj_dim",
        "emb_dim", "input_embedding_size", "output_embedding_size", "attention_hidden_size", "lru_width",
        "num_pad_tokens", "hidden_size_per_layer_input", "ple_embed_dim",
    )),
    (48, (
        "intermediate_size", "ffn_dim", "ffn_hidden_size", "intermediate_size_mlp", "moe_intermediate_size",
        "shared_expert_intermediate_size", "shared_experts_intermediate_size", "shared_intermediate_size",
        "dense_intermediate_size", "dim_ff", "dff", "n_inner", "feed_forward_size", "expert_ffn_hidden_size",
        "moe_shared_expert_intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "router_hidden_size",
    )),
    (HEADS, (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
        "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
        "swa_num_attention_heads", "index_n_heads", "linear_num_heads", "linear_num_key_heads",
        "linear_num_value_heads", "n_mamba_heads",
    )),
    (LAYERS, LAYER_COUNTS),
    (HEAD, (
        "head_dim", "global_head_dim", "swa_head_dim", "d_head", "attention_head_dim", "kv_channels", "dim_head",
        "qk_nope_head_dim", "v_head_dim", "index_head_dim", "linear_head_dim", "linear_key_head_dim",
        "linear_value_head_dim", "mamba_d_head", "mamba_headdim", "mamba_head_dim", "laurel_rank", "d_rel",
        "gated_norm_rank", "o_lora_rank", "hc_lowrank", "attention_head_size", "query_pre_attn_scalar",
    )),
    (4, (
        "qk_rope_head_dim", "rotary_dim", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
        "hc_mult", "hc_count", "o_groups", "split_ngram_parts",
    )),
    (2 * HEADS, ("mamba_n_heads", "mamba_num_heads")),
    (16, ("kv_lora_rank", "q_lora_rank", "mamba_d_state", "state_size", "ssm_state_size", "time_step_rank")),
    (12, ("qk_head_dim",)),
    (2, ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "n_group", "num_expert_group",
        "n_groups")),
    (1, (
        "topk_group", "first_k_dense_replace", "num_dense_layers", "moe_num_shared_experts", "n_shared_experts",
        "num_shared_experts", "zero_expert_num", "num_nextn_predict_layers", "num_mem_blocks", "prompt_length",
    )),
    (512, (
        "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_target_positions",
        "model_max_length", "max_sequence_length",
    )),
)  # fmt: skip
SIZE_OF = {name: size for size, names in SIZES for name in names}
KEY_VALUE_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "swa_num_key_value_heads",
    "num_global_key_value_heads",
    "n_head_kv",
)
WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "window_size",
    "sliding_window_size",
    "local_attention",
    "attention_window_size",
    "keep_window_size",
    "index_topk",
)
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_CONV_AND_ATTENTION = ["conv", "full_attention"] * (LAYERS // 2)
SPECIAL: dict[str, dict[str, Any]] = {
    "blenderbot": {"encoder_layers": LAYERS},
    "bloom": {"tie_word_embeddings": False},
    "cohere_compass_text": {"rope_parameters": {kind: _ROPE for kind in ("sliding_attention", "full_attention")}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * LAYERS},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": _CONV_AND_ATTENTION},
    "llama4_text": {"no_rope_layers": [1, 0, 1, 0]},
    "ministral": {"head_dim": HEAD},
    "modernbert-decoder": {"global_attn_every_n_layers": 2},
    "mpt": {"use_cache": True},
    "nemotron": {"head_dim": HEAD, "num_key_value_heads": 2},
}  # fmt: skip
"""What the general rules below do not give: fields that hang together in ways of their own."""


def shrunken(config: PreTrainedConfig, *, windows: bool, kinds: bool) -> dict[str, Any]:
    """Constructor arguments of a small config of the same class, nested configs included.

    Args:
        config: the defaults of a type.
        windows: shrink windows and chunks too, so that they are shorter than the text.
        kinds: choose layer kinds in turn, so that all of them occur; otherwise the config's own pattern.
    """
    arguments: dict[str, Any] = {}
    depth = next((count for name in LAYER_COUNTS if (count := _number(config, name)) is not None), None)
    heads_differ = _number(config, "num_key_value_heads") not in (None, _number(config, "num_attention_heads"))
    for name in config.to_dict():
        value = _value(config, name)
        if isinstance(value, PreTrainedConfig):
            arguments[name] = shrunken(value, windows=windows, kinds=kinds)
        elif isinstance(value, bool) or name == "layer_types":
            continue
        elif name in KEY_VALUE_HEADS and isinstance(value, int):
            arguments[name] = 1 if value == 1 else (2 if heads_differ else HEADS)
        elif name in WINDOWS and isinstance(value, int):
            if windows:
                arguments[name] = WINDOW
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            arguments[name] = min(value, 1 if name == "pad_token_id" else 2)
        elif name in SIZE_OF and isinstance(value, int):
            arguments[name] = min(value, SIZE_OF[name])
        elif isinstance(value, list) and depth and len(value) == depth:
            arguments[name] = value[:LAYERS]
    types = _value(config, "layer_types")
    if kinds and types and "layer_types" in config.to_dict():
        distinct = list(dict.fromkeys(types))
        arguments["layer_types"] = [distinct[layer % len(distinct)] for layer in range(LAYERS)]
    if getattr(config, "kv_lora_rank", None) is not None and "head_dim" in arguments:
        arguments["head_dim"] = arguments.get("qk_rope_head_dim", HEAD)
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        arguments["is_decoder"] = True
    arguments.update(SPECIAL.get(config.model_type, {}))
    return arguments


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field, or None when it is missing or differs from layer to layer."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def _number(config: PreTrainedConfig, name: str) -> int | None:
    value = _value(config, name)
    return value if isinstance(value, int) else None


def configs(model_type: str, *, windows: bool) -> Iterator[PreTrainedConfig]:
    """Small configs to try in turn, the most telling one first."""
    make = CONFIG_MAPPING[model_type]
    default = make()
    for kinds in (True, False):
        yield make(**shrunken(default, windows=windows, kinds=kinds))


def build(model_type: str, attention: str | None, *, windows: bool = True) -> PreTrainedModel:
    """A small random model of the type that can run.

    Raises:
        Exception: whatever the last attempt raised.
    """
    failure: Exception = ValueError("no config")
    made = configs(model_type, windows=windows)
    while True:
        try:
            config = next(made)
        except StopIteration:
            raise failure from None
        except Exception as error:
            raise error if str(failure) == "no config" else failure from None
        try:
            return _built(config, attention)
        except Exception as error:
            failure = error


@torch.no_grad()
def _built(config: PreTrainedConfig, attention: str | None) -> PreTrainedModel:
    options = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config), **options).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"still {size / 1e6:.0f} M parameters after shrinking")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **options).eval().float()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0.0, DEVIATION, generator=generator)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = None, 0
    generation.forced_eos_token_id = generation.forced_bos_token_id = None
    generation.no_repeat_ngram_size = generation.encoder_no_repeat_ngram_size = None
    model(input_ids=torch.arange(3, 9)[None])
    return model


# --- Comparing with plain generate ---------------------------------------------------------------------------


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
