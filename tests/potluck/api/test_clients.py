"""The official client, and connections that break, against a real server on a loopback socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest

from tests.support.api.server import MODEL, Server, eventually


def _ask(client: openai.OpenAI, content: str, **fields: object) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(  # type: ignore[call-overload,no-any-return]
        model=MODEL, messages=[{"role": "user", "content": content}], **fields
    )


def test_no_answer_waits_for_an_acknowledgement(server: Server) -> None:
    # Nagle's algorithm and delayed acknowledgements would make each but the first take 40 ms; a busy machine some.
    with httpx.Client(base_url=server.base_url, trust_env=False, timeout=60.0) as client:
        client.post("chat/completions", json={})
        times_s = (client.post("chat/completions", json={}).elapsed.total_seconds() for _ in range(100))
        assert any(time_s < 0.03 for time_s in times_s)


def test_whole_answers_stop_strings_and_seeds(server: Server) -> None:
    client = server.client()
    answer = _ask(client, "one two three", seed=7)
    assert answer.choices[0].message.content == "three two one seed=7 "
    assert answer.usage is not None and answer.usage.total_tokens == 11
    assert _ask(client, "one two three", stop=["one"]).choices[0].message.content == "three two "
    assert _ask(client, "one two three", max_completion_tokens=1).choices[0].finish_reason == "length"
    assert [model.id for model in client.models.list()] == [MODEL]


def test_streamed_answers(server: Server) -> None:
    chunks = list(
        server.client().chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "a b"}],
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "b a seed=1 "
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 3


def test_several_at_once(server: Server) -> None:
    server.engine.delay_s = 0.01

    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=60.0) as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=MODEL, messages=[{"role": "user", "content": f"word{number}"}], seed=number
                    )
                    for number in range(20)
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask_all()) == [f"word{number} seed={number} " for number in range(20)]


def test_a_stream_that_is_closed_midway_cancels(server: Server) -> None:
    server.engine.delay_s = 0.005
    stream = server.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "forever"}], stream=True
    )
    for number, _ in enumerate(stream):
        if number == 5:
            break
    assert server.engine.num_running == 1
    stream.close()
    eventually(lambda: server.engine.num_running == 0 and len(server.engine.left) == 1)


def test_a_connection_that_breaks_cancels_a_whole_answer_too(server: Server) -> None:
    server.engine.delay_s = 0.005
    with _raw_post(server, "forever", stream=False) as connection:
        eventually(lambda: server.engine.num_running == 1)
        connection.close()
    eventually(lambda: server.engine.num_running == 0 and len(server.engine.left) == 1)


def test_a_client_that_leaves_before_the_first_token_cancels(server: Server) -> None:
    server.engine.delay_s = 30.0
    with _raw_post(server, "forever", stream=True) as connection:
        eventually(lambda: server.engine.num_running == 1)
        connection.close()
    eventually(lambda: server.engine.num_running == 0)


def test_errors_arrive_as_the_clients_own(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError) as bad:
        _ask(client, "hi", tools=[{"type": "function", "function": {"name": "f"}}])
    assert bad.value.param == "tools"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.InternalServerError, match="mlx:0 died"):
        _ask(client, "fail:0")
    seen = []
    with pytest.raises(openai.APIError, match="mlx:0 died"):
        for chunk in client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "fail:2"}], stream=True
        ):
            seen.append(chunk)
    assert len(seen) == 3


def test_a_silent_stream_is_kept_alive(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potluck.api.streaming._KEEPALIVE_S", 0.05)
    server.engine.delay_s = 30.0
    with _raw_post(server, "forever", stream=True) as connection:
        received = b""
        while received.count(b": keepalive") < 3:
            received += connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 200")


@contextmanager
def _raw_post(server: Server, content: str, *, stream: bool) -> Iterator[socket.socket]:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": content}], "stream": stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=60.0) as connection:
        connection.sendall(head.encode() + body)
        yield connection
