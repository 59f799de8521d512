"""The chat handler answers POST /v1/chat/completions, at once or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol, cast

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from potluck.api.errors import ApiError, json_response, model_not_found
from potluck.api.json_body import BodyReader
from potluck.api.openai.chat_request import ChatRequest, decode_chat_request
from potluck.api.openai.chat_response import ChunkEncoder, CompletionBuilder, CompletionHeader
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
)

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
