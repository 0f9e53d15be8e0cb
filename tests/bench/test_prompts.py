"""Prompts: templates and raw text, exactly one BOS, the same text tomorrow, and what was sent on record."""

from __future__ import annotations

import copy
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from specdec.bench.prompts import PromptBuilder
from specdec.errors import SpecdecError
from tests.tiny import BOS, tokenizer

PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + PLAIN
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
]


def tokenizer_with(template: Any = None, *, adds_bos: bool = False) -> Any:
    """One that begins every text with a BOS, as Llama's does, or does not, as Qwen's."""
    made = copy.deepcopy(tokenizer())
    if adds_bos:
        made.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    made.chat_template = template
    assert (made("a")["input_ids"][0] == BOS) == adds_bos
    return made


def says(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- One BOS ---------------------------------------------------------------------------------------------------


def test_rendering_and_then_tokenizing_with_special_tokens_gives_two_bos() -> None:
    """The mistake that the next test is about, so that it is known to find it."""
    made = tokenizer_with(WITH_BOS, adds_bos=True)
    text: Any = made.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert made(text)["input_ids"][:2] == [BOS, BOS]


@pytest.mark.parametrize("template", [WITH_BOS, PLAIN, "{{ bos_token }}" + WITH_BOS])
@pytest.mark.parametrize("given", ["by the tokenizer", "directly"])
def test_a_tokenizer_that_begins_texts_with_a_bos_gets_exactly_one(template: str, given: str) -> None:
    if given == "directly":
        prompt = PromptBuilder(tokenizer_with(adds_bos=True), template).build(CHAT)
    else:
        prompt = PromptBuilder(tokenizer_with(template, adds_bos=True)).build(CHAT)
    assert prompt.kind == "chat"
    assert prompt.input_ids[0] == BOS
    assert prompt.input_ids.count(BOS) == 1


def test_a_template_with_its_own_bos_gives_the_ids_of_transformers() -> None:
    for adds_bos in (True, False):
        made = tokenizer_with(WITH_BOS, adds_bos=adds_bos)
        expected: Any = made.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
        assert PromptBuilder(made).build(CHAT).input_ids == expected["input_ids"]


def test_a_tokenizer_without_a_bos_gets_none() -> None:
    assert BOS not in PromptBuilder(tokenizer_with(PLAIN)).build(CHAT).input_ids
    assert BOS not in PromptBuilder(tokenizer_with()).build(CHAT).input_ids


@pytest.mark.parametrize("text", ["Why?", "<bos>Why?", "<bos><bos>Why?"])
def test_raw_text_begins_with_one_bos_even_if_it_spells_one_out(text: str) -> None:
    made = tokenizer_with(adds_bos=True)
    prompt = PromptBuilder(made).build([{"role": "user", "content": text}])
    assert prompt.input_ids == made("Why?")["input_ids"]
    assert prompt.input_ids.count(BOS) == 1
    assert (prompt.text, prompt.kind) == (text, "raw")


# --- Which text ------------------------------------------------------------------------------------------------


def test_a_base_model_gets_the_raw_text_to_the_character() -> None:
    text = "def f(x):\n    return "
    prompt = PromptBuilder(tokenizer_with()).build([{"role": "user", "content": text}])
    assert prompt.text == text
    assert prompt.input_ids == tokenizer()(text)["input_ids"]


def test_earlier_turns_of_raw_text_are_followed_by_their_answers_and_a_blank_line() -> None:
    assert PromptBuilder(tokenizer_with()).build(CHAT).text == "HiYes?\n\nWhy?"
    assert PromptBuilder(tokenizer_with(), system="Be brief.").build(CHAT).text == "Be brief.\n\nHiYes?\n\nWhy?"


def test_a_chat_template_sees_history_and_system() -> None:
    builder = PromptBuilder(tokenizer_with(PLAIN), system="Be brief.")
    assert builder.build(CHAT).text == "system: Be brief.\nuser: Hi\nassistant: Yes?\nuser: Why?\nassistant:"
    own = [{"role": "system", "content": "Be long."}, CHAT[0]]
    assert builder.build(own).text == "system: Be long.\nuser: Hi\nassistant:"
    assert CHAT[0] == {"role": "user", "content": "Hi"}, "the caller's messages stay as they are"


def test_a_template_can_be_chosen_over_the_tokenizers(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("Q: {{ messages[-1]['content'] }}\nA:")
    made = tokenizer_with(PLAIN)
    assert PromptBuilder(made, str(path)).build(CHAT).text == "Q: Why?\nA:"
    assert PromptBuilder(made, "Q: {{ messages[-1]['content'] }}\nA:").build(CHAT).text == "Q: Why?\nA:"
    assert PromptBuilder(made, "raw").build(CHAT).text == "HiYes?\n\nWhy?"
    assert PromptBuilder(tokenizer_with(), str(path)).build(CHAT).kind == "chat"
    assert made.chat_template == PLAIN


def test_of_several_templates_the_default_is_taken() -> None:
    assert PromptBuilder(tokenizer_with({"default": PLAIN, "tool_use": "{{ 1 }}"})).template == PLAIN
    with pytest.raises(SpecdecError, match="chat templates rag, tool_use and no default") as error:
        PromptBuilder(tokenizer_with({"rag": PLAIN, "tool_use": PLAIN}))
    says(error)


def test_variables_reach_the_template() -> None:
    template = "{% if enable_thinking %}think{% else %}talk{% endif %}: {{ messages[0]['content'] }}"
    made = tokenizer_with(template)
    assert PromptBuilder(made, variables={"enable_thinking": True}).build(CHAT).text == "think: Hi"
    assert PromptBuilder(made, variables={"enable_thinking": False}).build(CHAT).text == "talk: Hi"
    with pytest.raises(SpecdecError, match="without a template"):
        PromptBuilder(made, "raw", variables={"enable_thinking": True})


def test_templates_that_print_the_date_give_the_same_prompt_every_day() -> None:
    template = "{{ strftime_now('%d %b %Y') }}|{% set d = strftime_now( \"%Y-%m-%d\" ) %}{{ d }}|" + PLAIN
    made = tokenizer_with(template)
    text = PromptBuilder(made).build(CHAT[:1]).text
    assert text == "01 Jan 2025|2025-01-01|user: Hi\nassistant:"
    today: Any = made.apply_chat_template(CHAT[:1], tokenize=False)
    assert not today.startswith("01 Jan 2025"), "transformers itself prints today's date"


# --- The record ------------------------------------------------------------------------------------------------


def test_what_decides_the_prompts_is_on_record() -> None:
    record = PromptBuilder(tokenizer_with(PLAIN), system="Be brief.", variables={"x": 1}).record()
    assert record == {
        "kind": "chat",
        "template": PLAIN,
        "template_sha256": hashlib.sha256(PLAIN.encode()).hexdigest(),
        "template_date": "2025-01-01",
        "variables": {"x": 1},
        "system": "Be brief.",
    }
    raw = PromptBuilder(tokenizer_with(PLAIN), "raw").record()
    assert (raw["kind"], raw["template"], raw["template_sha256"], raw["template_date"]) == ("raw", None, None, None)


# --- Refusals --------------------------------------------------------------------------------------------------


def test_a_template_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("no turn in here")
    (tmp_path / "latin").write_bytes("für {{ x }}".encode("latin-1"))
    for template, expected in {
        str(tmp_path / "nothing.jinja"): "no template file",
        "chatml": "no template file chatml; give auto, raw, a path, or Jinja",
        str(tmp_path / "plain.txt"): "is no Jinja template",
        str(tmp_path / "latin"): "cannot read the template",
        str(tmp_path): "cannot read the template",
        "a\0b": "cannot read the template",
    }.items():
        with pytest.raises(SpecdecError, match=expected) as error:
            PromptBuilder(tokenizer_with(), template)
        says(error)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ raise_exception('System role not\nsupported') }}", "System role not supported"),
        ("{% for m in messages %}{{ m['content'] }}", "the chat template refuses a prompt"),
        ("{{ messages[0].content + 1 }}", "the chat template refuses a prompt"),
        ("{% if false %}x{% endif %}", "the prompt has no tokens"),
    ],
)
def test_a_template_that_refuses_is_one_line(template: str, expected: str) -> None:
    with pytest.raises(SpecdecError, match=expected) as error:
        PromptBuilder(tokenizer_with(), template).build(CHAT)
    says(error)


@pytest.mark.parametrize(
    "roles", [[], ["assistant"], ["user", "user"], ["user", "assistant"], ["user", "system", "user"]]
)
def test_a_history_in_another_order_is_refused(roles: list[str]) -> None:
    for builder in (PromptBuilder(tokenizer_with(PLAIN)), PromptBuilder(tokenizer_with(), system="Be brief.")):
        with pytest.raises(SpecdecError, match="user and assistant in turn") as error:
            builder.build([{"role": role, "content": "x"} for role in roles])
        says(error)


def test_the_example_on_the_page_on_benchmarking_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarking.md").read_text()
    (example,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "PromptBuilder" in code)
    names: dict[str, Any] = {"tokenizer": tokenizer_with(PLAIN)}
    exec(example, names)
    assert names["prompt"].kind == "chat"
    assert names["prompt"].text.startswith("user: Write a short letter")
