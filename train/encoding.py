"""From examples to token ids with a loss mask.

A token is supervised when it begins within text that the target is to learn: an answer and its end-of-turn token, a
completion and its end-of-text token, or plain text as a whole. Text is tokenized once and as a whole, so that
tokens come out as in the text that a target reads; special tokens that a template spells out are not doubled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from specdec.errors import BadData
from specdec.train.chat_template import ChatTemplate, Rendered, readable
from specdec.train.example import Completion, Conversation, Example, PlainText, TokenTurns
from specdec.vocabulary import vocabulary_sha256

PROMPT_TOKENS = 64
"""Prompt length for validation, of text that has no prompt of its own."""


@dataclass(frozen=True)
class Encoded:
    """One document.

    Attributes:
        ids, supervised: one entry for each token.
        form: "chat", "completion", "text" or "tokens".
        lost: tokens that were cut off at the end.
        cut_answer: the cut went through supervised text.
    """

    ids: list[int]
    supervised: list[bool]
    form: str
    lost: int = 0
    cut_answer: bool = False

    @property
    def prompt(self) -> list[int]:
        """Ids before the first supervised run; the beginning of text that is supervised from its first token."""
        first = next((place for place, mark in enumerate(self.supervised) if mark), len(self.ids))
        return self.ids[:first] if first > 1 else self.ids[: min(PROMPT_TOKENS, len(self.ids) // 2)]

    @property
    def teaches(self) -> bool:
        """A supervised token has a predecessor, from which it can be predicted."""
        return any(self.supervised[1:])


class Encoder:
    """Encodes examples for one target.

    Args:
        tokenizer: the target's; one that knows which characters a token stands for.
        max_length: longer conversations and completions are cut off, longer plain text is divided.
        template: of conversations; the tokenizer's own is looked for when the first conversation comes.
        end_of_text: end plain text and completions with the tokenizer's end-of-text token.

    Raises:
        BadData: the tokenizer cannot tell characters of tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 2048,
        template: ChatTemplate | None = None,
        *,
        end_of_text: bool = True,
    ) -> None:
        if not tokenizer.is_fast:
            raise BadData(
                f"{type(tokenizer).__name__} does not say which characters a token stands for, and the loss mask needs "
                "that; save the target with a tokenizer.json"
            )
        if max_length < 2:
            raise BadData(f"documents of at most {max_length} tokens teach nothing; expected 2 or more")
        self.tokenizer, self.max_length, self._template = tokenizer, max_length, template
        self.end = cast(int | None, tokenizer.eos_token_id) if end_of_text else None
        self.vocabulary = vocabulary_sha256(tokenizer.get_vocab())

    @property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            BadData: there is none.
        """
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer)
        return self._template

    @property
    def template_sha256(self) -> str | None:
        """Of the template, when one was used."""
        return None if self._template is None else self._template.sha256

    def encode(self, example: Example) -> list[Encoded]:
        """The documents of an example.

        Raises:
            BadData: the template refuses it, it holds half a character, or its ids belong to another vocabulary.
        """
        if isinstance(example, Conversation):
            return [self._clipped(*self._of_rendered(row), "chat") for row in self.template.rows(example)]
        if isinstance(example, Completion):
            return [self._clipped(*self._of_completion(example), "completion")]
        if isinstance(example, PlainText):
            return self._of_text(example)
        return [self._clipped(*ids_and_mask, "tokens") for ids_and_mask in self._of_turns(example)]

    def _of_rendered(self, row: Rendered) -> tuple[list[int], list[bool]]:
        ids, starts = self._tokenized(row.text, special=False)
        mask = [_within(start, row.spans) for start in starts]
        if row.marks is not None:
            if len(row.marks) != len(ids):
                raise BadData(f"the template marks {len(row.marks)} tokens of a text of {len(ids)}")
            mask = [mine and theirs for mine, theirs in zip(mask, row.marks, strict=True)]
        return ids, mask

    def _of_completion(self, example: Completion) -> tuple[list[int], list[bool]]:
        text = example.prompt + example.completion
        ids, starts = self._tokenized(text, special=True)
        mask = [_within(start, ((len(example.prompt), len(text)),)) for start in starts]
        return self._ended(ids, mask, example.cut)

    def _of_text(self, example: PlainText) -> list[Encoded]:
        ids, _ = self._tokenized(example.text, special=True)
        ids, mask = self._ended(ids, [True] * len(ids), example.cut)
        pieces = [slice(start, start + self.max_length) for start in range(0, len(ids), self.max_length)]
        return [Encoded(ids[piece], mask[piece], "text") for piece in pieces]

    def _of_turns(self, example: TokenTurns) -> list[tuple[list[int], list[bool]]]:
        """Turns whose prompt continues the text before it share a row."""
        if example.vocabulary != self.vocabulary:
            raise BadData(
                f"its ids belong to another vocabulary ({example.vocabulary[:12]}) than this tokenizer's "
                f"({self.vocabulary[:12]}); prepare it for the target that wrote it"
            )
        rows: list[tuple[list[int], list[bool]]] = []
        for prompt, answer in example.turns:
            read = list(prompt)
            if rows and read[: len(rows[-1][0])] == rows[-1][0]:
                ids, mask = rows[-1]
                mask += [False] * (len(read) - len(ids))
                ids += read[len(ids) :]
            else:
                rows.append((read, [False] * len(read)))
            rows[-1][0].extend(answer)
            rows[-1][1].extend([True] * len(answer))
        return rows

    def _ended(self, ids: list[int], mask: list[bool], cut: bool) -> tuple[list[int], list[bool]]:
        if cut or self.end is None or ids[-1:] == [self.end]:
            return ids, mask
        return [*ids, self.end], [*mask, True]

    def _clipped(self, ids: list[int], mask: list[bool], form: str) -> Encoded:
        end = self.max_length
        if len(ids) <= end:
            return Encoded(ids, mask, form)
        return Encoded(ids[:end], mask[:end], form, len(ids) - end, mask[end - 1] and mask[end])

    def _tokenized(self, text: str, *, special: bool) -> tuple[list[int], list[int]]:
        """Ids, and where in the text each begins; -1 for tokens that the tokenizer adds itself."""
        encoded: Any = self.tokenizer(
            readable(text),
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=special,
            verbose=False,  # documents may be longer than a model's context; they are cut below
        )
        starts = [start for start, _ in encoded["offset_mapping"]]
        if special:
            # A special token that the text spells out has characters; an added one has none.
            none = [stop <= start for start, stop in encoded["offset_mapping"]]
            added = [bool(mark) and empty for mark, empty in zip(encoded["special_tokens_mask"], none, strict=True)]
            starts = [-1 if mark else start for start, mark in zip(starts, added, strict=True)]
        return list(encoded["input_ids"]), starts


def _within(start: int, spans: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= start < stop for first, stop in spans)
