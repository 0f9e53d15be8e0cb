"""A cost table in which drafting and nodes have prices by hand."""

from __future__ import annotations

from specdec.costs.table import CostTable, DraftPoint, VerifyPoint


def costs(*, per_node: float = 0.05, per_level: float = 0.2, base: float = 1.0, contexts: bool = False) -> CostTable:
    """verify(n) = base + per_node * (n - 1); draft = per_level * levels; 0.01 a step and 0.02 a token on top."""
    lengths = (1, 1001) if contexts else (1,)
    verifications = tuple(
        VerifyPoint(1, length, nodes, (base + per_node * (nodes - 1)) * (1 + (length - 1) / 1000))
        for length in lengths
        for nodes in (1, 200)
    )
    proposals = tuple(DraftPoint("fixed", levels, levels, 1, per_level * levels) for levels in (1, 4))
    return CostTable(verifications, proposals if per_level else (), per_step=0.01, per_token=0.02)
