"""The probe: does this model decode a token tree exactly, only a chain, or neither?

transformers has some 190 causal families. Most take a tree mask; some refuse it, and some take it and are
silently wrong because they place keys by cache slot instead of `position_ids`. A list would rot, so the
model is asked: a six-node tree after a dozen random tokens against token-by-token decoding.

The answer is kept per configuration, in memory and in the user's cache folder, so a large model pays once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specdec.context import Context
from specdec.errors import UnsupportedModel
from specdec.target import Form, Target
from specdec.tree import NO_NODE, TokenTree
from specdec.version import __version__

PROMPT_LENGTH = 12
PARENTS = (NO_NODE, 0, 0, 1, 2, 4)
CHAIN_PARENTS = (NO_NODE, 0, 1, 2)
SMALL_WINDOW = 8
WINDOWS = ("sliding_window", "attention_chunk_size", "keep_window_size", "index_topk")
"""Names of what limits how far attention reaches; probed at SMALL_WINDOW."""
PADDING = 2
LONGEST_PROMPT = 1024
ATTEMPTS = 2


@dataclass(frozen=True)
class Probe:
    """What the probe found.

    Attributes:
        form: "tree", "chain" or "refuse".
        reason: one line for people.
        difference: largest logit difference between the form's forward and token-by-token decoding.
        noise: the same between cached and uncached decoding of the model itself.
    """

    form: Literal["tree", "chain", "refuse"]
    reason: str
    difference: float
    noise: float


_known: dict[str, Probe] = {}
_forms: WeakKeyDictionary[PreTrainedModel, tuple[tuple[str, torch.dtype, str], Form]] = WeakKeyDictionary()
# Of each live model only the answer is kept: an adapter would keep its model alive.


def target_of(model: PreTrainedModel) -> Target:
    """A probed adapter of the model; it is probed once while dtype, device and attention stay as they are.

    Raises:
        UnsupportedModel: the model cannot be verified.
    """
    target = Target(model)
    circumstances = (target.attention, target.dtype, target.device.type)
    known = _forms.get(model)
    if known is not None and known[0] == circumstances:
        target.form = known[1]
        return target
    probed(target)
    _forms[model] = (circumstances, target.form)
    return target


def probed(target: Target) -> Target:
    """The target with its form set.

    Raises:
        UnsupportedModel: neither a tree nor a chain decodes exactly.
    """
    key = fingerprint(target)
    result = _known.get(key) or _read(key)
    if result is None:
        result = probe(target)
        _write(key, result)
    _known[key] = result
    if result.form == "refuse":
        raise UnsupportedModel(
            f"{type(target.model).__name__} cannot be verified exactly: {result.reason}. "
            "Use plain model.generate() for it."
        )
    target.form = result.form
    return target


@torch.no_grad()
def probe(target: Target) -> Probe:
    """Compare tree and chain forwards with token-by-token decoding."""
    model = target.model
    was_training, was_form = model.training, target.form
    model.eval()
    try:
        with _shortened_windows(target), target.uncompiled_on_cpu():
            return _probe(target)
    finally:
        model.train(was_training)
        target.form = was_form


def _probe(target: Target) -> Probe:
    noise, reason = 0.0, ""
    for form, parents in (("tree", PARENTS), ("chain", CHAIN_PARENTS)):
        if form == "tree" and not target.takes_positions:
            reason = "it takes no position_ids, so tree nodes cannot be placed"
            continue
        target.form = form  # type: ignore[assignment]
        for attempt in range(ATTEMPTS):
            try:
                noise, difference, scale = _differences(target, parents, seed=attempt)
            except Exception as error:
                reason = f"a {form} forward raised {type(error).__name__}: {str(error).splitlines()[0][:100]}"
                break
            if difference <= tolerance(target.dtype, noise, scale):
                why = "tree equals token-by-token decoding" if form == "tree" else f"chain only: {reason}"
                return Probe(form, why, difference, noise)  # type: ignore[arg-type]
            reason = f"a {form} forward differs from token-by-token decoding by {difference:.2g} (noise {noise:.1g})"
    return Probe("refuse", reason, float("nan"), noise)


def tolerance(dtype: torch.dtype, noise: float, scale: float) -> float:
    """Largest difference that counts as rounding: a few times the model's own noise.

    Wrong masks or positions showed 0.04 and more on logits of scale 1 to 4, against a noise of 1e-5 in fp32. Noise
    beyond ten times the usual is no rounding: such a model decodes differently with and without its cache, and
    may not excuse us.
    """
    usual = {torch.float64: 1e-10, torch.float32: 2e-4}.get(dtype, 3e-2) * scale
    return max(usual, min(4 * noise, 10 * usual))


def _differences(target: Target, parents: tuple[int, ...], seed: int) -> tuple[float, float, float]:
    """(noise of the model itself, difference of our forward, scale of the logits), with and without left padding."""
    generator = torch.Generator().manual_seed(seed)
    length = prompt_length(target)
    ids = torch.randint(3, target.vocab_size, (1, length + len(parents)), generator=generator)
    prompt, drafted = ids[:, :length], ids[0, length:].tolist()
    tree = TokenTree.of_nodes(
        torch.tensor(drafted[:1]), [[(p, t) for p, t in zip(parents[1:], drafted[1:], strict=True)]]
    )
    shape = tree.shapes[0]
    leaves = [node for node in range(tree.num_nodes) if not shape.children[node]]
    noise, difference, scale = 0.0, 0.0, 0.0
    for padding, nodes in ((0, range(tree.num_nodes)), (PADDING, leaves)):
        ours = _scored(target, prompt, padding, tree)
        for node in nodes:
            tokens = torch.cat([prompt, tree.tokens[:, [0, *shape.path(node)]]], 1)
            stepwise = _stepwise_logits(target, tokens, length, padding)
            noise = max(noise, (stepwise - _uncached_logits(target, tokens, padding)).abs().max().item())
            difference = max(difference, (stepwise - ours[node]).abs().max().item())
            scale = max(scale, (stepwise - stepwise.mean()).std().item())
    if not all(map(_is_finite, (noise, difference))):
        raise ValueError("logits are not finite")
    return noise, difference, scale


def prompt_length(target: Target) -> int:
    """A dozen tokens, or past a window that is built into the model's buffers and cannot be shortened."""
    built_in = getattr(target.config, "window_size", None)
    if isinstance(built_in, int) and built_in <= LONGEST_PROMPT:
        return max(PROMPT_LENGTH, built_in + PADDING + 4)
    return PROMPT_LENGTH


def _is_finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _scored(target: Target, prompt: Tensor, padding: int, tree: TokenTree) -> Tensor:
    """Logits [N, V] of the tree after the prompt, through the code that decoding uses."""
    context = Context(target)
    target.model(**_inputs(target, prompt, padding), past_key_values=context.cache, use_cache=True)
    context.begin([padding], prompt.shape[1])
    if context.cache.get_seq_length() != prompt.shape[1]:
        raise ValueError("the model does not fill a key-value cache")
    return context.run(tree.tokens, tree.depths(), tree.ancestors()).logits[0].float()


def _stepwise_logits(target: Target, tokens: Tensor, prompt_length: int, padding: int) -> Tensor:
    """Logits [V] after `tokens` [1, T], as plain `generate` gets them: the last few fed one at a time."""
    cache = DynamicCache(config=target.config)
    first = _inputs(target, tokens[:, :prompt_length], padding)
    output = target.model(**first, past_key_values=cache, use_cache=True)
    for end in range(prompt_length + 1, tokens.shape[1] + 1):
        step = _inputs(target, tokens[:, :end], padding)
        for name in ("input_ids", "position_ids"):
            if name in step:
                step[name] = step[name][:, -1:]
        output = target.model(**step, past_key_values=cache, use_cache=True)
    return output.logits[0, -1].float()


def _uncached_logits(target: Target, tokens: Tensor, padding: int) -> Tensor:
    return target.model(**_inputs(target, tokens, padding), use_cache=False).logits[0, -1].float()


def _inputs(target: Target, tokens: Tensor, padding: int) -> dict[str, Tensor]:
    """What plain `generate` passes for ids [1, T] of which the first `padding` count as padding."""
    tokens = tokens.to(target.device)
    column = torch.arange(tokens.shape[1], device=tokens.device)[None]
    inputs = {"input_ids": tokens}
    if target.takes_positions:
        inputs["position_ids"] = (column - padding).clamp(min=0)
    if padding:
        inputs["attention_mask"] = (column >= padding).long()
    return inputs


@contextmanager
def _shortened_windows(target: Target) -> Iterator[None]:
    """Let windows, chunks and sparse selections bind within the probe.

    Masks read the config at every forward; what modules copied from it is shortened there too.
    """
    saved: list[tuple[object, str, int]] = []
    for owner in (target.config, *target.model.modules()):
        for name in WINDOWS:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > SMALL_WINDOW:
                saved.append((owner, name, value))
                setattr(owner, name, SMALL_WINDOW)
    try:
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


def fingerprint(target: Target) -> str:
    """Everything the answer depends on: configuration, class, dtype, device type, attention, versions."""
    parts = [
        type(target.model).__name__,
        target.model.config.to_json_string(use_diff=False),
        target.config._attn_implementation,
        str(target.dtype),
        target.device.type,
        torch.__version__,
        transformers.__version__,
        __version__,
    ]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def cache_folder() -> Path:
    """Where answers are kept: $SPECDEC_CACHE, else the user's cache folder."""
    if "SPECDEC_CACHE" in os.environ:
        return Path(os.environ["SPECDEC_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "specdec"


def _read(key: str) -> Probe | None:
    with suppress(OSError, ValueError, TypeError):
        return Probe(**json.loads((cache_folder() / "probes" / f"{key}.json").read_text()))
    return None


def _write(key: str, result: Probe) -> None:
    with suppress(OSError):  # a read-only home only means that the next process probes again
        folder = cache_folder() / "probes"
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{key}.{os.getpid()}"
        partial.write_text(json.dumps(asdict(result)))
        partial.replace(folder / f"{key}.json")
