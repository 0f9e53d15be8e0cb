"""Several continuations of one text as one tree: equal prefixes become one path. Chosen children."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def merged(chains: Iterable[Sequence[int]], budget: int) -> list[tuple[int, int]]:
    """Nodes as (parent, token) for `TokenTree.of_nodes`: earlier chains first, whole as long as the budget lasts."""
    index: dict[tuple[int, int], int] = {}
    nodes: list[tuple[int, int]] = []
    for chain in chains:
        at = 0
        for token in chain:
            if (at, token) not in index:
                if len(nodes) == budget:
                    return nodes
                nodes.append((at, token))
                index[at, token] = len(nodes)
            at = index[at, token]
    return nodes
