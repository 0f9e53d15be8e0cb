"""A small OpenAI-compatible server that fails on request; also runnable, so that clients can be killed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Behaviour:
    """What the server does, and what it saw.

    Attributes:
        failures: (status, headers) of the first requests, one each; status 0 drops the connection, 1 sends no JSON.
        pause: seconds before each answer.
        finish: finish_reason of answers.
        requests: paths and bodies, in order of arrival; `times` are theirs.
        together: the most requests at the same time.
    """

    failures: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    pause: float = 0.0
    finish: str | None = "stop"
    message: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    together: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, dict[str, str]] | None:
        with self._lock:
            self.requests.append((path, body, headers))
            self.times.append(time.monotonic())
            self._now += 1
            self.together = max(self.together, self._now)
            return self.failures.pop(0) if self.failures else None

    def leave(self) -> None:
        with self._lock:
            self._now -= 1


def reply(behaviour: Behaviour, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Answers with the number of messages and the last one's text."""
    if path.endswith("/chat/completions"):
        messages = body["messages"]
        message = {"role": "assistant", "content": f"{len(messages)}: {messages[-1]['content']}", **behaviour.message}
        return {"choices": [{"message": message, "finish_reason": behaviour.finish}]}
    return {"choices": [{"text": f" and on from {body['prompt'][-5:]}", "finish_reason": behaviour.finish}]}


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[str]:
    """The address of a server in a thread."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            failure = behaviour.enter(self.path, body, dict(self.headers))
            try:
                time.sleep(behaviour.pause)
                self._respond(failure, body)
            except ConnectionError:  # whoever asked was killed
                self.close_connection = True
            finally:
                behaviour.leave()

        def _respond(self, failure: tuple[int, dict[str, str]] | None, body: dict[str, Any]) -> None:
            if failure is not None and failure[0] == 0:
                self.close_connection = True
                return
            status, headers = failure or (200, {})
            data = json.dumps(reply(behaviour, self.path, body)).encode() if failure is None else b"it went wrong"
            self.send_response(200 if status == 1 else status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
