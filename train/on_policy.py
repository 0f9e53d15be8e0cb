"""Training text from three pens: the data's own, the target's, or the draft's that is learning (on-policy).

DistillSpec (arXiv 2310.08461, section 4) compares them. A row that is not fixed keeps the beginnings of the fixed
row's documents, and a model goes on from there. All is a function of row numbers, seed and the writer's weights, so a
resumed run writes what the unbroken one wrote.

Dimensions: R rows, S row length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.api import generate
from specdec.drafter import Drafter
from specdec.errors import BadRecipe
from specdec.target import Target
from specdec.train.batch import Document, Documents, TrainBatch
from specdec.train.order import Order, Piece, Row, derived_seed
from specdec.train.prepared import MemoryData

Writer = Literal["fixed", "target", "draft"]

TEXTS: dict[str, dict[str, float]] = {
    "fixed": {},
    "target": {"target": 1.0},
    "draft": {"draft": 1.0},
    "mixture": {"fixed": 0.5, "draft": 0.5},
}
"""DistillSpec's sources by name, as `TextShares` of those who are named."""

WRITTEN_AT_ONCE = 32
"""Documents that one call of generate writes."""


@dataclass(frozen=True)
class TextShares:
    """Of all rows, how many come from where; only the proportions count.

    Attributes:
        fixed: the data as it is.
        target: the target continues beginnings.
        draft: the draft in training continues them.

    Raises:
        BadRecipe: a negative share, or nothing at all.
    """

    fixed: float = 1.0
    target: float = 0.0
    draft: float = 0.0

    def __post_init__(self) -> None:
        if min(astuple(self)) < 0 or not sum(astuple(self)):
            raise BadRecipe(f"shares of text are 0 or more, and not all 0; got {self}")

    def writer(self, seed: int, row: int) -> Writer:
        """Who writes a row of the run."""
        shares: dict[Writer, float] = {"fixed": self.fixed, "target": self.target, "draft": self.draft}
        left = derived_seed(seed, "writer", row) / 2**63 * sum(shares.values())
        drawn: Writer = "fixed"
        for name, share in shares.items():
            if share:
                drawn = name
                if left < share:
                    break
            left -= share
        return drawn


@dataclass(frozen=True)
class Writing:
    """How models write.

    Attributes:
        temperature: 0 for greedy text; 1 is the law itself.
        prompt_tokens: beginning of a document that is supervised from its start, as plain text is; at most half of
            it. Otherwise the beginning is all before the first supervised token.
        speculative: let the draft draft for the target while that writes. Worth it for a large target and few rows at
            once; a batch that keeps the hardware busy is faster without. The law stays, the sampled text does not.

    Raises:
        BadRecipe: a number out of range.
    """

    temperature: float = 1.0
    prompt_tokens: int = 32
    speculative: bool = False

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.prompt_tokens < 1:
            raise BadRecipe(
                f"writing needs a temperature of 0 or more and prompts of a token or more, got {self.temperature} "
                f"and {self.prompt_tokens}"
            )


class Pens(Protocol):
    """The models that write: a `Trainable` of a draft model is one."""

    target: Target

    def served(self) -> PreTrainedModel:
        """The draft with its present weights."""
        ...

    def drafter(self) -> Drafter:
        """A drafter with its present weights, which makes the target write faster."""
        ...


class MixedSource:
    """Batches by row number for `train.loop.Loop`.

    Args:
        documents: prepared texts.
        order: packs them into rows.
        shares: who writes.
        pens: target and draft.
        writing: how they write.
    """

    def __init__(
        self,
        documents: Documents,
        order: Order,
        shares: TextShares,
        pens: Pens,
        writing: Writing | None = None,
    ) -> None:
        self.documents, self.order, self.shares, self.pens = documents, order, shares, pens
        self.writing = writing or Writing()

    def __call__(self, numbers: list[int]) -> TrainBatch:
        """The rows of these numbers; those that a model continues are written now."""
        rows = [self.order.row(number) for number in numbers]
        texts = [[self.documents.piece(piece) for piece in row] for row in rows]
        for writer in ("target", "draft"):
            chosen = [i for i, number in enumerate(numbers) if self.shares.writer(self.order.seed, number) == writer]
            if chosen:
                seed = derived_seed(self.order.seed, "text", writer, numbers[chosen[0]])
                written = self._written(writer, [document for i in chosen for document in texts[i]], seed)
                for i in chosen:
                    texts[i], written = written[: len(texts[i])], written[len(texts[i]) :]
        return _laid_out(texts, numbers, self.order)

    def reads_weights(self, numbers: Sequence[int]) -> bool:
        """Whether one of these rows is written with the draft's present weights."""
        writers = {self.shares.writer(self.order.seed, number) for number in numbers}
        return "draft" in writers or ("target" in writers and self.writing.speculative)

    def _written(self, writer: Writer, documents: list[Document], seed: int) -> list[Document]:
        """These documents with everything after their beginnings written anew."""
        model = self.pens.target.model if writer == "target" else self.pens.served()
        drafter = self.pens.drafter() if writer == "target" and self.writing.speculative else None
        return continued(model, documents, self.writing, seed, drafter)


def continued(
    model: PreTrainedModel,
    documents: Sequence[Document],
    writing: Writing,
    seed: int,
    drafter: Drafter | None = None,
) -> list[Document]:
    """Documents whose beginnings a model continues up to their old length, or to its end of text.

    Documents of similar room are written together. What is written is supervised, the end of text included. A
    document without room, or where nothing is supervised, stays as it is.

    Args:
        model: writes, in evaluation mode.
        documents: beginnings and lengths.
        writing: temperature and beginnings.
        seed: of the sampling.
        drafter: makes it faster without changing the law.
    """
    result = list(documents)
    lengths = [beginning(document, writing.prompt_tokens) for document in documents]
    rooms = {i: len(d.ids) - n for i, (d, n) in enumerate(zip(documents, lengths, strict=True)) if n < len(d.ids)}
    waiting = sorted(rooms, key=lambda i: (-rooms[i], i))
    generator = torch.Generator(model.device).manual_seed(seed)
    for first in range(0, len(waiting), WRITTEN_AT_ONCE):
        group = waiting[first : first + WRITTEN_AT_ONCE]
        prompts = [documents[i].ids[: lengths[i]] for i in group]
        answers = write(model, prompts, [rooms[i] for i in group], writing.temperature, generator, drafter)
        for i, prompt, answer in zip(group, prompts, answers, strict=True):
            ids = torch.cat([prompt, answer])
            result[i] = Document(ids, torch.arange(len(ids)) >= len(prompt))
    return result


def beginning(document: Document, prompt_tokens: int) -> int:
    """Tokens of a document that are kept; all of them where nothing is to be written."""
    supervised = document.supervised.nonzero()
    if not len(supervised):
        return len(document.ids)
    first = int(supervised[0])
    is_plain = first <= 1  # a first token cannot be predicted
    return max(min(prompt_tokens, len(document.ids) // 2), 1) if is_plain else first


def write(
    model: PreTrainedModel,
    prompts: list[Tensor],
    rooms: list[int],
    temperature: float,
    generator: torch.Generator,
    drafter: Drafter | None,
) -> list[Tensor]:
    """The continuation of each prompt: at most `rooms[i]` tokens, up to and including an end of text."""
    longest = max(map(len, prompts))
    positions = Target(model).max_positions
    tokens = max(rooms) if positions is None else min(max(rooms), positions - longest)
    if tokens < 1:
        raise BadRecipe(
            f"a beginning of {longest} tokens leaves {type(model).__name__} no position to write in (it has "
            f"{positions}); use a smaller row_length or prompt_tokens"
        )
    ends = _ends_of_text(model)
    pad = ends[0] if ends else 0
    ids = torch.full((len(prompts), longest), pad)
    live = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        live[row, longest - len(prompt) :] = 1
    settings: dict[str, Any] = {
        "do_sample": temperature > 0, "max_new_tokens": tokens, "pad_token_id": pad, "repetition_penalty": 1.0,
    }  # fmt: skip
    if temperature > 0:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    written = generate(
        model, ids.to(model.device), attention_mask=live.to(model.device), drafter=drafter, generator=generator,
        eos_token_id=ends or None, **settings,
    )  # fmt: skip
    assert isinstance(written, Tensor)
    answers = written[:, longest:].cpu().clone()
    return [_up_to_end(answer[:room], ends) for answer, room in zip(answers, rooms, strict=True)]


def _ends_of_text(model: PreTrainedModel) -> list[int]:
    config: Any = model.generation_config
    end = None if config is None else config.eos_token_id
    if end is None:
        end = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    return [] if end is None else [int(e) for e in (end if isinstance(end, list | tuple) else [end])]


def _up_to_end(answer: Tensor, ends: list[int]) -> Tensor:
    stops = torch.isin(answer, torch.tensor(ends, dtype=answer.dtype)).nonzero()
    return answer[: int(stops[0]) + 1] if len(stops) else answer


def _laid_out(texts: list[list[Document]], numbers: list[int], order: Order) -> TrainBatch:
    documents = [(document.ids, document.supervised) for row in texts for document in row]
    rows: list[Row] = []
    for row in texts:
        first = sum(map(len, rows))
        rows.append(tuple(Piece(first + i, 0, len(document.ids)) for i, document in enumerate(row)))
    return TrainBatch.of_rows(MemoryData(documents), rows, numbers, order.row_length, order.seed)
