"""Publishing: the real client of the hub against a server on this machine that speaks its protocol."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from specdec.errors import BadRecipe, SpecdecError
from specdec.train.publish import check_push, push_to_hub


class Hub(ThreadingHTTPServer):
    """Keeps repositories in memory; the token is "secret"."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    """Of the hub's HTTP interface, what making a repository and one commit need."""

    server: Hub  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Every request that changes something."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer secret":
            self.answer(401, {"error": "who are you?"})
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self.answer(200, {"url": f"{self.server.address}/somebody/drafter"})
        elif self.path == "/api/models/somebody/drafter/preupload/main":
            files = json.loads(body)["files"]
            self.answer(
                200,
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]},
            )
        elif self.path == "/api/models/somebody/drafter/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                200,
                {
                    "success": True,
                    "commitOid": "0" * 40,
                    "commitUrl": f"{self.server.address}/somebody/drafter/commit/0",
                },
            )
        else:
            self.answer(404, {"error": self.path})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        """JSON."""
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    """OUT/drafter: a link to a checkpoint's drafter."""
    (tmp_path / "step-000003" / "drafter").mkdir(parents=True)
    (tmp_path / "step-000003" / "drafter" / "drafter.json").write_text('{"kind": "medusa"}')
    (tmp_path / "step-000003" / "drafter" / "model.safetensors").write_bytes(b"\0\1\2")
    (tmp_path / "drafter").symlink_to("step-000003/drafter")
    return tmp_path / "drafter"


def test_a_drafter_arrives_whole_in_a_private_repository(hub: Hub, drafter: Path) -> None:
    assert push_to_hub(drafter, "somebody/drafter") == f"{hub.address}/somebody/drafter"
    assert hub.files == {"drafter.json": b'{"kind": "medusa"}', "model.safetensors": b"\0\1\2"}
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("drafter", "somebody")
    assert made.get("private") is True or made.get("visibility") == "private"


def test_a_wrong_token_is_one_line_and_the_drafter_stays(
    hub: Hub, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "guess")
    with pytest.raises(
        SpecdecError, match=r"drafter is finished but could not be pushed to somebody/drafter: .*401"
    ) as e:
        push_to_hub(drafter, "somebody/drafter")
    assert "\n" not in str(e.value)
    assert (drafter / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("some body/drafter", "secret", "'some body/drafter' is no name on the hub"),
        ("drafter", "secret", "OWNER/NAME, got 'drafter'"),
        ("somebody/drafter", None, "needs a token"),
    ],
)
def test_what_could_not_be_pushed_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, name: str, token: str | None, words: str
) -> None:
    monkeypatch.setattr("specdec.train.publish.get_token", lambda: token)
    with pytest.raises(BadRecipe, match=re.escape(words)):
        check_push(name)


def test_a_name_and_a_token_are_enough_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.train.publish.get_token", lambda: "secret")
    check_push("somebody/drafter")
