"""The official client against the running demo ring: three processes, two tensor libraries, real sockets."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.support.e2e.potluck_process import ASK_S, GONE_S, wait_until

QUESTION: Any = [{"role": "user", "content": "Name three fruits."}]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=ASK_S) as client:
        yield client


def status(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/potluck/status", timeout=ASK_S).json()
    return found


def stages(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = status(url)["stages"]
    return found


def is_at_rest(url: str) -> bool:
    """Nothing runs, and every stage holds what the engine keeps for prompts to come, and no more."""
    found = status(url)
    engine = found["engine"]
    held = {stage["kv_tokens"] for stage in found["stages"]}
    return engine["running_requests"] == 0 and engine["kv_tokens"] == 0 and held == {engine["cached_kv_tokens"]}


def test_the_ring_is_mixed(url: str) -> None:
    found = stages(url)
    assert [stage["backend"] for stage in found] == ["torch", "mlx", "torch"]
    assert [stage["first"] for stage in found] == [0, *[stage["last"] for stage in found[:-1]]]
    assert found[-1]["last"] == 30


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]


def test_an_answer(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=24)
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 24
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "smollm2", "messages": QUESTION, "temperature": 0, "max_completion_tokens": 24}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len([chunk for chunk in chunks if chunk.choices]) > 5


def test_several_at_once_say_what_each_says_alone(client: openai.OpenAI) -> None:
    questions = ["Name three fruits.", "What is 2 + 2?", "Who wrote Hamlet?", "Name a colour."]

    def ask(question: str) -> str | None:
        reply = client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=12
        )
        return reply.choices[0].message.content

    alone = [ask(question) for question in questions]
    with ThreadPoolExecutor(len(questions)) as pool:
        together = list(pool.map(ask, questions))
    # bf16: a batch of another size may round a near-tie the other way; most answers must be the very same.
    assert sum(a == b for a, b in zip(alone, together, strict=True)) >= 3


def test_stop_strings(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "smollm2", "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**options).choices[0].message.content
    assert whole
    stop = whole[5:9]
    reply = client.chat.completions.create(**options, stop=[stop])
    assert reply.choices[0].message.content == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_seeds(client: openai.OpenAI) -> None:
    def answer(seed: int) -> str | None:
        reply = client.chat.completions.create(
            model="smollm2", messages=QUESTION, temperature=1.2, seed=seed, max_tokens=16
        )
        return reply.choices[0].message.content

    assert answer(7) == answer(7)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_choices_and_logprobs(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="smollm2", messages=QUESTION, n=2, temperature=1.0, seed=3, max_tokens=6, logprobs=True, top_logprobs=3
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    for choice in reply.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in choice.logprobs.content)


def test_a_client_that_leaves_frees_kv_on_every_stage(client: openai.OpenAI, url: str) -> None:
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Write a very long story."}],
        max_tokens=1000,
        stream=True,
        temperature=0,
        logit_bias={"2": -100},
    )
    for _, _chunk in zip(range(5), stream, strict=False):
        pass
    assert status(url)["engine"]["running_requests"] == 1
    assert status(url)["engine"]["kv_tokens"] > 0
    stream.close()
    wait_until(lambda: is_at_rest(url), GONE_S, lambda: status(url))


def test_a_client_that_leaves_without_streaming_too(url: str) -> None:
    body = json.dumps({"model": "smollm2", "messages": QUESTION, "max_tokens": 1000, "logit_bias": {"2": -100}})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        wait_until(lambda: status(url)["engine"]["running_requests"] == 1, ASK_S, lambda: status(url))
    wait_until(lambda: is_at_rest(url), GONE_S, lambda: status(url))


def test_a_second_turn_reuses_the_first(client: openai.OpenAI) -> None:
    first: Any = [{"role": "user", "content": "Here is a list of words: " + "apple pear plum " * 40}]
    options: Any = {"model": "smollm2", "temperature": 0, "max_tokens": 8}
    reply = client.chat.completions.create(messages=first, **options)
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    turn = [
        *first,
        {"role": "assistant", "content": reply.choices[0].message.content},
        {"role": "user", "content": "Again."},
    ]
    again = client.chat.completions.create(messages=turn, **options)
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and reply.usage.prompt_tokens <= cached + 8 < again.usage.prompt_tokens


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"num_ctx": 3}}, "num_ctx"),
    ],
)
def test_what_can_not_be_done_is_a_400_that_names_it(client: openai.OpenAI, options: dict[str, Any], word: str) -> None:
    with pytest.raises(openai.BadRequestError, match=word):
        client.chat.completions.create(**{"model": "smollm2", "messages": QUESTION, **options})


def test_a_prompt_longer_than_the_context_is_a_400_with_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"2048|4096"):
        client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": "word " * 9000}])


def test_an_unknown_model_is_a_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
