"""What the head does for its own user's commands, and for nobody else who may chat."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from potluck.api.api_key import SECRET_HEADER
from potluck.api.server import create_app
from potluck.head import routes
from potluck.head.models.search import FileHolder, FileHolders, RemoteModelEntry, RemoteModelList
from tests.support.api.scripted_engine import ScriptedEngine
from tests.support.api.server import MODEL, Server
from transport.errors import BadRequest

SECRET = "of-this-head"


class _Head:
    """Keeps what it was made to do."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def report(self) -> Any:
        return {"model": MODEL}

    def request_replan(self) -> None:
        self.done.append("replan")

    def invite(self) -> tuple[str, str]:
        self.done.append("invite")
        return "potluck://192.0.2.1:11501?made-up", "ABCD-EFGH"

    def decide_candidate(self, name: str, allow: bool) -> str:
        if name != "mac":
            raise BadRequest(f"no device called {name} waits to be let in")
        self.done.append((name, allow))
        return name

    def find_file(self, sha256: str) -> FileHolders:
        self.done.append(sha256)
        return FileHolders(holders=[FileHolder(name="mac", endpoint="tcp://192.0.2.2:5", key="k", num_bytes=7)])

    def list_models(self) -> RemoteModelList:
        self.done.append("models")
        return RemoteModelList(models=[RemoteModelEntry(host="mac", name="m", source="", bytes=7)])


class _AnyKey:
    def is_right(self, presented: bytes) -> bool:
        return True


@pytest.fixture
def head() -> _Head:
    return _Head()


@pytest.fixture(params=["without a key", "with a key"])
def server(request: pytest.FixtureRequest, head: _Head) -> Iterator[Server]:
    app = create_app(ScriptedEngine(), model=MODEL)
    app.router.routes.extend(routes.head_routes(head, SECRET))
    opened = Server(app, key=_AnyKey() if request.param == "with a key" else None)
    yield opened
    opened.close()


def _post(server: Server, path: str, secret: str | None, body: Any = None) -> httpx.Response:
    headers = {"Authorization": "Bearer sk-potluck-of-a-friend"} | ({} if secret is None else {SECRET_HEADER: secret})
    url = f"http://127.0.0.1:{server.port}/potluck/{path}"
    return httpx.post(url, json={} if body is None else body, headers=headers, timeout=60.0, trust_env=False)


def _get_models(server: Server, secret: str) -> httpx.Response:
    headers = {"Authorization": "Bearer sk-potluck-of-a-friend", SECRET_HEADER: secret}
    url = f"http://127.0.0.1:{server.port}/potluck/models"
    return httpx.get(url, headers=headers, timeout=60.0, trust_env=False)


def test_commands_of_the_heads_user_are_obeyed(server: Server, head: _Head) -> None:
    assert _post(server, "replan", SECRET).json() == {"better_plan": None}
    assert _post(server, "invite", SECRET).json()["code"] == "ABCD-EFGH"
    assert _post(server, "approve", SECRET, {"name": "mac", "allow": True}).json() == {"name": "mac"}
    holders = _post(server, "files", SECRET, {"sha256": "ab"}).json()["holders"]
    assert holders == [{"name": "mac", "endpoint": "tcp://192.0.2.2:5", "key": "k", "num_bytes": 7}]
    models = _get_models(server, SECRET).json()["models"]
    assert models == [{"host": "mac", "name": "m", "source": "", "bytes": 7}]
    assert head.done == ["replan", "invite", ("mac", True), "ab", "models"]


@pytest.mark.parametrize("secret", [None, "", "of-this-hea", "of-this-head1", "sk-potluck-of-a-friend", "é"])
def test_who_may_only_chat_decides_nothing(server: Server, head: _Head, secret: str | None) -> None:
    asked = {"name": "mac", "allow": True}
    for path, body in (
        ("replan", {}),
        ("invite", {}),
        ("approve", asked),
        ("approve", [1]),
        ("files", {"sha256": "a"}),
    ):
        refused = _post(server, path, None if secret is None else secret.encode("latin-1"), body)  # type: ignore[arg-type]
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "not_allowed"
    assert _get_models(server, "of-this-hea").status_code == 403
    assert head.done == []
    status = httpx.get(f"http://127.0.0.1:{server.port}/potluck/status", timeout=60.0, trust_env=False)
    assert status.json() == {"model": MODEL}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "mac"},
        {"name": 1, "allow": True},
        {"name": "mac", "allow": True, "x": 1},
        {"name": "pc", "allow": True},
    ],
)
def test_an_answer_that_says_nothing_is_told(server: Server, head: _Head, body: Any) -> None:
    refused = _post(server, "approve", SECRET, body)
    assert refused.status_code == 400 and head.done == []
    assert _post(server, "approve", SECRET, "x" * 5000).status_code == 413


def test_a_body_that_does_not_come_ends(
    server: Server, head: _Head, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(routes, "_BODY_TIMEOUT_S", 0.2)
    begin = (
        f"POST /potluck/approve HTTP/1.1\r\nHost: localhost\r\n{SECRET_HEADER}: {SECRET}\r\n"
        'Content-Type: application/json\r\nContent-Length: 40\r\n\r\n{"name"'
    ).encode()
    for is_waiting in (True, False):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60.0) as connection:
            connection.sendall(begin)
            assert not is_waiting or b" 408 " in connection.recv(4096)
    assert _post(server, "replan", SECRET).status_code == 200
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
