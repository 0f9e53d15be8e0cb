"""From a name to a drafter; the refusals are in test_errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import specdec
from specdec.drafters.directory import DrafterJson, fingerprint, read_drafter_json, write_drafter_json
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.early_exit import EarlyExitDrafter
from specdec.drafters.load import HEAD_DRAFTERS, WORDS, load_drafter, parse_spec
from specdec.drafters.lookup import LookupDrafter
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.grow.fixed import FixedGrowth
from specdec.heads.kinds import HEADS
from tests.tiny import VOCAB, make_target, prompt, shared_draft, shared_target


def loaded(spec: Any) -> Any:
    return load_drafter(spec, shared_target())


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("lookup", ("lookup", {})),
        ("lookup:ngram=3", ("lookup", {"ngram": "3"})),
        ("lookup: ngram = 3 , tokens=4", ("lookup", {"ngram": "3", "tokens": "4"})),
        ("suffix:min-match=2", ("suffix", {"min_match": "2"})),
        ("a/path", ("a/path", {})),
        ("a/path:depth=4", ("a/path", {"depth": "4"})),
        ("C:/model", ("C:/model", {})),
        ("a:b/path=c", ("a:b/path=c", {})),
        ("odd:name:depth=4", ("odd:name", {"depth": "4"})),
    ],
)
def test_a_specification_is_a_name_and_options(spec: str, expected: tuple[str, dict[str, str]]) -> None:
    assert parse_spec(spec) == expected


def test_options_reach_the_drafter_in_their_type() -> None:
    lookup = loaded("lookup:ngram=4,tokens=7,min_ngram=2")
    assert isinstance(lookup, LookupDrafter)
    assert (lookup.ngram, lookup.tokens, lookup.min_ngram) == (4, 7, 2)
    suffix = loaded("suffix:budget=5,branches=3,min_match=2,factor=1.5,min_share=0.25,remember=99")
    assert isinstance(suffix, SuffixDrafter)
    assert (suffix.budget, suffix.branches, suffix.min_match) == (5, 3, 2)
    assert (suffix.factor, suffix.min_share, suffix.remember) == (1.5, 0.25, 99)
    recycling = loaded("recycling:successors=4,budget=6,depth=2,remember=yes")
    assert isinstance(recycling, RecyclingDrafter)
    assert (recycling.successors, recycling.remember, recycling.vocab_size) == (4, True, VOCAB)
    assert (recycling.shape.num_nodes, recycling.shape.depth) == (7, 2)
    early = loaded("early-exit:layer=3,depth=2,budget=5,children=drawn")
    assert isinstance(early, EarlyExitDrafter)
    assert isinstance(early.policy, FixedGrowth)
    assert (early.layer, early.policy.children) == (3, "drawn")
    assert (early.policy.depth, early.policy.shape.num_nodes) == (2, 6)


def test_every_word_but_the_demo_draft_loads_without_options() -> None:
    for word in sorted(set(WORDS) - {"demo-draft"}):
        assert isinstance(loaded(word), specdec.Drafter)


def test_no_drafter_and_a_drafter_object_pass_through() -> None:
    assert loaded(None) is None
    drafter = LookupDrafter()
    assert loaded(drafter) is drafter


def test_a_loaded_model_becomes_a_draft_model_drafter() -> None:
    drafter = loaded(shared_draft())
    assert isinstance(drafter, DraftModelDrafter)
    assert drafter.model.model is shared_draft()


def test_a_model_path_loads_a_draft_model_in_the_targets_dtype(tmp_path: Path) -> None:
    shared_draft().save_pretrained(tmp_path)
    drafter = loaded(f"{tmp_path}:depth=3,budget=6")
    assert isinstance(drafter, DraftModelDrafter)
    assert isinstance(drafter.policy, FixedGrowth)
    assert (drafter.policy.depth, drafter.policy.shape.num_nodes) == (3, 7)
    assert not drafter.model.model.training
    twin: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    in_double: Any = load_drafter(tmp_path, twin)
    assert in_double.model.dtype == torch.float64
    arguments: dict[str, Any] = {**prompt(1), "max_new_tokens": 10}
    output: Any = specdec.generate(shared_target(), drafter=drafter, **arguments, return_dict_in_generate=True)
    assert output.sequences.tolist() == shared_target().generate(**arguments).tolist()
    assert output.stats.accepted > 0


def test_a_drafter_directory_carries_its_options_and_arguments_override_them(tmp_path: Path) -> None:
    write_drafter_json(tmp_path, DrafterJson("suffix", {"budget": "5", "branches": "3"}, fingerprint(shared_target())))
    assert (loaded(tmp_path).budget, loaded(tmp_path).branches) == (5, 3)
    assert (loaded(f"{tmp_path}:budget=4").budget, loaded(f"{tmp_path}:budget=4").branches) == (4, 3)


def test_a_drafter_directory_may_hold_a_draft_model(tmp_path: Path) -> None:
    shared_draft().save_pretrained(tmp_path)
    write_drafter_json(tmp_path, DrafterJson("draft-model", {"depth": "2"}, fingerprint(shared_target())))
    drafter = loaded(tmp_path)
    assert isinstance(drafter, DraftModelDrafter)
    assert drafter.policy.depth == 2


def test_every_kind_of_head_has_a_drafter() -> None:
    assert HEAD_DRAFTERS.keys() == HEADS.keys()


def test_drafter_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    described = DrafterJson("lookup", {"ngram": "2"}, fingerprint(make_target()))
    write_drafter_json(tmp_path / "new" / "folder", described)
    assert read_drafter_json(tmp_path / "new" / "folder") == described
    assert described.target == {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 4}
