"""Fresh draft models: a choice from a table of costs, weights to begin with, and stages of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from specdec.drafters.load import load_drafter
from specdec.errors import BadCheckpoint, BadRecipe, UnsupportedModel
from specdec.train import architecture as module
from specdec.train.architecture import (
    Architecture,
    Costs,
    candidates,
    choose,
    draft_config,
    fresh_draft,
    measured_costs,
    num_parameters,
    principal_directions,
)
from specdec.train.distill import DEFAULT_RECIPE
from specdec.train.fast_draft import Stage, fast_draft
from specdec.train.prepared import MemoryData
from tests.tiny import make_target, shared_target

THIN = Architecture(2, 8, 2, 1, 16)
DEEP = Architecture(4, 8, 2, 1, 16)
WIDE = Architecture(2, 16, 2, 1, 32)
FLAT = Architecture(1, 24, 4, 2, 48)


def config() -> Any:
    return shared_target().config


def costs(**seconds: float) -> Costs:
    table = {"thin": THIN, "deep": DEEP, "wide": WIDE, "flat": FLAT}
    return Costs(1.0, {table[name]: value for name, value in seconds.items()})


def test_the_most_parameters_within_the_budget_win() -> None:
    assert num_parameters(WIDE, config()) > num_parameters(DEEP, config()) > num_parameters(THIN, config())
    table = costs(thin=0.05, deep=0.10, wide=0.12, flat=0.14)
    assert choose(table, config(), 0.15) == WIDE
    assert choose(table, config(), 0.11) == DEEP
    assert choose(table, config(), 0.07) == THIN
    assert choose(Costs(2.0, table.candidates), config(), 0.06) == WIDE  # a share of the target's step


def test_one_layer_is_taken_only_where_two_do_not_fit() -> None:
    assert num_parameters(FLAT, config()) > num_parameters(THIN, config())
    assert choose(costs(thin=0.1, flat=0.1), config(), 0.15) == THIN
    assert choose(costs(thin=0.2, flat=0.1), config(), 0.15) == FLAT


def test_the_choice_does_not_depend_on_the_order_of_the_table() -> None:
    table = costs(thin=0.1, deep=0.1, wide=0.1)
    turned = Costs(1.0, dict(reversed(list(table.candidates.items()))))
    assert choose(table, config(), 0.15) == choose(turned, config(), 0.15)


def test_a_budget_that_nothing_fits_says_what_the_cheapest_costs() -> None:
    with pytest.raises(BadRecipe, match=r"the cheapest, 2x8, costs 0\.30"):
        choose(costs(thin=0.3, deep=0.4), config(), 0.15)
    with pytest.raises(BadRecipe, match="between 0 and 1"):
        choose(costs(thin=0.3), config(), 1.5)


def test_the_parameters_of_the_layers_are_counted_as_they_are() -> None:
    for made in (THIN, WIDE, FLAT):
        draft = fresh_draft(shared_target(), made)
        inside = [p for name, p in draft.named_parameters() if "_proj" in name]
        assert num_parameters(made, config()) == sum(p.numel() for p in inside)


def test_the_grid_keeps_the_targets_design() -> None:
    grid = candidates(config())
    assert len(grid) > 8
    assert len(set(grid)) == len(grid)
    for made in grid:
        assert made.num_layers <= 4
        assert made.hidden_size < 32
        assert made.num_heads % made.num_key_value_heads == 0
        draft = fresh_draft(shared_target(), made)
        with torch.no_grad():
            assert draft(input_ids=torch.arange(3, 9)[None]).logits.shape == (1, 6, 100)


def test_a_fresh_draft_has_the_targets_vocabulary_ties_its_embeddings_and_begins_alike_everywhere() -> None:
    torch.manual_seed(1)
    first: Any = fresh_draft(shared_target(), WIDE, seed=4)
    expected = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), expected)  # others' random numbers are left alone
    again, other = fresh_draft(shared_target(), WIDE, seed=4), fresh_draft(shared_target(), WIDE, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert first.get_input_embeddings().weight is first.get_output_embeddings().weight
    assert load_drafter(first, shared_target()) is not None


def test_tokens_that_the_target_treats_alike_begin_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(50, 6, generator=generator) @ torch.randn(6, 32, generator=generator)
    small = principal_directions(flat, 6)
    assert torch.allclose(small @ small.T / (flat @ flat.T), torch.ones(50, 50) * float(
        small.square().sum() / flat.square().sum()), rtol=2e-2)  # fmt: skip
    assert float(small.square().mean()) == pytest.approx(1.0, rel=1e-4)


def test_a_family_with_other_blocks_is_refused() -> None:
    other: Any = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModel, match="from scratch"):
        draft_config(other, THIN)


def test_a_head_size_of_its_own_stays() -> None:
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip
    made = candidates(model.config)[0]
    assert draft_config(model, made).head_dim == 16
    assert fresh_draft(model, made).config.layer_types == ["full_attention"] * made.num_layers


def test_costs_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "ROUNDS", 2)
    first = measured_costs(shared_target(), (THIN, WIDE))
    assert first.target > 0
    assert set(first.candidates) == {THIN, WIDE}
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    assert measured_costs(shared_target(), (THIN, WIDE)) == first
    with pytest.raises(pytest.fail.Exception):
        measured_costs(shared_target(), (THIN, DEEP))
    with pytest.raises(pytest.fail.Exception):
        measured_costs(make_target(num_hidden_layers=3), (THIN, WIDE))


def data() -> MemoryData:
    """A text that counts: each token is followed by the next one."""
    return MemoryData([((torch.arange(24) + start) % 90 + 5, torch.arange(24) > 0) for start in range(40)])


def stage(name: str, steps: int, **head: Any) -> Stage:
    loop = {"steps": steps, "rows_per_step": 4, "rows_at_once": 4, "warmup": 0, "learning_rate": 1e-2, "save_every": 1}
    recipe = DEFAULT_RECIPE.changed({"loop": loop, "data": {"row_length": 48}, "head": head})
    return Stage(name, data(), recipe)


def stages() -> list[Stage]:
    return [stage("pretrain", 8, learns="tokens"), stage("continue", 3, learns="tokens"), stage("align", 3)]


def run(out: Path, heard: list[tuple[str, float]], stop_after: int = 0, **options: Any) -> Any:
    def report_of(name: str) -> Any:
        def report(step: Any) -> None:
            heard.append((name, step.loss))
            if len(heard) == stop_after:
                raise KeyboardInterrupt

        return report

    return fast_draft(shared_target(), stages(), out, costs=costs(thin=0.1, wide=0.1, deep=0.3), report=report_of,
                      **options)  # fmt: skip


def test_stages_follow_each_other_and_a_stopped_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole: list[tuple[str, float]] = []
    loop = run(tmp_path / "whole", whole)
    assert [name for name, _ in whole] == ["pretrain"] * 8 + ["continue"] * 3 + ["align"] * 3
    assert whole[7][1] < 0.9 * whole[0][1]
    assert whole[8][1] < whole[0][1]  # goes on from what was learned
    assert loop.trainable.module.config.hidden_size == WIDE.hidden_size
    broken: list[tuple[str, float]] = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", broken, stop_after=10)
    rest: list[tuple[str, float]] = []
    again = run(tmp_path / "broken", rest)
    assert rest == whole[-len(rest) :]
    for ours, theirs in zip(loop.trainable.module.parameters(), again.trainable.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert load_drafter(str(tmp_path / "broken" / "align" / "latest" / "drafter"), shared_target()) is not None


def test_the_choice_is_written_down_and_another_budget_is_refused(tmp_path: Path) -> None:
    run(tmp_path, [])
    written = json.loads((tmp_path / "architecture.json").read_text())
    assert Architecture(**written["architecture"]) == WIDE
    assert len(written["measured"]) == 3
    with pytest.raises(BadCheckpoint, match=r"chosen for a budget of 0\.15; this run asks for 0\.3"):
        run(tmp_path, [], share=0.3)
    (tmp_path / "architecture.json").write_text("{")
    with pytest.raises(BadCheckpoint, match=r"architecture\.json cannot be read"):
        run(tmp_path, [])


@pytest.mark.parametrize("names", [[], ["a", "a"], ["a/b"], [""]])
def test_stages_need_names(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(BadRecipe, match="stages have names"):
        fast_draft(shared_target(), [stage(name, 1) for name in names], tmp_path, architecture=THIN)
