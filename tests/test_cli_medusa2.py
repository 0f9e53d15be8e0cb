"""`specdec train medusa2`: two stages in one command, killed and gone on with, and the pair that comes out of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from specdec.train.run_log import read_log
from tests.test_cli_train import ROOT, at_step, failed, finished, run, save
from tests.tiny import make_target

pytest.importorskip("peft")

SMALL = ("--steps", 4, "--row-length", 64, "--batch-rows", 4, "--save-every", 1, "--evaluate-every", 2,
         "--set", "head.frozen_steps=3", "--set", "head.num_heads=2", "--set", "head.lora.rank=4", "--rows-at-once", 2,
         "--set", "data.validation_tokens=8", "--set", "data.validation_prompts=2", "--device", "cpu")  # fmt: skip
FINAL = ("target/model.safetensors", "target/config.json", "target/tokenizer.json",
         "heads/step-000003/training.safetensors",
         *(f"step-000004/{name}" for name in ("training.safetensors", "optimizer.pt", "drafter/drafter.json",
                                              "drafter/adapter/adapter_model.safetensors")))  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with its tokenizer, prepared data, a whole run, and what that said."""
    path = tmp_path_factory.mktemp("medusa2")
    save(make_target(), path / "target")
    lines = [{"text": f"def f{n}(a, b):\n    return a + {n} * b\n" * (n % 4 + 1)} for n in range(40)]
    (path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = finished(run("train", "medusa2", path / "target", path / "texts.jsonl", "--out", path / "whole", *SMALL))
    (path / "told.txt").write_text(told.stderr)
    return path


def train(folder: Path, out: Path, *more: object) -> Any:
    return run("train", "medusa2", folder / "target", folder / "whole/data", "--out", out, *SMALL, *more)


def test_one_command_makes_a_pair_that_can_be_used_and_says_how_far_the_target_moved(folder: Path) -> None:
    out = folder / "whole"
    validations = [event for event in read_log(out / "log.jsonl") if event["event"] == "validation"]
    assert [event["step"] for event in validations] == [2, 4]
    assert all({"kl_to_original", "top1_agreement", "tau"} <= event.keys() for event in validations)
    kinds = [event["event"] for event in read_log(out / "heads" / "log.jsonl")]
    assert kinds == ["step", "step", "validation", "step", "validation"]
    told = finished(run("train", "medusa2", folder / "target", folder / "texts.jsonl", "--out", out, *SMALL))
    assert told.stdout.splitlines()[1] == f"use it: specdec generate {out / 'target'} --drafter {out}"
    generated = run("generate", out / "target", "--drafter", out, "-p", "def f(a", "-n", 6, "--json")
    assert json.loads(finished(generated).stdout)["statistics"]["new_tokens"] == 6
    refused = run("generate", folder / "target", "--drafter", out, "-p", "def f(a", "-n", 6)
    failed(refused, 1, "was trained together with its target")


def test_a_medusa_2_directory_holds_both(folder: Path, tmp_path: Path) -> None:
    out = folder / "whole"
    wrong = run("convert", out / "drafter", "--to", "medusa_2", "--base", folder / "target", "--out", tmp_path / "no")
    failed(wrong, 1, "not the model that these heads were trained together with")
    finished(run("convert", out / "drafter", "--to", "medusa_2", "--base", out / "target", "--out", tmp_path / "both"))
    generated = run("generate", tmp_path / "both", "--drafter", tmp_path / "both", "-p", "def f(a", "-n", 6, "--json")
    assert json.loads(finished(generated).stdout)["statistics"]["new_tokens"] == 6


def test_lines_name_the_stage_and_the_distance(folder: Path) -> None:
    told = (folder / "told.txt").read_text()
    assert "stage 1 of 2, heads: 3 steps on" in told
    assert "step 3 of 3: loss " in told
    assert "stage 2 of 2, joint: 4 steps on" in told
    assert "step 4 of 4: loss " in told
    assert "; from the original target KL 0.0" in told


def test_a_plan_counts_heads_and_adapters(folder: Path, tmp_path: Path) -> None:
    plan = json.loads(finished(train(folder, tmp_path / "run", "--plan", "--json")).stdout)
    stored = load_file(folder / "whole" / "step-000004" / "training.safetensors")
    assert plan["learning"] == plan["parameters"] == sum(value.numel() for value in stored.values())
    assert not (tmp_path / "run").exists()


def test_cached_states_of_the_target_serve_both_stages(folder: Path, tmp_path: Path) -> None:
    made = run("data", "features", folder / "whole" / "data", "--target", folder / "target", "--kind", "medusa2",
               "--row-length", 64, "--out", tmp_path / "cache", "--yes")  # fmt: skip
    finished(made)
    finished(train(folder, tmp_path / "run", "--features", tmp_path / "cache"))
    whole, cached = (read_log(path / "log.jsonl") for path in (folder / "whole", tmp_path / "run"))
    assert [e["loss"] for e in cached if e["event"] == "step"] == pytest.approx(
        [e["loss"] for e in whole if e["event"] == "step"], rel=1e-3
    )


def test_a_signal_in_the_second_stage_says_that_the_target_is_still_to_come(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        first: list[int] = []

        def stop() -> None:  # step 2 comes in both stages
            first.append(1)
            if len(first) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        at_step(patch, 2, stop)
        stopped = finished(train(folder, tmp_path / "run"))
    assert "stopped and saved after step 2 of 4 of stage joint; the same command goes on" in stopped.stderr
    assert "is written when the run ends" in stopped.stderr
    assert "use it" not in stopped.stdout
    assert not (tmp_path / "run" / "target").exists()
    finished(train(folder, tmp_path / "run"))
    assert all((tmp_path / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes() for name in FINAL)


def test_a_target_that_cannot_be_written_is_one_line_and_the_same_command_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(folder / "whole", tmp_path / "run", symlinks=True))
    shutil.rmtree(out / "target")

    def full(_model: Any, _path: Path) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("specdec.train.joint.save_model", full)
        result = train(folder, out)
    failed(result, 1, "the adapted target cannot be written", "No space left", "run the same command again")
    assert not (out / "target").exists()
    assert not list(out.glob(".unfinished*"))
    finished(train(folder, out))
    assert all((out / name).read_bytes() == (folder / "whole" / name).read_bytes() for name in FINAL)


def test_a_signal_at_the_end_of_the_first_stage_stops_there_and_its_heads_fit_the_original(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped = finished(train(folder, out))
    assert "stopped and saved after step 3 of 3 of stage heads; the same command goes on" in stopped.stderr
    use = f"use it: specdec generate {folder / 'target'} --drafter {out / 'heads' / 'drafter'}"
    assert stopped.stdout.splitlines()[-1] == use
    assert not list(out.glob("step-*"))
    rest = finished(train(folder, out))
    assert "stage 1 of 2" not in rest.stderr
    assert all((out / name).read_bytes() == (folder / "whole" / name).read_bytes() for name in FINAL)


def test_heads_that_are_there_are_one_run_without_stages(folder: Path, tmp_path: Path) -> None:
    few = tuple(word for pair in zip(SMALL[::2], SMALL[1::2], strict=True) for word in pair
                if not str(pair[1]).startswith(("head.frozen_steps", "head.num_heads")))  # fmt: skip
    made = finished(run("train", "medusa2", folder / "target", folder / "whole/data", "--out", tmp_path / "run", *few,
                        "--from", folder / "whole" / "heads" / "drafter"))  # fmt: skip
    assert "stage" not in made.stderr
    assert not (tmp_path / "run" / "heads").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--fsdp", "--processes", 2),
            "medusa2 learns inside its target, which FSDP does not divide; leave --fsdp out",
        ),
        (("--online", "--from", "heads"), "medusa2 changes its target, and --online does not"),
        (("--set", "head.frozen_rate=0.0"), "frozen_rate and head_rate are positive"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    result = run("train", "medusa2", tmp_path / "target", tmp_path / "data", "--out", tmp_path / "run", *arguments)
    failed(result, 2, *words.split(" and "))
    assert not (tmp_path / "run").exists()


def test_without_peft_one_line_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    result = run("train", "medusa2", folder / "target", folder / "texts.jsonl", "--out", tmp_path / "run", *SMALL)
    failed(result, 2, "adapters on the target need the package peft: pip install peft")
    assert not (tmp_path / "run").exists()


# --- Real processes ------------------------------------------------------------------------------------


def start(folder: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    command = [
        "train",
        "medusa2",
        folder / "target",
        folder / "whole/data",
        "--out",
        out,
        *SMALL,
        "--threads",
        1,
        *more,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, "-m", "specdec", *map(str, command)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@pytest.mark.slow
def test_killed_at_random_moments_in_both_stages_the_bytes_are_those_of_an_unbroken_run(
    folder: Path, tmp_path: Path
) -> None:
    moments = random.Random(1)
    for wanted in ("heads/step-000001", "step-000001", "step-000003"):
        process = start(folder, tmp_path / "run")
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob(f"run/{wanted}*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
    _, errors = start(folder, tmp_path / "run").communicate(timeout=240)
    assert "use it" not in errors
    assert all((tmp_path / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes() for name in FINAL)


@pytest.mark.slow
def test_two_processes_agree_with_one_to_rounding(folder: Path, tmp_path: Path) -> None:
    process = start(folder, tmp_path / "run", "--processes", 2)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "use it" in output
    one, two = (load_file(path / "step-000004/training.safetensors") for path in (folder / "whole", tmp_path / "run"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "target")
    assert isinstance(model(torch.arange(5, 10)[None]).logits, torch.Tensor)
    shutil.rmtree(tmp_path / "run" / "target")
    _, errors = start(folder, tmp_path / "run", "--processes", 2).communicate(timeout=300)
    assert (tmp_path / "run" / "target" / "model.safetensors").is_file(), errors
