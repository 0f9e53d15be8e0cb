"""Preparing data: what is written, what is held out, what is refused, and that nothing half-done is left."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.errors import BadData
from specdec.train.batch import Document
from specdec.train.encoding import Encoder
from specdec.train.order import Piece
from specdec.train.prepare import Prepared, held_out_prompts, open_prepared, prepare
from specdec.train.prepared import PreparedData, PreparedWriter, check_tokenizer
from specdec.train.preview import coloured, plain, segments
from specdec.train.validation_prompts import read_prompts
from tests.train import chats
from tests.train.chats import message


def chat(number: int) -> dict[str, Any]:
    return {"messages": [message("user", f"What is {number}?"), message("assistant", f"It is {number}.")]}


def chats_file(folder: Path, count: int = 40) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(chat(number)) + "\n" for number in range(count)))
    return path


def prepared(source: Path, out: Path, template: str | None = chats.CHATML, **settings: Any) -> Prepared:
    max_length = settings.pop("max_length", 2048)
    return prepare([source], Encoder(chats.tokenizer(template), max_length), out, **settings)


def documents(data: PreparedData) -> list[Document]:
    return [data.piece(Piece(number, 0, length)) for number, length in enumerate(data.lengths)]


def texts(data: PreparedData) -> list[str]:
    return [str(chats.tokenizer().decode(document.ids)) for document in documents(data)]


def rendered(number: int) -> str:
    return str(chats.tokenizer(chats.CHATML).apply_chat_template(chat(number)["messages"], tokenize=False))


def test_every_row_is_in_one_part_and_the_numbers_add_up(tmp_path: Path):
    counts = prepared(chats_file(tmp_path), tmp_path / "out", holdout=0.2)
    train, held_out = open_prepared(tmp_path / "out"), open_prepared(tmp_path / "out", "held-out")
    everything = [*texts(train), *texts(held_out)]
    assert len(everything) == counts.rows == 40
    assert {f"It is {number}." in text for number in range(40) for text in everything if f"s {number}?" in text} == {
        True
    }
    assert set(texts(train)).isdisjoint(texts(held_out))
    assert counts.held_out == len(held_out.lengths) > 1
    assert counts.documents == len(train.lengths)
    assert counts.tokens == sum(train.lengths) + sum(held_out.lengths)
    assert counts.supervised == sum(int(d.supervised.sum()) for d in [*documents(train), *documents(held_out)])


def test_held_out_prompts_end_where_the_answer_begins(tmp_path: Path):
    prepared(chats_file(tmp_path), tmp_path / "out", holdout=0.2)
    held_out = open_prepared(tmp_path / "out", "held-out")
    prompts = held_out_prompts(tmp_path / "out")
    assert len(prompts) == len(held_out.lengths)
    for ids, document in zip(prompts, documents(held_out), strict=True):
        assert document.ids[: len(ids)].tolist() == ids
        assert document.supervised.tolist().index(True) == len(ids)
        assert str(chats.tokenizer().decode(ids)).endswith("<|im_start|>assistant\n")
    assert held_out_prompts(tmp_path / "out" / "train") == prompts


def test_what_is_held_out_depends_on_the_seed_and_not_on_the_order_of_rows(tmp_path: Path):
    source = chats_file(tmp_path)
    rows = source.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    (tmp_path / "shuffled.jsonl").write_text("".join(rows))
    for name, seed in (("chats", 0), ("shuffled", 0), ("chats", 1)):
        prepared(tmp_path / f"{name}.jsonl", tmp_path / f"{name}-{seed}", holdout=0.3, seed=seed)
    held = {out: set(texts(open_prepared(tmp_path / out, "held-out"))) for out in ("chats-0", "shuffled-0", "chats-1")}
    assert held["chats-0"] == held["shuffled-0"] != held["chats-1"]


def test_rows_that_begin_alike_stay_together(tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    rows = [
        {"messages": [message("user", f"Question {n % 10}"), message("assistant", f"Answer {n}.")]} for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared(path, tmp_path / "out", holdout=0.4)
    questions = [{text.split("<|im_end|>")[0] for text in texts(open_prepared(tmp_path / "out", part))}
                 for part in ("train", "held-out")]  # fmt: skip
    assert questions[0].isdisjoint(questions[1])
    assert len(questions[0] | questions[1]) == 10


def test_one_row_is_held_out_even_of_little_data_and_none_when_told_so(tmp_path: Path):
    source = chats_file(tmp_path, 3)
    assert prepared(source, tmp_path / "few", holdout=0.001).held_out == 1
    assert prepared(source, tmp_path / "none", holdout=0.0).held_out == 0
    assert not (tmp_path / "none" / "held-out").exists()
    assert held_out_prompts(tmp_path / "none") == []
    assert prepared(source, tmp_path / "one", holdout=0.5, limit=1).documents == 1


def test_the_same_command_writes_the_same_bytes(tmp_path: Path):
    source = chats_file(tmp_path)
    files = []
    for name in ("one", "two"):
        prepared(source, tmp_path / name, holdout=0.2)
        folder = tmp_path / name
        files.append({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    assert files[0] == files[1]


def test_the_manifest_names_tokenizer_template_and_content(tmp_path: Path):
    tokenizer = chats.tokenizer(chats.CHATML)
    tokenizer.save_pretrained(tmp_path / "target")
    encoder = Encoder(tokenizer)
    prepare([chats_file(tmp_path)], encoder, tmp_path / "out", tokenizer_name=str(tmp_path / "target"))
    manifest = open_prepared(tmp_path / "out").manifest
    assert manifest["tokenizer"]["vocabulary"] == encoder.vocabulary
    assert len(manifest["tokenizer"]["sha256"]) == 64
    assert manifest["template"]["sha256"] == encoder.template.sha256
    other = prepared(chats_file(tmp_path, 39), tmp_path / "other")
    assert other.rows == 39
    assert open_prepared(tmp_path / "other").manifest["sha256"] != manifest["sha256"]


def test_plain_text_takes_a_beginning_as_prompt(tmp_path: Path):
    (tmp_path / "texts").mkdir()
    for number in range(6):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} " + chats.TEXT * 3)
    counts = prepared(tmp_path / "texts", tmp_path / "out", None, holdout=0.3)
    assert counts.supervised == counts.tokens
    assert all(1 < len(prompt) <= 64 for prompt in held_out_prompts(tmp_path / "out"))
    assert counts.forms == {"text": 6}


def test_cut_answers_are_counted_and_warned_of(tmp_path: Path):
    counts = prepared(chats_file(tmp_path), tmp_path / "out", max_length=24)
    assert counts.cut_answers > 0
    assert counts.lost >= counts.cut >= counts.cut_answers
    assert any(f"{counts.cut_answers} answers were cut off at 24 tokens" in line for line in counts.warnings)


def test_documents_that_teach_nothing_are_left_out_and_counted(tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    long = {"messages": [message("user", "What is two and two? " * 20), message("assistant", "Four.")]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [long, chat(1), chat(2)]))
    counts = prepared(path, tmp_path / "out", max_length=40)
    assert (counts.silent, counts.documents + counts.held_out) == (1, 2)


@pytest.mark.parametrize(
    ("content", "template", "complaint"),
    [
        ("", chats.CHATML, "the data is empty"),
        (json.dumps({"text": "a"}) + "\nbroken\n", None, r"chats\.jsonl:2: not JSON"),
        (json.dumps(chat(1)) + "\n", None, r"chats\.jsonl:1: these are conversations, .*no chat template"),
        (json.dumps(chat(1)) + "\n", chats.DIVERGING, r"chats\.jsonl:1: .*renders the history differently"),
        (json.dumps(chat(1)) + "\n", "{{ 'always the same' }}", r"no token of 1 usable rows is supervised"),
        (json.dumps({"messages": [message("assistant", "Hello.")]}) + "\n", chats.CHATML,
         r"chats\.jsonl:1: the assistant speaks without having been asked"),
        (json.dumps(chat(1)) + "\n",
         "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
         r"every one of the \d+ tokens of the conversations is supervised"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_right_is_refused_and_nothing_is_left(
    tmp_path: Path, content: str, template: str | None, complaint: str
):
    path = tmp_path / "chats.jsonl"
    path.write_text(content)
    with pytest.raises(BadData, match=complaint):
        prepared(path, tmp_path / "out", template)
    assert [entry.name for entry in tmp_path.iterdir()] == ["chats.jsonl"]


def test_bad_rows_are_passed_over_only_when_asked_to(tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(chat(1)) + "\n" + json.dumps({"messages": []}) + "\n" + json.dumps(chat(2)) + "\n")
    with pytest.raises(BadData, match=r"chats\.jsonl:2: .*--skip-bad"):
        prepared(path, tmp_path / "out")
    counts = prepared(path, tmp_path / "out", skip_bad=True)
    assert (counts.rows, counts.bad) == (3, 1)
    assert "chats.jsonl:2" in counts.warnings[-1]


def test_prompts_that_no_tokenizer_reads_are_named_with_their_line(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "What?"}) + "\n" + json.dumps({"prompt": "ok \ud83d"}) + "\n")
    with pytest.raises(BadData, match=r"prompts\.jsonl:2: .*U\+D83D"):
        read_prompts(path, chats.tokenizer(), 340)


def test_almost_nothing_supervised_is_warned_of_with_numbers(tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": [message("user", f"{n} " + chats.TEXT * 20), message("assistant", "4")]} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any("tokens (0." in line for line in prepared(path, tmp_path / "out").warnings)


def test_an_existing_directory_is_never_overwritten(tmp_path: Path):
    prepared(chats_file(tmp_path), tmp_path / "out")
    with pytest.raises(BadData, match="never overwritten"):
        prepared(chats_file(tmp_path), tmp_path / "out")


def test_what_a_killed_process_left_is_removed(tmp_path: Path):
    (tmp_path / ".unfinished-out-99999").mkdir()
    prepared(chats_file(tmp_path), tmp_path / "out")
    assert not list(tmp_path.glob(".unfinished-*"))


def target(vocabulary: int, folder: Path | None = None) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=1)
    )  # fmt: skip
    if folder is not None:
        model.name_or_path = str(folder)
    return model


def test_data_of_another_tokenizer_is_refused_and_a_saved_copy_of_the_same_is_not(tmp_path: Path):
    ours, theirs = chats.tokenizer(chats.CHATML), chats.tokenizer(chats.CHATML)
    theirs.add_tokens(["<more>"])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    prepare([chats_file(tmp_path)], Encoder(ours), tmp_path / "out", tokenizer_name=str(tmp_path / "ours"))
    manifest = open_prepared(tmp_path / "out").manifest
    check_tokenizer(manifest, target(400, tmp_path / "ours"))
    (tmp_path / "ours" / "tokenizer.json").write_text(
        json.dumps(json.loads((tmp_path / "ours" / "tokenizer.json").read_text()), indent=7)
    )
    check_tokenizer(manifest, target(400, tmp_path / "ours"))
    with pytest.raises(BadData, match=r"prepared with the tokenizer of .*ours"):
        check_tokenizer(manifest, target(400, tmp_path / "theirs"))
    with pytest.raises(BadData, match=r"token id \d+, the target has 100 tokens"):
        check_tokenizer(manifest, target(100))


def test_shards_hold_the_documents_in_order_and_damage_is_found(tmp_path: Path):
    rows = [([number, number + 1, number + 2], [False, True, number % 2 == 0]) for number in range(20)]
    writer = PreparedWriter(tmp_path / "data", shard_tokens=10)
    for ids, supervised in rows:
        writer.add(ids, supervised)
    assert len(writer.finish({})["shards"]) == 5
    data = PreparedData(tmp_path / "data")
    assert [(d.ids.tolist(), d.supervised.tolist()) for d in documents(data)] == rows
    shard = tmp_path / "data" / "shard-00000.safetensors"
    tensors = load_file(shard)
    save_file({**tensors, "ids": tensors["ids"][:-1].clone()}, shard)
    with pytest.raises(BadData, match="shard-00000"):
        PreparedData(tmp_path / "data")


def test_a_preview_shows_token_edges_supervision_and_control_characters():
    tokenizer = chats.tokenizer()
    ids = tokenizer("<s>What\n\x1b[31m é")["input_ids"]
    marks = [place >= len(ids) // 2 for place in range(len(ids))]
    shown = list(segments(tokenizer, ids, marks))
    text = plain(shown)
    assert text.startswith("<s>·")
    assert "⏎\n" in text
    assert "\\u001b" in text
    assert "\x1b" not in text
    assert text.count("⟦") == text.count("⟧") == 1
    assert text.endswith("é⟧")
    assert coloured(shown).plain == text.replace("·", "").replace("⟦", "").replace("⟧", "")
    assert str(coloured(shown).spans[0].style).startswith("bold italic")


def test_a_character_of_several_tokens_is_shown_whole():
    tokenizer = chats.tokenizer()
    ids = tokenizer("𝄞")["input_ids"]
    assert len(ids) == 4, "one character of four byte tokens"
    assert plain(segments(tokenizer, ids, [True] * 4)) == "⟦𝄞⟧"
    assert "\ufffd" in plain(segments(tokenizer, ids[:2], [True] * 2))


def test_lines_that_cannot_be_read_are_passed_over_and_counted(tmp_path: Path):
    path = tmp_path / "chats.jsonl"
    half = json.dumps({"messages": [message("user", "ok \ud83d"), message("assistant", "Yes.")]})
    path.write_text("".join(f"{line}\n" for line in [json.dumps(chat(1)), "broken", half, json.dumps(chat(2))]))
    counts = prepared(path, tmp_path / "out", skip_bad=True, holdout=0.0)
    assert (counts.bad, counts.documents) == (2, 2)


def test_rows_that_begin_alike_are_not_divided(tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": chats.TEXT * 3}) + "\n" for _ in range(6)))
    counts = prepared(path, tmp_path / "out", None, holdout=0.02)
    assert (counts.documents, counts.held_out) == (6, 0)
    assert "nothing is held out: all rows begin alike" in counts.warnings


def test_rows_that_begin_like_the_first_are_held_out_with_it(tmp_path: Path):
    path = tmp_path / "completions.jsonl"
    rows = [{"prompt": prompt, "completion": f" It is {n}."} for n, prompt in enumerate(("one", "two", "one", "three"))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = prepared(path, tmp_path / "out", None, holdout=0.001)
    assert (counts.documents, counts.held_out) == (2, 2)
    assert all(text.startswith("one") for text in texts(open_prepared(tmp_path / "out", "held-out")))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_one_row_is_left_to_train_on_whatever_is_held_out(tmp_path: Path, count: int):
    for seed in range(3):
        counts = prepared(chats_file(tmp_path, count), tmp_path / str(seed), holdout=0.99, seed=seed)
        assert (counts.documents, counts.held_out) == (1, count - 1)


def test_completions_without_a_prompt_begin_with_themselves(tmp_path: Path):
    path = tmp_path / "completions.jsonl"
    rows = [{"prompt": "", "completion": f"{n} {chats.TEXT}"} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = prepared(path, tmp_path / "out", None, holdout=0.5)
    assert 1 < counts.held_out < 19


def test_the_work_of_a_neighbour_and_of_a_living_process_is_left_alone(tmp_path: Path):
    neighbour, living = tmp_path / f".unfinished-out-long-{os.getppid()}", tmp_path / f".unfinished-out-{os.getppid()}"
    dead = tmp_path / ".unfinished-out-4194999"
    for folder in (neighbour, living, dead):
        folder.mkdir()
    prepared(chats_file(tmp_path), tmp_path / "out")
    assert (neighbour.is_dir(), living.is_dir(), dead.is_dir()) == (True, True, False)
