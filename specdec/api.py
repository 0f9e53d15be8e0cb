"""The drop-in: `generate`, `attach` and `detach`.

Both go through transformers' own `custom_generate=` preparation, so configs, processors, criteria and cache
are built by transformers. What that route drops (streamer, tokenizer, stop strings) is bound beforehand.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.acceptance import Rule
from specdec.cache import KVCache
from specdec.decode import StepResult, decode
from specdec.drafter import Drafter
from specdec.drafters.load import load_drafter
from specdec.emitter import Emitter
from specdec.errors import SpecdecError, UnsupportedGeneration
from specdec.probe import probed
from specdec.sampling import SamplingParams
from specdec.stats import DecodeStats
from specdec.target import Target
from specdec.verifier import Verifier

SPARE_COLUMNS = 64
"""Cache columns allocated beyond the final length, for the nodes of one tree."""


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """transformers' output for decoder-only models, plus `stats`."""

    stats: DecodeStats | None = None


_targets: WeakKeyDictionary[PreTrainedModel, Target] = WeakKeyDictionary()


def target_of(model: PreTrainedModel) -> Target:
    """The probed adapter of a model; the same one on every call while layers and attention stay as they are.

    Raises:
        UnsupportedModel: the model cannot be verified.
    """
    target = _targets.get(model)
    if target is None or target.attention != model.config.get_text_config(decoder=True)._attn_implementation:
        target = probed(Target(model))
        _targets[model] = target
    return target


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    drafter: Drafter | PreTrainedModel | str | None = "lookup",
    rule: Rule = "auto",
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> Tensor | SpeculativeOutput:
    """`model.generate(inputs, **kwargs)`, faster and with the same output.

    Args:
        model: a decoder-only transformers model.
        inputs: prompt ids [B, S], left-padded; or pass `input_ids=` as a keyword.
        drafter: what proposes: a specification such as "lookup:ngram=3", "early-exit:layer=2", a model path or
            a drafter directory; a loaded draft model; a Drafter; or None for plain decoding in the same loop.
        rule: acceptance rule; "auto" picks the lossless one for the drafter's trees.
        generator: source of randomness for sampling; torch's global one otherwise.
        **kwargs: anything `model.generate` takes.

    Returns:
        Ids [B, T], or with `return_dict_in_generate` a SpeculativeOutput whose `stats` say what happened.

    Raises:
        SpecdecError: an option, model or drafter that cannot be honoured exactly; the message says what to do.

    Example:
        >>> inputs = tokenizer("def", return_tensors="pt")
        >>> output = specdec.generate(model, **inputs, drafter="suffix", max_new_tokens=64)
    """
    target = target_of(model)
    run = _Generation(target, load_drafter(drafter, model), rule, generator)
    arguments = run.bind(kwargs)
    with _without_stop_strings(model):
        # An attached model carries its own `generate`; the class's is transformers' original.
        return cast(Any, type(model)).generate(model, inputs, custom_generate=run, **arguments)


def attach(model: PreTrainedModel, drafter: Drafter | PreTrainedModel | str) -> PreTrainedModel:
    """Make `model.generate(...)` speculative, and with it pipelines and anything else that calls it.

    The drafter is loaded and checked now. Keyword arguments `drafter=`, `rule=` and `generator=` still override per
    call. Returns the model. Attaching again replaces the drafter; `detach` restores.
    """
    target_of(model)
    attached = load_drafter(drafter, model)

    def speculative_generate(inputs: Tensor | None = None, **kwargs: Any) -> Any:
        return generate(model, inputs, **{"drafter": attached, **kwargs})

    model.generate = speculative_generate  # type: ignore[method-assign]
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`; does nothing on a model that has none. Returns the model."""
    model.__dict__.pop("generate", None)
    return model


class _Generation:
    """One call: what transformers' preparation hands over, plus what it drops."""

    def __init__(self, target: Target, drafter: Drafter | None, rule: Rule, generator: torch.Generator | None) -> None:
        self.target, self.drafter, self.generator = target, drafter, generator
        self.rule: Rule = rule
        self.streamer: Any = None

    def bind(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take out of generate's arguments what `custom_generate` would lose; returns the rest."""
        arguments = dict(kwargs)
        _refuse_arguments(arguments)
        self.streamer = arguments.pop("streamer", None)
        _bind_stop_strings(self.target.model, arguments)
        return arguments

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        _refuse_config(generation_config, model_kwargs)
        user_cache: Cache | None = model_kwargs.get("past_key_values")
        wants_dict = bool(generation_config.return_dict_in_generate)
        params = SamplingParams.of(generation_config, self.generator)
        pad = generation_config._pad_token_tensor
        emitter = Emitter(
            input_ids,
            logits_processor,
            stopping_criteria,
            params,
            pad_token=None if pad is None else int(pad),
            keep_scores=bool(wants_dict and generation_config.output_scores),
            keep_logits=bool(wants_dict and generation_config.output_logits),
            in_step=self.target.form == "chain",
        )
        keeps_cache = wants_dict or getattr(user_cache, "_is_user_defined", False)
        verifier = Verifier(
            self.target,
            self.drafter.taps if self.drafter is not None else (),
            (emitter.max_length or 0) + SPARE_COLUMNS,
            park=keeps_cache,
        )
        stats = DecodeStats()
        stream = _Stream(self.streamer, emitter)
        for step in decode(
            verifier, self.drafter, emitter, input_ids, generation_config, model_kwargs, stats, rule=self.rule
        ):
            stream.put(step)
        stream.end()
        sequences = emitter.sequences()
        if not keeps_cache:
            return sequences
        cache = verifier.whole_cache()
        _hand_back(cache, user_cache)
        if not wants_dict:
            return sequences
        return SpeculativeOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=cast(Any, _by_step(emitter.scores)),
            logits=cast(Any, _by_step(emitter.logits)),
            past_key_values=user_cache if getattr(user_cache, "_is_user_defined", False) else cache,
            stats=stats,
        )


class _Stream:
    """Feeds a transformers streamer: the prompt, then tokens in order, all rows of one position at a time."""

    def __init__(self, streamer: Any, emitter: Emitter) -> None:
        self.streamer, self.emitter = streamer, emitter
        self.sent = emitter.prompt_length
        if streamer is not None:
            streamer.put(emitter.sequences().cpu())

    def put(self, _step: StepResult) -> None:
        """Send every position that all rows have reached or passed by finishing."""
        if self.streamer is None:
            return
        running = self.emitter.running
        lengths = self.emitter.lengths
        ready = min((lengths[row] for row in running), default=max(lengths))
        sequences = self.emitter.sequences()
        for position in range(self.sent, ready):
            self.streamer.put(sequences[:, position].cpu())
        self.sent = max(self.sent, ready)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def _by_step(rows: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
    """Per-row lists as transformers' tuple of [B, V] per step; rows that ended earlier are minus infinity."""
    if rows is None:
        return None
    steps = max(map(len, rows))
    return tuple(
        torch.stack([row[step] if step < len(row) else torch.full_like(row[0], -torch.inf) for row in rows])
        for step in range(steps)
    )


def _hand_back(cache: KVCache, user_cache: Cache | None) -> None:
    if user_cache is not None and getattr(user_cache, "_is_user_defined", False):
        cache.write_back(user_cache)


# --- Refusals: each names the alternative -----------------------------------------------------------------

_REFUSED_ARGUMENTS = {
    "assistant_model": "pass the draft model as drafter=",
    "prompt_lookup_num_tokens": 'use drafter="lookup"',
    "assistant_early_exit": 'use drafter="early-exit:layer=E"',
    "assistant_tokenizer": "drafters here share the target's vocabulary",
    "custom_generate": "specdec.generate is itself a custom_generate",
    "inputs_embeds": "pass input_ids: drafters read token ids",
}


def _refuse_arguments(arguments: dict[str, Any]) -> None:
    for name, instead in _REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise UnsupportedGeneration(f"{name} cannot be combined with specdec; {instead}.")


def _refuse_config(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    plain = "use plain model.generate() (after specdec.detach(model) if attached)"
    refusals = [
        ((config.num_beams or 1) > 1, f"num_beams={config.num_beams}: beam search keeps several hypotheses; {plain}"),
        (config.penalty_alpha is not None and config.penalty_alpha > 0, f"contrastive search: {plain}"),
        (getattr(config, "dola_layers", None) is not None, f"DoLa decoding: {plain}"),
        (config.use_cache is False, "use_cache=False: verification needs the key-value cache; leave use_cache on"),
        (bool(config.output_attentions), f"output_attentions: {plain}"),
        (bool(config.output_hidden_states), f"output_hidden_states: {plain}"),
        (
            config.cache_implementation not in (None, "dynamic", "dynamic_full"),
            f"cache_implementation={config.cache_implementation!r}: specdec brings its own cache; drop the option",
        ),
        (
            config.prefill_chunk_size is not None,
            f"prefill_chunk_size={config.prefill_chunk_size}: drop the option, or {plain}",
        ),
        (
            not isinstance(model_kwargs.get("past_key_values"), DynamicCache | KVCache | None),
            f"past_key_values of type {type(model_kwargs.get('past_key_values')).__name__}: pass a DynamicCache",
        ),
    ]  # fmt: skip
    for applies, message in refusals:
        if applies:
            raise UnsupportedGeneration(f"specdec cannot honour {message}.")


@contextmanager
def _without_stop_strings(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's own stop strings, which are bound already, from the preparation that would refuse them."""
    saved = model.generation_config.stop_strings
    model.generation_config.stop_strings = None
    try:
        yield
    finally:
        model.generation_config.stop_strings = saved


def _bind_stop_strings(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Build the stop-string criterion here: the tokenizer does not survive `custom_generate` preparation."""
    tokenizer = arguments.pop("tokenizer", None)
    config: GenerationConfig | None = arguments.get("generation_config")
    sources = [
        arguments.get("stop_strings"),
        getattr(config, "stop_strings", None),
        model.generation_config.stop_strings,
    ]
    stop_strings = next((s for s in sources if s is not None), None)
    if stop_strings is None:
        return
    if tokenizer is None:
        raise SpecdecError("stop_strings need the tokenizer: pass tokenizer= as plain generate() asks, too.")
    arguments.pop("stop_strings", None)
    if config is not None and config.stop_strings is not None:
        arguments["generation_config"] = copy.deepcopy(config)
        arguments["generation_config"].stop_strings = None
    criteria = StoppingCriteriaList(arguments.get("stopping_criteria") or [])
    criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
    arguments["stopping_criteria"] = criteria
