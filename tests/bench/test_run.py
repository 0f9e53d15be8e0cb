"""A run: what it records, in which order, under which protocol."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.bench.manifest import MANIFEST_FILE
from specdec.bench.methods import Decoding, Request, SpeculativeMethod, TransformersMethod
from specdec.bench.record import Record, key_of
from specdec.bench.runner import keys_of
from specdec.bench.schedule import schedule
from specdec.bench.sent import PROMPTS_FILE, ids_sha256
from specdec.bench.warmup import TEXT, is_stable
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import SpecdecError
from tests.bench.runs import NEW_TOKENS, QUESTIONS, question_set, run
from tests.tiny import make_target, perturbed, prompt, shared_draft, shared_target, tokenizer

ALL = {"lookup": "lookup", "suffix": "suffix:remember=500", "recycling": "recycling"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every kind of method, two repeats."""
    drafters = {**ALL, "draft model": shared_draft()}
    folder = tmp_path_factory.mktemp("run") / "out"
    return run(folder, drafters, settings={"repeats": 2}, assistant=shared_draft(), lookup_tokens=4)


def by_method(records: list[Record], **wanted: Any) -> dict[str, Record]:
    return {r["method"]: r for r in records if all(r[name] == value for name, value in wanted.items())}  # type: ignore[literal-required]


def test_there_is_one_record_for_each_method_question_turn_and_repeat(finished: Any):
    assert len(finished.records) == len({key_of(r) for r in finished.records}) == 8 * 4 * 2
    assert [r["sequence"] for r in finished.records] == list(range(64))
    assert not finished.errors


def test_every_method_gives_the_tokens_of_plain_generate(finished: Any):
    assert Counter(v["verdict"] for v in finished.verdicts) == {"exact": 7 * 4 * 2}
    texts = {(r["question_id"], r["turn"]): r["token_ids"] for r in finished.records}
    for question in QUESTIONS:
        first = by_method(finished.records, question_id=question.id, turn=0)["plain"]
        ids = torch.tensor([tokenizer()(question.turns[0])["input_ids"]])
        expected = shared_target().generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
        assert first["token_ids"] == texts[question.id, 0] == expected


def test_steps_add_up_to_the_tokens_and_times_to_the_total(finished: Any):
    for record in finished.records:
        steps, seconds = record["steps"], record["seconds"]
        lengths = {len(values) for values in steps.values() if values is not None}
        assert len(lengths) == 1
        assert sum(steps["total"]) + seconds["ttft"] <= seconds["total"]
        assert record["finish"] == "length"
        if record["method"] in ("plain", "assisted", "prompt-lookup"):
            assert steps["drafted"] is steps["draft"] is seconds["draft"] is None
            assert sum(steps["emitted"]) <= len(record["token_ids"]) - 1
            continue
        assert sum(steps["emitted"]) == len(record["token_ids"]) - 1
        assert all(
            a <= d and a <= t for a, d, t in zip(steps["accepted"], steps["drafted"], steps["tried"], strict=True)
        )
        parts = [seconds[name] for name in ("prefill", "draft", "verify", "accept", "other")]
        assert sum(parts) == pytest.approx(seconds["total"])
        assert min(parts) >= 0
        assert sum(steps["draft"]) == pytest.approx(seconds["draft"])
        assert record["target_calls"] == len(steps["emitted"]) + 1


def test_plain_and_the_empty_loop_emit_one_token_for_each_step(finished: Any):
    for name in ("plain", "none"):
        for record in (r for r in finished.records if r["method"] == name):
            assert record["steps"]["emitted"] == [1] * (NEW_TOKENS - 1)
    assert any(max(r["steps"]["emitted"]) > 1 for r in finished.records if r["method"] == "draft model")


def test_methods_take_turns_in_an_order_that_changes_and_is_that_of_the_seed(finished: Any):
    orders = {}
    for record in finished.records:
        orders.setdefault((record["repeat"], record["question_id"], record["turn"]), []).append(record["method"])
    assert {len(set(order)) for order in orders.values()} == {8}
    assert len({tuple(order) for order in orders.values()}) > 4  # 8 draws of 8! orders: equal ones once in 10^3 runs
    names = [entry["name"] for entry in json.loads((finished.path / MANIFEST_FILE).read_text())["methods"]]
    units = schedule(QUESTIONS, names, repeats=2, batch_size=1, seed=0)
    assert [key for unit in units for key in keys_of(unit)] == [key_of(r) for r in finished.records]
    other = schedule(QUESTIONS, names, repeats=2, batch_size=1, seed=1)
    assert [unit.method for unit in other] != [unit.method for unit in units]


def test_what_was_sent_is_recorded_once_for_each_prompt(finished: Any):
    lines = [json.loads(line) for line in (finished.path / PROMPTS_FILE).read_text().splitlines()]
    assert {entry["sha256"] for entry in lines} == {r["prompt"]["sha256"] for r in finished.records}
    assert len(lines) == 4
    for entry in lines:
        assert ids_sha256(entry["token_ids"]) == entry["sha256"]
        assert tokenizer()(entry["text"])["input_ids"] == entry["token_ids"]


def test_the_manifest_says_what_a_reader_needs(finished: Any):
    manifest = json.loads((finished.path / MANIFEST_FILE).read_text())
    assert manifest["target"]["parameters"] == sum(p.numel() for p in shared_target().parameters())
    assert manifest["target"]["dtype"] == "float32"
    assert manifest["questions"]["ids"] == [q.id for q in QUESTIONS]
    assert manifest["settings"]["repeats"] == 2
    assert manifest["hardware"]["threads"] == 1
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["finished"]
    (start,) = manifest["starts"]
    assert start["records_before"] == 0
    assert 0 < start["probe"]["seconds_per_step"] < 1e-3
    assert [entry["method"] for entry in start["warm_up"]] == [entry["name"] for entry in manifest["methods"]]
    assert all(3 <= len(entry["seconds"]) <= 12 for entry in start["warm_up"])


def test_drafters_start_anew_for_each_question_unless_carried_over(tmp_path: Path):
    same = tuple(type(QUESTIONS[0])(number, "qa", ("hello hello",)) for number in range(3))
    accepted = {}
    for carry_over in (False, True):
        drafters = {"suffix": "suffix:remember=500"}
        settings = {"carry_over": carry_over, "repeats": 2}
        done = run(tmp_path / str(carry_over), drafters, settings=settings, questions=question_set(same))
        records: list[Any] = [r for r in done.records if r["method"] == "suffix"]
        accepted[carry_over] = [sum(r["steps"]["accepted"]) for r in records]
        methods = json.loads((tmp_path / str(carry_over) / MANIFEST_FILE).read_text())["methods"]
        assert {m["name"]: m["resets"] for m in methods} == {"plain": True, "none": True, "suffix": not carry_over}
    assert len(set(accepted[False])) == 1
    cold, *warm = accepted[True][:3]
    assert cold == accepted[False][0]
    assert all(count > cold for count in warm)
    assert accepted[True][3:] == accepted[True][:3], "each repeat begins cold"


def test_a_copied_drafter_shares_the_models_and_nothing_else():
    method = SpeculativeMethod("draft", shared_target(), Decoding(), shared_draft())
    before = method._drafter
    method.prepare()
    assert method._drafter is not before
    assert method._drafter.model.model is shared_draft()  # type: ignore[union-attr]


def test_a_drafter_that_trains_its_weights_is_refused_without_carry_over():
    draft = make_target(seed=5)
    method = SpeculativeMethod("draft", shared_target(), Decoding(), draft)
    with torch.no_grad():
        next(draft.parameters()).add_(0.0)
    with pytest.raises(SpecdecError, match="changed its weights"):
        method.prepare()


def test_a_drafter_whose_state_cannot_be_copied_is_refused_without_carry_over(tmp_path: Path):
    drafter = SuffixDrafter()
    drafter.callback = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(SpecdecError, match=r"suffix cannot be copied.*--carry-over"):
        run(tmp_path / "run", {"suffix": drafter})
    assert not (tmp_path / "run").exists()


def with_end(model: Any) -> Any:
    """A copy of the target that has an end-of-text token, one that it does emit."""
    ids = torch.tensor([tokenizer()("hello hello")["input_ids"]])
    end = int(model.generate(ids, max_new_tokens=6, do_sample=False)[0, -1])
    ending = make_target()
    ending.generation_config.eos_token_id = end
    return ending


def test_answers_end_with_the_end_of_text_or_have_the_fixed_length(tmp_path: Path):
    model = with_end(shared_target())
    natural = run(tmp_path / "natural", ALL, model=model, settings={"batch_size": 2})
    fixed = run(tmp_path / "fixed", ALL, model=model, settings={"fixed_length": True, "batch_size": 2})
    end = model.generation_config.eos_token_id
    ended = [r for r in natural.records if r["finish"] == "eos"]
    assert ended
    assert all(r["token_ids"].index(end) == len(r["token_ids"]) - 1 for r in ended)
    assert {len(r["token_ids"]) for r in fixed.records} == {NEW_TOKENS}
    assert {r["finish"] for r in fixed.records} == {"length"}
    for done in (natural, fixed):
        assert {v["verdict"] for v in done.verdicts} == {"exact"}
        for record in done.records:
            assert sum(record["steps"]["emitted"]) == len(record["token_ids"]) - 1


def test_rows_of_a_batch_share_times_and_batches_are_those_of_every_method(tmp_path: Path):
    done = run(tmp_path / "run", ALL, settings={"batch_size": 2})
    groups: dict[Any, list[Record]] = {}
    for record in done.records:
        groups.setdefault(record["sequence"], []).append(record)
    for rows in groups.values():
        assert len(rows) == rows[0]["batch"]["size"]
        assert [r["batch"]["row"] for r in rows] == list(range(len(rows)))
        assert len({r["seconds"]["total"] for r in rows}) == 1
    members = {(r["question_id"], r["batch"]["id"]) for r in done.records}
    assert members == {("first", 0), ("second", 1), ("third", 1)}
    assert {v["verdict"] for v in done.verdicts} == {"exact"}


def test_reference_history_gives_every_method_the_prompt_of_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wrong_first_turn(monkeypatch)
    prompts = {}
    for history in ("own", "reference"):
        done = run(tmp_path / history, settings={"history": history})
        seconds = by_method(done.records, question_id="first", turn=1)
        prompts[history] = {name: record["prompt"]["sha256"] for name, record in seconds.items()}
        verdicts = {(v["method"], v["turn"]): v for v in done.verdicts if v["question_id"] == "first"}
        assert verdicts["lookup", 0]["verdict"] == "wrong"
        expected = {"own": "not-compared", "reference": "exact"}[history]
        assert verdicts["lookup", 1]["verdict"] == expected
    assert prompts["own"]["lookup"] != prompts["own"]["plain"] == prompts["own"]["none"]
    assert len(set(prompts["reference"].values())) == 1


def wrong_first_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method lookup changes the last token of answers to short prompts."""
    right = SpeculativeMethod.generate

    def generate(self: Any, request: Request) -> Any:
        generated = right(self, request)
        if self.name == "lookup" and len(request.prompts[0]) <= len("abc abc abc"):
            generated.token_ids[0][-1] = (generated.token_ids[0][-1] + 1) % 90 + 5
        return generated

    monkeypatch.setattr(SpeculativeMethod, "generate", generate)


def test_with_a_seed_chosen_children_draw_what_plain_sampling_draws(tmp_path: Path):
    drafters = {**ALL, "drawn": "early-exit:layer=3,children=drawn"}
    done = run(tmp_path / "run", drafters, settings={"temperature": 1.0, "repeats": 2}, lookup_tokens=4)
    verdicts: dict[str, set[Any]] = {}
    for verdict in done.verdicts:
        if verdict["turn"] == 0:
            verdicts.setdefault(verdict["method"], set()).add((verdict["verdict"], verdict["reason"]))
    for name in ("none", *ALL):
        assert verdicts[name] == {("exact", None)}
    for name in ("drawn", "prompt-lookup"):
        assert verdicts[name] == {("not-compared", "drafting draws, too; equal in law only")}
    seeds = {(r["question_id"], r["turn"], r["repeat"]): r["seed"] for r in done.records}
    assert len(set(seeds.values())) == len(seeds) == 8
    assert all(r["seed"] == seeds[r["question_id"], r["turn"], r["repeat"]] for r in done.records)
    plain = [r["token_ids"] for r in done.records if r["method"] == "plain" and r["question_id"] == "second"]
    assert plain[0] != plain[1], "another repeat draws anew"


def test_a_method_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = SpeculativeMethod.generate

    def generate(self: Any, request: Request) -> Any:
        if self.name == "lookup" and request.prompts == [tokenizer()("abc abc abc")["input_ids"]]:
            raise RuntimeError("no\nluck")
        return right(self, request)

    monkeypatch.setattr(SpeculativeMethod, "generate", generate)
    done = run(tmp_path / "run")
    assert [(r["method"], r["question_id"], r["turn"], r["error"]) for r in done.errors] == [
        ("lookup", "first", 0, "RuntimeError: no luck"),
        ("lookup", "first", 1, "SpecdecError: lookup has no answer to turn 0"),
    ]
    assert all(r["finish"] == "error" and r["token_ids"] == [] for r in done.errors)
    failed = [v for v in done.verdicts if v["verdict"] == "not-compared"]
    assert {(v["method"], v["reason"]) for v in failed} == {("lookup", "the method failed")}
    assert not done.wrong
    for file in ("plain", "lookup"):
        answers = [json.loads(line) for line in (done.path / "answers" / f"{file}.jsonl").read_text().splitlines()]
        assert [answer["question_id"] for answer in answers] == ["second", "third"]


def test_the_warm_up_prompt_is_none_of_the_measured_ones(tmp_path: Path):
    sly = question_set((type(QUESTIONS[0])("sly", "qa", (TEXT,)),))
    prompts: list[list[int]] = []
    right = TransformersMethod.generate

    def generate(self: Any, request: Request) -> Any:
        prompts.extend(request.prompts)
        return right(self, request)

    TransformersMethod.generate = generate  # type: ignore[method-assign]
    try:
        run(tmp_path / "run", (), questions=sly)
    finally:
        TransformersMethod.generate = right  # type: ignore[method-assign]
    measured = tokenizer()(TEXT)["input_ids"]
    assert prompts.count(measured) == 1
    assert prompts[-1] == measured
    assert len(prompts) >= 4


@pytest.mark.parametrize(
    ("seconds", "stable"),
    [([1, 1], False), ([5, 1, 1.05, 1.1], True), ([1, 1, 1, 1.2], False), ([1, 1.2, 1.25, 1.3], True), ([], False)],
)
def test_times_are_stable_when_the_last_three_agree(seconds: list[float], stable: bool):
    assert is_stable(seconds) is stable


def test_a_finished_run_is_found_again_and_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = run(tmp_path / "run")
    monkeypatch.setattr(TransformersMethod, "generate", None)
    again = run(tmp_path / "run")
    assert again.records == first.records
    assert again.found == len(first.records)
    assert len(json.loads((tmp_path / "run" / MANIFEST_FILE).read_text())["starts"]) == 1


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"settings": {"max_new_tokens": 13}}, "settings.max_new_tokens is 12 there and 13 here"),
        ({"settings": {"seed": 3}}, "settings.seed is 0 there and 3 here"),
        ({"drafters": ("suffix",)}, r"methods\[2\].name is lookup there and suffix here"),
        ({"drafters": ()}, "methods is plain, none, lookup there and plain, none here"),
        ({"model": "another"}, "target.weights_sample_sha256"),
        ({"system": "be brief"}, "prompts.system is None there and be brief here"),
        ({"questions": question_set(QUESTIONS[:2])}, "questions.count is 3 there and 2 here"),
    ],
)
def test_a_directory_of_another_run_is_refused_with_the_field_that_differs(
    tmp_path: Path, changed: dict[str, Any], named: str
):
    run(tmp_path / "run")
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    if "model" in changed:
        changed = {"model": make_target(seed=9)}
    with pytest.raises(SpecdecError, match=f"holds another run: {named}") as error:
        run(tmp_path / "run", **{"drafters": ("lookup",), **changed})
    assert "\n" not in str(error.value)
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SpecdecError, match="is not empty and holds no run"):
        run(tmp_path)
    with pytest.raises(SpecdecError, match="is a file"):
        run(tmp_path / "thesis.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_without_a_directory_the_same_run_goes_on_and_a_finished_one_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(None, progress=interrupt_after(5))  # type: ignore[arg-type]
    (folder,) = (tmp_path / "specdec-bench").iterdir()
    first = run(None)  # type: ignore[arg-type]
    assert first.path.resolve() == folder.resolve()
    assert first.found == 5
    second = run(None)  # type: ignore[arg-type]
    assert second.path.name == f"{first.path.name}-2"
    other = run(None, settings={"seed": 1})  # type: ignore[arg-type]
    assert other.path.name not in (first.path.name, second.path.name)


def interrupt_after(generations: int) -> Any:
    def tell(what: str, done: int, total: int) -> None:
        if done == generations:
            raise KeyboardInterrupt

    return tell


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is at least 1, got 0"),
        ({"repeats": 0}, "repeats is at least 1"),
        ({"batch_size": -1}, "batch_size is at least 1"),
        ({"temperature": -0.5}, "temperature is 0 or more, got -0.5"),
        ({"history": "mine"}, 'history is "own" or "reference", got \'mine\''),
    ],
)
def test_settings_outside_their_limits_are_named(tmp_path: Path, settings: dict[str, Any], message: str):
    with pytest.raises(SpecdecError, match=message):
        run(tmp_path / "run", settings=settings)


def test_baselines_names_and_single_row_methods_are_guarded(tmp_path: Path):
    with pytest.raises(SpecdecError, match="cannot be called 'plain'"):
        run(tmp_path / "run", {"plain": "lookup"})
    with pytest.raises(SpecdecError, match="prompt-lookup serves one row at a time"):
        run(tmp_path / "run", lookup_tokens=4, settings={"batch_size": 2})
    assert not (tmp_path / "run").exists()


def test_without_phases_only_whole_steps_are_timed(tmp_path: Path):
    done = run(tmp_path / "run", settings={"phases": False})
    for record in done.records:
        assert record["steps"]["draft"] is record["seconds"]["verify"] is record["seconds"]["other"] is None
        assert all(seconds > 0 for seconds in record["steps"]["total"])


def test_transformers_own_draft_length_is_reset_between_questions():
    draft = perturbed(shared_target())
    draft.generation_config.num_assistant_tokens_schedule = "heuristic"
    draft.generation_config.num_assistant_tokens = 5
    extra: dict[str, Any] = {"assistant_model": draft}
    request = Request(prompt(1)["input_ids"].tolist(), 24)
    for carry_over in (False, True):
        method = TransformersMethod("assisted", shared_target(), Decoding(), extra, carry_over=carry_over)
        seen = []
        for _ in range(3):
            method.prepare()
            seen.append(draft.generation_config.num_assistant_tokens)
            method.generate(request)
        assert (set(seen) == {5}) is not carry_over
        method.begin_pass()
        assert draft.generation_config.num_assistant_tokens == 5
