"""Bodies of any kind: an ApiError or a request, and never more memory than the cap."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from potluck.api.errors import ApiError
from potluck.api.json_body import MAX_BODY_BYTES, MAX_CONTAINERS, MAX_DEPTH, BodyReader, decode_object
from potluck.api.openai.chat_request import ChatRequest, decode_chat_request

_GOOD = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
_NAMES = st.sampled_from([*ChatRequest.__struct_fields__, "tools", "user", "x", ""])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | _NAMES, inner, max_size=4),
    max_leaves=12,
)


def _decode(body: bytes) -> ChatRequest | ApiError:
    try:
        request = decode_chat_request(body)
    except ApiError as error:
        assert 400 <= error.status < 500
        answer = error.response()
        assert len(bytes(answer.body)) < 8192
        return error
    # What is accepted can travel on.
    request.submit("id")
    return request


@given(body=st.binary(max_size=400))
def test_any_bytes(body: bytes) -> None:
    _decode(body)


@given(fields=st.dictionaries(_NAMES, _VALUES, max_size=5), allow_nan=st.booleans())
def test_any_fields(fields: dict[str, Any], allow_nan: bool) -> None:
    _decode(json.dumps({**_GOOD, **fields}).encode())
    _decode(json.dumps({**_GOOD, **fields}, ensure_ascii=False).encode(errors="surrogatepass"))


@given(cut=st.integers(0, 200), at=st.integers(0, 200), byte=st.binary(min_size=1, max_size=3))
def test_a_good_body_that_was_damaged(cut: int, at: int, byte: bytes) -> None:
    whole = json.dumps({**_GOOD, "stop": ["a"], "logit_bias": {"1": 2}, "seed": 3, "temperature": 0.5}).encode()
    _decode(whole[:cut])
    _decode(whole[:at] + byte + whole[at:])
    _decode(whole[:at] + byte + whole[at + len(byte) :])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"model": "m", "model": "n", "messages": []}', "model stands twice"),
        (b'{"messages": [{"role": "user", "role": "system", "content": "a"}], "model": "m"}', "role stands twice"),
        (b'{"x": {"a": 1, "\\u0061": 2}}', "a stands twice"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b'{"temperature": Infinity}', "not valid JSON"),
        (b'{"temperature": -Infinity}', "not valid JSON"),
        (b'{"temperature": 1e999}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": "\x00"}', "not valid JSON"),
        (b'{"a": 1} {}', "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1 /* b */}', "not valid JSON"),
        (b'{"a": 01}', "not valid JSON"),
        (b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "levels of nesting"),
        (b'{"a":' + b"[" * 100_000, "levels of nesting"),
        (b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}", "levels of nesting"),
        (b'{"a": [' + b"[]," * MAX_CONTAINERS + b"[]]}", "lists and objects"),
        (b'{"a": [' + b"0," * 300_000 + b"0]}", "values"),
        (b'{"a": [' + b"[]," * 100 + b'""' * 300_000 + b"]}", "values"),
    ],
)
def test_what_is_no_request_is_told(body: bytes, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode_object(body)
    assert says in caught.value.message and caught.value.status == 400


def test_depth_is_counted_outside_of_texts() -> None:
    assert decode_object(b'{"a": "' + b"[{" * 50_000 + b'\\"[", "b": "\\\\"}')["b"] == "\\"
    deep = b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH
    assert decode_object(deep)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "m" * 257}, "model"),
        ({"messages": [{"role": "user", "content": "x"}] * 4097}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1025}]}, "messages[0].content"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a" * 1025]}, "stop[0]"),
        ({"stop": "a" * 1025}, "stop"),
        ({"logit_bias": {str(number): 1 for number in range(1025)}}, "logit_bias"),
        ({"tools": [{"type": "function"}] * 1000}, "tools"),
        ({"x" * 5000: 1}, "x" * 5000),
        ({"messages": [{"role": "r" * 100_000, "content": "x"}]}, "messages[0].role"),
    ],
)
def test_fields_have_limits(fields: dict[str, Any], param: str) -> None:
    found = _decode(json.dumps({**_GOOD, **fields}).encode())
    assert isinstance(found, ApiError) and found.param == param and found.status == 400


@pytest.mark.parametrize(
    "unit",
    [
        b"[],",
        b"{},",
        b'{"a":1},',
        b"0,",
        b'"",',
        b"[[[[[[[[]]]]]]]],",
        b"1e5,",
        b'"\\n",',
        b"null,",
        b'"\\ud83d\\ude00"',
    ],
)
def test_no_body_takes_many_times_its_size(unit: bytes) -> None:
    inner = unit * ((MAX_BODY_BYTES - 100) // len(unit))
    bodies = [b'{"a": [' + inner.rstrip(b",") + b"]}", inner, b'{"a": "' + inner.replace(b'"', b"'") + b'"}']
    for body in bodies:
        tracemalloc.start()
        try:
            _decode(body)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < 6 * MAX_BODY_BYTES, body[:40]


def test_long_bodies_that_come_in_wait_for_room_and_small_ones_do_not() -> None:
    bodies = BodyReader(limit_bytes=200_000)

    async def main() -> None:
        go = asyncio.Event()

        def read(*pieces: bytes) -> asyncio.Task[bytes]:
            async def receive() -> dict[str, Any]:
                if not left:
                    await go.wait()
                more = bool(left)
                return {"type": "http.request", "body": left.pop(0) if more else b"", "more_body": more}

            left = list(pieces)
            scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
            return asyncio.create_task(bodies.read(Request(scope, receive)))

        slow = [read(b" " * 150_000) for _ in range(2)]
        await asyncio.sleep(0.01)
        refused, taken = read(b" " * 50_000, b" " * 50_000), read(b" " * 50_000)
        await asyncio.sleep(0.01)
        go.set()
        with pytest.raises(ApiError, match="too many long requests"):
            await refused
        assert [len(await body) for body in (*slow, taken)] == [150_000, 150_000, 50_000]
        # And nothing is counted any more.
        assert len(await read(b" " * 250_000)) == 250_000

    asyncio.run(main())


def test_a_few_small_bodies_still_say_what_they_said() -> None:
    request = _decode(json.dumps(_GOOD).encode())
    assert isinstance(request, ChatRequest) and request.messages[0].text == "hi"
