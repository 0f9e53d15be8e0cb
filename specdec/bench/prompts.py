"""From turns to what the target reads: text and token ids, through a chat template or as raw text.

    auto     the tokenizer's own chat template; raw for a tokenizer without one, which is how base models come
    raw      the text itself; an answer follows its turn directly, as the model wrote it, and a blank line
             stands before the next turn
    FILE     a Jinja chat template in a file, instead of the tokenizer's
    {{...}}  a Jinja chat template given directly

A template's text already holds the special tokens it wants. Tokenizing it with special tokens added, as is right for
raw text, begins it with two BOS, and the target quietly gets worse. So ids are made without any, and a BOS is put
in front only where the tokenizer begins a text with one and the template did not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from specdec.errors import SpecdecError

Message = Mapping[str, str]
"""`role`, one of system, user and assistant, and `content`."""

TODAY = datetime(2025, 1, 1)
"""What templates that print the date are told, so that a prompt is the same tomorrow."""

BETWEEN_TURNS = "\n\n"


@dataclass(frozen=True)
class Prompt:
    """What was sent.

    Attributes:
        text: before tokenizing.
        input_ids: exactly what the target reads, any BOS included.
        kind: "chat" for a template, else "raw".
    """

    text: str
    input_ids: list[int]
    kind: Literal["chat", "raw"]


class PromptBuilder:
    """Builds prompts in one way for a whole run.

    Args:
        tokenizer: the target's.
        template: "auto", "raw", the path of a Jinja file, or Jinja itself.
        system: a message put before the first turn; None leaves that to the template.
        variables: further names for the template, such as {"enable_thinking": False}.

    Raises:
        SpecdecError: no such file, no template in it, or variables for raw text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "auto",
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.system, self.variables = tokenizer, system, dict(variables or {})
        self.template = _template(tokenizer, template)
        self.kind: Literal["chat", "raw"] = "raw" if self.template is None else "chat"
        if self.variables and self.template is None:
            raise SpecdecError(f"template variables {sorted(self.variables)} without a template: prompts are raw text")
        self._bos = _bos_of(tokenizer)

    @property
    def template_sha256(self) -> str | None:
        """Of the template's text; None for raw prompts."""
        return None if self.template is None else hashlib.sha256(self.template.encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """Everything that decides how turns become prompts, for a manifest."""
        return {
            "kind": self.kind,
            "template": self.template,
            "template_sha256": self.template_sha256,
            "template_date": None if self.template is None else TODAY.date().isoformat(),
            "variables": self.variables,
            "system": self.system,
        }

    def build(self, history: Sequence[Message]) -> Prompt:
        """The prompt that asks for the answer to the last turn.

        Args:
            history: messages with `role` and `content`: user and assistant in turn, the last one the user's.

        Raises:
            SpecdecError: the messages are in another order, the template refuses them, or nothing is left to send.
        """
        messages = self._messages(history)
        text = _raw_text(messages) if self.template is None else self._rendered(messages)
        ids = self._ids(text)
        if not ids:
            raise SpecdecError("the prompt has no tokens in this tokenizer; check the template and the question")
        return Prompt(text, ids, self.kind)

    def _messages(self, history: Sequence[Message]) -> list[dict[str, str]]:
        messages = [{"role": message["role"], "content": message["content"]} for message in history]
        if self.system is not None and (not messages or messages[0]["role"] != "system"):
            messages.insert(0, {"role": "system", "content": self.system})
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        expected = [("user", "assistant")[place % 2] for place in range(len(turns))]
        if turns != expected or not len(turns) % 2:
            raise SpecdecError(f"messages of the roles {turns}; expected user and assistant in turn, a user's last")
        return messages

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        assert self.template is not None
        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages,
                chat_template=_with_fixed_date(self.template),
                tokenize=False,
                add_generation_prompt=True,
                **self.variables,
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise SpecdecError(f"the chat template refuses a prompt: {reason}; choose another --template") from error
        return text

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=self.template is None)["input_ids"])
        if self._bos is None:
            return ids
        while ids[:2] == [self._bos, self._bos]:  # raw text that spells out the BOS which the tokenizer adds
            del ids[0]
        return ids if ids[:1] == [self._bos] else [self._bos, *ids]


def _template(tokenizer: PreTrainedTokenizerBase, wanted: str) -> str | None:
    """The template's text, None for raw prompts."""
    if wanted == "raw" or (wanted == "auto" and not tokenizer.chat_template):
        return None
    if wanted == "auto":
        try:
            return tokenizer.get_chat_template()
        except ValueError as error:
            names = ", ".join(sorted(tokenizer.chat_template))
            raise SpecdecError(
                f"the tokenizer has the chat templates {names} and no default; give --template"
            ) from error
    if "{{" in wanted or "{%" in wanted:
        return wanted
    return _template_in(Path(wanted).expanduser())


def _template_in(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecdecError(f"no template file {path}; give auto, raw, a path, or Jinja with {{{{ }}}} in it") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null character in the path
        raise SpecdecError(f"cannot read the template {str(path)!r}: {error}") from error
    if "{{" not in text and "{%" not in text:
        raise SpecdecError(
            f"{path} is no Jinja template: it has neither {{{{ }}}} nor {{% %}}, so no turn would be in it"
        )
    return text


def _with_fixed_date(template: str) -> str:
    """Calls of transformers' strftime_now(format) replaced by the text they give for TODAY."""
    call = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
    return re.sub(call, lambda found: f'"{TODAY.strftime(found[2])}"', template)


def _raw_text(messages: Sequence[Message]) -> str:
    """System text and turns with a blank line between; each answer directly behind its turn."""
    between = {"system": BETWEEN_TURNS, "user": "", "assistant": BETWEEN_TURNS}
    *earlier, last = messages
    return "".join(message["content"] + between[message["role"]] for message in earlier) + last["content"]


def _bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS that this tokenizer begins a text with, None when it begins with none."""
    plain, special = (list(tokenizer("a", add_special_tokens=wanted)["input_ids"]) for wanted in (False, True))
    bos = tokenizer.bos_token_id
    return bos if isinstance(bos, int) and special[:1] == [bos] and plain[:1] != [bos] else None
