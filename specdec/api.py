"""The drop-in: `generate`, `attach` and `detach`.

Both go through transformers' own `custom_generate=` preparation, so configs, processors, criteria and cache
are built by transformers. What that route drops (streamer, tokenizer, stop strings) is bound beforehand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
from specdec.probe import target_of
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


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    drafter: Drafter | PreTrainedModel | str | Path | None = "lookup",
    rule: Rule = "auto",
    generator: torch.Generator | None = None,
    stats: DecodeStats | None = None,
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
        stats: a fresh DecodeStats to be filled, for whoever wants counts and times without the rest of the output.
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
    run = _Generation(target, load_drafter(drafter, model), rule, generator, stats)
    arguments = run.bind(inputs, kwargs)
    try:
        return _plain_generate(model)(model, inputs, custom_generate=run, **arguments)
    except (IndexError, RuntimeError) as error:
        if run.left_positions():
            raise UnsupportedGeneration(
                f"the text outgrew the {target.max_positions} positions that {type(model).__name__} was made for, and "
                f"the model failed there ({type(error).__name__}); shorten the prompt or max_new_tokens."
            ) from error
        raise


def attach(model: PreTrainedModel, drafter: Drafter | PreTrainedModel | str | Path) -> PreTrainedModel:
    """Make `model.generate(...)` speculative, and with it pipelines and anything else that calls it.

    The drafter is loaded and checked now. Keyword arguments `drafter=`, `rule=`, `generator=` and `stats=` still
    override per call. Returns the model. Attaching again replaces the drafter; `detach` restores. A deep copy of the
    model, and a pickle, are attached to a copy of the drafter; `save_pretrained` writes the model alone.

    Raises:
        SpecdecError: the model or the drafter does not serve; the model is left as it was.
    """
    target_of(model)
    attached = load_drafter(drafter, model)
    model.generate = _SpeculativeGenerate(model, attached)  # type: ignore[method-assign]
    return model


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`; does nothing on a model that has none. Returns the model."""
    model.__dict__.pop("generate", None)
    return model


class _SpeculativeGenerate:
    """What `attach` puts in the place of `model.generate`.

    An object and no closure, so that copies of the model come with one that calls the copy.
    """

    def __init__(self, model: PreTrainedModel, drafter: Drafter | None) -> None:
        self.model, self.drafter = model, drafter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of this model; arguments as in transformers, by position or by name."""
        by_name = inspect.signature(_plain_generate(self.model)).bind_partial(self.model, *args).arguments
        by_name.pop("self")
        twice = [name for name in by_name if name in kwargs]
        if twice:
            raise TypeError(f"generate() got multiple values for argument {twice[0]!r}")
        return generate(self.model, **{"drafter": self.drafter, **by_name, **kwargs})


def _plain_generate(model: PreTrainedModel) -> Callable[..., Any]:
    """transformers' own `generate`: that of the class, since an attached model carries another one."""
    return cast(Any, type(model)).generate


class _Generation:
    """One call: what transformers' preparation hands over, plus what it drops."""

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        rule: Rule,
        generator: torch.Generator | None,
        stats: DecodeStats | None,
    ) -> None:
        self.target, self.drafter, self.generator = target, drafter, generator
        self.rule: Rule = rule
        self.stats = DecodeStats() if stats is None else stats
        self.streamer: Any = None
        self._verifier: Verifier | None = None
        self._prompt_length = 0

    def bind(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take out of generate's arguments what `custom_generate` would lose; returns the rest."""
        arguments = dict(kwargs)
        _refuse_arguments(arguments)
        _refuse_empty_prompt(arguments.get("input_ids") if inputs is None else inputs)
        self.streamer = arguments.pop("streamer", None)
        _bind_stop_strings(self.target.model, arguments)
        return arguments

    def left_positions(self) -> bool:
        """True when the text went beyond the positions that the target's config states."""
        last = self.target.max_positions
        if last is None or self._verifier is None:
            return False
        context = self._verifier.context
        rows = zip(context.lengths, context.starts, strict=True)
        return max(self._prompt_length, *(length - start + 1 for length, start in rows), 0) > last

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        _refuse_config(generation_config)
        _refuse_model_arguments(input_ids, generation_config, model_kwargs)
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
            dtype=torch.float32,  # as plain generate, also for a model in float64
        )
        keeps_cache = wants_dict or getattr(user_cache, "_is_user_defined", False)
        verifier = Verifier(
            self.target,
            self.drafter.taps if self.drafter is not None else (),
            (emitter.max_length or 0) + SPARE_COLUMNS,
            park=keeps_cache,
        )
        self._verifier, self._prompt_length = verifier, input_ids.shape[1]
        stats = self.stats
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
    """Per-row lists as transformers' tuple of [B, V] per step; zeros where a row had ended earlier."""
    if rows is None:
        return None
    steps = max(map(len, rows))
    return tuple(
        torch.stack([row[step] if step < len(row) else torch.zeros_like(row[0]) for row in rows])
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
    "token_healing": "call model.heal_tokens(input_ids, tokenizer) first",
    "synced_gpus": "sharded models that must run in step are not served",
}
_PREPARED_ARGUMENTS = {
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep",
    "output_attentions", "output_hidden_states",
}  # fmt: skip
_PLAIN = "use plain model.generate() (after specdec.detach(model) if attached)"


def _refuse_arguments(arguments: dict[str, Any]) -> None:
    for name, instead in _REFUSED_ARGUMENTS.items():
        value = arguments.get(name)
        if value is not None and value is not False:
            raise UnsupportedGeneration(f"{name} cannot be combined with specdec; {instead}.")
    if arguments.get("cache_implementation") == "paged":  # transformers would leave for continuous batching
        raise UnsupportedGeneration(f"specdec cannot honour cache_implementation='paged': {_PLAIN}.")


def _refuse_empty_prompt(prompt: Any) -> None:
    if isinstance(prompt, Tensor) and prompt.numel() == 0:
        raise UnsupportedGeneration(
            f"the prompt is empty (input_ids of shape {tuple(prompt.shape)}); pass at least one token, such as the "
            "tokenizer's bos_token_id."
        )


def _refuse_config(config: GenerationConfig) -> None:
    lookup, early_exit = config.prompt_lookup_num_tokens, config.assistant_early_exit
    refusals = [
        ((config.num_beams or 1) > 1, f"num_beams={config.num_beams}: beam search keeps several hypotheses; {_PLAIN}"),
        (config.penalty_alpha is not None and config.penalty_alpha > 0, f"contrastive search: {_PLAIN}"),
        (getattr(config, "dola_layers", None) is not None, f"DoLa decoding: {_PLAIN}"),
        (config.use_cache is False, "use_cache=False: verification needs the key-value cache; leave use_cache on"),
        (bool(config.output_attentions), f"output_attentions: {_PLAIN}"),
        (bool(config.output_hidden_states), f"output_hidden_states: {_PLAIN}"),
        (
            config.cache_implementation not in (None, "dynamic", "dynamic_full"),
            f"cache_implementation={config.cache_implementation!r}: specdec brings its own cache; drop the option",
        ),
        (
            config.prefill_chunk_size is not None,
            f"prefill_chunk_size={config.prefill_chunk_size}: drop the option, or {_PLAIN}",
        ),
        (lookup is not None, f'prompt_lookup_num_tokens={lookup}: use drafter="lookup:tokens={lookup}"'),
        (early_exit is not None, f'assistant_early_exit={early_exit}: use drafter="early-exit:layer={early_exit}"'),
        (bool(getattr(config, "use_mtp", None)), f"use_mtp: {_PLAIN}"),
        (
            getattr(config, "constraints", None) is not None or getattr(config, "force_words_ids", None) is not None,
            f"constraints and force_words_ids: they need beam search; {_PLAIN}",
        ),
    ]  # fmt: skip
    for applies, message in refusals:
        if applies:
            raise UnsupportedGeneration(f"specdec cannot honour {message}.")


def _is_empty_dict(value: Any) -> bool:
    """What transformers prepares of images and sound for a multimodal model that was given text alone."""
    return isinstance(value, dict) and not value


def _refuse_model_arguments(input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """What a tree forward could not repeat would be silently wrong from the second step on."""
    given = {name for name, value in model_kwargs.items() if value is not None and not _is_empty_dict(value)}
    extra = sorted(given - _PREPARED_ARGUMENTS)
    if extra:
        raise UnsupportedGeneration(f"specdec passes no {', '.join(extra)} on to the model at every step; {_PLAIN}.")
    past = model_kwargs.get("past_key_values")
    if not isinstance(past, DynamicCache | KVCache | None):
        raise UnsupportedGeneration(
            f"specdec cannot honour past_key_values of type {type(past).__name__}: pass a DynamicCache."
        )
    mask: Tensor | None = model_kwargs.get("attention_mask")
    if mask is not None:
        live = mask != 0
        if not bool(live[:, -1].all()) or bool((live[:, :-1] & ~live[:, 1:]).any()):
            raise UnsupportedGeneration(
                "attention_mask must be zeros, then ones in every row (left padding); set the tokenizer's "
                'padding_side="left".'
            )
    width = input_ids.shape[1] if mask is None else mask.shape[1]
    width = getattr(config, "_mask_length", width) if mask is None else width
    positions: Tensor | None = model_kwargs.get("position_ids")
    if positions is not None:
        live = torch.ones(1, width, device=positions.device) if mask is None else mask != 0
        usual = (live.long().cumsum(-1) - 1).clamp(min=0)[:, -positions.shape[-1] :]
        if usual.shape[-1] != positions.shape[-1] or not bool((positions == usual).all()):
            raise UnsupportedGeneration(
                f"specdec counts positions from the attention mask; drop position_ids, or {_PLAIN}."
            )
    cached = past.get_seq_length() if past is not None else 0
    if cached and cached >= width:
        raise UnsupportedGeneration(
            f"past_key_values holds {cached} tokens already, the prompt with its past has {width}; pass at least one "
            "token that is not in the cache."
        )


def _bind_stop_strings(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Build the stop-string criterion here: the tokenizer does not survive `custom_generate` preparation.

    Precedence as in transformers: argument, then generation_config, then the model's generation config.
    """
    tokenizer = arguments.pop("tokenizer", None)
    config: GenerationConfig | None = arguments.get("generation_config")
    if "stop_strings" in arguments:
        stop_strings = arguments["stop_strings"]
    else:
        configs = (config, model.generation_config)
        stop_strings = next((c.stop_strings for c in configs if c is not None and c.stop_strings is not None), None)
    if stop_strings is None:
        return
    if tokenizer is None:
        raise SpecdecError("stop_strings need the tokenizer: pass tokenizer= as plain generate() asks, too.")
    arguments["stop_strings"] = None  # an argument goes before both configs, which stay untouched
    criteria = StoppingCriteriaList(arguments.get("stopping_criteria") or [])
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):  # the user's own goes first
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
    arguments["stopping_criteria"] = criteria
