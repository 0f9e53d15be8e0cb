"""The draft heads that ship: they fit the demo target, draft something, and never change what it writes."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import specdec
from specdec import demo
from specdec.demo.padded import cost_padded
from specdec.errors import UnknownDrafter
from tests.families import tiny_model

NEW_TOKENS = 48
LEAST_TAU = {"demo-medusa": 1.4, "demo-hydra": 1.7, "demo-eagle": 2.2, "demo-eagle3": 1.8, "demo-kangaroo": 1.4}
"""An untrained head has 1.0, Kangaroo's adapter 1.2: it begins with the target's own shallow states."""


@cache
def target() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.target_path(), dtype=torch.float32).eval()


@cache
def inputs() -> dict[str, Any]:
    tokenizer: Any = AutoTokenizer.from_pretrained(demo.target_path(), padding_side="left")
    texts = [text[: 150 + 100 * i] for i, text in enumerate(list(demo.prompts().values())[:3])]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@cache
def told() -> list[list[int]]:
    return target().generate(**inputs(), max_new_tokens=NEW_TOKENS, do_sample=False).tolist()


def test_every_head_that_is_named_ships() -> None:
    assert {*LEAST_TAU} == {*demo.HEADS}
    assert all((folder / "drafter.json").is_file() for folder in demo.HEADS.values())


@pytest.mark.parametrize("name", demo.HEADS)
def test_it_writes_the_targets_text_in_fewer_steps(name: str) -> None:
    output: Any = specdec.generate(
        target(), **inputs(), drafter=name, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == told()
    assert output.stats.tau > LEAST_TAU[name]


@pytest.mark.parametrize("name", ["demo-medusa", "demo-hydra", "demo-eagle", "demo-eagle3"])
def test_any_growth_and_a_padded_target_take_it(name: str) -> None:
    """A cost-padded target computes the same states, so that the heads fit it."""
    padded = cost_padded(
        LlamaForCausalLM.from_pretrained(demo.target_path(), dtype=torch.float32), parameters=9_000_000
    )
    drafter = f"{name}:budget=8,grow=best-first"
    output: Any = specdec.generate(padded, **inputs(), drafter=drafter, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert output.tolist() == told()


def test_a_name_close_to_one_is_suggested() -> None:
    with pytest.raises(UnknownDrafter, match="did you mean 'demo-eagle"):
        specdec.load_drafter("demo-eagel3", target())


def test_another_target_is_refused() -> None:
    with pytest.raises(specdec.SpecdecError, match="target"):
        specdec.load_drafter("demo-hydra", tiny_model("llama", "sdpa"))
