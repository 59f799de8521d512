"""Connections that do not get on, and more of them than there is room for."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from potluck.api import limits
from potluck.api.limits import LimitedConnection
from tests.support.api.raw_http import parse
from tests.support.api.server import MODEL, Server, eventually

_HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: "


@contextlib.contextmanager
def _open(server: Server, count: int, begin: bytes = b"") -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60.0))
            one.sendall(begin)
            opened.append(one)
        yield opened


def _is_served(server: Server) -> bool:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a b"}]}
    answer = httpx.post(f"{server.base_url}/chat/completions", json=body, timeout=60.0, trust_env=False)
    return answer.status_code == 200


def _is_closed(one: socket.socket) -> bool:
    try:
        return one.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("begin", [b"", b"G", _HALF])
def test_half_open_connections_stop_nobody(server: Server, monkeypatch: pytest.MonkeyPatch, begin: bytes) -> None:
    monkeypatch.setattr(LimitedConnection, "max_connections", 50)
    with _open(server, 200, begin) as opened:
        for _ in range(5):
            assert _is_served(server)
        # The oldest have made room.
        assert _is_closed(opened[0]) and _is_closed(opened[100])


def test_a_head_that_trickles_in_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEADERS_TIMEOUT_S", 0.5)
    with _open(server, 1, _HALF) as (slow,):
        slow.settimeout(0.05)
        deadline = time.monotonic() + 60.0
        is_closed = False
        while not is_closed:
            assert time.monotonic() < deadline
            try:
                slow.sendall(b"x")
                is_closed = slow.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                is_closed = True


def test_a_body_for_nobody_does_not_hold_a_connection(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEADERS_TIMEOUT_S", 0.5)
    head = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with _open(server, 1, head + b"Content-Length: 1000000\r\n\r\n") as (one,):
        assert b"404" in one.recv(4096)
        one.settimeout(0.05)
        deadline = time.monotonic() + 60.0
        is_closed = False
        while not is_closed:
            assert time.monotonic() < deadline
            try:
                one.sendall(b" ")
                is_closed = one.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                is_closed = True


def test_answers_under_way_are_not_cut_for_others(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LimitedConnection, "max_connections", 3)
    server.engine.delay_s = 0.01
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "forever"}], "stream": true}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    ask = head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with _open(server, 3, ask):
        eventually(lambda: server.engine.num_running == 3)
        with _open(server, 1) as (beyond,):
            refused = b""
            while piece := beyond.recv(4096):
                refused += piece
        answer = parse(refused)
        assert answer.status == 503 and answer.headers["retry-after"] == "2" and b'"busy"' in answer.body
        assert server.engine.num_running == 3
    eventually(lambda: server.engine.num_running == 0)
    assert _is_served(server)


def test_those_whose_bodies_do_not_come_make_room(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LimitedConnection, "max_connections", 3)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with _open(server, 3, head + b"Content-Length: 1000\r\n\r\n{") as opened:
        assert _is_served(server)
        assert _is_closed(opened[0])
    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", 0.2)
    with _open(server, 1, head + b"Content-Length: 1000\r\n\r\n{") as (slow,):
        assert _is_closed(slow)


def test_a_connection_is_kept_between_requests(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEADERS_TIMEOUT_S", 0.5)
    server.engine.delay_s = 0.2
    with httpx.Client(base_url=server.base_url, trust_env=False, timeout=60.0) as client:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "a b c"}]}
        # Longer than a head may take, and one after the other.
        assert [client.post("/chat/completions", json=body).status_code for _ in range(2)] == [200, 200]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ],
)
def test_a_head_has_a_size(server: Server, head: bytes) -> None:
    with _open(server, 1) as (one,):
        received = b""
        with contextlib.suppress(ConnectionError):
            one.sendall(head)
            while piece := one.recv(4096):
                received += piece
        assert received == b"" or parse(received).status in (400, 431)
    assert _is_served(server)
