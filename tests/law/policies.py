"""Proposals by growth policies over tables: one row, or several with contexts of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdec.grow.policy import Frontier, Grown, GrowthPolicy
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import NO_NODE
from tests.law.tables import SAMPLING, VOCAB, Context, Propose, Tables, root_of


def grow_rows(
    policy: GrowthPolicy,
    tables: Tables,
    contexts: Sequence[Context],
    chooser: Chooser,
    *,
    params: SamplingParams = SAMPLING,
    room: int = 9,
    dtype: torch.dtype = torch.float64,
) -> Grown:
    """Trees below the last token of every context. Padding has NaN for logits: no policy may look there."""
    paths: list[list[Context | None]] = [[] for _ in contexts]

    def expand(frontier: Frontier) -> Tensor:
        rows = []
        for row, context in enumerate(contexts):
            at = [
                _path(paths[row], token, parent)
                for token, parent in zip(frontier.tokens[row].tolist(), frontier.parents[row].tolist(), strict=True)
            ]
            for path, depth in zip(at, frontier.depths[row].tolist(), strict=True):
                assert depth == (0 if path is None else len(path))
            paths[row] += at
            rows.append(torch.stack([_draft(tables, context, path) for path in at]))
        return torch.stack(rows).to(dtype)

    root = torch.tensor([root_of(context) for context in contexts])
    grown = policy.grow(root, params, chooser, room, expand, VOCAB)
    _check_columns(grown, paths)
    return grown


def _path(known: list[Context | None], token: int, parent: int) -> Context | None:
    if not known:
        return ()
    if parent == NO_NODE:
        return None
    above = known[parent]
    assert above is not None, "padding has no children"
    return (*above, token)


def _draft(tables: Tables, context: Context, path: Context | None) -> Tensor:
    return torch.full((VOCAB,), torch.nan, dtype=torch.float64) if path is None else tables.draft[*context, *path]


def _check_columns(grown: Grown, paths: list[list[Context | None]]) -> None:
    """Every node that is said to be a column is the node that was run as it, and each inner node was run."""
    for row, shape in enumerate(grown.tree.shapes):
        tokens = grown.tree.tokens[row].tolist()
        for node, column in enumerate(grown.columns[row]):
            if node and shape.parents[node] == NO_NODE:
                continue
            assert column != NO_NODE or not shape.children[node]
            if column != NO_NODE:
                assert paths[row][column] == tuple(tokens[n] for n in shape.path(node))


def grown_by(make: Callable[[], GrowthPolicy], params: SamplingParams = SAMPLING, room: int = 9) -> Propose:
    """Proposals of a policy that is made anew for each tree, so that nothing learned carries over."""
    return lambda tables, context, chooser: grow_rows(make(), tables, [context], chooser, params=params, room=room).tree
