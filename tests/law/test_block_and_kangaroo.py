"""Whole generations with a DFlash head and a Kangaroo adapter, chosen and drawn, have exactly the target's law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from specdec.drafter import Drafter
from specdec.drafters.block import BlockDrafter
from specdec.drafters.kangaroo import KangarooDrafter
from specdec.heads.dflash import DFlashConfig, DFlashHead
from specdec.heads.kangaroo import KangarooConfig, KangarooHead
from specdec.heads.layer import LayerConfig
from specdec.tree import TokenTree
from tests.law.enumeration import law_of, total_variation
from tests.law.test_decode_paths import EXACT, PROMPT, TARGET, generate, processors, target_law

LAYER = LayerConfig(8, 16, 2, 1, 4)


def randomised(head: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.5)
    return head.double().eval().requires_grad_(False)


BLOCK = randomised(DFlashHead(DFlashConfig(replace(LAYER, qk_norm=True), 2, (1, 2), 4, 2, 3)), 1)
ADAPTER = randomised(KangarooHead(KangarooConfig(LAYER, exit_layer=1)), 1)


def block(**options: Any) -> Callable[[], Drafter]:
    return lambda: BlockDrafter(TARGET, BLOCK, **options)


def kangaroo(**options: Any) -> Callable[[], Drafter]:
    return lambda: KangarooDrafter(TARGET, ADAPTER, **{"depth": 2, **options})


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "block, chosen chain": block(),
    "block, chosen tree": block(depth=2, budget=4),
    "block, best-first tree": block(budget=5, grow="best-first"),
    "block, drawn chain": block(depth=2, children="drawn"),
    "block, drawn tree": block(depth=2, budget=3, children="drawn"),
    "block, dyspec": block(depth=2, budget=3, grow="dyspec", children="drawn"),
    "kangaroo, chosen chain that stops": kangaroo(confidence=0.5),
    "kangaroo, chosen tree": kangaroo(budget=4, confidence=0.0),
    "kangaroo, best-first tree": kangaroo(budget=4, grow="best-first"),
    "kangaroo, drawn chain that stops": kangaroo(children="drawn", confidence=0.5),
    "kangaroo, drawn tree": kangaroo(budget=3, children="drawn", confidence=0.0),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_whole_generation_has_the_targets_law(name: str) -> None:
    """Prefill and steps up to four tokens or the end of text."""
    drafter = DRAFTERS[name]()
    law = law_of(lambda chooser: generate(chooser, drafter, PROMPT, 4, processors())[0])
    expected = target_law(PROMPT[0].tolist(), 4, processors())
    assert len(expected) > 8
    assert total_variation(law, expected) < EXACT


@pytest.mark.parametrize("name", ["block, best-first tree", "kangaroo, drawn chain that stops"])
def test_rows_of_unequal_length_are_exact_and_independent(name: str) -> None:
    ids, mask = torch.tensor([[0, 0, 1], [0, 2, 0]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    drafter = DRAFTERS[name]()
    law = law_of(lambda chooser: generate(chooser, drafter, ids, 3, processors(), mask=mask))
    one, two = target_law([0, 1], 3, processors()), target_law([0, 2, 0], 3, processors())
    joint = {(a, b): p * q for a, p in one.items() for b, q in two.items()}
    assert total_variation(law, joint) < EXACT


@pytest.mark.parametrize("name", ["block, drawn chain", "block, drawn tree", "kangaroo, drawn tree"])
def test_a_law_that_is_not_the_one_drawn_from_is_seen(name: str) -> None:
    drafter = DRAFTERS[name]()
    right = drafter.propose

    def propose(*args: Any) -> TokenTree:
        tree = right(*args)
        return tree if tree.log_q is None else replace(tree, log_q=tree.log_q * 0.3)

    drafter.propose = propose  # type: ignore[method-assign]
    law = law_of(lambda chooser: generate(chooser, drafter, PROMPT, 4, processors())[0])
    assert total_variation(law, target_law(PROMPT[0].tolist(), 4, processors())) > 1e-3


@pytest.mark.parametrize("name", ["block, drawn chain", "kangaroo, drawn tree"])
def test_drawn_children_that_claim_to_be_chosen_are_harmless_and_the_reverse_is_seen(name: str) -> None:
    """The walk is lossless whatever the children are; a residual rule on children that were not drawn is not."""
    drawn, options = (
        DRAFTERS[name](),
        {"block, drawn chain": block(depth=2), "kangaroo, drawn tree": kangaroo(budget=3)},
    )
    chosen, right = options[name](), drawn.propose
    law = law_of(
        lambda chooser: generate(chooser, _renamed(drawn, lambda *a: replace(right(*a), log_q=None)), PROMPT, 3,
                                 processors())[0]
    )  # fmt: skip
    expected = target_law(PROMPT[0].tolist(), 3, processors())
    assert total_variation(law, expected) < EXACT
    propose = chosen.propose

    def lying(*args: Any) -> TokenTree:
        tree = propose(*args)
        log_q = torch.zeros(*tree.tokens.shape, 3, dtype=torch.float64)
        return replace(tree, log_q=log_q)

    lossy = law_of(lambda chooser: generate(chooser, _renamed(chosen, lying), PROMPT, 3, processors())[0])
    assert total_variation(lossy, expected) > 1e-3


def _renamed(drafter: Drafter, propose: Callable[..., TokenTree]) -> Drafter:
    drafter.propose = propose  # type: ignore[method-assign]
    return drafter
