"""The command line: what it prints, where, and how it ends."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from specdec.cli import app
from specdec.cli.commands import COMMANDS, command_named
from specdec.cli.recording import Recording, Side, choose_threads, compare
from specdec.cli.text import TextStream, text_pieces
from specdec.demo import prompts, target_path
from specdec.drafters.directory import DrafterJson, fingerprint, write_drafter_json
from specdec.stats import DecodeStats, StepRecord
from specdec.version import __version__

TEXT = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n    def pop(self):\n"
LIMIT = 400
needs_pair = pytest.mark.skipif(
    not (target_path() / "model.safetensors").is_file(), reason="the demo pair has not been trained yet"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def save_model(path: Path, seed: int, *, layers: int = 2, hidden: int = 32, more_words: int = 0) -> LlamaForCausalLM:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens([f"<word {index}>" for index in range(more_words)])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=LIMIT, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a draft model for it, one with another vocabulary, and broken ones."""
    folder = tmp_path_factory.mktemp("models")
    target = save_model(folder / "target", seed=1)
    save_model(folder / "draft", seed=2, layers=1)
    other = save_model(folder / "other-vocabulary", seed=3, more_words=20)
    save_model(folder / "truncated", seed=1)
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    save_model(folder / "incomplete", seed=1)
    drop_weight(folder / "incomplete" / "model.safetensors")
    (folder / "no-model").mkdir()
    (folder / "no-model" / "notes.txt").write_text("nothing here")
    options = {"budget": "4"}
    write_drafter_json(folder / "drafter", DrafterJson("suffix", options, fingerprint(target)))
    write_drafter_json(folder / "drafter-of-another", DrafterJson("suffix", {}, fingerprint(other)))
    return folder


def drop_weight(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.delenv("SPECDEC_DEBUG", raising=False)
    torch.set_num_threads(1)


def run(*arguments: object, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def plain_ids(model: Path, prompt: str, **settings: Any) -> list[int]:
    loaded = LlamaForCausalLM.from_pretrained(model).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(prompt)["input_ids"]])
    settings = {"do_sample": False, "attention_mask": torch.ones_like(ids), **settings}
    return loaded.generate(ids, **settings)[0, ids.shape[1] :].tolist()  # type: ignore[operator]


def failed(result: Any, status: int, *words: str) -> None:
    """Ended with this status, one line on stderr that holds the words, and nothing on stdout."""
    assert result.exit_code == status, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("specdec: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, f"{word!r} is not in {result.stderr!r}"


# --- Help and version ----------------------------------------------------------------------------------


def test_version_is_that_of_the_package():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"specdec {__version__}\n")


def test_no_command_shows_what_there_is():
    result = run()
    assert result.exit_code == 0
    for command in ("demo", "generate", "info", "convert"):
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_summary_of_a_command_is_the_one_that_its_own_help_begins_with(command: str):
    """Summaries are known without importing the commands; here is what keeps them true."""
    told = " ".join(command_named(command).help.split("\n\n")[0].split())
    assert told == COMMANDS[command]
    assert COMMANDS[command].split(". ")[0][:50] in " ".join(run("--help").stdout.replace("│", " ").split())


@pytest.mark.parametrize("command", ["demo", "generate", "info", "convert"])
def test_help_of_every_command_has_an_example(command: str):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: specdec {command}" in " ".join(result.stdout.split())


def commands_below(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """The words that lead to every command that takes options of its own."""
    if not hasattr(command, "commands"):
        yield path
        return
    for name, below in command.commands.items():
        yield from commands_below(below, *path, name)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_leaves_nothing_out_in_a_terminal_of_80_columns(command: str, monkeypatch: pytest.MonkeyPatch):
    """Names of options, their values and words that are too long for their column would end in dots."""
    monkeypatch.setenv("COLUMNS", "80")
    for path in commands_below(command_named(command), command):
        shown = run(*path, "--help").stdout
        assert "Options" in shown
        assert "…" not in shown, (path, [line for line in shown.splitlines() if "…" in line])


# --- generate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["suffix", "lookup:ngram=2", "early-exit:layer=1", "none", "draft", "drafter"])
def test_generate_prints_json_with_the_tokens_of_plain_generate(models_folder: Path, drafter: str):
    target = models_folder / "target"
    spec = models_folder / drafter if drafter in ("draft", "drafter") else drafter
    result = run("generate", target, "-d", spec, "-p", TEXT, "-n", 24, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    report = json.loads(result.stdout)
    expected = plain_ids(target, TEXT, max_new_tokens=24)
    assert report["token_ids"] == expected
    assert report["text"] == AutoTokenizer.from_pretrained(target).decode(expected, skip_special_tokens=True)
    assert report["statistics"]["new_tokens"] == len(expected)
    assert report["statistics"]["tau"] >= 1


def test_generate_streams_the_same_text_that_json_holds(models_folder: Path):
    arguments = ("generate", models_folder / "target", "-p", TEXT, "-n", 20)
    streamed, report = run(*arguments), json.loads(run(*arguments, "--json").stdout)
    assert streamed.stdout == report["text"] + "\n"


def test_statistics_go_to_stderr(models_folder: Path):
    arguments = ("generate", models_folder / "target", "-p", TEXT, "-n", 20)
    quiet, told = run(*arguments), run(*arguments, "--stats")
    assert told.stdout == quiet.stdout
    assert quiet.stderr == ""
    assert "tau" in told.stderr


def test_a_seed_gives_the_tokens_of_plain_sampling(models_folder: Path):
    target = models_folder / "target"
    sampled = run("generate", target, "-p", TEXT, "-n", 16, "--temperature", 0.9, "--top-k", 20, "--seed", 5, "--json")
    torch.manual_seed(5)
    expected = plain_ids(target, TEXT, max_new_tokens=16, do_sample=True, temperature=0.9, top_k=20)
    assert json.loads(sampled.stdout)["token_ids"] == expected


def test_several_continuations_are_listed(models_folder: Path):
    arguments = ("generate", models_folder / "target", "-p", TEXT, "-n", 8, "--temperature", 1, "--seed", 1)
    report = json.loads(run(*arguments, "--num-return-sequences", 3, "--json").stdout)
    assert len(report["sequences"]) == 3
    assert all(0 < len(sequence["token_ids"]) <= 8 for sequence in report["sequences"])
    assert run(*arguments, "--num-return-sequences", 3).stdout.count("--- ") >= 3


def test_prompts_come_from_option_file_and_stdin_alike(models_folder: Path, tmp_path: Path):
    file = tmp_path / "prompt.txt"
    file.write_text(TEXT.rstrip("\n") + "\n")
    arguments = ("generate", models_folder / "target", "-n", 8)
    outputs = {
        run(*arguments, "--prompt", TEXT.rstrip("\n")).stdout,
        run(*arguments, "--prompt-file", file).stdout,
        run(*arguments, stdin=file.read_text()).stdout,
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) > 1


def test_a_chat_template_is_used_when_there_is_one(models_folder: Path, tmp_path: Path):
    save_model(tmp_path, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}class {{ m['content'] }}:{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    arguments = ("generate", tmp_path, "-n", 8, "--json")
    templated = json.loads(run(*arguments, "-p", "Stack").stdout)
    assert templated["token_ids"] == plain_ids(tmp_path, "class Stack:", max_new_tokens=8)
    bare = json.loads(run(*arguments, "-p", "class Stack:", "--no-chat").stdout)
    assert bare["token_ids"] == templated["token_ids"]


@pytest.mark.parametrize("drafter", ["suffix:budget=40,factor=30", "early-exit:layer=1,depth=30", "draft:depth=30"])
def test_a_draft_deeper_than_the_room_left_works(models_folder: Path, drafter: str):
    target = models_folder / "target"
    spec = f"{models_folder}/{drafter}" if drafter.startswith("draft") else drafter
    result = run("generate", target, "-d", spec, "-p", TEXT * 2, "-n", 3, "--json")
    assert json.loads(result.stdout)["token_ids"] == plain_ids(target, TEXT * 2, max_new_tokens=3)


def test_generation_stops_at_the_models_limit_and_says_so(models_folder: Path):
    prompt = "item " * (LIMIT // 3)
    tokens = len(tiny_tokenizer()(prompt)["input_ids"])
    assert LIMIT - 300 < tokens < LIMIT
    result = run("generate", models_folder / "target", "-p", prompt, "-n", 500, "--json")
    assert len(json.loads(result.stdout)["token_ids"]) <= LIMIT - tokens
    assert f"at most {LIMIT} tokens" in result.stderr
    assert result.stderr.count("\n") == 1


# --- Bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["-d", "sufix"], 1, ["sufix", "suffix", "lookup", "early-exit"]),
        (["-d", "suffix:depth=3"], 1, ["depth", "budget"]),
        (["-d", "suffix:budget=0"], 1, ["budget", "0"]),
        (["-d", "early-exit:layer=1,budget=0"], 1, ["budget", "0"]),
        (["-d", "recycling:budget=0"], 1, ["budget", "0"]),
        (["-d", "suffix:budget=many"], 1, ["budget", "many", "int"]),
        (["-d", "{}/nowhere"], 1, ["nowhere"]),
        (["-d", "{}/no-model"], 1, ["no-model", "config.json"]),
        (["-d", "{}/drafter-of-another"], 1, ["another target", "vocab_size"]),
        (["-d", "{}/other-vocabulary"], 1, ["vocabulary", "tokens"]),
        (["-d", "{}/truncated"], 1, ["truncated", "load"]),
        (["-d", "{}/target:layer=1"], 1, ["layer"]),
        (["-p", ""], 2, ["prompt is empty"]),
        (["-p", "item " * 500], 1, ["at most 400", "shorten"]),
        (["--prompt-file", "{}/nowhere.txt"], 2, ["nowhere.txt"]),
        (["-p", "x", "--prompt-file", "{}/no-model/notes.txt"], 2, ["not both"]),
        (["--max-new-tokens", "0"], 2, ["--max-new-tokens", "got 0", "1 or more"]),
        (["--max-new-tokens", "-3"], 2, ["--max-new-tokens", "-3"]),
        (["--temperature", "-1"], 2, ["--temperature", "-1"]),
        (["--top-p", "2"], 2, ["--top-p", "got 2", "0 to 1"]),
            (["--temperature", "nan"], 2, ["--temperature", "nan"]),
            (["--threads", "0"], 2, ["--threads", "got 0"]),
        (["--top-p", "0.5"], 2, ["--top-p", "--temperature"]),
        (["--num-return-sequences", "2"], 2, ["--temperature"]),
        (["--chat"], 1, ["chat template"]),
        (["--device", "abacus"], 1, ["abacus", "cpu"]),
        (["--dtype", "int3"], 2, ["int3", "float32"]),
        (["--no-such-option"], 2, ["--no-such-option"]),
    ],
)  # fmt: skip
def test_bad_options_of_generate_end_in_one_line(
    models_folder: Path, options: list[str], status: int, words: list[str]
):
    options = [option.format(models_folder) for option in options]
    given = {"-p", "--prompt-file"} & set(options)
    result = run("generate", models_folder / "target", *options, *([] if given else ["-p", TEXT]))
    failed(result, status, *words)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere", ["nowhere", "no such directory"]),
        ("no-model", ["no-model", "config.json"]),
        ("no-model/notes.txt", ["notes.txt", "file"]),
        ("truncated", ["truncated", "cannot load"]),
        ("incomplete", ["incomplete", "model.layers.1.mlp.up_proj.weight"]),
    ],
)
@pytest.mark.parametrize("command", ["generate", "info"])
def test_what_is_no_model_is_refused_in_one_line(models_folder: Path, command: str, target: str, words: list[str]):
    failed(run(command, models_folder / target, *(["-p", "x"] if command == "generate" else [])), 1, *words)


def test_a_drafter_directory_is_no_target(models_folder: Path):
    failed(run("generate", models_folder / "drafter", "-p", "x"), 1, "drafter", "--drafter")


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe\x00bad"])
def test_a_prompt_file_without_text_is_refused(models_folder: Path, tmp_path: Path, content: bytes):
    (tmp_path / "prompt.txt").write_bytes(content)
    result = run("generate", models_folder / "target", "--prompt-file", tmp_path / "prompt.txt")
    failed(result, 1, "prompt.txt", "not UTF-8" if b"\xff" in content else "empty")


def test_empty_stdin_is_refused(models_folder: Path):
    failed(run("generate", models_folder / "target", stdin=""), 1, "stdin", "empty")


def test_an_unknown_command_is_wrong_usage():
    failed(run("generat"), 2, "generat")


def test_an_unforeseen_error_is_one_line_and_debug_shows_it_all(models_folder: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(sys.modules["specdec.cli.generate"], "load_tokenizer", broken)
    arguments = ("generate", models_folder / "target", "-p", "x")
    failed(run(*arguments), 1, "unexpected KeyError", "surprise", "SPECDEC_DEBUG")
    assert isinstance(run("--debug", *arguments).exception, KeyError)
    monkeypatch.setenv("SPECDEC_DEBUG", "1")
    assert isinstance(run(*arguments).exception, KeyError)


# --- info ----------------------------------------------------------------------------------------------


def test_info_describes_a_model(models_folder: Path):
    report = json.loads(run("info", models_folder / "target", "--json").stdout)
    model = LlamaForCausalLM.from_pretrained(models_folder / "target")
    expected = {"type": "llama", "layers": 2, "hidden_size": 32, "heads": 2, "key_value_heads": 1, "positions": LIMIT}
    assert expected.items() <= report["model"].items()
    assert report["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["target"]["form"] == "tree"
    screen = run("info", models_folder / "target").stdout
    for word in ("LlamaForCausalLM", "float32", "tree", f"{LIMIT} positions"):
        assert word in screen


def test_info_says_why_a_model_is_refused(tmp_path: Path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    result = run("info", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["target"]["form"] == "refused"
    assert "state" in report["target"]["reason"]


def test_info_describes_a_drafter_directory_and_what_it_fits(models_folder: Path):
    arguments = ("info", models_folder / "drafter", "--json", "--target")
    fitting = json.loads(run(*arguments, models_folder / "target").stdout)
    assert fitting["drafter"]["kind"] == "suffix"
    assert fitting["drafter"]["options"] == {"budget": "4"}
    assert fitting["drafter"]["target"]["vocab_size"] == len(tiny_tokenizer())
    assert fitting["fits_target"]["fits"] is True
    other = json.loads(run(*arguments, models_folder / "other-vocabulary").stdout)
    assert other["fits_target"]["fits"] is False
    assert "another target" in other["fits_target"]["reason"]
    assert "no: the drafter in" in " ".join(
        run("info", models_folder / "drafter", "--target", models_folder / "other-vocabulary").stdout.split()
    )


# --- Text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["naïve “quoted” 🙂 done", "a\n    b\n\n\tc  d", "日本語のテキスト"])
def test_streamed_pieces_join_to_the_text_whatever_a_token_cuts(text: str):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    pieces = text_pieces(tokenizer, tokenizer(TEXT)["input_ids"], ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_an_incomplete_character_is_held_back_until_the_end():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("x🙂")["input_ids"][:-1]
    written: list[str] = []
    stream = TextStream(tokenizer, written.append)
    stream.put(torch.tensor([[1, 2]]))
    for token in ids:
        stream.put(torch.tensor([token]))
    assert "".join(written) == "x"
    stream.end()
    assert "".join(written).startswith("x\ufffd")


# --- demo ----------------------------------------------------------------------------------------------


def test_compare_repeats_every_side_and_finds_them_identical(models_folder: Path):
    model = LlamaForCausalLM.from_pretrained(models_folder / "target").eval()
    ids = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"]])
    plain, sides = compare(model, ids, ["suffix", "early-exit:layer=1"], max_new_tokens=12, repeats=3)
    for side in [plain, *sides]:
        assert len(side.recordings) == 3
        assert side.identical_to(plain)
        for recording in side.recordings:
            assert len(recording.tokens) == len(recording.times) == len(recording.accepted())
            assert recording.times == sorted(recording.times)
            assert recording.times[-1] <= recording.seconds
    assert plain.typical.tokens == plain_ids(models_folder / "target", TEXT, max_new_tokens=12)
    sides[0].recordings[1].tokens[3] += 1
    assert not sides[0].identical_to(plain)


def test_slow_runs_are_not_repeated_for_long(models_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("specdec.cli.recording.PATIENCE", 0.0)
    model = LlamaForCausalLM.from_pretrained(models_folder / "target").eval()
    ids = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"]])
    plain, sides = compare(model, ids, ["suffix"], max_new_tokens=2, repeats=5)
    assert [len(side.recordings) for side in [plain, *sides]] == [1, 1]


@pytest.mark.parametrize("faster", [1, 2])
def test_the_faster_number_of_threads_is_chosen(monkeypatch: pytest.MonkeyPatch, faster: int):
    def record(*_: object) -> Recording:
        return Recording(seconds=1.0 if torch.get_num_threads() == faster else 2.0)

    monkeypatch.setattr("specdec.cli.recording.record", record)
    torch.set_num_threads(2)
    choose_threads(None, torch.tensor([[1]]))  # type: ignore[arg-type]
    chosen = torch.get_num_threads()
    torch.set_num_threads(1)
    assert chosen == faster


def test_the_typical_recording_is_the_median():
    side = Side("suffix", [Recording([1, 2, 3], seconds=seconds) for seconds in (9.0, 1.0, 3.0)])
    assert side.typical.seconds == 3.0


def test_accepted_proposals_are_told_from_the_targets_own_tokens():
    stats = DecodeStats(steps=[StepRecord(3, 2, 3, 3), StepRecord(3, 0, 1, 1), StepRecord(2, 1, 1, 1)])
    recording = Recording([7] * 6, stats=stats)
    assert recording.accepted() == [False, True, True, False, False, True]


def test_the_shipped_prompts_are_long_enough_to_draft_from_and_end_within_a_line():
    assert 4 <= len(prompts()) <= 6
    for text in prompts().values():
        assert 200 < len(text) < 1200
        assert not text.endswith("\n")


@needs_pair
def test_demo_shows_identical_text_and_faster_steps():
    result = run("demo", "-n", 48, "--repeats", 1, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    for words in ("plain generate()", "(the same text)", "identical", "yes", "tau", "acceptance by depth"):
        assert words in result.stdout


@needs_pair
def test_demo_reports_every_drafter_as_json():
    result = run("demo", "-n", 32, "--repeats", 1, "--threads", 1, "--json", "-d", "suffix", "-d", "demo-draft")
    report = json.loads(result.stdout)
    assert [side["drafter"] for side in report["speculative"]] == ["suffix", "demo-draft"]
    assert all(side["identical"] for side in report["speculative"])
    assert all(side["statistics"]["tau"] >= 1 for side in report["speculative"])
    assert report["plain"]["new_tokens"] == 32


@needs_pair
def test_demo_fails_when_the_texts_differ(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Side, "identical_to", lambda self, other: False)
    result = run("demo", "-n", 8, "--repeats", 1, "--threads", 1)
    assert result.exit_code == 1
    assert "NO" in result.stdout


def test_demo_refuses_a_prompt_that_does_not_ship():
    failed(run("demo", "--example", "sonnet"), 2, "sonnet", "properties")


# --- The real process ------------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "specdec", *map(str, arguments)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


IMPORT_FOREVER = """
import sys, types
class Forever:
    def find_spec(self, name, *_):
        if name == "torch":
            print("importing", flush=True)
            while True:
                try:
                    sum(range(1000))
                except BaseException:
                    pass  # as imports of large libraries do here and there
sys.meta_path.insert(0, Forever())
sys.argv = ["specdec", "info", "demo"]
from specdec.__main__ import main
main()
"""


def test_ctrl_c_while_torch_is_imported_ends_with_one_line():
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORT_FOREVER], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=90)
    finally:
        process.kill()
    assert (process.returncode, error.decode().strip()) == (130, "specdec: interrupted")


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--version"], 0), (["--help"], 0), ([], 0), (["frobnicate"], 2), (["--nonsense"], 2)]
)
def test_what_needs_no_model_does_not_wait_for_torch(arguments: list[str], status: int):
    code = f"import sys; sys.modules['torch'] = None; sys.argv = ['specdec', *{arguments}]; " \
           "from specdec.__main__ import main; main()"  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("\n") == (status != 0)


def test_a_process_ends_as_its_user_wishes(models_folder: Path, tmp_path: Path):
    """Ctrl-C, a reader that goes away, and an unknown model, at once to save time."""
    model = save_model(tmp_path, seed=4)
    model.config.max_position_embeddings = 1_000_000
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(tmp_path)
    endless = ("generate", tmp_path, "-p", TEXT, "-n", 900_000, "-d", "lookup")
    interrupted, unread = start(*endless), start(*endless)
    unknown = start("generate", "someone/no-such-model", "-p", "x")
    try:
        assert interrupted.stdout
        assert unread.stdout
        assert interrupted.stdout.read(5)
        interrupted.send_signal(signal.SIGINT)
        _, error = interrupted.communicate(timeout=180)
        assert (interrupted.returncode, error.decode().strip()) == (130, "specdec: interrupted")

        assert unread.stdout.read(5)
        unread.stdout.close()
        assert unread.wait(timeout=180) == 141
        assert unread.stderr
        assert unread.stderr.read() == b""

        shown, error = unknown.communicate(timeout=180)
        assert (unknown.returncode, shown) == (1, b"")
        assert error.startswith(b"specdec: cannot load a model from someone/no-such-model")
        assert error.count(b"\n") == 1
    finally:
        for process in (interrupted, unread, unknown):
            process.kill()
            process.communicate()
