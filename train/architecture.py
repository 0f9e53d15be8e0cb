"""How deep and wide a fresh draft model should be: the most parameters that a share of the target's step pays for.

FastDraft (arXiv 2411.11055) keeps the target's vocabulary and block design and scales depth and width by measured
latency: layers cost time one after the other, width costs little until memory binds. So candidates are measured here,
on this machine, and chosen from a table; the choice is a function of that table alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from specdec.context import Context
from specdec.environment import hardware
from specdec.errors import BadRecipe, UnsupportedModel
from specdec.probe import cache_folder, fingerprint, target_of
from specdec.target import Target
from specdec.train.prune import FAMILIES, head_size
from specdec.vocabulary import vocab_size

DEPTHS = (1, 2, 3, 4, 6, 8)
WIDTHS = (0.125, 0.25, 0.375, 0.5, 0.75)
"""Hidden sizes, as shares of the target's."""

CONTEXT = 64
WARM_UP, ROUNDS = 3, 15


@dataclass(frozen=True, order=True)
class Architecture:
    """Sizes of a draft model of the target's family.

    Attributes:
        num_layers, hidden_size, num_heads, num_key_value_heads, intermediate_size: as in configs.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int

    @property
    def name(self) -> str:
        """For tables: "2x128"."""
        return f"{self.num_layers}x{self.hidden_size}"


@dataclass(frozen=True)
class Costs:
    """Seconds of a one-token step.

    Attributes:
        target: of the target.
        candidates: of each architecture.
    """

    target: float
    candidates: Mapping[Architecture, float]


def candidates(
    config: Any, depths: Sequence[int] = DEPTHS, widths: Sequence[float] = WIDTHS
) -> tuple[Architecture, ...]:
    """The grid: the target's head size, grouping of heads and MLP ratio at smaller depth and width.

    Args:
        config: the target's text config.
        depths: layers; those above the target's are left out.
        widths: hidden sizes as shares of the target's, rounded to whole head groups.
    """
    size, heads, groups = head_size(config), config.num_attention_heads, config.num_key_value_heads
    found = set()
    for share in widths:
        scaled = max(round(heads * share), 1)
        ratio = heads // groups
        query_heads = max(scaled // ratio, 1) * ratio if scaled >= ratio else scaled
        hidden = max(round(config.hidden_size * share / 8), 1) * 8
        inner = max(round(config.intermediate_size * share / 8), 1) * 8
        key_heads = max(query_heads // ratio, 1)
        if query_heads * size >= 1 and hidden < config.hidden_size:
            found |= {Architecture(depth, hidden, query_heads, key_heads, inner)
                      for depth in depths if depth <= config.num_hidden_layers}  # fmt: skip
    return tuple(sorted(found))


def sized(config: Any, num_layers: int = 0, hidden_size: int = 0) -> tuple[Architecture, ...]:
    """The grid where a depth or a width is chosen beforehand; 0 is not.

    Raises:
        BadRecipe: the target's family has no architecture of these sizes.
    """
    depths = (num_layers,) if num_layers else DEPTHS
    widths = (hidden_size / config.hidden_size,) if hidden_size else WIDTHS
    grid = candidates(config, depths, widths)
    if hidden_size:
        grid = tuple(made for made in grid if made.hidden_size == hidden_size)
    if not grid:
        raise BadRecipe(
            f"a draft of this target has 1 to {config.num_hidden_layers} layers and a width below {config.hidden_size} "
            f"that is a multiple of 8, got {num_layers or 'any'} and {hidden_size or 'any'}"
        )
    return grid


def num_parameters(architecture: Architecture, config: Any) -> int:
    """Parameters of all layers, without embeddings."""
    _, hidden, heads, key_heads, inner = astuple(architecture)
    attention = 2 * hidden * head_size(config) * (heads + key_heads)
    return architecture.num_layers * (attention + 3 * hidden * inner)


def choose(costs: Costs, config: Any, share: float) -> Architecture:
    """The architecture with the most parameters among those whose step costs at most `share` of a target step.

    Of one layer only where nothing deeper fits: it cannot look back at what followed an earlier token. Ties go to the
    cheaper, then to the shallower.

    Raises:
        BadRecipe: nothing fits; says what the cheapest costs.
    """
    if not 0 < share < 1:
        raise BadRecipe(f"the budget of a draft step is a share of a target step between 0 and 1, got {share:g}")
    fitting = [made for made, seconds in costs.candidates.items() if seconds <= share * costs.target]
    if not fitting:
        cheapest = min(costs.candidates, key=lambda made: (costs.candidates[made], made))
        needed = costs.candidates[cheapest] / costs.target
        raise BadRecipe(
            f"no draft architecture costs at most {share:g} of a target step here; the cheapest, "
            f"{cheapest.name}, costs {needed:.2f}. Raise the budget, or train a draft head"
        )
    deep = [made for made in fitting if made.num_layers > 1] or fitting
    return min(deep, key=lambda made: (-num_parameters(made, config), costs.candidates[made], made))


def draft_config(model: PreTrainedModel, architecture: Architecture) -> Any:
    """The target's config at other sizes, embeddings tied.

    Raises:
        UnsupportedModel: a family whose blocks cannot be scaled by these numbers.
    """
    if model.config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"no draft model of the family of {type(model).__name__} can be made from scratch; there are "
            f"{', '.join(FAMILIES)}. Begin with a small model of the same vocabulary"
        )
    config = copy.deepcopy(model.config)
    config.head_dim = head_size(config)
    config.num_hidden_layers, config.hidden_size = architecture.num_layers, architecture.hidden_size
    config.num_attention_heads = architecture.num_heads
    config.num_key_value_heads = architecture.num_key_value_heads
    config.intermediate_size = architecture.intermediate_size
    config.tie_word_embeddings = True
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: architecture.num_layers]
    return config


def fresh_draft(model: PreTrainedModel, architecture: Architecture, seed: int = 0) -> PreTrainedModel:
    """An untrained draft model in fp32 that shares the target's vocabulary.

    Embeddings begin as the target's principal directions at the usual scale, so that tokens which the target treats
    alike begin alike; what writes back into the states is scaled by (2 L) ** -1/2, as in GPT-2.
    """
    draft: Any = _random_draft(model, architecture, seed)
    config = draft.config
    with torch.no_grad():
        draft.get_input_embeddings().weight.copy_(
            principal_directions(cast(Any, model.get_input_embeddings()).weight, config.hidden_size)
            * config.initializer_range
        )
        for layer in draft.get_decoder().layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_((2 * architecture.num_layers) ** -0.5)
    draft.generation_config = copy.deepcopy(model.generation_config)
    return draft.eval().to(model.device)


def _random_draft(model: PreTrainedModel, architecture: Architecture, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            draft_config(model, architecture), dtype=torch.float32,
            attn_implementation=model.config._attn_implementation,
        )  # fmt: skip


def principal_directions(embedding: torch.Tensor, size: int) -> torch.Tensor:
    """Embeddings [V, D] in their `size` strongest directions [V, size], scaled to unit mean square.

    Signs are fixed, so that the result is the same on every machine up to rounding.
    """
    wide = embedding.detach().double()
    _, vectors = torch.linalg.eigh(wide.T @ wide)
    strongest = vectors[:, -size:].flip(1)
    largest = strongest.gather(0, strongest.abs().argmax(0, keepdim=True))
    projected = wide @ (strongest * largest.sign())
    return (projected / projected.square().mean().sqrt().clamp(min=1e-12)).to(embedding.dtype)


def measured_costs(model: PreTrainedModel, grid: Sequence[Architecture]) -> Costs:
    """Seconds of a one-token step of the target and of every candidate, kept for this machine and target.

    All are measured in turn, round by round, so that a slow moment of the machine touches all alike.
    """
    file = cache_folder() / "architectures" / f"{_key(model, grid)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(file.read_text())
        rows = [(Architecture(**row["architecture"]), float(row["seconds"])) for row in kept["candidates"]]
        if {made for made, _ in rows} == set(grid):
            return Costs(float(kept["target"]), dict(rows))
    costs = measure(model, grid)
    rows = [{"architecture": asdict(made), "seconds": seconds} for made, seconds in costs.candidates.items()]
    with suppress(OSError):  # a read-only home only means that the next run measures again
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({"target": costs.target, "candidates": rows}, indent=2))
        unfinished.replace(file)
    return costs


def measure(model: PreTrainedModel, grid: Sequence[Architecture]) -> Costs:
    """Time a one-token step of the target and of untrained candidates: the fastest of interleaved rounds.

    Another process can only make a step slower, and these are short: on a busy machine medians of alike candidates
    differ several times over, minima far less.
    """
    steps = [_Step(target_of(model))]
    for architecture in grid:
        draft: Any = _random_draft(
            model, architecture
        )  # what it says does not matter, and embeddings take long to make
        steps.append(_Step(Target(draft.eval().to(model.device, model.dtype))))
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(WARM_UP + ROUNDS):
        for step, times in zip(steps, seconds, strict=True):
            taken = step.timed()
            if number >= WARM_UP:
                times.append(taken)
    fastest = [min(times) for times in seconds]
    return Costs(fastest[0], dict(zip(grid, fastest[1:], strict=True)))


class _Step:
    """One more token after a context."""

    def __init__(self, target: Target) -> None:
        self.target = target
        length = CONTEXT if target.max_positions is None else min(CONTEXT, target.max_positions - WARM_UP - ROUNDS - 1)
        self.context = Context(target)
        with torch.inference_mode():
            self.context.prefill([[1 % target.vocab_size] * max(length, 1)])

    @torch.inference_mode()
    def timed(self) -> float:
        started = time.perf_counter()
        logits = self.context.extend(torch.ones(1, 1, dtype=torch.long), [1], keep_logits=1).logits
        float(logits[0, 0, 0])  # waits for the device
        return time.perf_counter() - started


def _key(model: PreTrainedModel, grid: Sequence[Architecture]) -> str:
    where = json.dumps(hardware(model.device), sort_keys=True, default=str)
    parts = [fingerprint(Target(model)), str(vocab_size(model)), where, *(str(astuple(made)) for made in grid)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
