"""Ways of drafting by hand, beside the level-wise growth of real drafters: one row, three tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.sampling import Chooser
from specdec.tree import TokenTree
from tests.law.tables import VOCAB, Context, Propose, Tables, root_of, with_log_q


def fixed(nodes: list[tuple[int, int]]) -> Propose:
    """The same tokens always, as (parent, token): chosen."""
    return lambda tables, context, chooser: TokenTree.of_nodes(torch.tensor([root_of(context)]), [nodes])


def repeating(depth: int) -> Propose:
    """The text so far, once more: chosen, as an n-gram drafter's chain is."""

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        text = [1, 0, *context]
        return TokenTree.of_chains(torch.tensor([text[-1]]), [[text[i % len(text)] for i in range(depth)]])

    return propose


def draw_child(tables: Tables, path: Context, without: list[int], chooser: Chooser) -> int:
    """One more child of the node at `path`, drawn after its elder siblings."""
    return int(chooser.draw(_remaining(tables.draft[path], without).softmax(-1)[None]))


def _remaining(logits: Tensor, without: list[int]) -> Tensor:
    return logits.index_fill(0, torch.tensor(without, dtype=torch.long), -torch.inf)


def drawn_chain_until_unsure(depth: int, sure: float) -> Propose:
    """Stops before a draw when the draft's most probable token is unlikely; looks at laws, never at the draw."""

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        path: list[int] = []
        while len(path) < depth and float(tables.draft[*context, *path].softmax(-1).max()) > sure:
            path.append(draw_child(tables, (*context, *path), [], chooser))
        return with_log_q(TokenTree.of_chains(torch.tensor([root_of(context)]), [path]), tables, context)

    return propose


def drawn_chain_keeping_the_unlikely(depth: int, likely: float) -> Propose:
    """Stops after a token that was unlikely under the draft, and keeps that token."""

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        path: list[int] = []
        while len(path) < depth:
            q = tables.draft[*context, *path].softmax(-1)
            path.append(draw_child(tables, (*context, *path), [], chooser))
            if float(q[path[-1]]) < likely:
                break
        return with_log_q(TokenTree.of_chains(torch.tensor([root_of(context)]), [path]), tables, context)

    return propose


def drawn_where_earlier_draws_lead() -> Propose:
    """A tree whose shape depends on what is drawn already, never on the value of the token being decided.

    A second child only after token 0, a third only after 0 and 1; the first child branches, deeper where the second
    child was token 2.
    """

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        first = draw_child(tables, context, [], chooser)
        nodes = [(0, first)]
        if first == 0:
            nodes.append((0, draw_child(tables, context, [first], chooser)))
            if nodes[-1][1] == 1:
                nodes.append((0, draw_child(tables, context, [0, 1], chooser)))
        second = nodes[1][1] if len(nodes) > 1 else None
        below = draw_child(tables, (*context, first), [], chooser)
        nodes.append((1, below))
        if second == 2:
            nodes.append((1, draw_child(tables, (*context, first), [below], chooser)))
            nodes.append((2, draw_child(tables, (*context, second), [], chooser)))
        return with_log_q(TokenTree.of_nodes(torch.tensor([root_of(context)]), [nodes]), tables, context)

    return propose


def merged_rollouts(count: int, depth: int) -> Propose:
    """Independent rollouts with equal prefixes merged, children in order of first appearance: drawn."""

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        index: dict[Context, int] = {(): 0}
        nodes: list[tuple[int, int]] = []
        for _ in range(count):
            path: Context = ()
            for _ in range(depth):
                token = draw_child(tables, (*context, *path), [], chooser)
                if (*path, token) not in index:
                    nodes.append((index[path], token))
                    index[*path, token] = len(nodes)
                path = (*path, token)
        return with_log_q(TokenTree.of_nodes(torch.tensor([root_of(context)]), [nodes]), tables, context)

    return propose


def padded(propose: Propose, num_nodes: int) -> Propose:
    """With padding nodes behind, as the decode loop adds them for fast matmul widths."""
    return lambda tables, context, chooser: propose(tables, context, chooser).padded_to(num_nodes)


def cut(propose: Propose, depth: int) -> Propose:
    """Without the nodes below a depth, as the decode loop cuts to the room left."""
    return lambda tables, context, chooser: propose(tables, context, chooser).up_to_depth(depth)


def first_path(propose: Propose) -> Propose:
    """Only first children, as the decode loop keeps for targets that decode chains."""
    return lambda tables, context, chooser: propose(tables, context, chooser).first_path()


def without_unlikely_draws(propose: Propose, least: float) -> Propose:
    """Draws of small draft probability are dropped afterwards: a hidden rejection."""

    def pruned(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        tree = propose(tables, context, chooser)
        assert tree.log_q is not None
        q, shape, tokens = tree.log_q.softmax(-1)[0], tree.shapes[0], tree.tokens[0].tolist()
        own = [True] + [bool(q[shape.parents[n], tokens[n]] >= least) for n in range(1, tree.num_nodes)]
        keep = [all(own[m] for m in shape.path(n)) for n in range(tree.num_nodes)]
        return tree._keeping([keep])

    return pruned


def drawn_with_replacement(count: int) -> Propose:
    """Independent children of the root, duplicates kept: not what a tree with `log_q` promises."""

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        nodes = [(0, draw_child(tables, context, [], chooser)) for _ in range(count)]
        return with_log_q(TokenTree.of_nodes(torch.tensor([root_of(context)]), [nodes]), tables, context)

    return propose


def siblings_sorted(propose: Propose, *, by: str) -> Propose:
    """The same draws with every node's children tested in another order: "q" (likeliest first) or "reversed"."""

    def reordered(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        tree = propose(tables, context, chooser)
        assert tree.log_q is not None
        shape, tokens, log_q = tree.shapes[0], tree.tokens[0].tolist(), tree.log_q[0]
        nodes: list[tuple[int, int]] = []

        def visit(old: int, new: int) -> None:
            children = list(shape.children[old])
            if by == "q":
                children.sort(key=lambda child: -float(log_q[old, tokens[child]]))
            else:
                children.reverse()
            placed = []
            for child in children:
                nodes.append((new, tokens[child]))
                placed.append((child, len(nodes)))
            for child, at in placed:
                visit(child, at)

        visit(0, 0)
        return with_log_q(TokenTree.of_nodes(tree.tokens[:, 0], [nodes]), tables, context)

    return reordered


def random_junk(depth: int) -> Propose:
    """A chain of uniform tokens that claims nothing about its law: chosen, however it came about."""

    def propose(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        uniform = torch.full((1, VOCAB), 1 / VOCAB, dtype=torch.float64)
        return TokenTree.of_chains(
            torch.tensor([root_of(context)]), [[int(chooser.draw(uniform)) for _ in range(depth)]]
        )

    return propose


def as_chosen(propose: Propose) -> Propose:
    """The same children without their law, as if a rule had chosen them."""

    def propose_chosen(tables: Tables, context: Context, chooser: Chooser) -> TokenTree:
        tree = propose(tables, context, chooser)
        return TokenTree(tree.tokens, tree.shapes)

    return propose_chosen


def with_fake_law(propose: Propose) -> Propose:
    """Chosen children that pretend to have been drawn from the draft."""
    return lambda tables, context, chooser: with_log_q(propose(tables, context, chooser), tables, context)
