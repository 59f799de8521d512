"""More than a ring can do at once, and clients that do not do their part, against a real head."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from tests.support.e2e.potluck_process import ASK_S, GONE_S, Home, Running, make_home, up_arguments, wait_until

_NUM_REQUESTS = 1000
_MOST_GROWTH_BYTES = 150 * 2**20
_DEVICES = ("--device", "torch:cpu", "--device", "torch:cpu")


@pytest.fixture(scope="module")
def ring(data_home: Any) -> Iterator[tuple[Home, Running]]:
    home = make_home(data_home)
    running = Running(home, *up_arguments("--context", "1024", devices=_DEVICES))
    try:
        running.facts()
        yield home, running
    finally:
        running.stop()
        for process in home.processes():
            process.kill()
        shutil.rmtree(home.runtime, ignore_errors=True)


def _url(running: Running) -> str:
    found: str = running.facts()["url"]
    return found


def _question(content: str, **fields: Any) -> dict[str, Any]:
    return {"model": "smollm2", "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


def _status(running: Running) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{_url(running)}/potluck/status", timeout=ASK_S).json()
    return found


def _is_at_rest(running: Running) -> bool:
    engine = _status(running)["engine"]
    return (engine["running_requests"], engine["queued_requests"], engine["kv_tokens"]) == (0, 0, 0)


def _rss_bytes(pids: list[int]) -> int:
    return sum(psutil.Process(pid).memory_info().rss for pid in pids)


def test_a_thousand_requests_at_once_end_or_are_asked_to_come_again(ring: tuple[Home, Running]) -> None:
    home, running = ring
    _allow_connections(2 * _NUM_REQUESTS)
    report = _status(running)
    pids = [report["pid"], report["engine_pid"]]
    before_bytes = _rss_bytes(pids)

    async def ask_all() -> list[tuple[int, str | None]]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, timeout=500.0, trust_env=False) as client:

            async def ask(number: int) -> tuple[int, str | None]:
                body = _question(f"Say {number}.", max_tokens=2, stream=number % 2 == 0)
                response = await client.post(f"{_url(running)}/v1/chat/completions", json=body)
                if number % 2 == 0 and response.status_code == 200:
                    assert response.text.endswith("data: [DONE]\n\n")
                return response.status_code, response.headers.get("retry-after")

            return await asyncio.gather(*(ask(number) for number in range(_NUM_REQUESTS)))

    ends = asyncio.run(ask_all())
    counts = Counter(status for status, _ in ends)
    assert set(counts) <= {200, 429, 503} and counts[200] > 100 and counts[429] + counts[503] > 0, counts
    assert all(retry_after for status, retry_after in ends if status != 200)
    assert _rss_bytes(pids) - before_bytes < _MOST_GROWTH_BYTES
    reply = httpx.post(f"{_url(running)}/v1/chat/completions", json=_question("Hello!", max_tokens=2), timeout=ASK_S)
    assert reply.status_code == 200
    wait_until(lambda: _is_at_rest(running), GONE_S, lambda: _status(running))
    assert "Traceback" not in _logs(home) + running.said()


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(ring: tuple[Home, Running]) -> None:
    url = f"{_url(ring[1])}/v1/chat/completions"
    for fields in ({}, {"stream": True}):
        refused = httpx.post(url, json=_question("word " * 3000, **fields), timeout=ASK_S)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert "1024 tokens" in error["message"] and "the prompt has 30" in error["message"]
        assert error["param"] == "messages"
    refused = httpx.post(url, json=_question("word " * 500, max_tokens=900), timeout=ASK_S)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"
    assert "max_tokens is 900" in refused.json()["error"]["message"]


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_no_tokens_at_all_are_refused(ring: tuple[Home, Running], max_tokens: int) -> None:
    url = f"{_url(ring[1])}/v1/chat/completions"
    refused = httpx.post(url, json=_question("Hello!", max_tokens=max_tokens), timeout=ASK_S)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"


def test_a_client_that_stops_reading_slows_nobody(ring: tuple[Home, Running]) -> None:
    _, running = ring
    url = f"{_url(running)}/v1/chat/completions"
    body = json.dumps(_question("Count.", stream=True, max_tokens=400, logit_bias={"2": -100})).encode()
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        lazy.connect(("127.0.0.1", httpx.URL(url).port or 0))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        lazy.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: _status(running)["engine"]["running_requests"] == 1, ASK_S)
        with ThreadPoolExecutor(4) as pool:
            answers = list(
                pool.map(lambda n: httpx.post(url, json=_question(f"Say {n}.", max_tokens=8), timeout=ASK_S), range(4))
            )
        assert [answer.status_code for answer in answers] == [200] * 4
        # Its own answer is written to the end all the same, and waits for it in buffers.
        wait_until(lambda: _status(running)["engine"]["running_requests"] == 0, ASK_S)
        lazy.settimeout(ASK_S)
        received = b""
        while b"[DONE]" not in received:
            received += lazy.recv(65536)
    assert received.count(b'"content"') == 401


def test_clients_that_all_leave_leave_nothing_behind(ring: tuple[Home, Running]) -> None:
    _, running = ring
    url = f"{_url(running)}/v1/chat/completions"
    body = json.dumps(_question("Count.", max_tokens=900, logit_bias={"2": -100})).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connections = [socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)) for _ in range(20)]
    for connection in connections:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    wait_until(lambda: _status(running)["engine"]["running_requests"] > 0, ASK_S)
    for connection in connections:
        connection.close()
    wait_until(lambda: _is_at_rest(running), GONE_S, lambda: _status(running))


def _logs(home: Home) -> str:
    """The head's and its engine's, which each start begins anew."""
    return "".join((home.data / "logs" / name).read_text(errors="replace") for name in ("head.log", "engine.log"))


def _allow_connections(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))
