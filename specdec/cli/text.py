"""Text in and out: prompts from an option, a file or stdin, and generated tokens as text while they arrive."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdec.errors import SpecdecError

CONTEXT = 6
"""Earlier tokens decoded along with new ones: some tokenizers write a word differently at the start of a text."""


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt from exactly one of --prompt, --prompt-file and stdin, without the newline that ends a file.

    Raises:
        typer.BadParameter: none or two of them, or an empty --prompt.
        SpecdecError: a file without text.
    """
    if text is not None and file is not None:
        raise typer.BadParameter("give either --prompt or --prompt-file, not both")
    if text is not None:
        if not text:
            raise typer.BadParameter("the prompt is empty; give at least one word", param_hint="--prompt")
        return text
    if file is None and sys.stdin.isatty():
        raise typer.BadParameter("no prompt: give --prompt TEXT, --prompt-file FILE, or pipe text into stdin")
    where = "stdin" if file is None else str(file)
    try:
        read = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecdecError(f"the prompt in {where} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not read.strip():
        raise SpecdecError(f"the prompt in {where} is empty; it needs at least one word")
    return read.removesuffix("\n")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool | None) -> Tensor:
    """Token ids [1, S] of a prompt.

    Args:
        tokenizer: the target's.
        prompt: text, or one user message for a chat template.
        chat: use the tokenizer's chat template; None when it has one.

    Raises:
        SpecdecError: no template, or no tokens.
    """
    if chat and not tokenizer.chat_template:
        raise SpecdecError("this tokenizer has no chat template; leave out --chat")
    if tokenizer.chat_template and chat is not False:
        messages = [{"role": "user", "content": prompt}]
        text: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise SpecdecError("the prompt has no tokens in this tokenizer; give a longer one")
    return torch.tensor([ids])


class TextStream:
    """A streamer for `generate` that hands on text as soon as its characters are complete.

    Args:
        tokenizer: the target's.
        write: gets each piece of new text, one per token; empty while a character is incomplete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self._ids: list[int] | None = None
        self._window = self._written = 0

    def put(self, value: Tensor) -> None:
        """The prompt [1, S] first, then one token at a time."""
        if self._ids is None:
            self._ids = value.reshape(-1).tolist()[-CONTEXT:]
            self._written = len(self._ids)
            return
        self._ids += value.reshape(-1).tolist()
        piece = self._new_text()
        if piece.endswith("\ufffd"):
            self.write("")
            return
        self._window, self._written = self._written, len(self._ids)
        self.write(piece)

    def end(self) -> None:
        """Write what is left, incomplete or not."""
        if self._ids is not None and self._written < len(self._ids):
            self.write(self._new_text())

    def _new_text(self) -> str:
        assert self._ids is not None
        before = self.tokenizer.decode(self._ids[self._window : self._written], skip_special_tokens=True)
        after = self.tokenizer.decode(self._ids[self._window :], skip_special_tokens=True)
        return str(after)[len(before) :]


def text_pieces(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> list[str]:
    """The new tokens' text, one piece for each token, as it reads after the prompt."""
    pieces: list[str] = []
    stream = TextStream(tokenizer, pieces.append)
    stream.put(torch.tensor(prompt))
    for token in new:
        stream.put(torch.tensor([token]))
    stream.end()
    if new:  # characters that never became complete belong to the last token
        pieces[len(new) - 1 :] = ["".join(pieces[len(new) - 1 :])]
    return pieces
