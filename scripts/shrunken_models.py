"""Small random models of any causal type of the installed transformers, by shrinking the type's own default config."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB, WIDTH, HEADS, HEAD, LAYERS, WINDOW = 128, 32, 4, 8, 4, 8
DEVIATION = 0.15
"""Of the random weights."""

MOST_PARAMETERS = 20_000_000

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
