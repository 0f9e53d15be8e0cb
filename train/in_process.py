"""The target answers in this process: left-padded batches through our own generate, with a drafter."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.api import generate
from specdec.drafters.load import load_drafter
from specdec.errors import BadData
from specdec.probe import target_of
from specdec.train.answerer import Answer, Failure, Request
from specdec.train.chat_template import ChatTemplate

BATCHES_AHEAD = 8
"""Requests held back for each place in a batch, so that batches of about equal lengths can be made."""

THINKING_ENDS = "</think>"


class InProcessAnswerer:
    """Answers with a model in this process.

    Args:
        model: the target.
        tokenizer: the target's.
        drafter: specification of what proposes; it keeps what it has seen from batch to batch. None for none.
        template: of conversations.
        batch_size: requests generated together; those of one batch share a temperature.
        max_new_tokens: cap of each answer.
        prompt_tokens: of a text, continue so many tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        drafter: str | None = "suffix",
        template: ChatTemplate | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 1024,
        prompt_tokens: int = 64,
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.drafter = load_drafter(drafter, model)
        self.batch_size, self.max_new_tokens, self.prompt_tokens = batch_size, max_new_tokens, prompt_tokens
        self._held: list[tuple[Request, list[int]]] = []
        self._failed: list[tuple[Request, Answer | Failure]] = []

    @property
    def room(self) -> int:
        """How many more requests it takes now."""
        return self.batch_size * BATCHES_AHEAD - len(self._held)

    @property
    def waiting(self) -> int:
        """Requests without an outcome."""
        return len(self._held) + len(self._failed)

    def submit(self, request: Request) -> None:
        """Tokenize a request and hold it until a batch is made."""
        try:
            ids = self._ids(request)
        except BadData as error:
            self._refuse(request, str(error))
            return
        limit = target_of(self.model).max_positions
        if not ids:
            self._refuse(request, "the prompt has no tokens")
        elif limit is not None and len(ids) >= limit:
            self._refuse(request, f"the prompt has {len(ids)} tokens, the target takes {limit}")
        else:
            self._held.append((request, ids))

    def _refuse(self, request: Request, reason: str) -> None:
        self._failed.append((request, Failure(reason, of_prompt=True)))

    def wait(self) -> list[tuple[Request, Answer | Failure]]:
        """Outcomes of one batch: requests of the oldest one's temperature, the longest prompts first."""
        if self._failed:
            failed, self._failed = self._failed, []
            return failed
        temperature = self._held[0][0].temperature
        alike = [pair for pair in self._held if pair[0].temperature == temperature]
        batch = sorted(alike, key=lambda pair: -len(pair[1]))[: self.batch_size]
        chosen = {id(request) for request, _ in batch}
        self._held = [pair for pair in self._held if id(pair[0]) not in chosen]
        rows = self._generated([ids for _, ids in batch], temperature, batch[0][0].seed)
        return [(request, self._answer(request, ids, new)) for (request, ids), new in zip(batch, rows, strict=True)]

    def _ids(self, request: Request) -> list[int]:
        if request.text is not None:
            return list(self.tokenizer(request.text)["input_ids"])[: self.prompt_tokens]
        if self.template is None:
            self.template = ChatTemplate(self.tokenizer)
        text = self.template.render(request.messages, request.tools, ask=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _generated(self, prompts: list[list[int]], temperature: float, seed: int) -> list[list[int]]:
        """New tokens of each prompt, up to and including the end-of-text token, or up to its own cap.

        A batch has the room of its longest prompt; where that is less than others have, these are gone on with.
        """
        ends, _ = self._special_tokens()
        drawn: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            drawn |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
            drawn["generator"] = torch.Generator(self.model.device).manual_seed(seed)
        caps = [self._cap(prompt) for prompt in prompts]
        rows: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        while going:
            room = min(caps[row] - len(rows[row]) for row in going)
            continued = self._continued([prompts[row] + rows[row] for row in going], room, drawn)
            for row, new in zip(going, continued, strict=True):
                rows[row] += _until_end(new, ends)
            going = [row for row in going if rows[row][-1] not in ends and len(rows[row]) < caps[row]]
        return rows

    def _cap(self, prompt: list[int]) -> int:
        limit = target_of(self.model).max_positions
        return self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - len(prompt))

    def _continued(self, prompts: list[list[int]], room: int, drawn: dict[str, Any]) -> list[list[int]]:
        """So many new tokens of each prompt; whatever stands behind an end-of-text token is padding."""
        _, pad = self._special_tokens()
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = generate(
            self.model,
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            drafter=self.drafter,
            max_new_tokens=room,
            pad_token_id=pad,
            **drawn,
        )
        return cast(torch.Tensor, output)[:, width:].tolist()

    def _special_tokens(self) -> tuple[set[int], int]:
        config = self.model.generation_config
        given = config.eos_token_id
        ends = set(given) if isinstance(given, list) else set() if given is None else {int(given)}
        return ends, config.pad_token_id if config.pad_token_id is not None else next(iter(sorted(ends)), 0)

    def _answer(self, request: Request, prompt: list[int], new: list[int]) -> Answer | Failure:
        ends, _ = self._special_tokens()
        finished = new[-1] in ends
        text = str(self.tokenizer.decode(new[:-1] if finished else new, skip_special_tokens=True))
        content, reasoning = (text, None) if request.text is not None else split_reasoning(text)
        if not content and reasoning is None:
            return Failure("the answer is empty", of_prompt=True)
        started = None if request.text is None else str(self.tokenizer.decode(prompt, skip_special_tokens=True))
        return Answer(content, "stop" if finished else "length", reasoning, started, tuple(prompt), tuple(new))


def split_reasoning(text: str) -> tuple[str, str | None]:
    """Content, and what was thought before it, where the thinking's end is marked."""
    thought, marked, content = text.partition(THINKING_ENDS)
    if not marked:
        return text, None
    return content.lstrip("\n"), thought.partition("<think>")[2].strip("\n") or thought.strip("\n")


def _until_end(row: list[int], ends: set[int]) -> list[int]:
    stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
    return row[:stop]
