"""What training a drafter takes for an 8B and a 70B target: the counts behind scripts/scaling.py.

Sizes are counted on the real modules, made on the meta device; bytes on disk are
those of the feature cache; floating-point operations are counted by hand, and tests compare the count with torch's on
real training steps; devices are those of `specdec/costs/machines.toml`. What is assumed stands in ASSUMED, pairs of
the slower and the faster end; what was measured comes in as `rates`, which scripts/scaling_rates.py writes.

Dimensions: D hidden size, V vocabulary, S tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.costs.roofline import Roofline, machine_named
from specdec.heads.dflash import DFlashConfig, DFlashHead
from specdec.target import BEFORE_NORM, Target
from specdec.train.feature_cache import FeaturePlan
from specdec.train.features import stored_taps
from specdec.train.recipe import recipe_for
from specdec.train.run import make_training

LLAMA3: dict[str, Any] = {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072}
TARGETS: dict[str, dict[str, Any]] = {
    "8b": LLAMA3 | {  # Llama-3.1-8B
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70b": LLAMA3 | {  # Llama-3.1-70B
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
DRAFT_1B: dict[str, Any] = LLAMA3 | {  # Llama-3.2-1B
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
KINDS = ("medusa", "hydra", "eagle3", "dflash", "draft-model")
DRAFT_VOCABULARY = 32000
MACHINE_OF = {"8b": "8b@h100", "70b": "70b@8xh100"}
"""Devices that hold one copy of the target in training."""


@dataclass(frozen=True)
class Assumed:
    """What is neither counted nor measured; pairs are (slower end, faster end)."""

    machines: int = 2
    devices_per_machine: int = 8
    mfu: tuple[float, float] = (0.3, 0.5)
    disk: tuple[float, float] = (2e9, 25e9)
    network: tuple[float, float] = (25e9, 400e9)
    row_length: int = 2048
    rows_per_step: int = 64
    tokens_per_dialogue: int = 1000
    answer_tokens: int = 600
    prompts: int = 500_000
    tau: tuple[float, float] = (2.0, 3.0)
    depth: int = 4
    usable_memory: float = 0.9
    activation_bytes_per_state: int = 34

    @property
    def devices(self) -> int:
        """Of all machines."""
        return self.machines * self.devices_per_machine


ASSUMED = Assumed()
BUDGETS = {
    "short": (68_600, 2),
    "usual": (500_000, 3),
    "long": (532_000, 40),
}
"""Dialogues and epochs: Medusa-1's ShareGPT run, the advice of speculators' maintainers, EAGLE-3's recipe."""


def tokens_of(budget: str) -> int:
    """Tokens that training passes over."""
    dialogues, epochs = BUDGETS[budget]
    return dialogues * epochs * ASSUMED.tokens_per_dialogue


# --- Counting ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What training one kind on one target takes.

    Attributes:
        kind, target: words.
        parameters: that learn.
        stored: taps in a feature cache.
        flops: forward and backward of the head for each token, loss aside.
        laws: depths of the loss.
        law_size: tokens of a law.
        states: activations [D'] that are kept for each token, layers times passes times D'.
        mask_columns: columns of additive fp32 masks for each token of a row, all passes together.
    """

    kind: str
    target: str
    parameters: int
    stored: tuple[int, ...]
    flops: float
    laws: int
    law_size: int
    states: int
    mask_columns: int

    @property
    def hidden_size(self) -> int:
        """D of the target."""
        return TARGETS[self.target]["hidden_size"]

    @property
    def bytes_per_token(self) -> int:
        """Of the feature cache."""
        plan = FeaturePlan("", {}, self.stored, "bfloat16", self.hidden_size, ASSUMED.row_length, True, 0, 0, ())
        return plan.bytes_per_token


@cache
def target_of_shape(name: str) -> Target:
    """The adapter of a model of this shape without weights."""
    with torch.device("meta"):
        return Target(LlamaForCausalLM(LlamaConfig(**TARGETS[name])).to(dtype=torch.bfloat16))  # type: ignore[call-arg]


@cache
def work_of(kind: str, target_name: str, row_length: int = ASSUMED.row_length) -> Work:
    """Counted on the kind's own module with the settings of its default recipe."""
    target = target_of_shape(target_name)
    with torch.device("meta"):
        if kind == "draft-model":
            return _draft_model_work(target, target_name, row_length)
        if kind == "dflash":
            return _dflash_work(target, target_name, row_length)
        head = {"draft_vocab_size": DRAFT_VOCABULARY} if kind == "eagle3" else {}
        training = make_training(recipe_for(kind, head=head), target)
    module = cast(Any, training.module)
    stored = tuple(sorted(stored_taps(target, training.taps, needs_logits=training.needs_logits)))
    passes = getattr(training, "steps", 1)
    laws = passes if kind == "eagle3" else module.depth if kind == "hydra" else module.config.num_heads
    law_size = module.guessed if kind == "eagle3" else target.vocab_size
    states = passes if kind == "eagle3" else laws
    return Work(
        kind, target_name, learning(module), stored, head_flops(kind, module, target, row_length, passes), laws,
        law_size, states * target.hidden_size, row_length * passes * (passes + 1) // 2 if kind == "eagle3" else 0,
    )  # fmt: skip


def _draft_model_work(target: Target, name: str, row_length: int) -> Work:
    draft = LlamaForCausalLM(LlamaConfig(**DRAFT_1B))
    config = draft.config
    states = cast(int, config.num_hidden_layers) * cast(int, config.hidden_size)
    flops = draft_model_flops(draft, row_length)
    return Work("draft-model", name, learning(draft), (BEFORE_NORM,), flops, 1, target.vocab_size, states, 0)


def _dflash_work(target: Target, name: str, row_length: int) -> Work:
    config = DFlashConfig.of(target.config, mask_token_id=0)
    head = DFlashHead(config)
    stored = tuple(sorted(stored_taps(target, config.taps)))
    states = (config.num_layers + 1) * config.hidden_size
    flops = dflash_flops(head, target.vocab_size, row_length)
    return Work("dflash", name, learning(head), stored, flops, 1, target.vocab_size, states, 2 * row_length)


def learning(module: nn.Module) -> int:
    """Parameters that learn."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def matrices(module: nn.Module) -> int:
    """Elements of all linear layers below a module: multiplications for each token of one pass."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


# A product costs 2 operations for each element and token; its backward pass 2 for the weight's gradient and 2 for the
# input's. What reads the target's states saves the last (4); the target's frozen output matrix the middle one (4).
LEARNED, FIRST, FROZEN = 6, 4, 4


def head_flops(kind: str, module: Any, target: Target, row_length: int, passes: int = 1) -> float:
    """Operations of a training step's head, forward and backward, for each token of the rows; all are supervised."""
    output = target.vocab_size * target.hidden_size
    if kind == "medusa":
        first = sum(matrices(blocks[0]) for blocks in module.blocks)
        own = matrices(module.lm_heads)
        logits = LEARNED * own if own else FROZEN * output * module.config.num_heads
        return FIRST * first + LEARNED * (matrices(module.blocks) - first) + logits
    if kind == "hydra":
        first = sum(matrices(depth.first) for depth in module.heads)
        return FIRST * first + LEARNED * (matrices(module.heads) - first)
    if kind == "eagle3":
        layer = module.config.layer
        attention = 12 * layer.num_attention_heads * layer.head_dim * row_length * passes * (passes + 1) / 2
        return FIRST * matrices(module.fc) + LEARNED * passes * matrices_beside_fc(module) + attention
    raise ValueError(f"no count for {kind}")


def matrices_beside_fc(head: Any) -> int:
    """Of an EAGLE-3 head: what every step of training-time test runs."""
    return matrices(head) - matrices(head.fc)


def draft_model_flops(draft: Any, row_length: int) -> float:
    """Of a draft model: all matrices, and attention over half a row on average."""
    config = draft.config
    size = config.num_attention_heads * config.head_dim
    return LEARNED * matrices(draft) + 12 * size * row_length / 2 * config.num_hidden_layers


def dflash_flops(head: DFlashHead, vocabulary: int, row_length: int) -> float:
    """Of a block drafter with as many block tokens as text tokens: an anchor in every `block_size` tokens."""
    config, layer = head.config, head.config.layer
    injected = sum(matrices(cast(Any, part).self_attn.k_proj) * 2 for part in head.layers)
    attention = 12 * layer.num_attention_heads * layer.head_dim * 2 * row_length * config.num_layers
    logits = FROZEN * vocabulary * config.hidden_size * config.max_depth / config.block_size
    return FIRST * matrices(head.fc) + LEARNED * (matrices(head.layers) + injected) + attention + logits


# --- Speed -------------------------------------------------------------------------------------------------


def machine(target: str, mfu: float, name: str | None = None) -> Roofline:
    """Devices that share one target, reaching this share of their peak."""
    described = machine_named(name or MACHINE_OF[target])
    return replace(described, serving=replace(described.serving, flops_share=mfu))


def target_seconds(target: str, mfu: float, name: str | None = None) -> float:
    """Device-seconds of the target's forward for each token, four rows at once."""
    model, rows = machine(target, mfu, name), 4
    seconds = model.verify(ASSUMED.row_length, rows, ASSUMED.row_length / 2)
    return seconds * model.device.count / (rows * ASSUMED.row_length)


def head_seconds(work: Work, mfu: float, rates: dict[str, Any]) -> float:
    """Device-seconds of the head's forward and backward for each token."""
    ratio = rates["training"].get(work.kind, rates["training"]["eagle3"])["fraction"] / rates["forward"]["fraction"]
    return work.flops / (machine(work.target, mfu).device.flops * mfu * ratio)


def online_seconds(work: Work, mfu: float, rates: dict[str, Any]) -> float:
    """Device-seconds of training for each token, the target in process."""
    return target_seconds(work.target, mfu) + head_seconds(work, mfu, rates)


def cached_head_seconds(work: Work, mfu: float, rates: dict[str, Any]) -> float:
    """The same with features from disk: the target's output matrix makes the laws anew."""
    logits = 2 * work.hidden_size * TARGETS[work.target]["vocab_size"]
    return head_seconds(work, mfu, rates) + logits / (machine(work.target, mfu).device.flops * mfu)


def hours(tokens: float, device_seconds: float, devices: int = ASSUMED.devices) -> float:
    """Of so many tokens on all devices."""
    return tokens * device_seconds / devices / 3600
