"""The token tree: what a drafter proposes and the verifier scores.

Node 0 is the root, the last emitted token, which is not in the target's cache yet. A chain is a tree
of width 1. Rows of one batch may have different shapes: a node other than the root whose parent is
NO_NODE is padding, attends to itself alone and is never reached.

Dimensions: B sequences, N nodes (root included), V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

NO_NODE = -1
"""Parent of the root and of padding nodes."""


@dataclass(frozen=True)
class Topology:
    """The shape of one row's tree, on the host: `parents[n] < n`, NO_NODE for root and padding."""

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        for node, parent in enumerate(self.parents):
            if not NO_NODE <= parent < max(node, 1):
                raise ValueError(f"node {node} has parent {parent}; a parent comes before its child")
            if node and parent > 0 and self.parents[parent] == NO_NODE:
                raise ValueError(f"node {node} hangs on node {parent}, which is padding")
        if not self.parents or self.parents[0] != NO_NODE:
            raise ValueError("node 0 is the root and has no parent")

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance from the root; 0 for padding."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent == NO_NODE else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def depth_row(self) -> Tensor:
        """The depths as a tensor [N]."""
        return torch.tensor(self.depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of every node in node order, which is draw order for drawn children."""
        children: list[list[int]] = [[] for _ in self.parents]
        for node, parent in enumerate(self.parents):
            if parent != NO_NODE:
                children[parent].append(node)
        return tuple(tuple(c) for c in children)

    @cached_property
    def ancestors(self) -> Tensor:
        """Bool [N, N]: entry (n, m) is True where node n sees node m, that is itself and its ancestors."""
        seen = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent != NO_NODE:
                seen[node] |= seen[parent]
        return seen

    @cached_property
    def is_chain(self) -> bool:
        """True when no node has two children."""
        return all(len(c) <= 1 for c in self.children)

    @cached_property
    def heavy_first(self) -> tuple[int, ...]:
        """All nodes depth first, into the largest subtree first (DySpec, arXiv 2410.11744, appendix C); padding last.

        A node then lies close to its ancestors, so that a mask in this order has few blocks with anything in them.
        Among subtrees of one size the earlier child, usually the likelier, comes first. Chains stay as they are.
        """
        if self.is_chain:
            return tuple(range(len(self.parents)))
        sizes = [1] * len(self.parents)
        for node in range(len(self.parents) - 1, 0, -1):
            if self.parents[node] != NO_NODE:
                sizes[self.parents[node]] += sizes[node]
        order, stack = [], [0]
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(sorted(reversed(self.children[node]), key=sizes.__getitem__))
        padding = [node for node, parent in enumerate(self.parents) if node and parent == NO_NODE]
        return (*order, *padding)

    def in_order(self, order: tuple[int, ...]) -> Topology:
        """The same tree with node `order[i]` in place i; a parent comes before its children in `order`, too."""
        place = {node: index for index, node in enumerate(order)}
        return topology(tuple(NO_NODE if (p := self.parents[n]) == NO_NODE else place[p] for n in order))

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to `node`; empty for the root."""
        nodes = []
        while node > 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]


@lru_cache(maxsize=4096)
def topology(parents: tuple[int, ...]) -> Topology:
    """The Topology of these parents, cached: drafters repeat a few shapes, masks are built once for each."""
    return Topology(parents)


@dataclass(frozen=True)
class Resume:
    """States of a tree that a drafter already ran through the target's first layers.

    Attributes:
        layer: number of layers that have run; verification starts at this layer.
        hidden: their output, [B, N, D], before any final norm. The keys and values of those layers
            already lie in the target's cache, in node order.
    """

    layer: int
    hidden: Tensor


@dataclass(frozen=True)
class TokenTree:
    """A proposal for B rows.

    Attributes:
        tokens: [B, N] token ids; column 0 holds the roots. Ids of padding nodes are arbitrary but valid.
        shapes: one Topology per row, all of N nodes.
        log_q: None when children were *chosen* (n-gram, top-k, ...). Otherwise [B, N, V]: the
            unnormalised log-law from which the children of each node were drawn, successively and
            without replacement, before the first removal. Rows of leaves are not read.
        resume: set by drafters that run the target's own first layers.
    """

    tokens: Tensor
    shapes: tuple[Topology, ...]
    log_q: Tensor | None = None
    resume: Resume | None = None

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 2, "tokens are [B, N]"
        assert len(self.shapes) == self.tokens.shape[0], "one shape per row"
        assert all(len(s.parents) == self.tokens.shape[1] for s in self.shapes), "N nodes in each shape"

    @cached_property
    def ids(self) -> list[list[int]]:
        """`tokens` on the host, brought there once."""
        return self.tokens.tolist()

    @property
    def num_nodes(self) -> int:
        """N, root and padding included."""
        return self.tokens.shape[1]

    @property
    def depth(self) -> int:
        """Depth of the deepest node of any row; 0 when nothing was proposed."""
        return max(max(shape.depths) for shape in self.shapes)

    @property
    def is_chain(self) -> bool:
        """True when every row is a chain."""
        return all(shape.is_chain for shape in self.shapes)

    @property
    def num_drafted(self) -> list[int]:
        """Proposed tokens per row: nodes without root and padding."""
        return [sum(p != NO_NODE for p in shape.parents) for shape in self.shapes]

    @staticmethod
    def of_roots(root: Tensor) -> TokenTree:
        """The tree that proposes nothing; `root` is [B]."""
        return TokenTree(root[:, None], (topology((NO_NODE,)),) * root.shape[0])

    @staticmethod
    def of_chains(root: Tensor, chains: list[list[int]]) -> TokenTree:
        """One chain per row below `root` [B]; rows may have different lengths, also 0."""
        shapes, rows = [], []
        width = max((len(c) for c in chains), default=0)
        for chain in chains:
            padding = width - len(chain)
            shapes.append(topology((NO_NODE, *range(len(chain)), *[NO_NODE] * padding)))
            rows.append([*chain, *[0] * padding])
        drafted = torch.tensor(rows, dtype=root.dtype, device=root.device).reshape(len(chains), width)
        return TokenTree(torch.cat([root[:, None], drafted], 1), tuple(shapes))

    @staticmethod
    def of_nodes(root: Tensor, nodes: list[list[tuple[int, int]]]) -> TokenTree:
        """From each row's list of (parent node, token); the first entry becomes node 1."""
        width = max((len(row) for row in nodes), default=0)
        shapes, rows = [], []
        for row in nodes:
            padding = width - len(row)
            shapes.append(topology((NO_NODE, *(parent for parent, _ in row), *[NO_NODE] * padding)))
            rows.append([*(token for _, token in row), *[0] * padding])
        drafted = torch.tensor(rows, dtype=root.dtype, device=root.device).reshape(len(nodes), width)
        return TokenTree(torch.cat([root[:, None], drafted], 1), tuple(shapes))

    def up_to_depth(self, depth: int) -> TokenTree:
        """Without the nodes below `depth`. Lossless for drawn children: the cut looks at no token."""
        return self.up_to_depths([depth] * len(self.shapes))

    def up_to_depths(self, depths: list[int]) -> TokenTree:
        """The same with a depth of its own for each row."""
        rows = list(zip(self.shapes, depths, strict=True))
        if all(max(shape.depths) <= depth for shape, depth in rows):
            return self
        return self._keeping([[d <= depth for d in shape.depths] for shape, depth in rows])

    def first_path(self) -> TokenTree:
        """Only the first child of every node: the chain that a chain-only target can verify."""
        if self.is_chain:
            return self
        keep = []
        for shape in self.shapes:
            on_path, node = {0}, 0
            while shape.children[node]:
                node = shape.children[node][0]
                on_path.add(node)
            keep.append([n in on_path for n in range(self.num_nodes)])
        return self._keeping(keep)

    def _keeping(self, keep: list[list[bool]]) -> TokenTree:
        """The nodes marked in `keep`, moved to the front of each row; the root is always kept."""
        assert self.resume is None, "a resumed tree's nodes already lie in the cache and cannot be dropped"
        orders, shapes = [], []
        kept_rows = [[n for n, parent in enumerate(shape.parents) if n == 0 or (parent != NO_NODE and keep[b][n])]
                     for b, shape in enumerate(self.shapes)]  # fmt: skip
        width = max(len(row) for row in kept_rows)
        for shape, row in zip(self.shapes, kept_rows, strict=True):
            new_index = {old: new for new, old in enumerate(row)}
            parents = [NO_NODE if old == 0 else new_index[shape.parents[old]] for old in row]
            shapes.append(topology((*parents, *[NO_NODE] * (width - len(row)))))
            orders.append([*row, *[0] * (width - len(row))])
        order = torch.tensor(orders, device=self.tokens.device)
        log_q = self.log_q
        if log_q is not None:
            log_q = log_q.gather(1, order[:, :, None].expand(-1, -1, log_q.shape[2]))
        return replace(self, tokens=self.tokens.gather(1, order), shapes=tuple(shapes), log_q=log_q)

    def padded_to(self, num_nodes: int) -> TokenTree:
        """With padding nodes appended up to `num_nodes`; some matmul kernels are slow at odd widths."""
        extra = num_nodes - self.num_nodes
        if extra <= 0 or self.resume is not None:
            return self
        shapes = tuple(topology((*shape.parents, *[NO_NODE] * extra)) for shape in self.shapes)
        filler = self.tokens[:, :1].expand(-1, extra)
        log_q = self.log_q
        if log_q is not None:
            log_q = torch.cat([log_q, log_q.new_zeros(log_q.shape[0], extra, log_q.shape[2])], 1)
        return replace(self, tokens=torch.cat([self.tokens, filler], 1), shapes=shapes, log_q=log_q)

    def ancestors(self) -> Tensor:
        """Bool [B, N, N] on the host: which nodes each node sees (itself and its ancestors)."""
        return stacked([shape.ancestors for shape in self.shapes])

    def depths(self) -> Tensor:
        """[B, N] on the host: distance from the root, 0 for padding."""
        return stacked([shape.depth_row for shape in self.shapes])


def stacked(rows: list[Tensor]) -> Tensor:
    """Tensors of B rows as one [B, ...]; a view where all rows are the same one."""
    if all(row is rows[0] for row in rows):
        return rows[0].expand(len(rows), *rows[0].shape)
    return torch.stack(rows)
