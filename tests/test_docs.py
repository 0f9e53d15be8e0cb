"""The pages under docs/ say what the code does: examples run, defaults agree, links lead somewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec import formats
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.load import HEAD_DRAFTERS, NOT_OPTIONS, WORDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "README.md"])
DRAFTERS = {word: make for word, make in WORDS.items() if word != "demo-draft"} | {"path/to/model": DraftModelDrafter}
DRAFTERS |= HEAD_DRAFTERS


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def drafter() -> Any:
    """The drafter that adding-a-drafter.md shows."""
    code = code_blocks("adding-a-drafter.md")[0]
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    return namespace["FollowersDrafter"]()


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_example_drafter_leaves_greedy_output_as_it_is_and_accepts_tokens(model: Any, drafter: Any):
    assert isinstance(drafter, specdec.Drafter)
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[5, 3, 9, 5, 3]]),
        "attention_mask": torch.ones(1, 5, dtype=torch.long),
    }
    expected = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    got = specdec.generate(
        model, **inputs, drafter=drafter, max_new_tokens=64, do_sample=False, return_dict_in_generate=True
    )
    assert isinstance(got, specdec.SpeculativeOutput)
    assert got.sequences.tolist() == expected.tolist()
    assert got.stats is not None
    assert got.stats.tau > 1.5  # a tiny random model soon repeats itself


def test_the_example_drafter_serves_a_batch_whose_rows_end_apart(model: Any, drafter: Any):
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[0, 0, 4, 8], [1, 2, 3, 4], [0, 7, 7, 7]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]),
    }
    plain = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    eos = int(plain[0, 10])
    expected = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=eos)
    lengths = {(row == eos).nonzero()[0].item() if eos in row else 40 for row in expected[:, 4:]}
    assert len(lengths) > 1, "rows that end together would not exercise select"
    got = specdec.generate(model, **inputs, drafter=drafter, max_new_tokens=40, do_sample=False, eos_token_id=eos)
    assert isinstance(got, torch.Tensor)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("name", DRAFTERS)
def test_choosing_a_drafter_names_every_option_with_its_default(name: str):
    sections = re.split(r"^## ", (ROOT / "docs" / "choosing-a-drafter.md").read_text(), flags=re.MULTILINE)
    (section,) = (text for text in sections if f"`{name}`" in text.splitlines()[0])
    written = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section, re.MULTILINE))
    parameters = inspect.signature(DRAFTERS[name]).parameters
    actual = {key: str(value.default).lower() for key, value in parameters.items() if key not in NOT_OPTIONS}
    assert written == actual


def test_formats_names_every_format():
    page = (ROOT / "docs" / "formats.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == {known.NAME for known in formats.FORMATS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"


def test_architecture_names_every_module():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"^\| `([\w/]+)(?:/\*)?` \|", page, re.MULTILINE))
    modules = {path.stem for path in (ROOT / "specdec").glob("*.py")} - {"__init__", "__main__", "version"}
    folders = {path.parent.name for path in (ROOT / "specdec").glob("*/__init__.py") if not path.parent.is_symlink()}
    missing = [name for name in modules | folders if not any(entry.split("/")[0] == name for entry in named)]
    assert not missing, f"docs/architecture.md does not say what {sorted(missing)} do"
    assert len(page.splitlines()) <= 120, "short enough not to rot"
