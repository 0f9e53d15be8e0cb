"""The target answers behind an OpenAI-compatible endpoint: a vLLM or SGLang server, `transformers serve`, ...

Requests run in threads. Busy and broken servers are asked again, later and later, or when they say so themselves
(`Retry-After`); what no repetition can mend ends the run at once.
"""

from __future__ import annotations

import http.client
import json
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any

from specdec.errors import SpecdecError
from specdec.train.answerer import Answer, Failure, Finish, Request
from specdec.train.chat_template import HALF, is_readable
from specdec.train.in_process import split_reasoning
from specdec.train.source import shown

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
"""Answers of a server that has something better to say later."""

NEVER = (401, 403, 404, 405)
"""Answers that are the same for every prompt: a wrong key, a wrong model, a wrong address."""

REFUSED = (400, 413, 422)
"""Answers that are about this prompt alone, such as one that is too long."""

ENDS: dict[str, Finish] = {"stop": "stop", "tool_calls": "stop", "length": "length"}
"""What `finish_reason` says of an answer that can be used."""

BROKEN_OFF = (None, "abort", "error")
"""What it says of one that the server did not go through with."""

CHARACTERS_PER_TOKEN = 4
"""Without the tokenizer, the beginning of a text is cut by characters."""


@dataclass(frozen=True)
class Patience:
    """How long to go on with one request.

    Attributes:
        retries: after the first try.
        timeout: seconds without a byte from the server.
        backoff: seconds before the first repetition; doubled each time, with a random part.
        longest: seconds between two tries at most, whatever the server says.
    """

    retries: int = 6
    timeout: float = 600.0
    backoff: float = 1.0
    longest: float = 120.0


class _Hopeless(Exception):
    """No request can succeed."""


class _BrokenOff(Exception):
    """An answer without an end, which may have one the next time."""


class EndpointAnswerer:
    """Answers through an endpoint.

    Args:
        url: up to and including the version, such as http://localhost:8000/v1.
        model: its name there.
        key: sent as bearer token, when there is one.
        concurrency: requests at the same time.
        max_new_tokens: cap of each answer.
        prompt_tokens: of a text, continue about so many tokens.
        patience: with servers that fail.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        concurrency: int = 16,
        max_new_tokens: int = 1024,
        prompt_tokens: int = 64,
        patience: Patience | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise SpecdecError(f"the endpoint is {url!r}; expected an address such as http://localhost:8000/v1")
        self.url, self.model, self.key = url.rstrip("/"), model, key
        self.concurrency, self.max_new_tokens, self.prompt_tokens = concurrency, max_new_tokens, prompt_tokens
        self.patience = patience or Patience()
        self.waiting = 0
        self._asked: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[tuple[Request, Answer | Failure | _Hopeless]] = queue.SimpleQueue()
        self._closed = threading.Event()
        for _ in range(concurrency):
            threading.Thread(target=self._work, daemon=True).start()  # nobody waits for a silent server at the end

    @property
    def room(self) -> int:
        """How many more requests it takes now."""
        return self.concurrency - self.waiting

    def submit(self, request: Request) -> None:
        """Send a request."""
        self.waiting += 1
        self._asked.put(request)

    def wait(self) -> list[tuple[Request, Answer | Failure]]:
        """The next outcome.

        Raises:
            SpecdecError: no request can succeed.
        """
        request, outcome = self._outcomes.get()
        self.waiting -= 1
        if isinstance(outcome, _Hopeless):
            raise SpecdecError(f"{self.url} cannot answer: {outcome}")
        return [(request, outcome)]

    def __enter__(self) -> EndpointAnswerer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        for _ in range(self.concurrency):
            self._asked.put(None)

    def _work(self) -> None:
        while (request := self._asked.get()) is not None and not self._closed.is_set():
            try:
                outcome: Answer | Failure | _Hopeless = self._ask(request)
            except _Hopeless as error:
                outcome = error
            except Exception as error:  # a thread that dies would leave its request without an outcome
                outcome = Failure(f"unexpected {type(error).__name__}: {shown(str(error))}")
            self._outcomes.put((request, outcome))

    def _ask(self, request: Request) -> Answer | Failure:
        """One request with all its repetitions."""
        reason = "closed"
        for attempt in range(self.patience.retries + 1):
            pause: float | None = None
            try:
                return self._answer(request, self._post(request))
            except urllib.error.HTTPError as error:
                body = _excerpt(error)
                reason = f"HTTP {error.code}: {body}"
                if error.code in NEVER:
                    raise _Hopeless(reason) from error
                if error.code not in AGAIN:
                    return Failure(reason, of_prompt=error.code in REFUSED)
                pause = _retry_after(error.headers.get("Retry-After"))
            except _BrokenOff as error:
                reason = str(error)
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"{type(error).__name__}: {shown(str(error))}"
            if attempt < self.patience.retries and self._closed.wait(self._pause(request, attempt, pause)):
                break
        return Failure(f"no answer after {self.patience.retries + 1} tries; the last: {reason}")

    def _pause(self, request: Request, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, self.patience.longest)
        chance = random.Random(f"{request.key}/{request.turn}/{attempt}").uniform(0.5, 1.5)
        return min(self.patience.backoff * 2**attempt * chance, self.patience.longest)

    def _post(self, request: Request) -> Any:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_new_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        if request.text is None:
            path, body["messages"] = "chat/completions", list(request.messages)
            body |= {"tools": list(request.tools)} if request.tools else {}
        else:
            path, body["prompt"] = "completions", self._beginning(request.text)
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        sent = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), headers, method="POST")
        with urllib.request.urlopen(sent, timeout=self.patience.timeout) as response:
            return json.load(response)

    def _answer(self, request: Request, reply: Any) -> Answer | Failure:
        """What a reply says.

        Raises:
            _BrokenOff: the server did not go through with it.
        """
        choice = reply["choices"][0]
        word = choice.get("finish_reason")
        if word in BROKEN_OFF:
            raise _BrokenOff(f"the answer broke off: its finish_reason is {word!r}")
        if word not in ENDS:  # filtered, or a word that nobody knows: the text and its end may not be the target's
            return Failure(f"the answer's finish_reason is {shown(word)}, expected stop or length", of_prompt=True)
        if request.text is not None:
            return _usable(Answer(choice["text"], ENDS[word], prompt=self._beginning(request.text)))
        message = choice["message"]
        if message.get("tool_calls"):
            return Failure("the target called a tool, and nobody is there to answer the call", of_prompt=True)
        content, reasoning = split_reasoning(message.get("content") or "")
        reasoning = message.get("reasoning_content") or message.get("reasoning") or reasoning
        return _usable(Answer(content, ENDS[word], reasoning))

    def _beginning(self, text: str) -> str:
        """About `prompt_tokens` tokens, ending with a whole word."""
        start = text[: self.prompt_tokens * CHARACTERS_PER_TOKEN]
        if len(start) == len(text):
            return text
        space = max(start.rfind(" "), start.rfind("\n"))
        return start[:space] if space > 0 else start


def _usable(answer: Answer) -> Answer | Failure:
    if not answer.content and not answer.reasoning:
        return Failure("the answer is empty", of_prompt=True)
    if not is_readable(f"{answer.content}{answer.reasoning or ''}"):
        return Failure(f"the answer holds {HALF}", of_prompt=True)
    return answer


def _excerpt(error: urllib.error.HTTPError) -> str:
    try:
        return shown(error.read(2000).decode(errors="replace"))
    except (OSError, http.client.HTTPException):
        return shown(error.reason)


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or from a date."""
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        try:
            return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
        except (TypeError, ValueError):
            return None
