"""Bytes that are hardly HTTP, or none: an answer or a closed connection, nothing in the log, and others are served."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.api.raw_http import parse
from tests.support.api.server import MODEL, Server

_BODY = b'{"model": "tiny", "messages": [{"role": "user", "content": "a b"}]}'
_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
_WHOLE = _HEAD + b"Content-Length: %d\r\n\r\n" % len(_BODY) + _BODY
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
_IN_CHUNKS = _CHUNKED + b"%x\r\n" % len(_BODY) + _BODY + b"\r\n0\r\n\r\n"
_GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
_ELSEWHERE = _IN_CHUNKS.replace(b"/v1/chat/completions", b"/nothing")

_SEEDS = st.sampled_from([_WHOLE, _IN_CHUNKS, _GET, _ELSEWHERE, _GET * 3, _ELSEWHERE + _WHOLE])
_PATCHES = st.one_of(
    st.binary(max_size=6),
    st.sampled_from(
        [b"\r\n", b"\n", b"\r\n\r\n", b"0\r\n\r\n", b"ffffffff\r\n", b":", b" ", b"\0", b"HTTP/1.0", b"HEAD"]
    ),
    st.sampled_from([b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Upgrade: x\r\n"]),
    st.sampled_from([b"Transfer-Encoding: chunked\r\n", b"Content-Length: 3\r\n"]),
)
_EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9), _PATCHES), max_size=4)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    opened = Server()
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def nothing_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert _complaints(caplog) == []


def _complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.WARNING]


def _exchange(server: Server, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """What comes back until the connection ends, once everything is sent."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60.0) as connection, contextlib.suppress(OSError):
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause_s)
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(65536):
            received += piece
    return received


def _is_served(server: Server) -> bool:
    return httpx.get(f"http://127.0.0.1:{server.port}/health", timeout=60.0, trust_env=False).status_code == 200


def test_any_change_of_a_request_is_answered_or_ends_its_connection(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(seed=_SEEDS, edits=_EDITS, cut=st.floats(0, 1))
    def any_change(seed: bytes, edits: list[tuple[float, int, bytes]], cut: float) -> None:
        for where, removed, patch in edits:
            at = int(where * len(seed))
            seed = seed[:at] + patch + seed[at + removed :]
        at = int(cut * len(seed))
        received = _exchange(server, seed[:at], seed[at:])
        assert not received or received.startswith(b"HTTP/1.1 ")
        assert b" 500 " not in received and _complaints(caplog) == []

    any_change()
    assert _is_served(server)


@pytest.mark.parametrize("pause_s", [0.0, 0.1])
@pytest.mark.parametrize("target", [b"/v1/chat/completions", b"/nothing", b"http://elsewhere/"])
def test_what_follows_an_answer_and_is_no_http_ends_in_silence(server: Server, target: bytes, pause_s: float) -> None:
    begin = _CHUNKED.replace(b"/v1/chat/completions", target)
    received = _exchange(server, begin, b"a prompt of somebody\r\n", pause_s=pause_s)
    assert received.count(b"HTTP/1.1 ") == 1 and parse(received).status in (400, 404)


def test_a_body_in_crumbs_is_none(server: Server) -> None:
    crumbs = b"".join(b"1\r\n%c\r\n" % byte for byte in _BODY.ljust(4000))
    assert parse(_exchange(server, _CHUNKED + crumbs + b"0\r\n\r\n")).status == 400
    # Some are none: a program may send what it makes as it makes it.
    crumbs = b"".join(b"1\r\n%c\r\n" % byte for byte in _BODY)
    rest = (
        b"%x\r\n" % 100_000 + b" " * 100_000 + b"\r\n" + b"".join(b"40\r\n" + b" " * 64 + b"\r\n" for _ in range(2000))
    )
    connection_closes = _CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server.port), timeout=60.0) as connection:
        connection.sendall(connection_closes + crumbs + rest + b"0\r\n\r\n")
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert parse(received).status == 200


def test_crumbs_from_strangers_hold_up_nobody() -> None:
    class Nobody:
        def is_right(self, presented: bytes) -> bool:
            return False

    server = Server(key=Nobody())
    stopping = threading.Event()

    def flood() -> None:
        while not stopping.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=5.0) as one:
                one.sendall(_CHUNKED)
                while not stopping.is_set():
                    one.sendall(b"1\r\na\r\n" * 40_000)

    threads = [threading.Thread(target=flood) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        waits_s = []
        for _ in range(10):
            started_s = time.monotonic()
            assert _is_served(server)
            waits_s.append(time.monotonic() - started_s)
        # It was 3 s at the median.
        assert sorted(waits_s)[len(waits_s) // 2] < 1.0, waits_s
    finally:
        stopping.set()
        for thread in threads:
            thread.join(60.0)
        server.close()


def test_a_length_that_is_said_in_two_ways_ends_the_connection(server: Server) -> None:
    both = _CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n")
    received = _exchange(server, both + b"0\r\n\r\n" + _GET, pause_s=0.2)
    assert received.count(b"HTTP/1.1 ") == 1 and b"got both; send one" in received and MODEL.encode() not in received
