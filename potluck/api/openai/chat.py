"""The chat handler answers POST /v1/chat/completions, as a whole or as a stream of chunks."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, cast

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from potluck.api.errors import ApiError, json_response, model_not_found
from potluck.api.json_body import BodyReader
from potluck.api.openai.chat_request import ChatRequest, decode_chat_request
from potluck.api.streaming import DONE, EventStream, sse_event, wait_for_disconnect
from transport.errors import RingDown
from transport.messages.requests import (
    Aborted,
    Accepted,
    ChoiceFinished,
    Delta,
    EngineEvent,
    EngineState,
    Finished,
    RequestFailed,
    Submit,
    TokenLogprob,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionHeader:
    """What every body of an answer carries. `created` is in seconds since 1970; `service_tier` only if one was asked
    for."""

    id: str
    model: str
    created: int
    service_tier: str | None

    def fields(self, kind: str) -> dict[str, Any]:
        found = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return found if self.service_tier is None else {**found, "service_tier": self.service_tier}


class CompletionBuilder:
    """One request's answer under way, to be sent at once."""

    def __init__(self, head: CompletionHeader, *, num_choices: int, wants_logprobs: bool) -> None:
        self._head = head
        self._wants_logprobs = wants_logprobs
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(num_choices)]
        self._reasons: list[str | None] = [None] * num_choices

    def add(self, event: Delta | ChoiceFinished) -> None:
        match event:
            case Delta(choice=choice, text=text, logprobs=logprobs):
                self._texts[choice].append(text)
                self._logprobs[choice].extend(logprobs)
            case ChoiceFinished(choice=choice, reason=reason):
                self._reasons[choice] = reason

    def body(self, finished: Finished) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(texts), "refusal": None},
                "logprobs": logprobs_body(tuple(self._logprobs[index])) if self._wants_logprobs else None,
                "finish_reason": self._reasons[index],
            }
            for index, texts in enumerate(self._texts)
        ]
        return {**self._head.fields("chat.completion"), "choices": choices, "usage": usage_body(finished)}


def usage_body(finished: Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }


def logprobs_body(logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any]:
    content = [
        {
            **_token_body(item.token, item.token_bytes, item.logprob),
            "top_logprobs": [_token_body(*alternative) for alternative in item.top],
        }
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


def _token_body(token: str, token_bytes: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token_bytes)}


_encode = msgspec.json.Encoder().encode


class ChunkEncoder:
    """One request's chunks."""

    def __init__(self, head: CompletionHeader, *, num_choices: int, wants_logprobs: bool, with_usage: bool) -> None:
        """`with_usage`: one more chunk, at the end, has the numbers, and the others say that they have none."""
        self._num_choices = num_choices
        self._wants_logprobs = wants_logprobs
        self._opening = b"data: " + _encode(head.fields("chat.completion.chunk"))[:-1] + b',"choices":'
        self._closing = b',"usage":null}\n\n' if with_usage else b"}\n\n"
        self._before_text = [
            self._opening + b'[{"index":%d,"delta":{"content":' % index for index in range(num_choices)
        ]
        self._after_text = b'},"logprobs":null,"finish_reason":null}]' + self._closing

    def opening(self) -> bytes:
        """The chunks that say who speaks, one a choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._chunk(index, delta) for index in range(self._num_choices))

    def chunk(self, event: Delta | ChoiceFinished) -> bytes:
        match event:
            case Delta(choice=choice, text=text, logprobs=logprobs):
                if self._wants_logprobs:
                    return self._chunk(choice, {"content": text}, logprobs=logprobs_body(logprobs))
                return self._before_text[choice] + _encode(text) + self._after_text
            case ChoiceFinished(choice=choice, reason=reason):
                return self._chunk(choice, {}, reason=reason)

    def usage(self, finished: Finished) -> bytes:
        return self._opening + b'[],"usage":' + _encode(usage_body(finished)) + b"}\n\n"

    def _chunk(self, index: int, delta: dict[str, Any], *, logprobs: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._opening + _encode([choice]) + self._closing


# Shorter than the connection's own, so that a slow body gets an answer before it is cut.
_BODY_TIMEOUT_S = 30.0
_CLIENT_CLOSED_REQUEST = 499


class ChatEngine(Protocol):
    """What the API needs of `potluck.engine.client.EngineClient`."""

    @property
    def state(self) -> EngineState: ...

    @property
    def reason(self) -> str: ...

    def submit(self, submit: Submit) -> AsyncIterator[EngineEvent]:
        """Events up to the terminal one; closing the iterator cancels the request."""


class ChatCompletions:
    """The handler. Raises ApiError for what can't be served; a client that disconnects takes its request with it."""

    def __init__(self, engine: ChatEngine, model: str) -> None:
        self._engine = engine
        self._model = model
        self._body_reader = BodyReader()

    async def __call__(self, request: Request) -> Response:
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                chat = decode_chat_request(await self._body_reader.read(request))
        except TimeoutError:
            raise ApiError(408, f"expected the body within {_BODY_TIMEOUT_S:.0f} s; send it faster, or less") from None
        except ClientDisconnect:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        if chat.model != self._model:
            raise model_not_found(chat.model, self._model)
        if self._engine.state != "ready":
            raise ApiError(503, f"{self._model} can't answer now: {self._engine.reason}", code=RingDown.code)
        name = f"chatcmpl-{secrets.token_hex(12)}"
        head = CompletionHeader(id=name, model=self._model, created=int(time.time()), service_tier=chat.served_tier)
        # The engine's iterators are generators; the Protocol leaves that open.
        events = cast("AsyncGenerator[EngineEvent]", self._engine.submit(chat.submit(name)))
        if chat.stream:
            return await _stream_response(chat, head, events)
        return await _full_response(request, chat, head, events)


async def _stream_response(chat: ChatRequest, head: CompletionHeader, events: AsyncGenerator[EngineEvent]) -> Response:
    # The status line can still say what is wrong, as long as the engine has not accepted.
    first = await anext(events)
    if isinstance(first, RequestFailed | Aborted):
        await events.aclose()
        raise _api_error(first)
    with_usage = chat.stream_options is not None and chat.stream_options.include_usage
    chunks = ChunkEncoder(head, num_choices=chat.n, wants_logprobs=chat.logprobs, with_usage=with_usage)
    return EventStream(_encode_chunks(chunks, events, with_usage=with_usage), events)


async def _full_response(
    request: Request, chat: ChatRequest, head: CompletionHeader, events: AsyncGenerator[EngineEvent]
) -> Response:
    completion = CompletionBuilder(head, num_choices=chat.n, wants_logprobs=chat.logprobs)
    answer = asyncio.create_task(_collect_completion(completion, events))
    gone = asyncio.create_task(wait_for_disconnect(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        return json_response(answer.result())
    finally:
        for task in (answer, gone):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ApiError):
            await answer


async def _encode_chunks(
    chunks: ChunkEncoder, events: AsyncIterator[EngineEvent], *, with_usage: bool
) -> AsyncIterator[bytes]:
    yield chunks.opening()
    async for event in events:
        match event:
            case Delta() | ChoiceFinished():
                yield chunks.chunk(event)
            case Finished():
                yield (chunks.usage(event) if with_usage else b"") + DONE
            case RequestFailed() | Aborted():
                # No finish_reason and no [DONE]: a client must not take what it has for the whole answer.
                yield sse_event(msgspec.json.encode(_api_error(event).body()), b"error")
            case _:
                pass


def _api_error(event: RequestFailed | Aborted) -> ApiError:
    if isinstance(event, RequestFailed):
        return ApiError.from_failure(event)
    return ApiError(_CLIENT_CLOSED_REQUEST, "the request was cancelled", code="cancelled")


async def _collect_completion(completion: CompletionBuilder, events: AsyncGenerator[EngineEvent]) -> dict[str, Any]:
    """The complete answer. Raises ApiError."""
    async with aclosing(events):
        async for event in events:
            match event:
                case Delta() | ChoiceFinished():
                    completion.add(event)
                case Finished():
                    return completion.body(event)
                case RequestFailed() | Aborted():
                    raise _api_error(event)
                case Accepted():
                    pass
    raise ApiError(500, "the engine's answer has no end", code="internal_error")
