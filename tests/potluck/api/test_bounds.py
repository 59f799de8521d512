"""What the endpoint does with more than it can hold, and for clients that do not do their part."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from potluck.api.limits import ConcurrencyLimit
from potluck.api.server import create_app
from tests.support.api.scripted_engine import ScriptedEngine
from tests.support.api.server import MODEL, Server, eventually
from transport.messages.requests import Accepted, EngineEvent, Submit


def _body(content: str, **fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def test_answers_beyond_the_bound_are_asked_to_come_again() -> None:
    engine = ScriptedEngine()
    app = ConcurrencyLimit(create_app(engine, model=MODEL), limit=2)

    async def main() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            engine.delay_s = 30.0
            held = [
                asyncio.create_task(client.post("/v1/chat/completions", json=_body("forever", stream=stream)))
                for stream in (False, True)
            ]
            while engine.num_running < 2:
                await asyncio.sleep(0.01)
            engine.delay_s = 0.0
            refused = await client.post("/v1/chat/completions", json=_body("hi"))
            assert refused.status_code == 429 and refused.headers["retry-after"] == "2"
            assert "2 requests are open already" in refused.json()["error"]["message"]
            assert (await client.get("/health")).status_code == 200
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)
            assert (await client.post("/v1/chat/completions", json=_body("hi"))).status_code == 200

    asyncio.run(main())


def test_bodies_that_are_still_coming_take_no_place() -> None:
    server = Server(ConcurrencyLimit(create_app(ScriptedEngine(), model=MODEL), limit=1))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                slow = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60.0))
                slow.sendall(head + b"Content-Length: 1000\r\n\r\n{")
            for _ in range(3):
                asked = httpx.post(
                    f"{server.base_url}/chat/completions", json=_body("hi"), timeout=60.0, trust_env=False
                )
                assert asked.status_code == 200
    finally:
        server.close()


def test_an_answer_that_fails_leaves_its_place() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("a bug")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def main() -> None:
        app = ConcurrencyLimit(broken, limit=1)
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        for _ in range(2):
            with pytest.raises(RuntimeError):
                await app(scope, None, send)  # type: ignore[arg-type]

    asyncio.run(main())
    assert sent == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_shows_nothing_of_a_prompt(caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    class Broken(ScriptedEngine):
        async def submit(self, submit: Submit) -> AsyncIterator[EngineEvent]:
            yield Accepted(submit.request, 7)
            raise ValueError(f"no room for {submit.messages}") from KeyError(str(submit.messages))

    server = Server(create_app(Broken(), model=MODEL))
    received = ""
    try:
        asked: dict[str, Any] = {"json": _body("xylophone", stream=stream), "timeout": 60.0, "trust_env": False}
        with httpx.stream("POST", f"{server.base_url}/chat/completions", **asked) as answer:
            # It ends in the middle.
            with contextlib.suppress(httpx.RemoteProtocolError):
                for piece in answer.iter_text():
                    received += piece
            assert answer.status_code == (200 if stream else 500)
    finally:
        server.close()
    assert "xylophone" not in received and "[DONE]" not in received
    assert "ValueError" in caplog.text and "KeyError" in caplog.text and "chat.py" in caplog.text
    assert "xylophone" not in caplog.text


def test_a_client_that_stops_reading_slows_nobody_and_is_dropped(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("potluck.api.streaming._KEEPALIVE_S", 0.1)
    monkeypatch.setattr("potluck.api.streaming._SEND_TIMEOUT_S", 0.5)
    with _lazy_client(server, "forever"):
        eventually(lambda: server.engine.num_running == 1)
        for number in range(5):
            url, body = f"{server.base_url}/chat/completions", _body(f"word{number}")
            answer = httpx.post(url, json=body, timeout=60.0, trust_env=False)
            assert answer.status_code == 200
        eventually(lambda: server.engine.num_running == 0)
        assert len(server.engine.left) == 1


def test_a_client_that_reads_slowly_gets_it_all(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potluck.api.streaming._KEEPALIVE_S", 0.1)
    monkeypatch.setattr("potluck.api.streaming._SEND_TIMEOUT_S", 20.0)
    words = " ".join(["w" * 500] * 3000)
    received = bytearray()
    with _lazy_client(server, words) as connection:
        while b"[DONE]" not in received[-4096:]:
            if len(received) < 10_000:
                time.sleep(0.1)
            piece = connection.recv(4096)
            assert piece, "the server hung up"
            received += piece
    assert received.count(b"www ") == 3000
    assert server.engine.left == []


def _lazy_client(server: Server, content: str) -> socket.socket:
    """A connection with a request on it and little room for what comes back."""
    body = json.dumps(_body(content, stream=True)).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60.0)
    connection.connect(("127.0.0.1", server.port))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection
