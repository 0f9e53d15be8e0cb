"""Medusa-2: heads and target that learn together, the law that is kept, and the target that comes out of it."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from specdec import formats
from specdec.api import generate
from specdec.drafters.load import load_drafter
from specdec.environment import weights_sample
from specdec.errors import BadCheckpoint, BadRecipe, DrafterMismatch
from specdec.probe import target_of
from specdec.stats import DecodeStats
from specdec.train.adapters import Adapters, LoRASettings
from specdec.train.batch import TrainBatch
from specdec.train.evaluate import Evaluator
from specdec.train.joint import JointSettings, joint_training, train_medusa2
from specdec.train.kinds.medusa import MedusaTraining
from specdec.train.kinds.medusa2 import JointWeights, Medusa2Training
from specdec.train.loop import Loop
from specdec.train.objective import Objective
from specdec.train.order import Piece
from specdec.train.prepared import MemoryData
from specdec.train.recipe import Recipe, recipe_for
from specdec.train.report import Score, StepReport
from tests.families import tiny_model
from tests.tiny import make_target

peft = pytest.importorskip("peft")

PROMPT, LENGTH, TEXTS = 4, 36, 6


def sharp_target() -> Any:
    """Its laws are peaked, so that a small change of its weights does not turn its favourite tokens around."""
    model = make_target(seed=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


@cache
def texts() -> torch.Tensor:
    """The target's own greedy texts."""
    prompts = torch.randint(3, 100, (TEXTS, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompts)
    return sharp_target().generate(prompts, attention_mask=mask, max_new_tokens=LENGTH - PROMPT, do_sample=False)


def data() -> MemoryData:
    return MemoryData([(text, torch.arange(LENGTH) >= PROMPT) for text in texts()])


def prompts() -> list[list[int]]:
    return texts()[:, :PROMPT].tolist()


def batch() -> TrainBatch:
    rows = [(Piece(n, 0, LENGTH), Piece(n + 1, 0, LENGTH)) for n in range(0, TEXTS, 2)]
    return TrainBatch.of_rows(data(), rows, [0, 1, 2], 2 * LENGTH)


def recipe(**sections: dict[str, Any]) -> Recipe:
    """Two stages of a few steps."""
    lora = sections.pop("lora", {})
    loop = {"steps": 4, "rows_per_step": 2, "rows_at_once": 2, "save_every": 1, "evaluate_every": 0}
    head = {"num_heads": 2, "frozen_steps": 3, "lora": {"rank": 4, **lora}}
    given = {"loop": loop, "data": {"row_length": 40, "validation_tokens": 6, "validation_prompts": 2}, "head": head}
    return recipe_for("medusa2", None, **{name: given.get(name, {}) | sections.get(name, {}) for name in
                                          ("loop", "data", "head", "objective")})  # fmt: skip


def learn(out: Path, model: Any = None, **sections: dict[str, Any]) -> tuple[Loop, list[Any]]:
    """Train; returns the loop and the second stage's reports."""
    heard: list[Any] = []
    model = model or sharp_target()
    loop = train_medusa2(recipe(**sections), model, data(), out, prompts=prompts(), report=heard.append)
    return loop, heard


def adapted(model: Any, lora: LoRASettings | None = None, noise: float = 0.1) -> tuple[Any, Adapters]:
    """A target with adapters that are not at their beginning."""
    adapters = Adapters(target_of(model), lora or LoRASettings(rank=4, alpha=8.0))
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in adapters.parameters():
            weight.add_(torch.randn_like(weight) * noise)
    return model, adapters


IDS = torch.arange(5, 25)[None]


# --- Adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2-sliding"])
def test_with_its_adapters_off_a_target_is_the_original_one_and_merged_it_is_the_adapted_one(family: str) -> None:
    model: Any = tiny_model(family, "eager", layers=2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        original = model(IDS).logits
        adapters = Adapters(target_of(model), LoRASettings(rank=4))
        assert torch.equal(model(IDS).logits, original)  # fresh adapters change nothing
        adapters = adapted(model := tiny_model(family, "eager", layers=2))[1]
        on = model(IDS).logits
        assert (on - original).abs().max() > 0.01
        with adapters.off():
            assert torch.equal(model(IDS).logits, original)
        with adapters.merged():
            assert (model(IDS).logits - on).abs().max() < 1e-5
        assert torch.equal(model(IDS).logits, on)  # to the bit, though a sum was taken back
        assert all(weight.requires_grad for weight in adapters.parameters())
        folded: Any = adapters.fold()
        assert (folded(IDS).logits - on).abs().max() < 1e-5
    assert folded.state_dict().keys() == before.keys()


def test_adapters_taken_out_leave_the_original_bits() -> None:
    model = sharp_target()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapters = adapted(model)[1]
    with adapters.merged():
        pass
    after = adapters.remove().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_bfloat16_target_has_adapters_in_float32_and_gets_its_bits_back() -> None:
    model, adapters = adapted(sharp_target().to(torch.bfloat16))
    assert {weight.dtype for weight in adapters.parameters()} == {torch.float32}
    on = model(IDS).logits
    with adapters.merged():
        assert not torch.equal(model(IDS).logits, on)  # merged weights are rounded: the subtraction would not undo it
    assert torch.equal(model(IDS).logits, on)


def test_every_linear_layer_gets_an_adapter_and_the_output_matrix_unless_it_is_the_embedding() -> None:
    _, adapters = adapted(sharp_target())
    names = {name.rpartition("/")[2] for name, _ in adapters.named_children()}
    assert names == {*(f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")), "lm_head"}
    tied = adapted(make_target(tie_word_embeddings=True))[1]
    assert len(list(tied.children())) == len(list(adapters.children())) - 1
    few = Adapters(target_of(sharp_target()), LoRASettings(rank=4, modules=["q_proj", "v_proj"]))
    assert len(list(few.children())) == 2 * 4


def test_a_mark_tells_adapters_and_originals_apart() -> None:
    _, one = adapted(sharp_target())
    assert one.mark() == adapted(sharp_target())[1].mark()
    assert one.mark() != adapted(sharp_target(), LoRASettings(rank=4, alpha=9.0))[1].mark()
    assert one.mark() != adapted(make_target(seed=5))[1].mark()
    with torch.no_grad():
        next(one.parameters())[0, 0] += 1e-3
    assert one.mark() != adapted(sharp_target())[1].mark()


# --- The joint loss ------------------------------------------------------------------------------------


def training(**sections: dict[str, Any]) -> Medusa2Training:
    return joint_training(recipe(**sections), target_of(sharp_target()))


def test_the_loss_is_the_published_sum() -> None:
    made = training(head={"base_weight": 3.0, "head_weight": 0.5})
    base, first, second = made.terms(made.features(batch()), Objective(decay=0.8))
    assert [term.name for term in (base, first, second)] == ["base", "depth 1", "depth 2"]
    assert base.losses.abs().max() < 1e-6  # fresh adapters: both laws are one
    assert [term.weight for term in (base, first, second)] == pytest.approx([3.0, 0.5 * 0.8, 0.5 * 0.8**2])
    assert (base.depth, base.alpha) == (0, None)


def test_heads_and_adapters_learn_from_the_heads_loss_and_nothing_else_does() -> None:
    made = training()
    terms = made.terms(made.features(batch()), Objective("ce"))
    torch.stack([term.total for term in terms[1:]]).sum().backward()
    learning = {name for name, weight in made.module.named_parameters() if weight.grad is not None}
    assert learning == {name for name, _ in made.module.named_parameters()}
    assert any(name.startswith("heads.") for name in learning)
    moved = [name for name, weight in made.module.named_parameters() if name.startswith("adapters.")
             and cast(torch.Tensor, weight.grad).abs().max() > 0]  # fmt: skip
    assert moved  # a frozen target would leave them at zero
    inside = {id(weight) for weight in made.module.parameters()}
    assert all(weight.grad is None for weight in made.target.model.parameters() if id(weight) not in inside)


def test_the_base_term_pulls_the_adapted_law_back() -> None:
    made = training()
    with torch.no_grad():
        for name, weight in made.module.named_parameters():
            if ".B." in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    laid = made.features(batch())
    weights = [weight for name, weight in made.module.named_parameters() if name.startswith("adapters.")]
    far = made.terms(laid, Objective())[0].total
    assert far > 0.1
    for weight, gradient in zip(weights, torch.autograd.grad(far, weights), strict=True):
        weight.data -= 1e-4 * gradient
    assert made.terms(laid, Objective())[0].total < far


def test_the_weight_of_the_heads_follows_its_schedule_by_row_number() -> None:
    def weights(form: str) -> list[float]:
        made = JointWeights(1.0, 0.2, form, steps=4, rows_per_step=2)
        return [made.of_heads(row) for row in (0, 1, 2, 5, 7)]

    assert weights("constant") == [0.2] * 5
    assert weights("linear") == pytest.approx([0.05, 0.05, 0.1, 0.15, 0.2])
    assert weights("sine")[-1] == pytest.approx(0.2)
    assert weights("sine")[0] == pytest.approx(0.2 * 0.3827, abs=1e-4)


def test_heads_learn_faster_than_adapters(tmp_path: Path) -> None:
    loop, _ = learn(tmp_path, loop={"steps": 1, "learning_rate": 1e-4, "warmup": 0}, head={"frozen_steps": 0})
    rates = {group["lr"] for group in loop.optimizer.param_groups}
    assert rates == {1e-4, 4e-4}


def test_recomputed_layers_learn_the_same_and_serve_a_cache() -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        made = joint_training(recipe(), target_of(sharp_target()), recompute=recompute)
        torch.stack([term.total for term in made.terms(made.features(batch()), Objective("ce"))]).sum().backward()
        ids = torch.tensor([prompts()[0]])
        model: Any = made.target.model
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False)[0], texts()[0, :8])
        return [cast(torch.Tensor, weight.grad) for weight in made.module.parameters()]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert (one - other).abs().max() < 1e-4


# --- Whole runs ----------------------------------------------------------------------------------------


LEARNED = {
    "loop": {"steps": 40, "rows_per_step": 3, "rows_at_once": 3, "learning_rate": 1e-3, "save_every": 0},
    "objective": {"divergence": "ce"},
    "data": {"row_length": 2 * LENGTH, "validation_tokens": LENGTH - PROMPT, "validation_prompts": TEXTS},
}
HEAD = {"num_heads": 3, "frozen_steps": 120, "frozen_rate": 1e-2, "lora": {"rank": 8}}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Score]:
    """A run that ends with its text known by heart, and its last validation."""
    out = tmp_path_factory.mktemp("medusa2")
    _, heard = learn(out, **LEARNED, head={**HEAD, "base_weight": 10.0})
    return out, next(report for report in reversed(heard) if isinstance(report, Score))


def test_heads_draft_the_text_of_their_adapted_target_and_the_output_is_that_targets_own(
    learned: tuple[Path, Score],
) -> None:
    out, score = learned
    model: Any = AutoModelForCausalLM.from_pretrained(out / "target")
    assert type(model) is type(sharp_target())
    rows = [prompts()[0], [*prompts()[1], 7, 9], prompts()[2][:3]]
    width = max(map(len, rows))
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    stats = DecodeStats()
    written = generate(model, **inputs, max_new_tokens=32, do_sample=False, drafter=str(out), stats=stats)
    assert torch.equal(cast(torch.Tensor, written), model.generate(**inputs, max_new_tokens=32, do_sample=False))
    assert 0 < stats.accepted < stats.drafted
    evaluate = Evaluator(model, prompts(), max_new_tokens=LENGTH - PROMPT)
    fresh = evaluate.measure(MedusaTraining(target_of(model), num_heads=3).drafter()).tau
    assert score.value > 2.6 > 2.2 > fresh
    assert evaluate.measure(load_drafter(out, model)).tau == pytest.approx(score.value, abs=1e-4)


def test_the_base_term_keeps_the_law_and_without_it_the_target_drifts(
    learned: tuple[Path, Score], tmp_path: Path
) -> None:
    out, kept = learned
    heard: list[Any] = []
    free_recipe = recipe_for("medusa2", None, **LEARNED, head={"base_weight": 0.0, "lora": HEAD["lora"]})
    train_medusa2(free_recipe, sharp_target(), data(), tmp_path, prompts=prompts(), report=heard.append,
                  begin_from=out / "heads" / "drafter")  # fmt: skip
    free = next(report for report in reversed(heard) if isinstance(report, Score))
    assert kept.details["kl_to_original"] < 0.05 < 1.0 < free.details["kl_to_original"]
    assert kept.details["top1_agreement"] > 0.9 > free.details["top1_agreement"]


def test_the_distance_in_the_log_is_that_of_the_two_models(learned: tuple[Path, Score]) -> None:
    out, score = learned
    original, model = sharp_target(), cast(Any, AutoModelForCausalLM.from_pretrained(out / "target"))
    with torch.no_grad():
        p, q = (m(texts()).logits[:, PROMPT - 1 : -1].log_softmax(-1) for m in (original, model))
    assert (p.exp() * (p - q)).sum(-1).mean().item() == pytest.approx(score.details["kl_to_original"], abs=1e-4)
    same = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    assert same == pytest.approx(score.details["top1_agreement"], abs=1e-3)


def test_the_heads_fit_their_own_target_and_the_first_stages_the_original(learned: tuple[Path, Score]) -> None:
    out, _ = learned
    original, model = sharp_target(), cast(Any, AutoModelForCausalLM.from_pretrained(out / "target"))
    assert weights_sample(original) != weights_sample(model)
    assert load_drafter(out, model) is not None
    assert load_drafter(out, model.to(torch.bfloat16)) is not None  # the mark does not depend on a dtype
    assert load_drafter(out / "heads", original) is not None
    with pytest.raises(DrafterMismatch, match="trained together with its target"):
        load_drafter(out, original)


def test_target_and_heads_become_a_medusa_2_model_and_no_other_base_will_do(
    learned: tuple[Path, Score], tmp_path: Path
) -> None:
    out, _ = learned
    checkpoint = formats.read(out / "drafter")
    sharp_target().save_pretrained(tmp_path / "original")
    with pytest.raises(BadCheckpoint, match="not the model that these heads were trained together with"):
        formats.write(replace(checkpoint, base=tmp_path / "original"), tmp_path / "wrong", "medusa_2")
    formats.write(replace(checkpoint, base=out / "target"), tmp_path / "whole", "medusa_2")
    assert formats.read(tmp_path / "whole").target["adapted"] == checkpoint.target["adapted"]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    stats = DecodeStats()
    inputs: dict[str, Any] = {"input_ids": torch.tensor(prompts()[:1]), "max_new_tokens": 20, "do_sample": False}
    written = generate(model, **inputs, drafter=str(tmp_path / "whole"), stats=stats)
    assert torch.equal(cast(torch.Tensor, written), model.generate(**inputs))
    assert stats.accepted > 0


def test_the_adapter_beside_the_heads_makes_the_same_target_with_peft_alone(learned: tuple[Path, Score]) -> None:
    out, _ = learned
    model: Any = peft.PeftModel.from_pretrained(sharp_target(), str(out / "drafter" / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(out / "target")
    with torch.no_grad():
        assert (model(input_ids=IDS).logits - merged(IDS).logits).abs().max() < 1e-4


DROPOUT = {"dropout": 0.1}
"""Of the runs that are broken off: what is drawn in a step must come again."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """An unbroken run of a few steps, and its reports."""
    out = tmp_path_factory.mktemp("medusa2-whole") / "run"
    return out, learn(out, lora=DROPOUT)[1]


def files_of(out: Path) -> dict[str, bytes]:
    """The final bytes of a run."""
    names = ["target/model.safetensors", "target/config.json", "heads/step-000003/training.safetensors"]
    names += [f"step-000004/{name}" for name in ("training.safetensors", "optimizer.pt", "drafter/drafter.json",
                                                 "drafter/model.safetensors")]  # fmt: skip
    return {name: (out / name).read_bytes() for name in names}


@pytest.mark.parametrize("stage", ["heads", "together"])
def test_a_run_that_is_broken_off_in_either_stage_ends_with_the_same_bytes(
    whole: tuple[Path, list[Any]], tmp_path: Path, stage: str
) -> None:
    model = sharp_target()
    before = weights_sample(model)

    class Killed(BaseException):
        """As sudden as a signal."""

    def hear(report: Any) -> None:
        if isinstance(report, StepReport) and report.step == 3:
            raise Killed

    reports: dict[str, Any] = {"report" if stage == "together" else "report_heads": hear}
    with pytest.raises(Killed):
        train_medusa2(recipe(lora=DROPOUT), model, data(), tmp_path, prompts=prompts(), **reports)
    assert weights_sample(model) == before
    assert not any("lora" in name for name, _ in model.named_modules())
    assert not (tmp_path / "target").exists()
    _, rest = learn(tmp_path, model, lora=DROPOUT)
    assert files_of(tmp_path) == files_of(whole[0])
    losses = {report.step: report.loss for report in whole[1] if isinstance(report, StepReport)}
    assert len(losses) == 4
    assert all(losses[report.step] == report.loss for report in rest if isinstance(report, StepReport))
    scores = [[r.details["kl_to_original"], r.value] for run in (whole[1], rest) for r in run if isinstance(r, Score)]
    assert scores[0] == scores[-1]


@pytest.fixture
def copied(whole: tuple[Path, list[Any]], tmp_path: Path) -> Path:
    """A copy of the whole run."""
    return Path(shutil.copytree(whole[0], tmp_path / "copied", symlinks=True))


def test_a_finished_run_writes_its_target_again_when_it_is_gone(copied: Path) -> None:
    before = files_of(copied)
    (copied / "target" / "config.json").unlink()
    model = sharp_target()
    _, heard = learn(copied, model, lora=DROPOUT)
    assert heard == []
    assert files_of(copied) == before
    assert weights_sample(model) == weights_sample(AutoModelForCausalLM.from_pretrained(copied / "target"))


def test_accumulating_small_batches_equals_one_big_batch_to_rounding(tmp_path: Path) -> None:
    quick: dict[str, Any] = {"head": {"frozen_steps": 0}, "data": {"validation_prompts": 0}}
    big, small = (learn(tmp_path / str(rows), loop={"rows_at_once": rows}, **quick) for rows in (2, 1))
    assert [report.loss for report in big[1]] == pytest.approx([report.loss for report in small[1]], rel=1e-4)
    a, b = (load_file(tmp_path / str(rows) / "step-000004" / "training.safetensors") for rows in (2, 1))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-4


def test_checkpoints_of_another_run_are_refused(copied: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"head\.base_weight 2\.0 \(checkpoint: 1\.0\)"):
        learn(copied, lora=DROPOUT, head={"base_weight": 2.0})
    with pytest.raises(BadCheckpoint, match="belongs to another run"):
        learn(copied, make_target(seed=5), lora=DROPOUT)


# --- What a user can do wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"head": {"rank": 3}}, "no setting 'rank'"),
        ({"lora": {"ranks": 3}}, r"\[head.lora\] has no setting 'ranks'"),
        ({"lora": {"rank": 0}}, "rank is at least 1"),
        ({"lora": {"dropout": 1.0}}, "dropout from 0 to below 1"),
        ({"lora": {"modules": ["q_proj", "query"]}}, "has no linear layer 'query'; it has down_proj, "),
        ({"lora": {"modules": [3]}}, "modules are names of layers"),
        ({"head": {"head_schedule": "cosine"}}, "head_schedule is constant, linear, sine, got 'cosine'"),
        ({"head": {"base_weight": -1.0}}, "base_weight is not negative"),
        ({"head": {"head_weight": 0.0}}, "head_weight positive"),
        ({"head": {"frozen_steps": -1}}, "frozen_steps is not negative"),
        ({"head": {"frozen_rate": 0.0}}, "frozen_rate and head_rate are positive"),
        ({"head": {"output": "mine"}}, "output is one of own, one, target"),
        ({"head": {"options": {"budgets": 3}}}, "no option 'budgets'"),
        ({"data": {"written_from": 0.5}}, "leave data.written_from out"),
        ({"loop": {"fsdp": True}}, "inside its target, which FSDP does not divide; leave --fsdp out"),
    ],
)
def test_settings_that_cannot_be_are_one_clear_line(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    model = sharp_target()
    with pytest.raises(BadRecipe, match=words) as caught:
        train_medusa2(recipe(**sections), model, data(), tmp_path, prompts=prompts())
    assert "\n" not in str(caught.value)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_an_output_matrix_that_is_the_embedding_cannot_be_adapted(tmp_path: Path) -> None:
    model = make_target(tie_word_embeddings=True)
    with pytest.raises(BadRecipe, match="is its embedding too"):
        learn(tmp_path, model, lora={"modules": ["lm_head"]}, head={"frozen_steps": 0})


def test_without_peft_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BadRecipe, match=r"need the package peft: pip install peft"):
        learn(tmp_path)
    assert not tmp_path.exists() or not any(tmp_path.iterdir())


def test_heads_that_are_there_leave_the_first_stage_out_and_keep_their_sizes(
    whole: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    heads = whole[0] / "heads" / "drafter"
    given = recipe_for("medusa2", None, loop={"steps": 1, "rows_per_step": 2}, data={"row_length": 40})
    train_medusa2(given, sharp_target(), data(), tmp_path / "second", begin_from=heads)
    assert not (tmp_path / "second" / "heads").exists()
    assert json.loads((tmp_path / "second" / "drafter" / "drafter.json").read_text())["head"]["num_heads"] == 2
    with pytest.raises(BadRecipe, match="num_heads cannot be chosen for a head that is there already"):
        train_medusa2(recipe(), sharp_target(), data(), tmp_path / "third", begin_from=heads)


def test_every_setting_is_written_beside_the_checkpoints(whole: tuple[Path, list[Any]]) -> None:
    written = json.loads((whole[0] / "recipe.json").read_text())["head"]
    assert written.keys() == JointSettings.__dataclass_fields__.keys()
    assert written["head_rate"] == 4.0
