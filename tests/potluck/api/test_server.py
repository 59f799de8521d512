from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from potluck.api.server import create_app
from tests.support.api.scripted_engine import ScriptedEngine
from transport.errors import BadRequest, Busy, RingDown

_MESSAGES = [{"role": "user", "content": "one two three"}]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def client(engine: ScriptedEngine) -> TestClient:
    return TestClient(create_app(engine, model="demo/tiny"), raise_server_exceptions=False)


def _post(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"model": "demo/tiny", "messages": _MESSAGES, **fields})


def _error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def _stream(response: Any) -> list[Any]:
    """The data of the events, and "[DONE]"."""
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_an_answer_as_a_whole(client: TestClient) -> None:
    body = _post(client, seed=5).json()
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion" and body["model"] == "demo/tiny"
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "three two one seed=5 ", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert body["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 5},
    }


def test_an_answer_in_chunks(client: TestClient) -> None:
    response = _post(client, seed=5, stream=True, max_tokens=2)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = _stream(response)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1 and all("usage" not in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and deltas[0]["content"] == ""
    assert [delta["content"] for delta in deltas[1:-1]] == ["three ", "two "]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "length"]


def test_usage_in_a_stream_comes_last_and_only_if_asked_for(client: TestClient) -> None:
    *chunks, last, _ = _stream(_post(client, stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 11
    assert all(chunk["usage"] is None for chunk in chunks)


def test_cached_tokens_are_told_in_a_stream_too(client: TestClient) -> None:
    *_, last, _ = _stream(_post(client, stream=True, stream_options={"include_usage": True}))
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}


@pytest.mark.parametrize(
    ("asked", "priority", "told"),
    [
        (None, "interactive", None),
        ("auto", "interactive", "default"),
        ("default", "interactive", "default"),
        ("priority", "interactive", "default"),
        ("flex", "batch", "flex"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_service_tier_is_a_priority(
    client: TestClient, engine: ScriptedEngine, asked: str | None, priority: str, told: str | None, stream: bool
) -> None:
    response = _post(client, service_tier=asked, stream=stream)
    bodies = _stream(response)[:-1] if stream else [response.json()]
    assert {body.get("service_tier") for body in bodies} == {told}
    assert engine.submitted[0].priority == priority


def test_text_is_escaped_in_chunks(client: TestClient) -> None:
    words = r'a"b \   </script> ü '
    *chunks, _ = _stream(_post(client, stream=True, seed=1, messages=[{"role": "user", "content": words}]))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == " ".join(reversed(words.split())) + " seed=1 "


def test_several_choices(client: TestClient) -> None:
    choices = _post(client, n=3).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    *chunks, _ = _stream(_post(client, n=2, stream=True))
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {0, 1}


def test_logprobs(client: TestClient) -> None:
    content = _post(client, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert content[0]["token"] == "three" and content[0]["bytes"] == list(b"three") and content[0]["logprob"] == -0.25
    assert [item["token"] for item in content[0]["top_logprobs"]] == ["three", "y"]
    assert _post(client, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_every_field_reaches_the_engine(client: TestClient, engine: ScriptedEngine) -> None:
    _post(
        client,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=-1,
        frequency_penalty=1,
        logit_bias={"42": -100},
        seed=-1,
        max_completion_tokens=9,
        n=2,
        stop="end",
    )
    submit = engine.submitted[0]
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, -1, 1)
    assert (sampling.logit_bias, sampling.seed, sampling.top_logprobs) == ({42: -100}, 2**63 - 1, None)
    assert (submit.max_tokens, submit.num_choices, submit.stop) == (9, 2, ("end",))


def test_contents_may_be_parts_and_developer_means_system(client: TestClient, engine: ScriptedEngine) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    _post(client, messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}])
    assert engine.submitted[0].messages == (
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one\ntwo"},
    )


def test_a_missing_seed_is_drawn_anew_each_time(client: TestClient, engine: ScriptedEngine) -> None:
    _post(client), _post(client)
    first, second = (submit.sampling.seed for submit in engine.submitted)
    assert first != second


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False},
        {"temperature": None, "stop": None, "logit_bias": None, "user": None, "stream_options": None, "seed": None},
        {"modalities": ["text"], "service_tier": "auto", "metadata": {}, "parallel_tool_calls": True},
        {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}},
        {"messages": [{"role": "user", "content": "hi", "name": None, "tool_calls": []}]},
        {"max_tokens": 5, "max_completion_tokens": 5},
    ],
)
def test_what_asks_for_nothing_is_accepted(client: TestClient, fields: dict[str, Any]) -> None:
    assert _post(client, **fields).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"store": True}, "store"),
        ({"store": 0}, "store"),
        ({"user": "me"}, "user"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"service_tier": "scale"}, "service_tier"),
        ({"service_tier": 1}, "service_tier"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": 2**64}, "max_completion_tokens"),
        ({"top_k": 2**64}, "top_k"),
        ({"n": 2**64}, "n"),
        ({"n": 129}, "n"),  # each is made room for before the engine is asked
        ({"logit_bias": {str(2**64): 1}}, "logit_bias"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [1]}, "stop[0]"),
        ({"logit_bias": {"42": 101}}, "logit_bias[...]"),
        ({"logit_bias": {"cat": 1}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"model": None}, "model"),
    ],
)
def test_what_can_not_be_honoured_is_refused_by_name(
    client: TestClient, engine: ScriptedEngine, fields: dict[str, Any], param: str
) -> None:
    error = _error(_post(client, **fields), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert engine.submitted == []


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_no_json_object(client: TestClient, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    _error(client.post("/v1/chat/completions", content=body, headers=headers), 400)


def test_other_content_types_and_large_bodies(client: TestClient) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"content-type": content_type}
        _error(client.post("/v1/chat/completions", content=b"{}", headers=headers), 415)
    headers = {"content-type": "application/json; charset=utf-8"}
    large = b'"' + b"x" * (8 * 2**20) + b'"'
    _error(client.post("/v1/chat/completions", content=large, headers=headers), 413)
    pieces = (large[start : start + 2**20] for start in range(0, len(large), 2**20))
    _error(client.post("/v1/chat/completions", content=pieces, headers=headers), 413)


def test_models(client: TestClient) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "demo/tiny" and card["object"] == "model"
    assert client.get("/v1/models/demo/tiny").json() == card
    assert _error(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert _error(_post(client, model="other"), 404)["code"] == "model_not_found"


def test_unknown_paths_and_methods_have_the_same_shape_of_error(client: TestClient) -> None:
    _error(client.get("/v1/nothing"), 404)
    _error(client.get("/v1/chat/completions"), 405)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "retry_after"),
    [
        (Busy("64 requests are waiting already"), 429, "2"),
        (RingDown("cuda:0 died"), 503, "10"),
        (BadRequest("the context is 100 tokens", param="messages"), 400, None),
    ],
)
def test_what_the_engine_refuses(
    client: TestClient, engine: ScriptedEngine, stream: bool, refusal: Any, status: int, retry_after: str | None
) -> None:
    engine.refusal = refusal
    response = _post(client, stream=stream)
    error = _error(response, status)
    assert refusal.message in error["message"] and error["code"] == refusal.code
    assert response.headers.get("retry-after") == retry_after
    assert error["param"] == getattr(refusal, "param", None)


def test_health_follows_the_engine(client: TestClient, engine: ScriptedEngine) -> None:
    assert client.get("/health").json() == {"status": "ready", "model": "demo/tiny"}
    engine.state, engine.reason = "down", "cuda:0 died"
    response = client.get("/health")
    assert response.status_code == 503 and response.json()["reason"] == "cuda:0 died"
    response = _post(client)
    assert "cuda:0 died" in _error(response, 503)["message"] and "retry-after" in response.headers


def test_a_failure_mid_stream_is_an_error_event_and_no_end(client: TestClient) -> None:
    response = _post(client, stream=True, messages=[{"role": "user", "content": "fail:2"}])
    *chunks, last = _stream(response)
    assert last["error"]["code"] == "ring_down" and "mlx:0 died" in last["error"]["message"]
    assert "event: error" in response.text and "[DONE]" not in response.text
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)
    _error(_post(client, messages=[{"role": "user", "content": "fail:2"}]), 503)


def test_a_bug_shows_no_insides(client: TestClient, engine: ScriptedEngine) -> None:
    engine.submit = None  # type: ignore[assignment, method-assign]
    assert "NoneType" not in _error(_post(client), 500)["message"]


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text
    for name in ("chat.js", "chat.css"):
        assert f"/page/{name}" in page.text
        file = client.get(f"/page/{name}")
        assert file.status_code == 200 and file.headers["x-content-type-options"] == "nosniff"
    _error(client.get("/page/../server.py"), 404)
