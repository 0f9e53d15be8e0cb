"""Which tokens of a conversation are supervised, whatever its chat template does."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from specdec.errors import BadData
from specdec.train.chat_template import ChatTemplate
from specdec.train.encoding import Encoded, Encoder
from specdec.train.example import Completion, Conversation, PlainText, TokenTurns, example_of
from specdec.train.source import SourceRow
from tests.train import chats
from tests.train.chats import STYLES, message

SYSTEM = message("system", "Be brief.")
TURNS = [message("user", "What is two and two?"), message("assistant", "It is four."),
         message("user", "And one more?"), message("assistant", "Five, please.")]  # fmt: skip
ENDS = {"chatml": "<|im_end|>", "marked": "<|im_end|>", "llama3": "<|eot|>", "gemma": "<end_of_turn>",
        "mistral": "</s>"}  # fmt: skip


def encode(template: str, messages: list[dict[str, Any]], max_length: int = 2048, **fields: Any) -> list[Encoded]:
    tokenizer = chats.tokenizer(template)
    example = example_of(SourceRow("here:1", {"messages": messages, **fields}))
    return Encoder(tokenizer, max_length).encode(example)


def supervised_texts(document: Encoded) -> list[str]:
    """Text of each supervised run."""
    tokenizer = chats.tokenizer()
    found: list[list[int]] = []
    before = False
    for token, mark in zip(document.ids, document.supervised, strict=True):
        if mark:
            found = [*found[:-1], [*found[-1], token]] if before else [*found, [token]]
        before = mark
    return [str(tokenizer.decode(run)) for run in found]


def rendered(template: str, messages: list[dict[str, Any]], **more: Any) -> str:
    return str(chats.tokenizer(template).apply_chat_template(messages, tokenize=False, **more))


@pytest.mark.parametrize("style", STYLES)
def test_answers_and_their_end_of_turn_are_supervised_and_nothing_else(style: str):
    (document,) = encode(STYLES[style], TURNS)
    space = " " if style == "mistral" else ""
    assert supervised_texts(document) == [f"{space}It is four.{ENDS[style]}", f"{space}Five, please.{ENDS[style]}"]


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_the_templates_own_text_with_nothing_doubled(style: str):
    (document,) = encode(STYLES[style], TURNS)
    tokenizer = chats.tokenizer(STYLES[style])
    assert document.ids == tokenizer.apply_chat_template(TURNS, return_dict=False)
    assert document.ids.count(chats.SPECIALS.index("<s>")) == (1 if style == "mistral" else 0)


@pytest.mark.parametrize("style", ["chatml", "llama3", "gemma"])
def test_a_system_message_is_context(style: str):
    (document,) = encode(STYLES[style], [SYSTEM, *TURNS[:2]])
    assert "Be brief." in chats.tokenizer().decode(document.ids)
    assert supervised_texts(document) == [f"It is four.{ENDS[style]}"]


def test_marks_of_a_template_and_differences_of_the_same_template_agree():
    (marked,), (unmarked,) = encode(chats.MARKED, [SYSTEM, *TURNS]), encode(chats.CHATML, [SYSTEM, *TURNS])
    assert ChatTemplate(chats.tokenizer(chats.MARKED)).marks_answers
    assert not ChatTemplate(chats.tokenizer(chats.CHATML)).marks_answers
    assert (marked.ids, marked.supervised) == (unmarked.ids, unmarked.supervised)


def test_what_a_template_does_not_mark_is_not_supervised():
    without_end = chats.MARKED.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}",
                                       "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}")  # fmt: skip
    (document,) = encode(without_end, TURNS[:2])
    assert supervised_texts(document) == ["It is four."]


def test_stripped_reasoning_gives_one_document_for_each_answer_as_the_target_saw_it():
    thinking = [TURNS[0], {**TURNS[1], "reasoning_content": "two plus two"},
                TURNS[2], {**TURNS[3], "reasoning_content": "one more"}]  # fmt: skip
    first, second = encode(chats.THINKING, thinking)
    assert supervised_texts(first) == ["<think>\ntwo plus two\n</think>\n\nIt is four.<|im_end|>"]
    assert supervised_texts(second) == ["<think>\none more\n</think>\n\nFive, please.<|im_end|>"]
    text = str(chats.tokenizer().decode(second.ids))
    assert "two plus two" not in text
    assert text.startswith(rendered(chats.THINKING, thinking[:3], add_generation_prompt=True))


def test_a_template_that_strips_nothing_keeps_the_conversation_in_one_document():
    assert len(encode(chats.THINKING, TURNS)) == 1


def test_an_opening_that_already_closes_the_thinking_is_not_supervised():
    tokenizer = chats.tokenizer(chats.THINKING)
    template = ChatTemplate(tokenizer, options={"enable_thinking": False})
    opening = rendered(chats.THINKING, TURNS[:1], add_generation_prompt=True, enable_thinking=False)
    assert opening.endswith("</think>\n\n"), "the opening holds more than what precedes the answer in a history"
    (document,) = Encoder(tokenizer, template=template).encode(Conversation(tuple(TURNS[:2])))
    assert supervised_texts(document) == ["It is four.<|im_end|>"]


def test_a_template_that_rewrites_its_history_when_the_answer_follows_is_refused():
    with pytest.raises(BadData, match=r"renders the history differently .* part at character 0: '1user"):
        encode(chats.DIVERGING, TURNS[:2])


def test_tool_calls_are_supervised_and_tool_answers_are_not():
    call = {"type": "function", "function": {"name": "add", "arguments": '{"left": 2}'}}
    messages = [TURNS[0], message("assistant", "", tool_calls=[call]), message("tool", "4"), TURNS[1]]
    (document,) = encode(chats.THINKING, messages)
    tool, answer = supervised_texts(document)
    assert tool == '<tool_call>{"name": "add", "arguments": {"left": 2}}</tool_call><|im_end|>'
    assert answer == "It is four.<|im_end|>"


def test_tools_reach_the_template():
    template = "{{ '<s>' }}{% for t in tools or [] %}{{ t.name }}{% endfor %}" + chats.CHATML
    tool = {"type": "function", "name": "adding_machine"}
    (document,) = encode(template, TURNS[:2], tools=[tool])
    assert "adding_machine" in chats.tokenizer().decode(document.ids)
    assert supervised_texts(document) == ["It is four.<|im_end|>"]


def test_an_answer_that_stopped_at_its_cap_has_no_end_to_be_learned():
    (document,) = encode(chats.CHATML, TURNS, finish=["stop", "length"])
    assert supervised_texts(document) == ["It is four.<|im_end|>", "Five, please."]


def test_messages_given_as_prompt_are_context_even_from_the_assistant():
    row = SourceRow("here:1", {"prompt": TURNS[:3], "completion": TURNS[3:]})
    (document,) = Encoder(chats.tokenizer(chats.CHATML)).encode(example_of(row))
    assert supervised_texts(document) == ["Five, please.<|im_end|>"]


def test_a_text_that_ends_within_an_answer_says_so():
    (whole,) = encode(chats.CHATML, TURNS)
    (short,) = encode(chats.CHATML, TURNS, max_length=len(whole.ids) - 4)
    assert short.lost == 4
    assert short.cut_answer
    assert short.ids == whole.ids[:-4]
    (before,) = encode(chats.CHATML, TURNS, max_length=whole.supervised.index(True))
    assert before.lost
    assert not before.cut_answer
    assert not before.teaches


def test_the_date_of_a_template_is_one_for_the_whole_run():
    template = ChatTemplate(chats.tokenizer("{{ strftime_now('%Y') }}" + chats.CHATML), today=datetime(1999, 1, 2))
    assert template.render(tuple(TURNS[:1])).startswith("1999<|im_start|>")


def test_without_a_template_conversations_are_refused():
    with pytest.raises(BadData, match="no chat template"):
        Encoder(chats.tokenizer(None)).encode(Conversation(tuple(TURNS)))


def test_a_template_that_raises_is_named_with_the_roles_it_refused():
    refusing = "{{ raise_exception('Conversation roles must alternate') }}"
    with pytest.raises(BadData, match=r"roles user, assistant: .*must alternate"):
        encode(refusing, TURNS[:2])


def test_only_the_completion_is_supervised_with_its_end_of_text():
    tokenizer = chats.tokenizer(begins=True)
    (document,) = Encoder(tokenizer).encode(Completion("What is two", " and two?"))
    assert supervised_texts(document) == [" and two?</s>"]
    assert document.ids[0] == tokenizer.bos_token_id
    assert document.prompt == tokenizer("What is two")["input_ids"]


def test_a_completion_that_was_cut_has_no_end_of_text():
    (document,) = Encoder(chats.tokenizer()).encode(Completion("What is two", " and two?", cut=True))
    assert supervised_texts(document) == [" and two?"]


def test_a_begin_of_text_is_never_supervised_in_a_completion_without_prompt():
    (document,) = Encoder(chats.tokenizer(begins=True)).encode(Completion("", "It is four."))
    assert document.supervised[:2] == [False, True]


def test_plain_text_is_supervised_throughout_and_divided_without_loss():
    encoder = Encoder(chats.tokenizer(), max_length=8)
    documents = encoder.encode(PlainText(chats.TEXT))
    assert all(all(document.supervised) for document in documents)
    assert [len(document.ids) for document in documents[:-1]] == [8] * (len(documents) - 1)
    joined = [token for document in documents for token in document.ids]
    assert chats.tokenizer().decode(joined) == chats.TEXT + "</s>"


def test_turns_given_as_ids_are_kept_and_joined_where_one_continues_the_other():
    encoder = Encoder(chats.tokenizer())
    turns = (((20, 21), (22, 23)), ((20, 21, 22, 23, 24), (25,)), ((30, 31), (32,)))
    joined, apart = encoder.encode(TokenTurns(turns, encoder.vocabulary))
    assert joined.ids == [20, 21, 22, 23, 24, 25]
    assert joined.supervised == [False, False, True, True, False, True]
    assert apart.ids == [30, 31, 32]
    with pytest.raises(BadData, match="another vocabulary"):
        encoder.encode(TokenTurns(turns, "0" * 64))


def test_characters_of_several_tokens_are_supervised_as_a_whole():
    (document,) = encode(chats.CHATML, [TURNS[0], message("assistant", "é→𝄞")])
    assert supervised_texts(document) == ["é→𝄞<|im_end|>"]


def test_a_tokenizer_that_does_not_know_characters_is_refused():
    tokenizer = chats.tokenizer()
    tokenizer.__class__ = type("Slow", (type(tokenizer),), {"is_fast": False})
    with pytest.raises(BadData, match=r"tokenizer\.json"):
        Encoder(tokenizer)


# --- What is said before the first question, parts, half characters, ends ---------------------------------

CLOSED = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
CLOSED += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ '</s>' }}{% endif %}"
READS_PARTS = """{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.content is string -%}
{{ m.content }}{% else %}{% for part in m.content %}{% if 'image' in part %}{{ '<image>' }}{% else -%}
{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor -%}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def test_what_the_assistant_says_unasked_is_context():
    with_default = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.' }}{% endif %}" + chats.CHATML
    for template in (chats.CHATML, with_default):
        greeted = [message("assistant", "Hello."), *TURNS[:2]]
        (document,) = encode(template, greeted, finish=["stop", "stop"])
        assert supervised_texts(document) == ["It is four.<|im_end|>"]
        prompt = rendered(template, greeted[:2], add_generation_prompt=True)
        assert chats.tokenizer().decode(document.prompt) == prompt
    with pytest.raises(BadData, match="without having been asked"):
        encode(chats.CHATML, [message("assistant", "Hello.")])


def in_parts(messages: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    return [{**m, "content": [{"type": "text", "text": m["content"][:4], **more},
                              {"type": "text", "text": m["content"][4:], **more}]} for m in messages]  # fmt: skip


@pytest.mark.parametrize("template", [chats.LLAMA3, chats.CHATML, READS_PARTS], ids=["prints", "refuses", "reads"])
def test_content_in_parts_is_the_text_that_it_is_in_one(template: str):
    (parts,), (whole,) = encode(template, in_parts(TURNS)), encode(template, TURNS)
    assert (parts.ids, parts.supervised) == (whole.ids, whole.supervised)


def test_fields_of_a_part_without_a_value_are_none():
    """Arrow fills them in; a template that asks for them would see an image."""
    (filled,), (whole,) = encode(READS_PARTS, in_parts(TURNS, image=None)), encode(READS_PARTS, TURNS)
    assert filled.ids == whole.ids


def test_an_image_is_refused_where_the_template_reads_no_parts():
    image = {**TURNS[0], "content": [{"type": "image", "url": "a.png"}]}
    with pytest.raises(BadData, match="reads no list as content of the role user"):
        encode(chats.LLAMA3, [image, TURNS[1]])


@pytest.mark.parametrize("example", [
    PlainText("ok \ud83d"), Conversation((TURNS[0], message("assistant", "ok \ud83d"))),
])  # fmt: skip
def test_half_a_character_is_bad_data(example: PlainText | Conversation):
    with pytest.raises(BadData, match=r"U\+D83D, half of a surrogate pair"):
        Encoder(chats.tokenizer(chats.CHATML), 100).encode(example)


def test_a_token_that_only_closes_the_text_is_not_learned():
    """The target stops at the end of its turn; nobody asks it for what the template puts behind the last one."""
    (document,) = encode(CLOSED, TURNS)
    assert supervised_texts(document) == ["It is four.<|im_end|>", "Five, please.<|im_end|>"]


@pytest.mark.parametrize("said", ["im", "It is", "It is probed, and"])
def test_an_answer_without_an_end_has_none_whatever_it_says(said: str):
    (document,) = encode(chats.CHATML, [*TURNS[:2], TURNS[2], message("assistant", said)], finish=["stop", "length"])
    assert supervised_texts(document) == ["It is four.<|im_end|>", said]


def test_thinking_that_was_cut_off_has_no_end():
    cut = {**message("assistant", ""), "reasoning_content": "two and"}
    (document,) = encode(chats.THINKING, [TURNS[0], cut], finish=["length"])
    (text,) = supervised_texts(document)
    assert text.endswith("two and")
    assert "</think>" not in text


def test_a_call_that_was_cut_off_is_not_learned():
    """Where it stopped cannot be told from what the template makes of it."""
    call = {"function": {"name": "add", "arguments": {"left": 2}}}
    (document,) = encode(chats.THINKING, [TURNS[0], message("assistant", "", tool_calls=[call])], finish=["length"])
    assert not any(document.supervised)
