"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Literal, Protocol, cast

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from potluck.http.chat_request import ChatRequest, decode_chat_request
from potluck.http.chat_response import Completion
from potluck.http.errors import ApiError
from transport.errors import ModelNotFound, RingDown
from transport.requests import (
    Aborted,
    Accepted,
    ChoiceFinished,
    Delta,
    EngineEvent,
    Finished,
    RequestFailed,
    Submit,
)

MAX_BODY_BYTES = 8 * 2**20
_KEEPALIVE_S = 10
# A client that takes nothing for this long is gone, whatever its socket says.
_SEND_TIMEOUT_S = 60
_CLIENT_CLOSED_REQUEST = 499


class EngineLike(Protocol):
    """What the API needs of `potluck.engine.client.EngineClient`."""

    @property
    def state(self) -> Literal["starting", "ready", "down"]: ...

    @property
    def reason(self) -> str: ...

    def submit(self, submit: Submit) -> AsyncIterator[EngineEvent]:
        """Events up to the terminal one; closing the iterator cancels the request."""


class ChatCompletions:
    """The handler. Raises ApiError for what can't be served; a client that disconnects takes its request with it."""

    def __init__(self, engine: EngineLike, model: str) -> None:
        self._engine = engine
        self._model = model

    async def __call__(self, request: Request) -> Response:
        try:
            chat = decode_chat_request(await _json_body(request))
        except ClientDisconnect:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        if chat.model != self._model:
            raise ApiError(
                404,
                f"the model {chat.model!r} is not served here; {self._model!r} is",
                code=ModelNotFound.code,
                param="model",
            )
        if self._engine.state != "ready":
            raise ApiError(503, f"{self._model} can't answer now: {self._engine.reason}", code=RingDown.code)
        name = f"chatcmpl-{secrets.token_hex(12)}"
        completion = Completion(
            name,
            self._model,
            num_choices=chat.n,
            wants_logprobs=chat.logprobs,
            with_usage=chat.stream_options is not None and chat.stream_options.include_usage,
        )
        # The engine's iterators are generators; the Protocol leaves that open.
        events = cast("AsyncGenerator[EngineEvent]", self._engine.submit(chat.submit(name)))
        answer = self._streamed if chat.stream else self._whole
        return await answer(request, chat, completion, events)

    async def _streamed(
        self, request: Request, chat: ChatRequest, completion: Completion, events: AsyncGenerator[EngineEvent]
    ) -> Response:
        # The status line can still say what is wrong, as long as the engine has not accepted.
        first = await anext(events)
        if isinstance(first, RequestFailed | Aborted):
            await events.aclose()
            raise _error_of(first)
        return _EventStream(_server_sent(completion, events, chat), events)

    async def _whole(
        self, request: Request, chat: ChatRequest, completion: Completion, events: AsyncGenerator[EngineEvent]
    ) -> Response:
        answer = asyncio.create_task(_gather(completion, events))
        gone = asyncio.create_task(_wait_for_disconnect(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return Response(status_code=_CLIENT_CLOSED_REQUEST)
            return Response(msgspec.json.encode(answer.result()), media_type="application/json")
        finally:
            for task in (answer, gone):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await answer


class _EventStream(EventSourceResponse):  # type: ignore[misc]  # sse_starlette is followed as untyped
    """Closes the engine's events however the stream ends, also if the client left before it began."""

    def __init__(self, content: AsyncIterator[ServerSentEvent], events: AsyncGenerator[EngineEvent]) -> None:
        super().__init__(
            content,
            ping=_KEEPALIVE_S,
            ping_message_factory=lambda: ServerSentEvent(comment="keepalive", sep="\n"),
            sep="\n",
            send_timeout=_SEND_TIMEOUT_S,
        )
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


async def _server_sent(
    completion: Completion, events: AsyncIterator[EngineEvent], chat: ChatRequest
) -> AsyncIterator[ServerSentEvent]:
    for chunk in completion.opening_chunks():
        yield _sse(chunk)
    async for event in events:
        match event:
            case Delta() | ChoiceFinished():
                yield _sse(completion.chunk(event))
            case Finished():
                if chat.stream_options is not None and chat.stream_options.include_usage:
                    yield _sse(completion.usage_chunk(event))
                yield ServerSentEvent("[DONE]", sep="\n")
            case RequestFailed() | Aborted():
                # No finish_reason and no [DONE]: a client must not take what it has for the whole answer.
                yield _sse(_error_of(event).body(), event="error")
            case _:
                pass


def _sse(body: dict[str, Any], *, event: str | None = None) -> ServerSentEvent:
    return ServerSentEvent(msgspec.json.encode(body).decode(), event=event, sep="\n")


def _error_of(event: RequestFailed | Aborted) -> ApiError:
    if isinstance(event, RequestFailed):
        return ApiError.of_failure(event)
    return ApiError(_CLIENT_CLOSED_REQUEST, "the request was cancelled", code="cancelled")


async def _gather(completion: Completion, events: AsyncGenerator[EngineEvent]) -> dict[str, Any]:
    """The whole answer. Raises ApiError."""
    async with aclosing(events):
        async for event in events:
            match event:
                case Delta() | ChoiceFinished():
                    completion.add(event)
                case Finished():
                    return completion.body(event)
                case RequestFailed() | Aborted():
                    raise _error_of(event)
                case Accepted():
                    pass
    raise ApiError(500, "the engine's answer has no end", code="internal_error")


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _json_body(request: Request) -> bytes:
    """Raises ApiError 415 or 413: other content types would let any web page post here without asking."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"content type {content_type or 'none'}; send application/json")
    too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES // 2**20} MiB", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise too_large
    return bytes(body)
