"""Suffix automaton drafting: the longest earlier occurrence of the text's end, and what followed it.

SAM-Decoding (arXiv 2411.10666) and SuffixDecoding (2411.04975): a chain or tree from the continuations of the
longest match, deeper for longer matches, branches ranked by how often each continuation occurred.
Texts are prompt and output, and earlier generations when asked to remember them.
"""

from __future__ import annotations

import heapq

from torch import Tensor

from specdec.context import Context
from specdec.drafter import Committed
from specdec.errors import UnknownDrafter
from specdec.sampling import Chooser, SamplingParams
from specdec.tree import TokenTree


class SuffixDrafter:
    """Trees from suffix matches.

    Args:
        budget: most nodes to propose.
        branches: most children of a node; 1 proposes chains.
        min_match: shortest match that is worth a proposal.
        factor: depth per matched token; a match of length m proposes at most `factor * m` levels.
        min_share: a continuation is proposed while its path's share of the occurrences is at least this.
        remember: keep up to so many tokens of earlier generations; 0 forgets them.
    """

    taps: tuple[int, ...] = ()

    def __init__(
        self,
        *,
        budget: int = 12,
        branches: int = 2,
        min_match: int = 1,
        factor: float = 4.0,
        min_share: float = 0.1,
        remember: int = 0,
    ) -> None:
        for name, value, least in (("budget", budget, 1), ("branches", branches, 1), ("min_match", min_match, 1)):
            if value < least:
                raise UnknownDrafter(f"suffix needs {name} >= {least}, got {value}")
        if not 0 < factor < float("inf") or not 0 <= min_share <= 1 or remember < 0:
            raise UnknownDrafter("suffix needs a finite factor > 0, 0 <= min_share <= 1 and remember >= 0")
        self.budget, self.branches, self.min_match = budget, branches, min_match
        self.factor, self.min_share, self.remember = factor, min_share, remember
        self._earlier = SuffixAutomaton()
        self._earlier_texts: list[list[int]] = []
        self._rows: list[_Row] = []
        self._finished: list[_Row] = []

    def reset(self, batch_size: int, context: Context) -> None:
        """Begin new texts; earlier ones are remembered up to the limit."""
        if self.remember:
            self._remember([row.text for row in [*self._finished, *self._rows]])
        self._rows = [_Row(self._earlier) for _ in range(batch_size)]
        self._finished = []

    def _remember(self, texts: list[list[int]]) -> None:
        texts = [text[-self.remember :] for text in texts if text]
        self._earlier_texts += texts
        if sum(map(len, self._earlier_texts)) > self.remember:
            while len(self._earlier_texts) > 1 and sum(map(len, self._earlier_texts)) > self.remember // 2:
                self._earlier_texts.pop(0)
            texts, self._earlier = self._earlier_texts, SuffixAutomaton()
        for text in texts:
            self._earlier.begin_text()
            for token in text:
                self._earlier.append(token)

    def observe(self, committed: Committed) -> None:
        """Append the final tokens to each row's automaton."""
        for row, tokens in zip(self._rows, committed.tokens, strict=True):
            row.extend(tokens)

    def propose(self, root: Tensor, params: SamplingParams, chooser: Chooser, room: int) -> TokenTree:
        """A tree per row from its longest match, empty where none is long enough."""
        return TokenTree.of_nodes(
            root, [self._nodes(row, token, room) for row, token in zip(self._rows, root.tolist(), strict=True)]
        )

    def _nodes(self, row: _Row, root: int, room: int) -> list[tuple[int, int]]:
        row.append_root(root)
        automaton, state, matched = row.longest_match()
        if matched < self.min_match:
            return []
        depth = min(room, max(1, int(self.factor * matched)))
        return grow_by_counts(automaton, state, self.budget, depth, self.branches, self.min_share)

    def select(self, rows: list[int]) -> None:
        """Keep only these rows; the texts of the others stay for later requests."""
        self._finished += [row for index, row in enumerate(self._rows) if index not in rows]
        self._rows = [self._rows[index] for index in rows]


class _Row:
    """One sequence: its own automaton, and its place in that of earlier texts."""

    def __init__(self, earlier: SuffixAutomaton) -> None:
        self.text: list[int] = []
        self.own = SuffixAutomaton()
        self.earlier = earlier
        self._state = self._matched = 0
        self._root_appended = False

    def extend(self, tokens: list[int]) -> None:
        for token in tokens[1:] if self._root_appended else tokens:
            self._append(token)
        self._root_appended = False

    def append_root(self, root: int) -> None:
        """The root is final although the target has not cached it yet."""
        if not self._root_appended:
            self._append(root)
            self._root_appended = True

    def _append(self, token: int) -> None:
        self.text.append(token)
        self.own.append(token)
        self._state, self._matched = self.earlier.advance(self._state, self._matched, token)

    def longest_match(self) -> tuple[SuffixAutomaton, int, int]:
        """(automaton, state, length) of the longest suffix that occurred before, the own text preferred."""
        state = self.own.repeated_suffix()
        length = self.own.lengths[state]
        if self._matched > length:
            return self.earlier, self._state, self._matched
        return self.own, state, length


class SuffixAutomaton:
    """The smallest automaton of all substrings, grown one token at a time (Blumer et al. 1985).

    State 0 is the empty string. `counts` says how often a state's strings occurred, updated along at most
    MAX_UPDATES suffix links per token so that repetitive text stays cheap.
    """

    MAX_UPDATES = 64

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.links: list[int] = [-1]
        self.lengths: list[int] = [0]
        self.counts: list[int] = [0]
        self.last_seen: list[int] = [0]
        self._clock = 0
        self._last = 0

    def begin_text(self) -> None:
        """The next token starts a new text; substrings do not run across."""
        self._last = 0

    def append(self, token: int) -> None:
        """Extend the current text by one token; amortised constant time."""
        existing = self.next[self._last].get(token)
        if existing is not None:  # only when several texts share a prefix
            self._last = self._split_if_longer(self._last, existing, token)
        else:
            new = self._add_state(self.lengths[self._last] + 1)
            state = self._last
            while state != -1 and token not in self.next[state]:
                self.next[state][token] = new
                state = self.links[state]
            self.links[new] = 0 if state == -1 else self._split_if_longer(state, self.next[state][token], token)
            self._last = new
        self._count_suffixes()

    def _add_state(self, length: int) -> int:
        self.next.append({})
        self.links.append(0)
        self.lengths.append(length)
        self.counts.append(0)
        self.last_seen.append(0)
        return len(self.next) - 1

    def _split_if_longer(self, state: int, target: int, token: int) -> int:
        """The state whose longest string is exactly one token longer than `state`'s."""
        if self.lengths[target] == self.lengths[state] + 1:
            return target
        clone = self._add_state(self.lengths[state] + 1)
        self.next[clone] = dict(self.next[target])
        self.links[clone] = self.links[target]
        self.counts[clone], self.last_seen[clone] = self.counts[target], self.last_seen[target]
        self.links[target] = clone
        walk = state
        while walk != -1 and self.next[walk].get(token) == target:
            self.next[walk][token] = clone
            walk = self.links[walk]
        return clone

    def _count_suffixes(self) -> None:
        self._clock += 1
        state, updates = self._last, 0
        while state > 0 and updates < self.MAX_UPDATES:
            self.counts[state] += 1
            self.last_seen[state] = self._clock
            state = self.links[state]
            updates += 1

    def repeated_suffix(self) -> int:
        """The state of the longest suffix of the current text that also occurs elsewhere."""
        return max(self.links[self._last], 0)

    def advance(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """Follow one token of another text: the longest match of its end, as (state, length)."""
        while state and token not in self.next[state]:
            state = self.links[state]
            matched = self.lengths[state]
        if token not in self.next[state]:
            return 0, 0
        return self.next[state][token], matched + 1


def grow_by_counts(
    automaton: SuffixAutomaton, state: int, budget: int, depth: int, branches: int, min_share: float
) -> list[tuple[int, int]]:
    """Best-first tree of continuations of a match, as (parent node, token).

    A continuation's value is its share of the occurrences along the path; the more recent of equals first.
    """
    nodes: list[tuple[int, int]] = []
    heap: list[tuple[float, int, int, int, int, int]] = []

    def push_children(parent: int, at: int, share: float, level: int) -> None:
        while at and not automaton.next[at]:  # the end of the text: a shorter suffix of it went on elsewhere
            at = automaton.links[at]
        if at == 0:
            return
        following = automaton.next[at]
        if len(following) == 1:  # the usual case on the way down a long match
            ranked = list(following.items())
        else:
            counts, seen = automaton.counts, automaton.last_seen
            ranked = heapq.nlargest(branches, following.items(), key=lambda item: (counts[item[1]], seen[item[1]]))
        total = sum(automaton.counts[child] for child in following.values())
        for token, child in ranked:
            value = share * automaton.counts[child] / max(total, 1)
            if value >= min_share:
                heapq.heappush(heap, (-value, level, -automaton.last_seen[child], parent, token, child))

    push_children(0, state, 1.0, 1)
    while heap and len(nodes) < budget:
        negative, level, _, parent, token, child = heapq.heappop(heap)
        nodes.append((parent, token))
        if level < depth:
            push_children(len(nodes), child, -negative, level + 1)
    return nodes
