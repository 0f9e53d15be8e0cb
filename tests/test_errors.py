"""Bad input gives one clear line that says what to do; every such error is a SpecdecError and so a ValueError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import specdec
from specdec.drafters.directory import DrafterJson, fingerprint, write_drafter_json
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.lookup import LookupDrafter
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import DrafterMismatch, SpecdecError, UnknownDrafter, UnsupportedGeneration, UnsupportedModel
from specdec.probe import target_of
from tests.tiny import PAD, drafter_named, make_target, perturbed, prompt, shared_draft, shared_target


def generate(**extra: Any) -> Any:
    arguments: dict[str, Any] = {**prompt(1), "max_new_tokens": 3, **extra}
    return specdec.generate(shared_target(), **arguments)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert isinstance(error.value, SpecdecError)
    assert isinstance(error.value, ValueError)
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


# --- Drafter specifications ------------------------------------------------------------------------------------

BAD_SPECS = {
    "nonsense": "known word",
    "lookpu": "did you mean 'lookup'",
    "no/such/path": "existing path",
    "lookup:ngram": "key=value",
    "lookup:": "key=value",
    "lookup:ngram=": "key=value",
    "lookup:ngram=x": "not of type int",
    "lookup:ngram=1.5": "not of type int",
    "lookup:foo=1": "it has: ngram, tokens, min_ngram",
    "lookup:ngram=2,ngram=3": "given twice",
    "lookup:min-ngram=2,min_ngram=2": "given twice",
    "lookup:ngram=0": "min_ngram <= ngram",
    "lookup:ngram=2,min_ngram=3": "min_ngram <= ngram",
    "lookup:tokens=0": "tokens >= 1",
    "suffix:budget=0": "budget >= 1",
    "suffix:branches=0": "branches >= 1",
    "suffix:min_match=0": "min_match >= 1",
    "suffix:factor=0": "factor > 0",
    "suffix:factor=nan": "factor > 0",
    "suffix:factor=inf": "factor > 0",
    "suffix:min_share=2": "min_share <= 1",
    "suffix:remember=-1": "remember >= 0",
    "recycling:budget=0": "budget >= 1",
    "recycling:depth=0": "depth >= 1",
    "recycling:successors=0": "successors >= 1",
    "recycling:remember=maybe": "not of type bool",
    "early-exit:layer=0": "1 <= layer < 4",
    "early-exit:layer=4": "1 <= layer < 4",
    "early-exit:budget=0": "budget >= 1",
    "early-exit:depth=-1": "depth >= 1",
    "early-exit:children=lost": '"chosen" or "drawn"',
    "early-exit:target=1": "no option 'target'",
}


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_a_bad_specification_is_explained(spec: str) -> None:
    with pytest.raises(UnknownDrafter) as error:
        generate(drafter=spec)
    assert BAD_SPECS[spec] in one_line(error)


@pytest.mark.parametrize("bad", [5, 1.5, ["lookup"], LookupDrafter, object()])
def test_an_object_that_is_no_drafter_is_refused(bad: Any) -> None:
    with pytest.raises(UnknownDrafter, match="got") as error:
        generate(drafter=bad)
    one_line(error)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: LookupDrafter(ngram=0), "min_ngram <= ngram"),
        (lambda: SuffixDrafter(budget=0), "budget >= 1"),
        (lambda: RecyclingDrafter(100, budget=0), "budget >= 1"),
        (lambda: DraftModelDrafter(target_of(shared_draft()), budget=0), "budget >= 1"),
        (lambda: DraftModelDrafter(target_of(shared_draft()), depth=0), "depth >= 1"),
        (lambda: DraftModelDrafter(target_of(shared_draft()), children="x"), '"chosen" or "drawn"'),
    ],
)
def test_drafters_check_their_own_arguments(make: Any, expected: str) -> None:
    with pytest.raises(UnknownDrafter) as error:
        make()
    assert expected in one_line(error)


# --- Drafter directories ---------------------------------------------------------------------------------------


def test_a_directory_without_a_drafter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownDrafter, match=r"neither drafter.json nor a model's config.json") as error:
        generate(drafter=str(tmp_path))
    one_line(error)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownDrafter, match="existing path") as error:
        generate(drafter=tmp_path / "absent")
    one_line(error)


def test_a_directory_with_half_a_model_is_refused(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UnknownDrafter, match="cannot load a model from") as error:
        generate(drafter=tmp_path)
    one_line(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not readable JSON"),
        ("[]", "must be an object"),
        ("{}", "with 'kind'"),
        ('{"kind": "lookup", "colour": 1}', "otherwise only"),
        ('{"kind": "oracle"}', "known kinds are draft-model"),
        ('{"kind": 3}', "'kind' is a string"),
        ('{"kind": "lookup", "options": []}', "are objects"),
        ('{"kind": "lookup", "format_version": 99, "news": 1}', "format version 99"),
        ('{"kind": "lookup", "options": {"ngram": "x"}}', "not of type int"),
        ('{"kind": "draft-model"}', "cannot load a model from"),
    ],
)
def test_a_malformed_drafter_json_is_explained(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "drafter.json").write_text(text)
    with pytest.raises(UnknownDrafter) as error:
        generate(drafter=tmp_path)
    assert expected in one_line(error)


def test_a_drafter_directory_of_another_target_is_refused_with_every_difference(tmp_path: Path) -> None:
    other = make_target(hidden_size=16, num_hidden_layers=3)
    write_drafter_json(tmp_path, DrafterJson("lookup", target=fingerprint(other)))
    with pytest.raises(DrafterMismatch) as error:
        generate(drafter=tmp_path)
    message = one_line(error)
    assert "hidden_size 32 (drafter: 16)" in message
    assert "num_layers 4 (drafter: 3)" in message


def test_another_tokenizer_is_another_target(tmp_path: Path) -> None:
    model = make_target()
    model.save_pretrained(tmp_path / "target")
    (tmp_path / "target" / "tokenizer.json").write_text("{}")
    model.config.name_or_path = model.name_or_path = str(tmp_path / "target")
    write_drafter_json(tmp_path / "drafter", DrafterJson("lookup", target=fingerprint(model)))
    assert isinstance(specdec.load_drafter(tmp_path / "drafter", model), LookupDrafter)
    (tmp_path / "target" / "tokenizer.json").write_text('{"another": 1}')
    with pytest.raises(DrafterMismatch, match="tokenizer"):
        specdec.load_drafter(tmp_path / "drafter", model)


def test_an_older_drafter_json_that_lacks_fields_still_loads(tmp_path: Path) -> None:
    (tmp_path / "drafter.json").write_text(json.dumps({"kind": "suffix", "options": {"budget": 3}}))
    drafter = specdec.load_drafter(tmp_path, shared_target())
    assert isinstance(drafter, SuffixDrafter)
    assert drafter.budget == 3


# --- Drafters that do not belong to the target -------------------------------------------------------------------


def test_a_draft_model_with_another_vocabulary_is_refused() -> None:
    small = make_target(vocab_size=90)
    for drafter in (small, DraftModelDrafter(target_of(small))):
        with pytest.raises(DrafterMismatch, match="vocabulary of 90 tokens, the target one of 100") as error:
            generate(drafter=drafter)
        one_line(error)


def test_a_recycling_table_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(DrafterMismatch, match="90 tokens, the target one of 100"):
        generate(drafter=RecyclingDrafter(90))


def test_an_early_exit_of_another_model_is_refused() -> None:
    other = specdec.load_drafter("early-exit:layer=2", make_target(seed=9))
    with pytest.raises(DrafterMismatch, match="another model"):
        generate(drafter=other)


def test_the_target_is_no_drafter_for_itself() -> None:
    with pytest.raises(DrafterMismatch, match="the target itself"):
        generate(drafter=shared_target())


def test_a_recurrent_draft_model_is_refused() -> None:
    config = MambaConfig(vocab_size=100, hidden_size=16, state_size=4, num_hidden_layers=2)
    with pytest.raises(UnsupportedModel, match="running state"):
        generate(drafter=MambaForCausalLM(config))


# --- Models ------------------------------------------------------------------------------------------------------


def test_an_encoder_decoder_model_is_refused_by_name() -> None:
    model: Any = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    for call in (
        lambda: specdec.generate(model, torch.tensor([[5, 6]]), max_new_tokens=2),
        lambda: specdec.attach(model, "lookup"),
    ):
        with pytest.raises(UnsupportedModel, match=r"T5ForConditionalGeneration.*plain model.generate") as error:
            call()
        one_line(error)
    assert "generate" not in model.__dict__


def test_a_recurrent_model_is_refused_by_name() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2))
    with pytest.raises(UnsupportedModel, match=r"MambaForCausalLM.*plain model.generate") as error:
        specdec.generate(model, torch.tensor([[5, 6]]), max_new_tokens=2)
    one_line(error)


# --- Options -----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "plain model.generate"),
    "sampling with beams": ({"num_beams": 2, "do_sample": True}, "plain model.generate"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "plain model.generate"),
    "dola": ({"dola_layers": "high"}, "plain model.generate"),
    "forced words": ({"force_words_ids": [[5]]}, "plain model.generate"),
    "no cache": ({"use_cache": False}, "leave use_cache on"),
    "static cache": ({"cache_implementation": "static"}, "drop the option"),
    "paged cache": ({"cache_implementation": "paged"}, "plain model.generate"),
    "chunked prefill": ({"prefill_chunk_size": 4}, "drop the option"),
    "attentions": ({"output_attentions": True}, "plain model.generate"),
    "hidden states": ({"output_hidden_states": True}, "plain model.generate"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, 'drafter="lookup"'),
    "assistant early exit": ({"assistant_early_exit": 2}, 'drafter="early-exit'),
    "mtp": ({"use_mtp": True}, "plain model.generate"),
    "token healing": ({"token_healing": True}, "heal_tokens"),
    "custom generate": ({"custom_generate": len}, "itself a custom_generate"),
    "another model argument": ({"labels": torch.zeros(1, 12, dtype=torch.long)}, "labels"),
    "other positions": ({"position_ids": torch.arange(5, 17)[None]}, "drop position_ids"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_cannot_be_honoured_is_refused_with_its_alternative(option: str) -> None:
    arguments, alternative = REFUSED[option]
    with pytest.raises(UnsupportedGeneration) as error:
        generate(**arguments)
    assert alternative in one_line(error)


@pytest.mark.parametrize("option", ["prompt lookup", "assistant early exit", "beams", "no cache"])
def test_an_option_in_a_generation_config_is_refused_too(option: str) -> None:
    arguments, _ = REFUSED[option]
    with pytest.raises(UnsupportedGeneration) as error:
        generate(generation_config=GenerationConfig(**arguments, pad_token_id=PAD))
    assert "specdec" in one_line(error)


def test_an_assistant_model_is_refused_in_favour_of_a_drafter() -> None:
    with pytest.raises(UnsupportedGeneration, match="pass the draft model as drafter="):
        generate(assistant_model=shared_draft())


def test_embeddings_in_place_of_ids_are_refused() -> None:
    with pytest.raises(UnsupportedGeneration, match="pass input_ids"):
        specdec.generate(shared_target(), inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2)


def test_a_static_cache_is_refused() -> None:
    cache = StaticCache(shared_target().config, max_cache_len=40)
    with pytest.raises(UnsupportedGeneration, match="pass a DynamicCache"):
        generate(past_key_values=cache)


def test_a_cache_that_holds_the_whole_prompt_is_refused() -> None:
    output: Any = generate(return_dict_in_generate=True)
    with pytest.raises(UnsupportedGeneration, match="at least one token"):
        generate(past_key_values=output.past_key_values)


@pytest.mark.parametrize("mask", [[1] * 10 + [0] * 2, [1] * 5 + [0] * 2 + [1] * 5, [0] * 12])
def test_padding_that_is_not_on_the_left_is_refused(mask: list[int]) -> None:
    with pytest.raises(UnsupportedGeneration, match="left padding") as error:
        generate(attention_mask=torch.tensor([mask]))
    one_line(error)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_an_empty_prompt_is_refused(shape: tuple[int, int]) -> None:
    for keyword in ("inputs", "input_ids"):
        arguments: dict[str, Any] = {keyword: torch.zeros(shape, dtype=torch.long)}
        with pytest.raises(UnsupportedGeneration, match="prompt is empty") as error:
            specdec.generate(shared_target(), **arguments, max_new_tokens=2)
        one_line(error)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"max_new_tokens": None, "max_length": 12},
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "temperature": -1.0},
        {"top_kk": 4},
        {"num_return_sequences": 2},
    ],
)
def test_what_transformers_refuses_is_refused_with_its_own_words(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as plain:  # noqa: PT011  both messages are compared
        shared_target().generate(**{**prompt(1), "max_new_tokens": 3, **arguments})
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        generate(**arguments)
    assert str(ours.value) == str(plain.value)


@pytest.mark.parametrize("rule", ["block", "traversal", "recursive", "magic"])
def test_a_rule_that_would_be_lossy_for_these_children_is_refused(rule: Any) -> None:
    with pytest.raises(UnsupportedGeneration, match="rule") as error:
        generate(drafter="early-exit:layer=3", rule=rule, do_sample=True, max_new_tokens=8)
    one_line(error)


def test_a_rule_that_scores_rejected_nodes_is_refused_to_processors_with_state() -> None:
    with pytest.raises(UnsupportedGeneration, match="with state"):
        generate(
            drafter=drafter_named("drawn tree"), rule="traversal", do_sample=True, logits_processor=[lambda ids, s: s],
            max_new_tokens=8,
        )  # fmt: skip


def test_rows_that_end_early_need_a_pad_token() -> None:
    from transformers.generation.stopping_criteria import EosTokenCriteria

    model = make_target(pad_token_id=None)
    with pytest.raises(SpecdecError, match="pad_token_id"):
        specdec.generate(model, **prompt(1), max_new_tokens=2, stopping_criteria=[EosTokenCriteria([5])])


# --- The model's own limit --------------------------------------------------------------------------------------


def learned_positions(limit: int) -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=limit, initializer_range=0.15,
            bos_token_id=1, eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip


DRAFTERS = ["lookup", "recycling", "early-exit:layer=1,depth=6,budget=12", "early-exit:layer=1,depth=6"]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_text_up_to_the_last_learned_position_is_exact(drafter: str) -> None:
    model = learned_positions(24)
    for batch_size in (1, 3):
        arguments: dict[str, Any] = {**prompt(batch_size), "max_new_tokens": 12}
        ours: Any = specdec.generate(model, drafter=drafter, **arguments)
        assert ours.tolist() == model.generate(**arguments).tolist()


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_text_that_ends_before_the_last_learned_position_may_ask_for_more(drafter: str) -> None:
    """Trees near the limit must not look up positions that the text itself never reaches."""
    model = learned_positions(24)
    text = model.generate(**prompt(1), max_new_tokens=13)
    arguments: dict[str, Any] = {**prompt(1), "max_new_tokens": 40, "eos_token_id": int(text[0, -1])}
    plain = model.generate(**arguments)
    ours: Any = specdec.generate(model, drafter=drafter, **arguments)
    assert ours.tolist() == plain.tolist()


def test_text_beyond_the_last_learned_position_is_refused_and_names_the_limit() -> None:
    model = learned_positions(24)
    with pytest.raises(IndexError):
        model.generate(**prompt(1), max_new_tokens=20)
    for drafter in (*DRAFTERS, None):
        with pytest.raises(UnsupportedGeneration, match="24 positions") as error:
            specdec.generate(model, **prompt(1), drafter=drafter, max_new_tokens=20)
        one_line(error)
    with pytest.raises(UnsupportedGeneration, match="24 positions"):
        specdec.generate(model, **prompt(1, length=30), max_new_tokens=2)


@pytest.mark.parametrize("drafter", ["lookup", "early-exit:layer=3,depth=4,budget=8"])
def test_a_rotary_model_goes_on_beyond_its_limit_as_in_transformers(drafter: str) -> None:
    model = make_target(max_position_embeddings=16)
    for arguments in (prompt(1), prompt(3), prompt(1, length=20)):
        ours: Any = specdec.generate(model, drafter=drafter, **arguments, max_new_tokens=12)
        assert ours.tolist() == model.generate(**arguments, max_new_tokens=12).tolist()


@pytest.mark.parametrize("children", ["chosen", "drawn"])
def test_a_draft_model_with_a_shorter_limit_stops_drafting_there(children: str) -> None:
    target, draft = learned_positions(64), perturbed(learned_positions(20), amount=0.0)
    for batch_size in (1, 3):
        arguments: dict[str, Any] = {**prompt(batch_size), "max_new_tokens": 30}
        drafter = DraftModelDrafter(target_of(draft), depth=4, budget=6, children=children)
        ours: Any = specdec.generate(target, drafter=drafter, **arguments, return_dict_in_generate=True)
        assert ours.sequences.tolist() == target.generate(**arguments).tolist()
        assert ours.stats.drafted > 0
        assert ours.stats.steps[-1].drafted == 0
