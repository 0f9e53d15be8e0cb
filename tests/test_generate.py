"""Every feature of transformers' generate() does here exactly what it does there."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

import specdec
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.probe import target_of
from tests.tiny import CHOSEN, PAD, VOCAB, drafter_named, make_target, perturbed, prompt, shared_target, tokenizer

NEW = 14
"""New tokens of most generations."""
LOW = {"do_sample": True, "temperature": 0.5}
"""Sampling cold enough that drafted tokens are accepted."""

# --- Processors and criteria of a user ----------------------------------------------------------------------


class Penalise(LogitsProcessor):
    """Lowers the tokens whose parity is that of the text's length; knows nothing but its arguments."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        scores = scores.clone()
        scores[:, input_ids.shape[1] % 2 :: 2] -= 2.0
        return scores


class CountsItsCalls(LogitsProcessor):
    """State: the n-th call forbids the n-th tokens, whatever the text."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.calls += 1
        scores = scores.clone()
        scores[:, (7 * self.calls) % VOCAB] = -torch.inf
        scores[:, (11 * self.calls) % VOCAB] += 1.0
        return scores


class TreatsRowsDifferently(LogitsProcessor):
    """Depends on the index of the row in its batch."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        scores = scores.clone()
        for row in range(scores.shape[0]):
            scores[row, row :: scores.shape[0] + 1] -= 2.0
        return scores


class StopsAtLength(StoppingCriteria):
    """Stops row b once its text has a length of `first + 3 b`; counts its calls."""

    def __init__(self, first: int) -> None:
        self.first, self.calls = first, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.calls += 1
        limits = self.first + 3 * torch.arange(input_ids.shape[0])
        return input_ids.shape[1] >= limits


class StopsAtToken(StoppingCriteria):
    """Stops a row when its last token is one of these."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return torch.isin(input_ids[:, -1], self.tokens)


def allowed_after(batch_id: int, ids: Tensor) -> list[int]:
    """Even tokens after odd ones and the reverse, shifted by the row; never a token twice in a row."""
    last = int(ids[-1])
    return [t for t in range(3, VOCAB) if (t + last + batch_id) % 2 and t != last]


# --- The features: a function makes the arguments anew, because processors have state -----------------------------

GREEDY_FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "repetition_penalty": lambda: {"repetition_penalty": 1.5},
    "no_repeat_ngram_size": lambda: {"no_repeat_ngram_size": 2},
    "bad_words_ids": lambda: {"bad_words_ids": [[t] for t in range(10, 30)] + [[40, 41], [50, 51, 52]]},
    "suppress_tokens": lambda: {"suppress_tokens": list(range(5, 50, 2))},
    "begin_suppress_tokens": lambda: {"begin_suppress_tokens": list(range(50, 100))},
    "min_new_tokens": lambda: {"min_new_tokens": 9, "eos_token_id": list(range(10, 30))},
    "min_length": lambda: {"min_length": 19, "eos_token_id": list(range(10, 30))},
    "forced_eos_token_id": lambda: {"forced_eos_token_id": 33, "eos_token_id": 33},
    "exponential_decay_length_penalty": lambda: {
        "exponential_decay_length_penalty": (4, 1.6),
        "eos_token_id": 33,
    },
    "sequence_bias": lambda: {"sequence_bias": {(5,): 4.0, (7, 8): 6.0, (9,): -5.0}},
    "eos list": lambda: {"eos_token_id": [16, 28, 33, 94]},
    "renormalize_logits": lambda: {"renormalize_logits": True},
    "remove_invalid_values": lambda: {"remove_invalid_values": True},
    "custom processor": lambda: {"logits_processor": LogitsProcessorList([Penalise()])},
    "processor with state": lambda: {"logits_processor": LogitsProcessorList([CountsItsCalls()])},
    "processor by row": lambda: {"logits_processor": LogitsProcessorList([TreatsRowsDifferently()])},
    "prefix_allowed_tokens_fn": lambda: {"prefix_allowed_tokens_fn": allowed_after},
    "criterion by length": lambda: {"stopping_criteria": StoppingCriteriaList([StopsAtLength(17)])},
    "criterion by length, with eos": lambda: {
        "stopping_criteria": StoppingCriteriaList([StopsAtLength(17)]),
        "eos_token_id": [11, 22],
    },
    "criterion by token": lambda: {"stopping_criteria": StoppingCriteriaList([StopsAtToken(list(range(3, 20)))])},
    "max_length": lambda: {"max_length": 22, "max_new_tokens": None},
    "max_time far off": lambda: {"max_time": 1000.0},
    "watermark": lambda: {"watermarking_config": WatermarkingConfig(bias=3.0)},
    "watermark selfhash": lambda: {
        "watermarking_config": WatermarkingConfig(bias=3.0, seeding_scheme="selfhash", context_width=2)
    },
    "guidance_scale": lambda: {"guidance_scale": 1.5},
    "negative prompt": lambda: {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[5, 6, 7]])},
    "several at once": lambda: {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [8, 9],
        "logits_processor": [Penalise()],
        "eos_token_id": [11, 12],
    },
}
SAMPLING_FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "top_k": lambda: {"top_k": 3},
    "no top_k": lambda: {"top_k": 0},
    "top_p": lambda: {"top_p": 0.7},
    "min_p": lambda: {"min_p": 0.2},
    "typical_p": lambda: {"typical_p": 0.7},
    "epsilon_cutoff": lambda: {"epsilon_cutoff": 0.05},
    "eta_cutoff": lambda: {"eta_cutoff": 0.1},
    "all warpers": lambda: {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.9},
    "synthid": lambda: {
        "watermarking_config": SynthIDTextWatermarkingConfig(
            ngram_len=3, keys=[654, 400, 836, 123], context_history_size=64
        ),
    },
}
FEW = ["suffix", "early-exit tree", "draft-model chain", "draft-model tree"]
IN_STEP = [
    "processor with state", "processor by row", "prefix_allowed_tokens_fn", "criterion by length",
    "criterion by length, with eos", "criterion by token", "guidance_scale", "custom processor", "synthid",
    "max_time far off",
]  # fmt: skip
WITHOUT_EFFECT = ["nothing", "renormalize_logits", "remove_invalid_values", "max_time far off"]
FEATURES = {**GREEDY_FEATURES, **SAMPLING_FEATURES}


def fitted(arguments: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Negative prompts need one row per prompt."""
    if "negative_prompt_ids" in arguments:
        arguments["negative_prompt_ids"] = arguments["negative_prompt_ids"].expand(batch_size, -1)
    return {"max_new_tokens": NEW, "do_sample": False, **arguments}


def assert_same_steps(ours: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> None:
    assert len(ours) == len(plain)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


DETAILS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.mark.parametrize("feature", GREEDY_FEATURES)
def test_greedy_text_scores_and_logits_are_those_of_plain_generate(feature: str) -> None:
    model, accepted = shared_target(), 0
    arguments = lambda: {**prompt(1), **fitted(GREEDY_FEATURES[feature](), 1), **DETAILS}  # noqa: E731
    plain: Any = model.generate(**arguments())
    featureless = model.generate(**prompt(1), max_new_tokens=NEW)
    assert (plain.sequences.tolist() == featureless.tolist()) == (feature in WITHOUT_EFFECT)
    for name in FEW:
        ours: Any = specdec.generate(model, drafter=drafter_named(name), **arguments())
        assert ours.sequences.tolist() == plain.sequences.tolist(), name
        assert_same_steps(ours.scores, plain.scores)
        assert_same_steps(ours.logits, plain.logits)
        accepted += ours.stats.accepted
    assert accepted > 0


@pytest.mark.parametrize("feature", GREEDY_FEATURES)
def test_a_greedy_batch_with_unequal_padding_is_that_of_plain_generate(feature: str) -> None:
    model = shared_target()
    arguments = lambda: {**prompt(3), **fitted(GREEDY_FEATURES[feature](), 3)}  # noqa: E731
    plain: Any = model.generate(**arguments())
    for name in ("recycling", "early-exit tree", "draft-model tree"):
        ours: Any = specdec.generate(model, drafter=drafter_named(name), **arguments())
        assert ours.tolist() == plain.tolist(), name


@pytest.mark.parametrize("feature", FEATURES)
def test_a_seed_samples_the_tokens_of_plain_generate(feature: str) -> None:
    model, accepted = shared_target(), 0
    arguments = lambda: {**prompt(1), **fitted({**LOW, **FEATURES[feature]()}, 1)}  # noqa: E731
    torch.manual_seed(11)
    plain: Any = model.generate(**arguments())
    for name in CHOSEN:
        torch.manual_seed(11)
        ours: Any = specdec.generate(model, drafter=drafter_named(name), **arguments(), return_dict_in_generate=True)
        assert ours.sequences.tolist() == plain.tolist(), name
        accepted += ours.stats.accepted
    assert accepted > 0


@pytest.mark.parametrize("feature", IN_STEP)
def test_a_batch_that_must_stay_in_step_samples_the_tokens_of_plain_generate(feature: str) -> None:
    model, accepted = shared_target(), 0
    arguments = lambda: {**prompt(3), **fitted({**LOW, "temperature": 0.2, **FEATURES[feature]()}, 3)}  # noqa: E731
    torch.manual_seed(5)
    plain: Any = model.generate(**arguments())
    for name in ("suffix", "early-exit tree", "draft-model tree"):
        torch.manual_seed(5)
        ours: Any = specdec.generate(model, drafter=drafter_named(name), **arguments(), return_dict_in_generate=True)
        assert ours.sequences.tolist() == plain.tolist(), name
        accepted += ours.stats.accepted
    assert accepted > 0


@pytest.mark.parametrize("name", CHOSEN)
def test_a_one_token_prompt_honours_forced_bos(name: str) -> None:
    model = shared_target()
    arguments: dict[str, Any] = {"input_ids": torch.tensor([[BOS_PROMPT]]), "forced_bos_token_id": 42}
    arguments |= {"begin_suppress_tokens": list(range(50, 100)), "max_new_tokens": NEW}
    ours: Any = specdec.generate(model, drafter=drafter_named(name), **arguments)
    assert ours.tolist() == model.generate(**arguments).tolist()
    assert ours[0, 1] == 42


BOS_PROMPT = 1


def test_without_a_prompt_generation_starts_from_bos() -> None:
    model = shared_target()
    ours: Any = specdec.generate(model, drafter="suffix", max_new_tokens=NEW)
    assert ours.tolist() == model.generate(max_new_tokens=NEW).tolist()


def test_a_model_in_float64_samples_the_tokens_of_plain_generate() -> None:
    model = make_target().double()
    arguments: dict[str, Any] = {**prompt(1), **LOW, "max_new_tokens": NEW, **DETAILS}
    torch.manual_seed(2)
    plain: Any = model.generate(**arguments)
    torch.manual_seed(2)
    ours: Any = specdec.generate(model, drafter="early-exit:layer=3,depth=3,budget=8", **arguments)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert {step.dtype for step in (*ours.scores, *ours.logits)} == {torch.float32}
    assert_same_steps(ours.scores, plain.scores)
    assert_same_steps(ours.logits, plain.logits)


def test_a_prompt_of_32_bit_ids_gives_the_dtype_of_plain_generate() -> None:
    model = shared_target()
    ids = prompt(1)["input_ids"].int()
    plain, ours = model.generate(ids, max_new_tokens=5), specdec.generate(model, ids, max_new_tokens=5)
    assert isinstance(ours, Tensor)
    assert ours.dtype == plain.dtype
    assert ours.tolist() == plain.tolist()


# --- Where the options come from ----------------------------------------------------------------------------


def test_generation_config_goes_before_the_models_and_arguments_before_both() -> None:
    model = make_target()
    model.generation_config.repetition_penalty = 1.4
    model.generation_config.max_new_tokens = 7
    config = GenerationConfig(max_new_tokens=9, suppress_tokens=list(range(3, 40)), pad_token_id=PAD)
    inputs = prompt(1)
    cases: list[dict[str, Any]] = [{}, {"generation_config": config}]
    cases.append({"generation_config": config, "max_new_tokens": 11})
    for arguments in cases:
        before = copy.deepcopy(config), copy.deepcopy(model.generation_config)
        plain = model.generate(**inputs, **arguments)
        ours: Any = specdec.generate(model, **inputs, **arguments)
        assert ours.tolist() == plain.tolist()
        assert (config, model.generation_config) == before
        assert ours.shape[1] == 12 + arguments.get("max_new_tokens", 9 if arguments else 7)


def test_generation_config_may_ask_for_sampling_and_a_dict() -> None:
    model = shared_target()
    config = GenerationConfig(
        do_sample=True, temperature=0.5, top_k=10, max_new_tokens=NEW, return_dict_in_generate=True, output_scores=True
    )
    torch.manual_seed(0)
    plain: Any = model.generate(**prompt(1), generation_config=config)
    torch.manual_seed(0)
    ours: Any = specdec.generate(
        model, **prompt(1), generation_config=config, drafter=drafter_named("draft-model tree")
    )
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert_same_steps(ours.scores, plain.scores)
    assert ours.logits is None


@pytest.mark.parametrize("new_tokens", [1, 2, 3])
@pytest.mark.parametrize("name", CHOSEN)
def test_a_few_tokens_end_exactly_there(new_tokens: int, name: str) -> None:
    model = shared_target()
    for batch_size in (1, 3):
        arguments: dict[str, Any] = {**prompt(batch_size), "max_new_tokens": new_tokens}
        ours: Any = specdec.generate(model, drafter=drafter_named(name), **arguments)
        assert ours.tolist() == model.generate(**arguments).tolist()


@pytest.mark.parametrize("spec", ["early-exit:layer=2,depth=50", "early-exit:layer=2,depth=50,budget=60"])
def test_a_draft_deeper_than_the_room_left_is_cut(spec: str) -> None:
    model = shared_target()
    ours: Any = specdec.generate(model, **prompt(1), drafter=spec, max_new_tokens=3)
    assert ours.tolist() == model.generate(**prompt(1), max_new_tokens=3).tolist()


def test_a_deep_draft_model_is_cut_to_the_room_left() -> None:
    model = shared_target()
    drafter = DraftModelDrafter(target_of(perturbed(model)), depth=50, budget=60)
    ours: Any = specdec.generate(model, **prompt(3), drafter=drafter, max_new_tokens=3)
    assert ours.tolist() == model.generate(**prompt(3), max_new_tokens=3).tolist()


# --- Stopping ---------------------------------------------------------------------------------------------------


def stop_strings_in_the_text(batch_size: int = 1) -> tuple[list[Any], Tensor]:
    """Two strings of two characters that plain generation writes, one in the middle and one never."""
    text = shared_target().generate(**prompt(batch_size), max_new_tokens=NEW)
    return [tokenizer().decode(text[0, 18:20]), "zqzq"], text


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("eos", [None, [2]])
def test_stop_strings_stop_where_plain_generate_stops(batch_size: int, eos: list[int] | None) -> None:
    model = shared_target()
    strings, whole = stop_strings_in_the_text(batch_size)
    arguments: dict[str, Any] = {**prompt(batch_size), "max_new_tokens": NEW, "eos_token_id": eos}
    arguments |= {"stop_strings": strings, "tokenizer": tokenizer()}
    plain = model.generate(**arguments)
    for name in CHOSEN:
        ours: Any = specdec.generate(model, drafter=drafter_named(name), **arguments)
        assert ours.tolist() == plain.tolist(), name
    if batch_size == 1:
        assert plain.shape[1] < whole.shape[1]


@pytest.mark.parametrize("place", ["generation_config", "model", "overridden", "switched off"])
def test_stop_strings_come_from_any_config(place: str) -> None:
    model = make_target()
    strings, _ = stop_strings_in_the_text()
    arguments: dict[str, Any] = {**prompt(1), "tokenizer": tokenizer()}
    if place == "generation_config":
        arguments["generation_config"] = GenerationConfig(stop_strings=strings, max_new_tokens=NEW)
    else:
        model.generation_config.stop_strings = ["never", "this"] if place == "overridden" else strings
        arguments["max_new_tokens"] = NEW
    if place == "overridden":
        arguments["stop_strings"] = strings
    if place == "switched off":
        arguments["stop_strings"] = None
    plain = model.generate(**arguments)
    saved = copy.deepcopy(model.generation_config.stop_strings)
    ours: Any = specdec.generate(model, drafter="early-exit:layer=3", **arguments)
    assert ours.tolist() == plain.tolist()
    assert (plain.shape[1] == 12 + NEW) == (place == "switched off")
    assert model.generation_config.stop_strings == saved


def test_stop_strings_without_a_tokenizer_are_refused_as_in_transformers() -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        shared_target().generate(**prompt(1), stop_strings=["x"], max_new_tokens=2)
    with pytest.raises(specdec.SpecdecError, match="tokenizer"):
        specdec.generate(shared_target(), **prompt(1), stop_strings=["x"], max_new_tokens=2)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_max_time_stops_all_rows_after_the_token_that_was_too_late(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock advances by a second at each look; the criterion looks once per token, as in plain generate."""
    model = shared_target()

    def generate(how: Callable[..., Any], **extra: Any) -> Any:
        ticks = iter(range(10_000))
        with monkeypatch.context() as patched:
            patched.setattr(time, "time", lambda: float(next(ticks)))
            return how(**prompt(batch_size), max_new_tokens=NEW, max_time=6.5, **extra)

    plain = generate(model.generate)
    assert plain.shape[1] < 12 + NEW
    for name in CHOSEN:
        ours = generate(lambda **kw: specdec.generate(model, **kw), drafter=drafter_named(name))
        assert ours.tolist() == plain.tolist(), name


def test_criteria_and_processors_are_called_once_for_each_token() -> None:
    model = shared_target()
    for name in (*CHOSEN, "drawn chain", "drawn tree"):
        processor, criterion = CountsItsCalls(), StopsAtLength(1000)
        ours: Any = specdec.generate(
            model, **prompt(1), drafter=drafter_named(name), logits_processor=LogitsProcessorList([processor]),
            stopping_criteria=StoppingCriteriaList([criterion]), max_new_tokens=NEW, **LOW,
        )  # fmt: skip
        assert ours.shape[1] == 12 + NEW
        assert (processor.calls, criterion.calls) == (NEW, NEW), name


def test_a_criterion_gets_the_scores_so_far() -> None:
    seen: list[list[int]] = []

    class Watches(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
            seen[-1].append(len(scores))
            return torch.tensor([False])

    model = shared_target()
    arguments: dict[str, Any] = {**prompt(1), "max_new_tokens": 8, "stopping_criteria": [Watches()], **DETAILS}
    for how in (model.generate, lambda **kw: specdec.generate(model, **kw)):
        seen.append([])
        how(**arguments)
    assert seen[0] == seen[1] == list(range(1, 9))


# --- Streamers ---------------------------------------------------------------------------------------------------


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[Any] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        self.puts.append(value.tolist())

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("eos", [None, [11, 22, 33, 44, 55, 66]])
def test_a_streamer_gets_the_prompt_then_every_position_in_order(batch_size: int, eos: list[int] | None) -> None:
    model = shared_target()
    arguments: dict[str, Any] = {**prompt(batch_size), "max_new_tokens": NEW, "eos_token_id": eos}
    plain = Recorder()
    model.generate(**arguments, streamer=plain)
    for name in CHOSEN:
        ours = Recorder()
        specdec.generate(model, drafter=drafter_named(name), **arguments, streamer=ours)
        assert ours.puts == plain.puts, name
        assert ours.ends == plain.ends == 1


def test_a_text_streamer_prints_what_plain_generate_prints(capsys: pytest.CaptureFixture[str]) -> None:
    model = shared_target()
    model.generate(**prompt(1), max_new_tokens=NEW, streamer=TextStreamer(tokenizer(), skip_prompt=True))
    plain = capsys.readouterr().out
    specdec.generate(model, **prompt(1), max_new_tokens=NEW, streamer=TextStreamer(tokenizer(), skip_prompt=True))
    assert capsys.readouterr().out == plain
    assert len(plain) > 5


def test_an_iterator_streamer_can_be_read_from_another_thread() -> None:
    model, streamer = shared_target(), TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=30)
    arguments: dict[str, Any] = {**prompt(1), "max_new_tokens": NEW}
    thread = Thread(target=lambda: specdec.generate(model, drafter="suffix", streamer=streamer, **arguments))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer().decode(model.generate(**arguments)[0, 12:])


# --- Batches and return values ---------------------------------------------------------------------------------


def test_num_return_sequences_repeats_each_prompt() -> None:
    model = shared_target()
    ours: Any = specdec.generate(
        model, **prompt(3), **LOW, num_return_sequences=2, max_new_tokens=6, drafter="early-exit:layer=3"
    )
    assert ours.shape == (6, 18)
    assert ours[::2, :12].tolist() == ours[1::2, :12].tolist() == prompt(3)["input_ids"].tolist()
    torch.manual_seed(3)
    plain = model.generate(**prompt(1), **LOW, num_return_sequences=2, max_new_tokens=6, logits_processor=[Penalise()])
    torch.manual_seed(3)
    in_step: Any = specdec.generate(
        model, **prompt(1), **LOW, num_return_sequences=2, max_new_tokens=6, logits_processor=[Penalise()]
    )
    assert in_step.tolist() == plain.tolist()


@pytest.mark.parametrize("name", ["recycling", "early-exit tree", "draft-model tree"])
def test_scores_and_logits_of_a_batch_are_those_of_plain_generate_up_to_each_rows_end(name: str) -> None:
    model = shared_target()
    arguments: dict[str, Any] = {**prompt(3), "max_new_tokens": NEW, "eos_token_id": [11, 22, 33, 44, 55, 66]}
    arguments |= {"repetition_penalty": 1.3, **DETAILS}
    plain: Any = model.generate(**arguments)
    ours: Any = specdec.generate(model, drafter=drafter_named(name), **arguments)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert len(ours.scores) == len(plain.scores) == ours.sequences.shape[1] - 12
    for step in range(len(ours.scores)):
        for row in range(3):
            if step and ours.sequences[row, 12 + step - 1] in (PAD, 11, 22, 33, 44, 55, 66):
                assert bool((ours.logits[step][row] == 0).all())  # the row had ended
                continue
            torch.testing.assert_close(ours.scores[step][row], plain.scores[step][row], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.logits[step][row], plain.logits[step][row], atol=1e-4, rtol=1e-4)


def test_statistics_add_up_and_are_plain_json() -> None:
    model = shared_target()
    for name in CHOSEN:
        for batch_size in (1, 3):
            for eos in (None, [11, 22, 33, 44, 55, 66]):
                ours: Any = specdec.generate(
                    model, **prompt(batch_size), drafter=drafter_named(name), max_new_tokens=NEW, eos_token_id=eos,
                    return_dict_in_generate=True,
                )  # fmt: skip
                stats, texts = ours.stats, ours.sequences[:, 12:]
                emitted = [int((row != PAD).sum()) for row in texts]
                assert stats.new_tokens == sum(emitted) == sum(s.emitted for s in stats.steps) + batch_size
                # Every call adds the accepted tokens and next_token, except where a row ended on an accepted one.
                ended_inside = sum(s.emitted == s.accepted for s in stats.steps)
                assert stats.new_tokens - batch_size == stats.accepted + len(stats.steps) - ended_inside
                assert ended_inside <= batch_size
                if eos is None and batch_size == 1:  # rows of a batch share the depth of the row with most room
                    assert ended_inside == 0
                summary = json.loads(json.dumps(stats.summary()))
                assert summary["new_tokens"] == stats.new_tokens
                assert all(0 <= alpha <= 1 for alpha in summary["alpha"])


# --- A cache of the user's own ---------------------------------------------------------------------------------


def sliding_target() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.15, use_sliding_window=True, sliding_window=8,
            layer_types=["full_attention", "sliding_attention"] * 2, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {"llama": make_target, "qwen2 with windows": sliding_target}


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize("filled_by", ["forward", "generate", "nothing"])
def test_a_cache_passed_in_is_used_and_left_as_plain_generate_leaves_it(
    which: str, with_config: bool, filled_by: str
) -> None:
    model = MODELS[which]()
    ids = prompt(1, length=30)["input_ids"]

    def filled() -> DynamicCache:
        cache = DynamicCache(config=model.config) if with_config else DynamicCache()
        if filled_by == "forward":
            with torch.no_grad():
                model(ids[:, :20], past_key_values=cache)
        if filled_by == "generate":
            model.generate(ids[:, :11], past_key_values=cache, max_new_tokens=2)
            assert cache.get_seq_length() == 12
        return cache

    start = ids if filled_by != "generate" else model.generate(ids[:, :11], max_new_tokens=2)
    theirs, ours = filled(), filled()
    plain = model.generate(start, past_key_values=theirs, max_new_tokens=NEW)
    spec: Any = specdec.generate(
        model, start, past_key_values=ours, max_new_tokens=NEW, drafter="early-exit:layer=3,depth=3,budget=6"
    )
    assert spec.tolist() == plain.tolist()
    assert ours.get_seq_length() == theirs.get_seq_length() == plain.shape[1] - 1
    layers: Any = zip(ours.layers, theirs.layers, strict=True)
    for mine, other in layers:
        torch.testing.assert_close(mine.keys, other.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.values, other.values, atol=1e-4, rtol=1e-4)
    more = model.generate(plain, past_key_values=theirs, max_new_tokens=9)
    assert model.generate(plain, past_key_values=ours, max_new_tokens=9).tolist() == more.tolist()


@pytest.mark.parametrize("which", MODELS)
def test_the_returned_cache_continues_in_plain_and_in_speculative_generation(which: str) -> None:
    model = MODELS[which]()
    whole = model.generate(**prompt(1), max_new_tokens=30)
    for first in ("suffix", "early-exit:layer=2,depth=3,budget=6"):
        for second in (model.generate, lambda *a, **kw: specdec.generate(model, *a, **kw)):
            ours: Any = specdec.generate(
                model, **prompt(1), drafter=first, max_new_tokens=15, return_dict_in_generate=True
            )
            assert ours.past_key_values.get_seq_length() == 12 + 15 - 1
            rest: Any = second(ours.sequences, past_key_values=ours.past_key_values, max_new_tokens=15)
            assert rest.tolist() == whole.tolist()


@pytest.mark.parametrize("name", CHOSEN)
def test_only_the_new_tokens_may_be_given_with_a_cache_and_a_whole_mask(name: str) -> None:
    model = shared_target()
    inputs = prompt(3, length=20)

    def run(how: Callable[..., Any], **extra: Any) -> Any:
        cache = DynamicCache()
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, :14]
        with torch.no_grad():
            model(
                inputs["input_ids"][:, :14], attention_mask=inputs["attention_mask"][:, :14], position_ids=positions,
                past_key_values=cache,
            )  # fmt: skip
        return how(
            inputs["input_ids"][:, 14:], attention_mask=inputs["attention_mask"], past_key_values=cache,
            max_new_tokens=NEW, **extra,
        )  # fmt: skip

    plain, drafter = run(model.generate), drafter_named(name)
    ours = run(lambda *a, **kw: specdec.generate(model, *a, **kw), drafter=drafter)
    assert ours.tolist() == plain.tolist()
    if isinstance(drafter, SuffixDrafter):  # it has seen the given tokens of every row, and no padding
        seen = [row.text[:6] for row in (*drafter._finished, *drafter._rows)]
        assert sorted(seen) == sorted(inputs["input_ids"][:, 14:].tolist())


def test_a_batch_cache_is_returned_with_every_row_in_place() -> None:
    model = shared_target()
    arguments: dict[str, Any] = {**prompt(3), "max_new_tokens": NEW, "return_dict_in_generate": True}
    plain: Any = model.generate(**arguments)
    ours: Any = specdec.generate(model, drafter=drafter_named("draft-model tree"), **arguments)
    assert ours.past_key_values.get_seq_length() == 12 + NEW - 1
    for mine, theirs in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
        for row, padding in enumerate((0, 5, 2)):
            torch.testing.assert_close(mine.keys[row, :, padding:], theirs.keys[row, :, padding:], atol=1e-4, rtol=1e-4)


# --- Randomness -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CHOSEN, "drawn chain", "drawn tree"])
def test_a_generator_makes_sampling_repeatable_and_leaves_the_global_one_alone(name: str) -> None:
    model, texts = shared_target(), []
    for seed in (7, 7, 8):
        before = torch.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        ours: Any = specdec.generate(
            model, **prompt(3), drafter=drafter_named(name), generator=generator, do_sample=True, temperature=0.9,
            max_new_tokens=NEW,
        )  # fmt: skip
        texts.append(ours.tolist())
        assert torch.equal(torch.get_rng_state(), before)
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]  # 60 tokens of two seeds: equal with a chance below 1e-6


@pytest.mark.parametrize("rule", ["walk", "block", "traversal", "recursive"])
def test_every_rule_serves_drawn_children_to_the_last_token(rule: Any) -> None:
    name = "drawn chain" if rule == "block" else "drawn tree"
    ours: Any = specdec.generate(
        shared_target(), **prompt(3), drafter=drafter_named(name), rule=rule, **LOW, max_new_tokens=NEW
    )
    assert ours.shape == (3, 12 + NEW)


def test_inference_mode_leaves_nothing_behind_that_breaks_the_next_call() -> None:
    model, drafter = shared_target(), drafter_named("recycling")
    plain = model.generate(**prompt(1), max_new_tokens=NEW)
    with torch.inference_mode():
        inside: Any = specdec.generate(model, **prompt(1), drafter=drafter, max_new_tokens=NEW)
    outside: Any = specdec.generate(model, **prompt(1), drafter=drafter, max_new_tokens=NEW)
    assert inside.tolist() == outside.tolist() == plain.tolist()
