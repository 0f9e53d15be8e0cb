"""A target and a draft over three tokens, given by tables, and the exact law of decoding with them.

A context is what was emitted after the prompt. Every law is random and different in every context, so that a rule
which mixes up nodes, or reuses a decision, does not get the joint law right by luck.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

from specdec.acceptance import Rule, accept
from specdec.emitter import Emitter, apply
from specdec.grow.levels import Children, grow_levels
from specdec.grow.shape import Shape
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE, TokenTree
from tests.law.enumeration import Law, every_path

VOCAB = 3
PROMPT = (1, 0)
"""Its last token is the first root."""
Context = tuple[int, ...]
SAMPLING = SamplingParams(do_sample=True)


@dataclass(frozen=True)
class Tables:
    """Logits [V] of target and draft by context, in float64."""

    target: dict[Context, Tensor]
    draft: dict[Context, Tensor]

    @staticmethod
    def random(seed: int, length: int = 4, *, noise: float = 1.0, sharpness: float = 1.0) -> Tables:
        """Normal target logits, and draft logits that are these plus noise, then sharpened."""
        generator = torch.Generator().manual_seed(seed)
        target, draft = {}, {}
        for context in (c for n in range(length + 1) for c in itertools.product(range(VOCAB), repeat=n)):
            target[context] = torch.randn(VOCAB, dtype=torch.float64, generator=generator)
            wrong = torch.randn(VOCAB, dtype=torch.float64, generator=generator)
            draft[context] = sharpness * (target[context] + noise * wrong)
        return Tables(target, draft)

    def without_tokens(self, seed: int) -> Tables:
        """In each context one token has no mass under the draft, and one, maybe another, none under the target."""
        generator = torch.Generator().manual_seed(seed)

        def struck(table: dict[Context, Tensor]) -> dict[Context, Tensor]:
            strikes = {c: int(torch.randint(VOCAB, (), generator=generator)) for c in table}
            return {c: logits.index_fill(0, torch.tensor(strikes[c]), -torch.inf) for c, logits in table.items()}

        return Tables(struck(self.target), struck(self.draft))


Propose = Callable[[Tables, Context, Chooser], TokenTree]
"""(tables, context, chooser) -> a tree for one row below the context's last token."""


def root_of(context: Context) -> int:
    return (*PROMPT, *context)[-1]


def grown(shape: Shape, children: Children, params: SamplingParams = SAMPLING) -> Propose:
    """Proposals by the level-wise growth that real drafters use."""

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        def expand(nodes: list[int], tokens: Tensor) -> Tensor:
            paths = [[int(tokens[0, n]) for n in shape.topology.path(node)] for node in nodes]
            return torch.stack([tables.draft[*context, *path] for path in paths])[None]

        return grow_levels(shape, torch.tensor([root_of(context)]), children, params, chooser, expand)

    return propose


def node_paths(tree: TokenTree, row: int = 0) -> list[Context | None]:
    """Tokens below the root of every node; None for padding."""
    tokens, shape = tree.tokens[row].tolist(), tree.shapes[row]
    padding = [node > 0 and parent == NO_NODE for node, parent in enumerate(shape.parents)]
    return [None if padding[n] else tuple(tokens[m] for m in shape.path(n)) for n in range(tree.num_nodes)]


def scored(tables: Tables, tree: TokenTree, contexts: Sequence[Context]) -> Tensor:
    """Target logits [B, N, V] of the nodes; NaN at padding, which no rule may read."""
    padding = torch.full((VOCAB,), torch.nan, dtype=torch.float64)
    rows = []
    for row, context in enumerate(contexts):
        paths = node_paths(tree, row)
        rows.append(torch.stack([padding if path is None else tables.target[*context, *path] for path in paths]))
    return torch.stack(rows)


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn from the target: its processors and its end-of-text token."""

    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    eos: int | None = None

    def emitter(self, contexts: Sequence[Context], chooser: Chooser, *, in_step: bool = False) -> Emitter:
        """An emitter whose ids are the prompt and these contexts, one per row."""
        ids = torch.tensor([[*PROMPT, *context] for context in contexts])
        ends = [] if self.eos is None else [EosTokenCriteria(self.eos)]
        pad = None if self.eos is None else self.eos
        criteria = StoppingCriteriaList(ends)
        return Emitter(ids, self.processors, criteria, SAMPLING, chooser=chooser, pad_token=pad, in_step=in_step)

    def p(self, tables: Tables, context: Context) -> list[float]:
        """The target's law after a context, by the processors alone: the definition that everything is held to."""
        ids = torch.tensor([[*PROMPT, *context]])
        return apply(self.processors, ids, tables.target[context][None].clone()).softmax(-1)[0].tolist()

    def ended(self, context: Context) -> bool:
        return self.eos is not None and self.eos in context

    def target_law(self, tables: Tables, length: int, start: Context = ()) -> Law:
        """The joint law of `length` tokens, fewer after an end of text, given the first ones."""
        if len(start) >= length or self.ended(start):
            return {start[:length]: 1.0}
        law: Law = {}
        for token, probability in enumerate(self.p(tables, start)):
            if probability > 0:
                for sequence, rest in self.target_law(tables, length, (*start, token)).items():
                    law[sequence] = law.get(sequence, 0.0) + probability * rest
        return law


PLAIN = Decoding()
"""No processors, no end of text."""

Verify = Callable[[TokenTree, Tensor, Emitter], Sequence[int]]
"""(tree of one row, logits, emitter) -> emitted tokens."""


def by_rule(rule: Rule) -> Verify:
    """Verification by the acceptance rule of this name, as the decode loop calls it."""
    return lambda tree, logits, emitter: accept(tree, logits, emitter, [0], rule).tokens[0]


def every_tree(draft: Callable[[Chooser], TokenTree]) -> list[tuple[TokenTree, float]]:
    """Every tree that may be drafted and its probability; trees of equal nodes are one."""
    trees: dict[object, tuple[TokenTree, float]] = {}
    for tree, probability in every_path(draft):
        key = (*map(tuple, tree.tokens.tolist()), *(shape.parents for shape in tree.shapes))
        trees[key] = (tree, trees.get(key, (tree, 0.0))[1] + probability)
    return list(trees.values())


def law_after_one_step(
    tables: Tables, propose: Propose, verify: Verify, decoding: Decoding = PLAIN, *, length: int | None = None
) -> Law:
    """The law of the first `length` tokens: one speculative step, then plain draws from the target.

    Without a length, the law of what the step itself emitted.
    """
    law: Law = {}
    for tree, drafted in every_tree(lambda chooser: propose(tables, (), chooser)):
        logits = scored(tables, tree, [()])

        def step(chooser: Chooser, tree: TokenTree = tree, logits: Tensor = logits) -> Context:
            return tuple(verify(tree, logits, decoding.emitter([()], chooser)))

        for emitted, verified in every_path(step):
            completions = {emitted: 1.0} if length is None else decoding.target_law(tables, length, emitted)
            for sequence, completed in completions.items():
                law[sequence] = law.get(sequence, 0.0) + drafted * verified * completed
    return law


def with_log_q(tree: TokenTree, tables: Tables, context: Context = ()) -> TokenTree:
    """The tree with the draft's laws attached, whether or not its children were drawn from them."""
    zeros = torch.zeros(VOCAB, dtype=torch.float64)
    laws = [zeros if path is None else tables.draft[*context, *path] for path in node_paths(tree)]
    return replace(tree, log_q=torch.stack(laws)[None])
