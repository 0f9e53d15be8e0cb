"""The real batched tensor code in float32 with the real chooser, against exact laws, by chi-square.

Odds of a false alarm: every comparison is made at significance 1e-6 and there are fewer than 30, so a correct
implementation would fail this file for one choice of seeds in 30 000. The seeds are fixed: it passes or fails for good.
Power: each rule's test also sees the same rule with acceptances 5 % too high.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as lp

import specdec
from specdec.acceptance import Rule, accept
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drawn_rules import DRAWN_RULES, traversal_at_once
from specdec.emitter import Emitter
from specdec.grow.levels import Children, grow_levels
from specdec.grow.shape import Shape, chain, shape_of
from specdec.sampling import Chooser, SamplingParams
from specdec.target import Target
from specdec.tree import TokenTree
from tests.law.chi_square import SIGNIFICANCE, chi_square
from tests.law.enumeration import Law, successive_law

VOCAB = 3
LENGTH = 3
SAMPLING = SamplingParams(do_sample=True)
TREE = shape_of([(0,), (1,), (0, 0)])


class BatchTables:
    """Target and draft logits by context as one tensor for each context length: [V ** n, V], in float32."""

    def __init__(self, seed: int, noise: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = [VOCAB**n for n in range(LENGTH)]
        self.target = [torch.randn(size, VOCAB, generator=generator) for size in sizes]
        self.draft = [t + noise * torch.randn(t.shape, generator=generator) for t in self.target]

    def rows(self, table: list[Tensor], paths: Tensor) -> Tensor:
        """Logits [B, V] after paths [B, n]; the context is read as a number in base V."""
        place = VOCAB ** torch.arange(paths.shape[1] - 1, -1, -1)
        return table[paths.shape[1]][(paths * place).sum(-1)]

    def at_nodes(self, table: list[Tensor], shape: Shape, nodes: list[int], tokens: Tensor) -> Tensor:
        """Logits [B, F, V] at these nodes of trees of one shape with tokens [B, N]."""
        return torch.stack([self.rows(table, tokens[:, shape.topology.path(node)]) for node in nodes], 1)

    def propose(self, shape: Shape, batch: int, children: Children, chooser: Chooser) -> TokenTree:
        root = torch.zeros(batch, dtype=torch.long)
        return grow_levels(
            shape, root, children, SAMPLING, chooser, lambda nodes, t: self.at_nodes(self.draft, shape, nodes, t)
        )

    def target_law(self) -> Law:
        """Joint law of the first LENGTH tokens, in float64 from the float32 logits."""
        p = [logits.double().softmax(-1) for logits in self.target]
        joint = p[0][0]
        for level in p[1:]:
            joint = (joint[:, None] * level).flatten()
        return dict(zip(itertools.product(range(VOCAB), repeat=LENGTH), joint.tolist(), strict=True))

    def completed(self, emitted: list[list[int]], generator: torch.Generator) -> list[tuple[int, ...]]:
        """The emitted tokens with plain draws from the target behind, up to LENGTH."""
        ids = torch.tensor([[*row, *[0] * LENGTH][:LENGTH] for row in emitted])
        lengths = torch.tensor([len(row) for row in emitted])
        for at in range(LENGTH):
            drawn = torch.multinomial(self.rows(self.target, ids[:, :at]).softmax(-1), 1, generator=generator)[:, 0]
            ids[:, at] = torch.where(lengths > at, ids[:, at], drawn)
        return list(map(tuple, ids.tolist()))


class Inflated(Chooser):
    """Accepts 5 % too often."""

    def accept(self, probability: Tensor) -> Tensor:
        return super().accept((probability * 1.05).clamp(max=1.0))


class Partial(Chooser):
    """Chooses among the ends of a tree by chances ** 1.5: for rules that decide once."""

    def one_of(self, chances: Tensor) -> Tensor:
        return super().one_of(chances**1.5)


class Tilted(Chooser):
    """Draws from p ** 1.15: for the walk, which accepts nothing but draws."""

    def draw(self, p: Tensor) -> Tensor:
        return super().draw((p**1.15) / (p**1.15).sum(-1, keepdim=True))


def samples(
    tables: BatchTables, shape: Shape, children: Children, rule: Rule, chooser: Chooser, total: int, batch: int
) -> list[tuple[int, ...]]:
    """Completed first tokens of `total` rows, each after one speculative step through `accept`."""
    generator = chooser.generator
    assert generator is not None
    collected: list[tuple[int, ...]] = []
    for _ in range(total // batch):
        tree = tables.propose(shape, batch, children, Chooser(generator))
        logits = tables.at_nodes(tables.target, shape, list(range(shape.num_nodes)), tree.tokens)
        emitter = Emitter(tree.tokens[:, :1], LogitsProcessorList(), StoppingCriteriaList(), SAMPLING, chooser=chooser)
        emitted = accept(tree, logits, emitter, list(range(batch)), rule).tokens
        collected += tables.completed(emitted, generator)
    return collected


TABLES = BatchTables(0, noise=1.0)
RULES: dict[str, tuple[Shape, Children, Rule]] = {
    "block": (chain(2), "drawn", "block"),
    "traversal on a chain": (chain(2), "drawn", "traversal"),
    "traversal in turn": (TREE, "drawn", "traversal"),
    "traversal at once": (TREE, "drawn", "traversal"),
    "recursive": (TREE, "drawn", "recursive"),
    "walk, drawn": (TREE, "drawn", "walk"),
    "walk, top-k": (TREE, "chosen", "walk"),
}
TOTALS = {"block": 100_000, "traversal at once": 20_000}
ENOUGH = 10_000
"""Of rules that are slower by row; `make test-all` takes 100 000 of each."""
BIASED_TOTALS = {"block": 25_000, "traversal at once": 17_500}


@pytest.fixture(autouse=True)
def traversal_by_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nodes are tried in turn; the other form is what a GPU runs."""
    if "at once" in request.node.name:
        monkeypatch.setitem(DRAWN_RULES, "traversal", traversal_at_once)


def seeded(kind: type[Chooser], seed: int) -> Chooser:
    return kind(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", RULES)
def test_batched_rules_have_the_targets_law(name: str) -> None:
    """Joint of three tokens after one step. A false alarm has odds of 1 in a million."""
    drawn = samples(TABLES, *RULES[name], seeded(Chooser, 1), TOTALS.get(name, ENOUGH), batch=2500)
    assert chi_square(drawn, TABLES.target_law()).p_value > SIGNIFICANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_batched_rules_have_the_targets_law_in_100_000_samples(name: str) -> None:
    """The same with many more samples. A false alarm has odds of 1 in a million."""
    drawn = samples(TABLES, *RULES[name], seeded(Chooser, 2), 100_000, batch=2500)
    assert chi_square(drawn, TABLES.target_law()).p_value > SIGNIFICANCE


@pytest.mark.parametrize(
    ("name", "biased"),
    [
        ("block", Inflated),
        ("traversal in turn", Inflated),
        ("traversal at once", Partial),
        ("recursive", Partial),
        ("walk, top-k", Tilted),
    ],
)
def test_the_same_test_sees_a_biased_rule(name: str, biased: type[Chooser]) -> None:
    """Acceptances 5 % too high, ends or next tokens from a power of their law, with no more samples than above."""
    drawn = samples(TABLES, *RULES[name], seeded(biased, 1), BIASED_TOTALS.get(name, ENOUGH), batch=2500)
    assert chi_square(drawn, TABLES.target_law()).p_value < SIGNIFICANCE


@pytest.mark.parametrize("scale", [1.0, 10.0, 50.0, 200.0])
@pytest.mark.parametrize("name", RULES)
def test_extreme_laws_in_float32_emit_only_tokens_that_have_mass(name: str, scale: float) -> None:
    """Nearly one-hot laws, tokens without mass, and a draft equal to the target: no NaN and nothing impossible."""
    shape, children, rule = RULES[name]
    for seed in range(3):
        tables, generator = BatchTables(seed, noise=0.0), torch.Generator().manual_seed(seed)
        for table in (tables.target, tables.draft):
            for length, logits in enumerate(table):
                noisy = scale * (logits if seed == 0 else torch.randn(logits.shape, generator=generator))
                strike = torch.randint(VOCAB, (len(logits), 1), generator=torch.Generator().manual_seed(length))
                table[length] = noisy.scatter(1, strike, -torch.inf)
        drawn = samples(tables, shape, children, rule, seeded(Chooser, seed), total=100, batch=100)
        law = tables.target_law()
        assert all(law[sequence] > 0 for sequence in drawn)


# --- The chooser ----------------------------------------------------------------------------------------


LOG_LAWS = {
    "unequal": torch.tensor([2.0, 0.5, 0.0, -1.0, 1.0]),
    "one token without mass": torch.tensor([0.3, -torch.inf, 1.0, -0.5]),
    "steep": torch.tensor([9.0, 3.0, 0.0, 5.0]),
}


@pytest.mark.parametrize("log_law", [pytest.param(law, id=name) for name, law in LOG_LAWS.items()])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_draws_without_replacement_have_the_successive_law_in_order(log_law: Tensor, count: int) -> None:
    """100 000 ordered draws. A false alarm has odds of 1 in a million."""
    drawn = seeded(Chooser, 3).draw_without_replacement(log_law.expand(100_000, -1), count)
    result = chi_square(map(tuple, drawn.tolist()), successive_law(log_law, count))
    assert result.p_value > SIGNIFICANCE


def test_sorted_draws_are_not_in_successive_order() -> None:
    drawn = seeded(Chooser, 4).draw_without_replacement(LOG_LAWS["unequal"].expand(100_000, -1), 2).sort(-1).values
    assert chi_square(map(tuple, drawn.tolist()), successive_law(LOG_LAWS["unequal"], 2)).p_value < SIGNIFICANCE


def test_surplus_draws_come_last_and_have_no_mass() -> None:
    log_law = torch.tensor([-torch.inf, 0.5, -torch.inf, -2.0]).expand(1000, -1)
    drawn = seeded(Chooser, 5).draw_without_replacement(log_law, 9)
    assert drawn.shape == (1000, 4), "no more than V"
    assert log_law.gather(-1, drawn).isfinite().tolist() == [[True, True, False, False]] * 1000
    assert drawn.sort(-1).values.tolist() == [[0, 1, 2, 3]] * 1000


def test_certain_decisions_are_never_left_to_chance() -> None:
    chooser = seeded(Chooser, 6)
    assert not chooser.accept(torch.zeros(100_000)).any()
    assert chooser.accept(torch.ones(100_000)).all()


def test_acceptances_have_their_probability() -> None:
    """A false alarm has odds of 1 in a million."""
    accepted = seeded(Chooser, 7).accept(torch.full((100_000,), 0.3))
    answers = [(int(a),) for a in accepted.tolist()]
    assert chi_square(answers, {(1,): 0.3, (0,): 0.7}).p_value > SIGNIFICANCE


# --- specdec.generate -------------------------------------------------------------------------------------


def tiny_llama(seed: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=6, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, bos_token_id=0, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


PROMPT = [3, 1, 4, 1, 5]
TEMPERATURE, TOP_K, NEW_TOKENS = 1.5, 4, 4


@torch.no_grad()
def model_law(model: LlamaForCausalLM, prompt: list[int], length: int) -> Law:
    """Joint law of the next tokens by full forwards and transformers' warpers, without our code."""
    warpers = LogitsProcessorList([lp.TemperatureLogitsWarper(TEMPERATURE), lp.TopKLogitsWarper(TOP_K)])
    law: Law = {(): 1.0}
    for _ in range(length):
        ids = torch.tensor([[*prompt, *new] for new in law])
        p = warpers(ids, model(input_ids=ids).logits[:, -1]).double().softmax(-1)  # type: ignore[arg-type]
        law = {
            (*new, token): before * float(q)
            for (new, before), row in zip(law.items(), p, strict=True)
            for token, q in enumerate(row)
            if q > 0
        }
    return law


GENERATIONS: dict[str, tuple[str, Shape, Rule]] = {
    "drawn chain": ("drawn", chain(2), "auto"),
    "drawn tree": ("drawn", TREE, "auto"),
    "drawn tree, recursive": ("drawn", TREE, "recursive"),
    "top-k tree": ("chosen", TREE, "auto"),
}


def generated(children: str, shape: Shape, rule: Rule, *, total: int, seed: int) -> list[tuple[int, ...]]:
    target, draft = tiny_llama(1, 2), tiny_llama(2, 1)
    drafter = DraftModelDrafter(Target(draft), children=children, shape=shape)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.tensor([PROMPT] * 250)
    collected: list[tuple[int, ...]] = []
    for _ in range(total // 250):
        output = specdec.generate(
            target, prompt, attention_mask=torch.ones_like(prompt), drafter=drafter, rule=rule, generator=generator,
            do_sample=True, temperature=TEMPERATURE, top_k=TOP_K, top_p=1.0, max_new_tokens=NEW_TOKENS,
        )  # fmt: skip
        assert isinstance(output, Tensor)
        collected += [tuple(row) for row in output[:, len(PROMPT) : len(PROMPT) + LENGTH].tolist()]
    return collected


@pytest.mark.parametrize("name", GENERATIONS)
def test_generate_samples_from_the_models_own_law(name: str) -> None:
    """First three new tokens of 3000 rows, with temperature and top-k. A false alarm has odds of 1 in a million."""
    children, shape, rule = GENERATIONS[name]
    law = model_law(tiny_llama(1, 2), PROMPT, LENGTH)
    assert max(law.values()) < 0.3, "a law worth testing"
    assert chi_square(generated(children, shape, rule, total=3000, seed=8), law).p_value > SIGNIFICANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATIONS)
def test_generate_samples_from_the_models_own_law_in_20_000_rows(name: str) -> None:
    """A false alarm has odds of 1 in a million."""
    law = model_law(tiny_llama(1, 2), PROMPT, LENGTH)
    assert chi_square(generated(*GENERATIONS[name], total=20_000, seed=10), law).p_value > SIGNIFICANCE


def test_the_test_of_generate_sees_another_models_law() -> None:
    """What the draft model would write is far from the target's law, so agreement means something."""
    draft = model_law(tiny_llama(2, 1), PROMPT, LENGTH)
    assert chi_square(generated("drawn", chain(2), "auto", total=1000, seed=9), draft).p_value < SIGNIFICANCE
