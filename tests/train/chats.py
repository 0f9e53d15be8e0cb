"""Chat templates in the styles of well-known families, written for these tests, and a byte-level tokenizer."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor -%}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

MARKED = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' -%}
{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif -%}
{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """{{- '<|begin|>' }}{% for m in messages %}{{ '<|header|>' + m.role + '<|/header|>\\n\\n' -}}
{{ m.content | trim }}{{ '<|eot|>' }}{% endfor -%}
{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}"""

GEMMA = """{%- set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' -%}
{% set ns.system = m.content + '\\n\\n' %}{% elif m.role == 'user' -%}
{{ '<start_of_turn>user\\n' + ns.system + (m.content | trim) + '<end_of_turn>\\n' }}{% set ns.system = '' %}{% else -%}
{{ '<start_of_turn>model\\n' + (m.content | trim) + '<end_of_turn>\\n' }}{% endif %}{% endfor -%}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

MISTRAL = """{{- '<s>' }}{% for m in messages -%}
{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else -%}
{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"""

THINKING = """{%- set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' -%}
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' -}}
{% if m.role == 'assistant' and m.reasoning_content is defined and loop.index0 > ns.last -%}
{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}{{ m.content -}}
{% for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor -%}
{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' -}}
{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

DIVERGING = """{{- messages | length }}{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor -%}
{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""

STYLES = {"chatml": CHATML, "marked": MARKED, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL}

SPECIALS = [
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|header|>", "<|/header|>", "<|eot|>",
    "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
TEXT = "What is two and two? It is four. Answer in one word, please. def add(self, left, right): return left + right\n"


@cache
def _backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # type: ignore[assignment]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def tokenizer(template: str | None = None, *, begins: bool = False, **overrides: Any) -> PreTrainedTokenizerFast:
    """340 tokens; </s> ends texts, <s> begins them when asked for."""
    backend = copy.deepcopy(_backend())
    if begins:
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", special_tokens=[("<s>", SPECIALS.index("<s>"))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens=SPECIALS[3:], padding_side="left", **overrides,
    )  # fmt: skip
    made.chat_template = template
    return made


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    """One message."""
    return {"role": role, "content": content, **more}
