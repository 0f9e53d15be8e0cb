"""Exactness: what counts as the same answer, as a tie, and as wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.bench.exactness import Judge, failures, first_difference, tie_tolerance
from specdec.bench.methods import Decoding, SpeculativeMethod, TransformersMethod
from specdec.bench.prompts import Prompt
from specdec.bench.record import Record, Sent
from specdec.bench.sent import SentPrompts
from tests.bench.runs import record
from tests.tiny import make_target, shared_target

PROMPT = [7, 8, 9, 7, 8]
LENGTH = 10
METHODS = ("plain", "lookup")


def answer(model: Any, ids: list[int], length: int, **settings: Any) -> list[int]:
    output = model.generate(torch.tensor([ids]), **{"max_new_tokens": length, "do_sample": False, **settings})
    return output[0, len(ids) :].tolist()


def verdict(
    folder: Path,
    ours: list[int],
    theirs: list[int],
    model: Any = None,
    decoding: Decoding | None = None,
    **changed: Any,
) -> Any:
    """How an answer to PROMPT compares with the plain one."""
    model, decoding = model or shared_target(), decoding or Decoding()
    sent = SentPrompts(folder)
    prompt = Sent(tokens=len(PROMPT), sha256=sent.add(Prompt("", PROMPT, "raw")), history="own")
    methods = [TransformersMethod("plain", model, decoding), SpeculativeMethod("lookup", model, decoding, "lookup")]
    records: list[Record] = [
        record("plain", token_ids=theirs, prompt=prompt, seed=changed.get("seed")),
        record("lookup", **{"token_ids": ours, "prompt": prompt, **changed}),
    ]
    (found,) = Judge(model, decoding, sent, methods).verdicts(records)
    return found


def twins(model: Any, first: int, second: int, apart: float = 0.0) -> Any:
    """Give two tokens the same output row, so that they tie wherever they lead, up to a factor."""
    with torch.no_grad():
        model.lm_head.weight[second] = model.lm_head.weight[first] * (1 + apart)
    return model


def test_the_same_ids_are_exact(tmp_path: Path):
    plain = answer(shared_target(), PROMPT, LENGTH)
    found = verdict(tmp_path, list(plain), plain)
    assert (found["verdict"], found["position"], found["gap"]) == ("exact", None, None)


@pytest.mark.parametrize("position", [0, 4, LENGTH - 1])
def test_another_token_is_wrong_where_the_target_is_sure(tmp_path: Path, position: int):
    plain = answer(shared_target(), PROMPT, LENGTH)
    ours = list(plain)
    ours[position] = (ours[position] + 1) % 90 + 3
    found = verdict(tmp_path, ours, plain)
    assert (found["verdict"], found["position"]) == ("wrong", position)
    assert found["gap"] > found["tolerance"]
    assert failures([found]) == [found]


def test_the_gap_is_that_of_the_logits_on_the_common_prefix(tmp_path: Path):
    plain = answer(shared_target(), PROMPT, LENGTH)
    ours = [*plain[:4], 50, *plain[5:]]
    logits = shared_target()(torch.tensor([PROMPT + plain[:4]])).logits[0, -1].detach()
    found = verdict(tmp_path, ours, plain)
    assert found["gap"] == pytest.approx(float(logits[plain[4]] - logits[50]), abs=1e-4)


@pytest.mark.parametrize("cut", [(6, LENGTH), (LENGTH, 6), (0, LENGTH)])
def test_an_answer_that_ends_elsewhere_is_wrong(tmp_path: Path, cut: tuple[int, int]):
    plain = answer(shared_target(), PROMPT, LENGTH)
    found = verdict(tmp_path, plain[: cut[0]], plain[: cut[1]])
    assert (found["verdict"], found["position"]) == ("wrong", min(cut))
    assert found["reason"] == f"{cut[0]} tokens where plain has {cut[1]}"


def tied(dtype: torch.dtype, apart: float) -> tuple[Any, list[int], list[int], int]:
    """A target in which a token of its own answer has a twin; the answers with either of them, and the place."""
    model = make_target().to(dtype)
    plain = answer(model, PROMPT, LENGTH)
    token = plain[3]
    twin = next(other for other in range(3, 100) if other not in plain + PROMPT)
    twins(model, token, twin, apart)
    plain = answer(model, PROMPT, LENGTH)
    place = next(place for place, chosen in enumerate(plain) if chosen in (token, twin))
    prefix = [*plain[:place], twin if plain[place] == token else token]
    return model, plain, [*prefix, *answer(model, PROMPT + prefix, LENGTH - len(prefix))], place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tie_is_a_near_tie_when_the_rest_is_the_targets_choice(tmp_path: Path, dtype: torch.dtype):
    model, plain, ours, place = tied(dtype, 0.0)
    found = verdict(tmp_path, ours, plain, model)
    assert (found["verdict"], found["position"], found["gap"]) == ("near-tie", place, 0.0)
    assert failures([found]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_follows_a_tie_must_be_the_targets_choice_too(tmp_path: Path, dtype: torch.dtype):
    model, plain, ours, place = tied(dtype, 0.0)
    later = place + 3
    ours[later] = next(token for token in range(3, 100) if token not in ours + plain)
    found = verdict(tmp_path, ours, plain, model)
    assert (found["verdict"], found["position"]) == ("wrong", later)


def test_a_gap_that_rounding_in_bfloat16_explains_is_wrong_in_float32(tmp_path: Path):
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        (tmp_path / str(dtype)).mkdir()
        model, plain, ours, _ = tied(dtype, 0.005)
        assert ours != plain
        found[dtype] = verdict(tmp_path / str(dtype), ours, plain, model)
    assert found[torch.float32]["verdict"] == "wrong"
    assert found[torch.bfloat16]["verdict"] == "near-tie"


@pytest.mark.parametrize(
    ("dtype", "best", "tolerance"),
    [
        (torch.bfloat16, 23.5, 4 * 0.125),
        (torch.bfloat16, -40.0, 4 * 0.25),
        (torch.float16, 8.0, 4 * 2**-7),
        (torch.float32, 23.5, 64 * 2**-19),
        (torch.float32, 0.0, 64 * 2**-23),
    ],
)
def test_the_tolerance_counts_units_in_the_last_place(dtype: torch.dtype, best: float, tolerance: float):
    assert tie_tolerance(dtype, best) == tolerance


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"prompt": Sent(tokens=1, sha256="another", history="own")}, "another prompt"),
        ({"error": "RuntimeError: no"}, "the method failed"),
        ({"question_id": "other"}, "there is no plain answer"),
    ],
)
def test_what_cannot_be_compared_says_why(tmp_path: Path, changed: dict[str, Any], reason: str):
    found = verdict(tmp_path, [1, 2], [1, 3], **changed)
    assert found["verdict"] == "not-compared"
    assert found["reason"].startswith(reason)


SAMPLING = Decoding(temperature=1.0)
DRAW = {"do_sample": True, "temperature": 1.0, "top_k": 0}


def drawn(model: Any, seed: int, length: int = LENGTH) -> list[int]:
    torch.manual_seed(seed)
    return answer(model, PROMPT, length, **DRAW)


@pytest.mark.parametrize("seed", range(4))
def test_another_draw_is_wrong(tmp_path: Path, seed: int):
    plain = drawn(shared_target(), seed)
    ours = [*plain[:5], 3 if plain[5] != 3 else 4, *plain[6:]]
    found = verdict(tmp_path, ours, plain, decoding=SAMPLING, seed=seed)
    assert (found["verdict"], found["position"]) == ("wrong", 5)
    assert found["gap"] > found["tolerance"]


def test_a_draw_between_two_tokens_on_the_brink_is_a_near_tie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = drawn(shared_target(), 1)
    other = 3 if plain[5] != 3 else 4
    right: Callable[..., Any] = Judge._scores

    def scores(self: Judge, prefix: list[int]) -> Any:
        """The law under which the other token would have lost by a hair, given the noise of this seed."""
        found = right(self, prefix).log_softmax(-1)
        noise = self._gumbel_noise(found, 1, 5)
        found[other] = found[plain[5]] + noise[plain[5]] - noise[other] - 1e-6
        return found

    monkeypatch.setattr(Judge, "_scores", scores)
    found = verdict(tmp_path, [*plain[:5], other, *plain[6:]], plain, decoding=SAMPLING, seed=1)
    assert found["verdict"] == "near-tie"
    assert 0 <= found["gap"] < 1e-4


def test_a_draw_that_does_not_repeat_is_not_compared(tmp_path: Path):
    plain = drawn(shared_target(), 1)
    ours = [*plain[:5], 3 if plain[5] != 3 else 4]
    tokens = [3, 4, plain[5]]
    theirs = [*plain[:5], next(token for token in range(5, 90) if token not in tokens), *plain[6:]]
    found = verdict(tmp_path, [*ours, *plain[6:]], theirs, decoding=SAMPLING, seed=1)
    assert (found["verdict"], found["reason"]) == ("not-compared", "the plain draw cannot be replayed on this device")


@pytest.mark.parametrize(
    ("ours", "theirs", "place"), [([], [], None), ([1], [1], None), ([1], [1, 2], 1), ([2, 1], [1, 1], 0), ([1], [], 0)]
)
def test_the_first_difference_may_be_an_end(ours: list[int], theirs: list[int], place: int | None):
    assert first_difference(ours, theirs) == place


def test_a_wrong_answer_of_a_lossy_method_is_no_failure(tmp_path: Path):
    plain = answer(shared_target(), PROMPT, LENGTH)
    found = verdict(tmp_path, [*plain[:-1], 3], plain, lossy="typical")
    assert (found["verdict"], found["lossy"]) == ("wrong", "typical")
    assert failures([found]) == []
