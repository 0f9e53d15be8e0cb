"""Tiny random models, one of each family, drawn so that a wrong mask or position changes the text.

Freshly initialised weights of 0.02 give nearly constant logits; matrices are drawn again with a deviation of
0.15. Windows and chunks are shorter than any text of the tests.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 128
LAYERS = 3
WINDOW = 8
DEVIATION = 0.15

_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def sizes(**overrides: Any) -> dict[str, Any]:
    """Sizes under the names that most configs share; no special tokens, so that every token asked for comes."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **overrides,
    }


def _experts(**overrides: Any) -> dict[str, Any]:
    return sizes(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, **overrides)


FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": tf.LlamaConfig(**sizes()),
    "llama-without-gqa": tf.LlamaConfig(**sizes(num_key_value_heads=4, tie_word_embeddings=True)),
    "qwen2": tf.Qwen2Config(**sizes()),
    "qwen3": tf.Qwen3Config(**sizes()),
    "qwen3-moe": tf.Qwen3MoeConfig(**_experts()),
    "mistral-sliding": tf.MistralConfig(**sizes(sliding_window=WINDOW)),
    "gemma2-sliding": tf.Gemma2Config(
        **sizes(sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=8, tie_word_embeddings=False)
    ),
    "gemma3-sliding": tf.Gemma3TextConfig(
        **sizes(sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=8, tie_word_embeddings=False)
    ),
    "phi3": tf.Phi3Config(**sizes()),
    "gpt2": tf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None
    ),
    "gpt-neox": tf.GPTNeoXConfig(**sizes()),
    "opt": tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=1,
    ),
    "olmo2": tf.Olmo2Config(**sizes()),
    "cohere2-sliding": tf.Cohere2Config(**sizes(sliding_window=WINDOW, layer_types=_MIXED, tie_word_embeddings=False)),
    "gpt-oss": tf.GptOssConfig(
        **sizes(sliding_window=WINDOW, layer_types=_MIXED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "deepseek-v3": tf.DeepseekV3Config(
        **sizes(
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            head_dim=4,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
        )
    ),
    "llama4-chunked": tf.Llama4TextConfig(
        **sizes(
            intermediate_size_mlp=48,
            num_local_experts=2,
            num_experts_per_tok=1,
            attention_chunk_size=WINDOW,
            layer_types=["chunked_attention", "full_attention", "chunked_attention"],
            no_rope_layers=[1, 0, 1],
        )
    ),
}

EAGER_ONLY = {"gemma2-sliding", "gpt-oss"}
"""Their soft caps and sinks are not in sdpa: transformers refuses it or falls back to eager."""

PICTURES_AND_TEXT = tf.Gemma3Config(
    text_config=FAMILIES["gemma3-sliding"].to_dict(),
    vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2},
)
"""A model with a vision tower beside its decoder, of as many layers."""


def tiny_model(family: str, attention: str = "eager", *, layers: int = LAYERS, seed: int = 0, **overrides: int) -> Any:
    """A random model of the family in float32, the same weights for every attention implementation.

    `layers` may be 2, which still holds one of each kind. `overrides` are other sizes.
    """
    config = copy.deepcopy(FAMILIES[family])
    config.num_hidden_layers = layers
    for name, value in overrides.items():
        setattr(config, name, value)
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[:layers])
    return model_of(config, attention, seed=seed)


def model_of(config: PreTrainedConfig, attention: str = "eager", *, seed: int = 0) -> Any:
    """A model of this config with matrices drawn from N(0, 0.15)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()
    redraw(model, seed)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.no_grad()
def redraw(model: PreTrainedModel, seed: int) -> None:
    """Draw every matrix anew; norms and biases stay."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0.0, DEVIATION, generator=generator)


@torch.no_grad()
def perturbed(model: Any, share: float = 0.03, seed: int = 1) -> Any:
    """A copy whose weights are off by a share of their deviation: a draft model that is often right."""
    draft = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        if parameter.ndim >= 2:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=share * DEVIATION)
    return draft


@dataclass(frozen=True)
class Prompts:
    """Prompts of one batch, left-padded."""

    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def inputs(self) -> dict[str, Any]:
        """As keyword arguments of generate."""
        return {"input_ids": self.ids, "attention_mask": self.mask}

    def to(self, device: torch.device) -> Prompts:
        """The same on a device."""
        return Prompts(self.ids.to(device), self.mask.to(device))


def prompts(lengths: list[int], seed: int = 0) -> Prompts:
    """Random prompts of these lengths, ids from 3 on, padded with 0 on the left."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length] = 0
        mask[row, : width - length] = 0
    return Prompts(ids, mask)


@dataclass(frozen=True)
class Reference:
    """What plain `generate` says to a batch of prompts."""

    prompts: Prompts
    sequences: torch.Tensor


CLEAR_GAP = 1e-4
"""Rounding between two ways to batch the same sums stays near 1e-5 here."""


def reference(model: Any, lengths: list[int], new_tokens: int) -> Reference:
    """Greedy text of plain `generate`, on the first prompts whose every choice is clear.

    Where the two best logits lie closer than rounding, either of them is a right answer. Such prompts are passed
    over, so that any difference that a test sees is a mistake.
    """
    for seed in range(20):
        asked = prompts(lengths, seed).to(model.device)
        output: Any = model.generate(
            **asked.inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.stack(output.logits).topk(2).values
        if (best[..., 0] - best[..., 1]).min() > CLEAR_GAP:
            return Reference(asked, output.sequences)
    raise AssertionError("no prompts with clear choices")
