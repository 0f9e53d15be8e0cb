"""Replaying a stream of prompts, and what is logged of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from specdec.errors import BadData
from specdec.train.online import LearningDrafter
from specdec.train.stream import replay_stream
from specdec.train.stream_prompts import StreamPrompt, read_stream
from tests.tiny import shared_target, tokenizer
from tests.train.test_online import FAST, draft_model, taus

torch.set_num_threads(1)
PROMPTS = [StreamPrompt([5 + number % 2, 9, 30, 31], f"topic {number % 2}") for number in range(12)]


def test_every_request_is_logged_and_learning_pays(tmp_path: Path):
    drafter, log = LearningDrafter(draft_model(), FAST), tmp_path / "log.jsonl"
    heard: list[int] = []
    learning = replay_stream(
        shared_target(),
        drafter,
        PROMPTS,
        log=log,
        max_new_tokens=24,
        report=lambda request: heard.append(request.number),
    )
    static = replay_stream(shared_target(), draft_model(), PROMPTS, max_new_tokens=24)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert heard == [row["number"] for row in rows] == list(range(12))
    assert [row["tau"] for row in rows] == [request.tau for request in learning]
    assert [row["topic"] for row in rows[:3]] == ["topic 0", "topic 1", "topic 0"]
    assert set(drafter.topics) == {"topic 0", "topic 1"}
    assert learning[0].tau == static[0].tau
    assert sum(r.tau for r in learning[-2:]) > sum(r.tau for r in static[-2:]) + 0.5
    assert (learning[-1].updates, static[-1].updates) == (11, 0)
    assert learning[-1].learning_seconds > static[-1].learning_seconds


def test_both_drafters_meet_the_same_random_numbers():
    """With chosen children the sampled texts, and so the numbers of tokens, do not depend on the drafter."""
    runs = [
        replay_stream(shared_target(), drafter, PROMPTS[:4], max_new_tokens=24, temperature=1.2, seed=3)
        for drafter in (LearningDrafter(draft_model(), FAST), draft_model())
    ]
    assert [r.new_tokens for r in runs[0]] == [r.new_tokens for r in runs[1]]
    assert runs[0][0].tau == runs[1][0].tau


def test_a_file_of_prompts_is_read_with_its_topics(tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "abc", "topic": "letters"}\n\n{"prompt": "12"}\n')
    first, second = read_stream([file], tokenizer())
    assert (first.topic, second.topic) == ("letters", "prompts")
    assert first.ids == tokenizer()("abc").input_ids


@pytest.mark.parametrize(
    ("line", "says"),
    [("{", "not JSON"), ("[1]", "expected"), ('{"prompt": 3}', "expected"), ('{"prompt": ""}', "empty"),
     ('{"prompt": "a", "topic": 1}', "topic is text")],
)  # fmt: skip
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, says: str):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "abc"}\n' + line + "\n")
    with pytest.raises(BadData, match=says) as caught:
        list(read_stream([file], tokenizer()))
    assert f"{file}:2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stream_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(BadData, match="there is no such file"):
        list(read_stream([tmp_path / "none.jsonl"], tokenizer()))


def test_a_text_file_has_one_prompt_a_line_and_its_name_as_topic(tmp_path: Path):
    (tmp_path / "sql.txt").write_text("SELECT a\n\nSELECT b")
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    first, second = read_stream([tmp_path / "sql.txt"], tokenizer())
    assert (first.ids, second.ids) == (tokenizer()("SELECT a").input_ids, tokenizer()("SELECT b").input_ids)
    assert {first.topic, second.topic} == {"sql"}
    assert second.place.endswith("sql.txt:3")
    with pytest.raises(BadData, match="chat template"):
        list(read_stream([tmp_path / "chats.jsonl"], tokenizer()))


def test_a_chat_template_asks_what_is_asked_last(tmp_path: Path):
    words = copy.deepcopy(tokenizer())
    words.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    file = tmp_path / "chats.jsonl"
    turns = [("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e")]
    messages = [{"role": role, "content": content} for role, content in turns]
    file.write_text(json.dumps({"messages": messages}) + '\n{"prompt": "x"}\n')
    history, question = read_stream([file], words)
    assert history.ids == words("u:b;a:c;u:d;a:", add_special_tokens=False).input_ids
    assert question.ids == words("u:x;a:", add_special_tokens=False).input_ids
    with pytest.raises(BadData, match="chat template"):
        list(read_stream([file], words, chat=False))


def test_requests_without_a_topic_are_reported_together():
    drafter = LearningDrafter(draft_model(), FAST)
    taus(drafter, [0])
    replay_stream(shared_target(), drafter, [StreamPrompt([5, 6])], max_new_tokens=8)
    assert set(drafter.topics) == {None}
    assert drafter.topics[None].requests == 2
