"""attach and detach: a model's own generate() becomes speculative, and nothing else about the model changes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, StoppingCriteria, pipeline
from transformers.generation.streamers import BaseStreamer

import specdec
from specdec.drafters.lookup import LookupDrafter
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree
from tests.tiny import make_target, perturbed, prompt, tokenizer

NEW = 14


@pytest.fixture
def model() -> Any:
    return make_target()


def text_of(model: Any, **extra: Any) -> list[list[int]]:
    return model.generate(**prompt(1), max_new_tokens=NEW, **extra).tolist()


def steps_of(model: Any, **extra: Any) -> Any:
    """Statistics of a generation, None when it was a plain one."""
    output = model.generate(**prompt(1), max_new_tokens=NEW, return_dict_in_generate=True, **extra)
    return getattr(output, "stats", None)


def test_an_attached_model_generates_speculatively_and_the_same_text(model: Any) -> None:
    plain = text_of(model)
    assert specdec.attach(model, perturbed(model)) is model
    assert text_of(model) == plain
    assert steps_of(model).accepted > 0
    assert specdec.detach(model) is model
    assert text_of(model) == plain
    assert steps_of(model) is None


def test_detach_leaves_no_trace(model: Any) -> None:
    before = set(model.__dict__)
    specdec.attach(model, "suffix")
    text_of(model)
    specdec.detach(model)
    assert set(model.__dict__) == before
    assert model.generate.__func__ is type(model).generate


def test_detaching_an_unattached_model_does_nothing(model: Any) -> None:
    plain = text_of(model)
    specdec.detach(model)
    assert text_of(model) == plain


def test_attaching_again_replaces_the_drafter(model: Any) -> None:
    specdec.attach(model, "lookup:tokens=2")
    specdec.attach(model, "early-exit:layer=3,depth=3")
    assert {step.drafted for step in steps_of(model).steps} >= {3}
    specdec.detach(model)
    assert steps_of(model) is None


@pytest.mark.parametrize("bad", ["nonsense", "early-exit:layer=9", "lookup:foo=1", 5, LookupDrafter])
def test_attaching_what_is_no_drafter_leaves_the_model_as_it_was(model: Any, bad: Any) -> None:
    plain, before = text_of(model), set(model.__dict__)
    with pytest.raises(specdec.UnknownDrafter):
        specdec.attach(model, bad)
    assert set(model.__dict__) == before
    specdec.attach(model, "early-exit:layer=3,depth=2")
    with pytest.raises(specdec.UnknownDrafter):
        specdec.attach(model, bad)
    assert text_of(model) == plain
    assert {step.drafted for step in steps_of(model).steps} >= {2}


def test_keyword_arguments_override_per_call(model: Any) -> None:
    specdec.attach(model, "early-exit:layer=3,depth=3")
    assert max(step.drafted for step in steps_of(model, drafter="early-exit:layer=3,depth=2").steps) == 2
    assert max(step.drafted for step in steps_of(model, drafter=None).steps) == 0
    assert max(step.drafted for step in steps_of(model).steps) == 3
    draws = [text_of(model, do_sample=True, generator=torch.Generator().manual_seed(s)) for s in (4, 4, 5)]
    assert draws[0] == draws[1] != draws[2]


def test_arguments_may_be_given_by_position(model: Any) -> None:
    config = GenerationConfig(max_new_tokens=5, pad_token_id=0)
    ids = prompt(1)["input_ids"]
    plain = model.generate(ids, config).tolist()
    specdec.attach(model, "suffix")
    assert model.generate(ids, config).tolist() == plain
    with pytest.raises(TypeError, match="generation_config"):
        model.generate(ids, config, generation_config=config)


def test_arguments_that_transformers_refuses_are_refused(model: Any) -> None:
    refused: list[dict[str, Any]] = [
        {"max_new_tokenz": 3},
        {"max_new_tokens": 0},
        {"max_length": 5},
        {"max_new_tokens": 3, "num_return_sequences": 2},
        {"max_new_tokens": 3, "do_sample": True, "temperature": -1.0},
        {"max_new_tokens": 3, "attention_mask": torch.ones(1, 1, 12, 12)},
        {"max_new_tokens": 3, "stop_strings": ["x"]},
    ]
    ids = prompt(1)["input_ids"]
    for arguments in refused:
        with pytest.raises(ValueError) as plain:  # noqa: PT011  both messages are compared
            model.generate(ids, **arguments)
        specdec.attach(model, "suffix")
        with pytest.raises(ValueError) as ours:  # noqa: PT011
            model.generate(ids, **arguments)
        specdec.detach(model)
        if "stop_strings" not in arguments:
            assert str(ours.value) == str(plain.value)


def test_a_pipeline_on_an_attached_model_writes_the_same_text(model: Any) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    arguments: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    for prompts in ("for x in y", ["for x in y", "a", "return"]):
        plain = generator(prompts, batch_size=3, **arguments)
        specdec.attach(model, "early-exit:layer=3,depth=3,budget=6")
        calls: list[int] = []
        hook = model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        ours = generator(prompts, batch_size=3, **arguments)
        hook.remove()
        specdec.detach(model)
        assert ours == plain
        assert len(calls) > NEW  # the early exits and their resumptions are forwards of the model, too


def test_a_pipeline_stops_at_a_string(model: Any) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    whole = generator("for x in y", max_new_tokens=NEW, do_sample=False, return_full_text=False)[0]["generated_text"]
    arguments: dict[str, Any] = {"stop_strings": [whole[5:7]], "tokenizer": tokenizer(), "do_sample": False}
    arguments |= {"max_new_tokens": NEW}
    plain = generator("for x in y", **arguments)
    specdec.attach(model, "suffix")
    assert generator("for x in y", **arguments) == plain


def test_two_models_are_attached_independently(model: Any) -> None:
    other = make_target(seed=5)
    plain = text_of(model), text_of(other)
    specdec.attach(model, "early-exit:layer=3,depth=3")
    specdec.attach(other, "early-exit:layer=2,depth=2")
    assert (text_of(model), text_of(other)) == plain
    specdec.detach(model)
    assert steps_of(model) is None
    assert max(step.drafted for step in steps_of(other).steps) == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("drafter", ["early-exit:layer=3,depth=3", "draft model"])
def test_a_copy_of_an_attached_model_decodes_with_its_own_weights(model: Any, how: str, drafter: str) -> None:
    specdec.attach(model, perturbed(model) if drafter == "draft model" else drafter)
    plain = text_of(model)
    twin: Any = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    changed = text_of(twin)
    assert steps_of(twin).tau >= 1
    assert text_of(model) == plain
    assert text_of(specdec.detach(twin)) == changed != plain
    assert steps_of(model) is not None


def test_an_attached_model_saves_and_loads_as_the_model_alone(model: Any, tmp_path: Path) -> None:
    plain = text_of(model)
    names = set(model.state_dict())
    specdec.attach(model, perturbed(model))
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert steps_of(loaded) is None
    assert text_of(loaded) == plain


def test_a_model_in_training_mode_stays_in_it(model: Any) -> None:
    plain = text_of(model.train())
    specdec.attach(model, "early-exit:layer=3,depth=3")
    assert text_of(model) == plain
    assert model.training
    assert all(module.training for module in model.modules())


def test_gradients_and_other_calls_of_an_attached_model_are_its_own(model: Any) -> None:
    specdec.attach(model, "early-exit:layer=3,depth=3")
    text_of(model)
    ids = prompt(1)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_specdec_generate_on_an_attached_model_takes_its_own_drafter(model: Any) -> None:
    specdec.attach(model, "early-exit:layer=3,depth=3")
    output: Any = specdec.generate(model, **prompt(1), drafter=None, max_new_tokens=NEW, return_dict_in_generate=True)
    assert output.stats.drafted == 0


def test_models_are_not_kept_alive() -> None:
    model = make_target()
    specdec.generate(model, **prompt(1), drafter="early-exit:layer=3", max_new_tokens=3)
    specdec.attach(model, perturbed(model))
    text_of(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# --- Exceptions in the middle ----------------------------------------------------------------------------------


class Trouble(Exception):
    pass


class FailsLater:
    """Counts down over its calls, then raises."""

    def __init__(self, error: type[BaseException], calls: int = 4) -> None:
        self.error, self.left = error, calls

    def count(self) -> None:
        self.left -= 1
        if not self.left:
            raise self.error("in the middle")


class FailingProcessor(FailsLater, LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.count()
        return scores


class FailingCriterion(FailsLater, StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.count()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class FailingStreamer(FailsLater, BaseStreamer):
    def put(self, value: Tensor) -> None:
        self.count()

    def end(self) -> None:
        raise AssertionError("the stream did not end")


class FailingDrafter(FailsLater, LookupDrafter):
    def __init__(self, error: type[BaseException]) -> None:
        FailsLater.__init__(self, error)
        LookupDrafter.__init__(self)

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        self.count()
        return super().propose(root, params, chooser, room)


@pytest.fixture(params=["processor", "criterion", "streamer", "drafter", "lower layer", "upper layer"])
def failing(request: pytest.FixtureRequest, model: Any) -> Any:
    """(arguments that make a generation fail in its middle, the error)."""
    error = KeyboardInterrupt if request.param in ("streamer", "lower layer") else Trouble
    arguments: dict[str, Any] = {
        "processor": lambda: {"logits_processor": [FailingProcessor(error)]},
        "criterion": lambda: {"stopping_criteria": [FailingCriterion(error)]},
        "streamer": lambda: {"streamer": FailingStreamer(error)},
        "drafter": lambda: {"drafter": FailingDrafter(error)},
        "lower layer": dict,
        "upper layer": dict,
    }[request.param]()
    handle: Any = None
    if "layer" in request.param:
        counter = FailsLater(error, calls=9)
        layer = model.model.layers[0 if request.param == "lower layer" else 3]
        handle = [layer.register_forward_hook(lambda *_: counter.count())]
        arguments["_remove"] = lambda: handle[0].remove()
    return arguments, error


@pytest.mark.parametrize("batch_size", [1, 3])
def test_after_an_exception_the_model_is_whole_and_the_next_text_is_right(
    model: Any, failing: Any, batch_size: int
) -> None:
    arguments, error = failing
    remove = arguments.pop("_remove", lambda: None)
    specdec.attach(make_target(), "suffix")  # the probe of this configuration is known from here on
    layers, modules = model.model.layers, [id(module) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    config = copy.deepcopy(model.generation_config)
    drafter = specdec.load_drafter("early-exit:layer=2,depth=3,budget=6", model)
    specdec.attach(model, "lookup")
    call = {"drafter": drafter, **prompt(batch_size), "max_new_tokens": 30, **arguments}
    with pytest.raises(error, match="in the middle"):
        model.generate(**call)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    remove()
    assert model.model.layers is layers
    assert [id(module) for module in model.modules()] == modules
    assert model.generation_config == config
    again = model.generate(**prompt(batch_size), drafter=drafter, max_new_tokens=NEW).tolist()
    specdec.detach(model)
    assert model.generate.__func__ is type(model).generate
    assert again == model.generate(**prompt(batch_size), max_new_tokens=NEW).tolist()
