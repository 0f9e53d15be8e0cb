"""The decode loop: propose, score, accept, commit, observe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from specdec.acceptance import Acceptance, Rule, accept
from specdec.drafter import Committed, Drafter
from specdec.emitter import UNLIMITED, Emitter
from specdec.stats import DecodeStats, StepRecord
from specdec.tree import TokenTree
from specdec.verifier import Verifier


@dataclass(frozen=True)
class StepResult:
    """Tokens that one target call emitted.

    Attributes:
        rows: the generation's row numbers that were still running.
        tokens: emitted tokens of each of those rows, next_token last.
    """

    rows: list[int]
    tokens: list[list[int]]


def decode(
    verifier: Verifier,
    drafter: Drafter | None,
    emitter: Emitter,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    stats: DecodeStats,
    *,
    rule: Rule = "auto",
) -> Iterator[StepResult]:
    """Generate until every row has finished; yields after the prefill and after each target call.

    Args:
        verifier: fresh, one per generation.
        drafter: None decodes without speculation, through the same loop.
        emitter: holds the prompt and takes every emitted token.
        input_ids: prompt [B, S] as prepared by `generate`.
        generation_config: as prepared by `generate`.
        model_kwargs: as prepared by `generate`, for the first forward.
        stats: filled in while decoding.
        rule: acceptance rule, see `acceptance.accept`.
    """
    rows = list(range(input_ids.shape[0]))
    with stats.timing("total"):
        result = _prefill(verifier, drafter, emitter, input_ids, generation_config, model_kwargs, stats)
    yield result
    while emitter.running:
        with stats.timing("total"):
            rows = _drop_finished(verifier, drafter, emitter, rows)
            root = torch.tensor([emitter.last_token(row) for row in rows], device=input_ids.device)
            with stats.timing("draft"):
                tree = _propose(verifier, drafter, emitter, root)
            with stats.timing("verify"):
                output = verifier.score(tree)
            with stats.timing("accept"):
                acceptance = accept(tree, output.logits.to(input_ids.device), emitter, rows, rule)
                verifier.commit(acceptance.paths)
            if drafter is not None:
                with stats.timing("draft"):
                    drafter.observe(_committed(tree, acceptance, output.logits, output.taps))
            _record(stats, tree, acceptance, rows, emitter.finished)
        yield StepResult(rows, acceptance.tokens)


def _prefill(
    verifier: Verifier,
    drafter: Drafter | None,
    emitter: Emitter,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    stats: DecodeStats,
) -> StepResult:
    """Run the prompt, show it to the drafter, emit each row's first token."""
    with stats.timing("prefill"):
        output = verifier.prefill(input_ids, generation_config, model_kwargs)
    stats.target_calls += 1
    starts, length = verifier.context.starts, verifier.context.base
    verifier.context.position_limit = None
    if emitter.max_length is not None:
        new_tokens = emitter.max_length - input_ids.shape[1]
        verifier.context.position_limit = [length - start + max(new_tokens - 2, 0) for start in starts]
    if drafter is not None:
        drafter.reset(len(starts), verifier.context)
        unseen = length - input_ids.shape[1]  # columns of a cache that came with the prompt's last tokens only
        padding = [max(start - unseen, 0) for start in starts]
        prompt = [row[count:] for row, count in zip(input_ids.tolist(), padding, strict=True)]
        drafter.observe(Committed(prompt, taps=output.taps))
    root_only = TokenTree.of_roots(input_ids[:, -1])
    first = accept(root_only, output.logits.to(input_ids.device), emitter, list(range(len(starts))))
    stats.new_tokens += sum(map(len, first.tokens))
    return StepResult(list(range(len(starts))), first.tokens)


def _drop_finished(verifier: Verifier, drafter: Drafter | None, emitter: Emitter, rows: list[int]) -> list[int]:
    """The rows still running; the others stop costing target and draft work."""
    kept = [index for index, row in enumerate(rows) if not emitter.finished[row]]
    if len(kept) < len(rows):
        verifier.select(kept)
        if drafter is not None:
            drafter.select(kept)
    return [rows[index] for index in kept]


def _propose(verifier: Verifier, drafter: Drafter | None, emitter: Emitter, root: Tensor) -> TokenTree:
    """The drafter's tree, cut to what can be emitted and verified."""
    room = min(emitter.room(), _positions_left(verifier))
    if drafter is None or room == 0:
        return TokenTree.of_roots(root)
    tree = drafter.propose(root, emitter.params, emitter.chooser, room)
    if tree.resume is None:
        tree = tree.up_to_depth(room)
    assert tree.depth <= room, "a drafter that runs the target's layers keeps to the room by itself"
    if verifier.target.form == "chain":
        tree = tree.first_path()
    return tree


def _positions_left(verifier: Verifier) -> int:
    """Depth at which the first row would leave the positions the target was made for.

    Past that point models differ: rotary ones go on, learned tables end in an error. Plain `generate` gets there
    only by emitting a token there, so a tree stays inside; a row that is already outside does not count.
    """
    last, context = verifier.target.max_positions, verifier.context
    if last is None:
        return UNLIMITED
    positions = [length - start for length, start in zip(context.lengths, context.starts, strict=True)]
    return min((last - 1 - position for position in positions if position < last), default=UNLIMITED)


def _committed(tree: TokenTree, acceptance: Acceptance, logits: Tensor, taps: dict[int, Tensor]) -> Committed:
    nodes = [[0, *path] for path in acceptance.paths]
    ids = tree.ids
    tokens = [[ids[row][node] for node in kept] for row, kept in enumerate(nodes)]
    return Committed(tokens, nodes, tree, logits, taps)


def _record(stats: DecodeStats, tree: TokenTree, acceptance: Acceptance, rows: list[int], finished: list[bool]) -> None:
    stats.target_calls += 1
    stats.drawn |= tree.log_q is not None
    stats.only_chains &= tree.is_chain
    ids = tree.ids
    drafted = tree.num_drafted
    for row, (path, tokens) in enumerate(zip(acceptance.paths, acceptance.tokens, strict=True)):
        shape = tree.shapes[row]
        children = shape.children[path[-1] if path else 0]
        # A row that a criterion ended on a proposed token accepted that token too.
        ended_inside = finished[rows[row]] and any(ids[row][child] == tokens[-1] for child in children)
        accepted = len(path) + ended_inside
        tried = len(path) + bool(children)
        step = StepRecord(drafted[row], accepted, len(tokens), tried, rows[row], len(stats.calls))
        stats.steps.append(step)
        stats.new_tokens += len(tokens)
