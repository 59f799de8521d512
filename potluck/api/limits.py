"""Limits bound the connections, their deadlines, and the number of requests that are answered at once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from potluck.api.errors import ApiError
from transport.errors import Busy

MAX_CONCURRENT_REQUESTS = 512
"""More than the engine lets wait and run, so that it is the engine that says who waits."""


class ConcurrencyLimit:
    """ASGI middleware: 429 for a POST while `limit` others are being answered. One whose body is still coming is not:
    a client that sends many of them slowly takes nobody's place."""

    def __init__(self, app: ASGIApp, limit: int = MAX_CONCURRENT_REQUESTS) -> None:
        self._app = app
        self._limit = limit
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        is_here = False

        async def receive_counted() -> Message:
            nonlocal is_here
            message = await receive()
            if not is_here and message["type"] == "http.request" and not message.get("more_body", False):
                if self._num_open >= self._limit:
                    raise ApiError.from_error(
                        Busy(f"{self._num_open} requests are open already", hint="try again soon")
                    )
                self._num_open += 1
                is_here = True
            return message

        try:
            await self._app(scope, receive_counted, send)
        finally:
            self._num_open -= is_here


MAX_CONNECTIONS = 1024
"""Twice as many as answers that can be open; each is a file to the system."""
HEADERS_TIMEOUT_S = 10.0
BODY_TIMEOUT_S = 60.0
WRITE_TIMEOUT_S = 60.0
# Each chunk of a body costs about as much time as a packet, however little is in it.
_MAX_SMALL_CHUNKS = 256
_MIN_CHUNK_BYTES = 64

_TOO_MANY_CONNECTIONS = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 2\r\nConnection: close\r\n"
    b'\r\n{"error": {"message": "too many connections are open; try again soon", "type": "server_error", '
    b'"param": null, "code": "busy"}}'
)


class ConnectionLimiter:
    """One server's connections that may have to make room, each with its deadline, the first one first."""

    def __init__(self) -> None:
        self.awaiting_headers: Deadlines = OrderedDict()
        self.awaiting_body: Deadlines = OrderedDict()
        self.awaiting_reader: Deadlines = OrderedDict()

    def evictable(self) -> LimitedConnection | None:
        """Found at once: strangers may open thousands a second."""
        return next(iter(self.awaiting_headers or self.awaiting_body or self.awaiting_reader), None)

    def remove(self, connection: LimitedConnection) -> None:
        for deadlines in (self.awaiting_headers, self.awaiting_body, self.awaiting_reader):
            connection.clear_deadline(deadlines)


class LimitedConnection(H11Protocol):
    """A connection that is closed when a request's head takes longer than HEADERS_TIMEOUT_S, also if bytes trickle in,
    or when it reads nothing for WRITE_TIMEOUT_S.

    Beyond `max_connections` the one that has waited longest without a request under way makes room, then the one whose
    request's body has been coming for longest, then the one that has not read for longest; if all are being answered,
    the new one gets a 503.
    """

    max_connections = MAX_CONNECTIONS

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limiter: ConnectionLimiter,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _RequestParser(h11.SERVER)
        self._limiter = limiter

    @property
    def is_answering(self) -> bool:
        """A request's head is here, and its answer is not yet complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.max_connections:
            evicted = self._limiter.evictable()
            if evicted is None:
                transport.write(_TOO_MANY_CONNECTIONS)
                transport.close()
                # Whatever it sends is nobody's.
                self.transport = transport
                return
            evicted.abort()
        super().connection_made(transport)
        self._set_deadline(self._limiter.awaiting_headers, HEADERS_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._limiter.remove(self)
        if self.flow is not None:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.flow is None:
            return
        super().data_received(data)
        if not self.is_answering:
            self._set_deadline(self._limiter.awaiting_headers, HEADERS_TIMEOUT_S)
            return
        self.clear_deadline(self._limiter.awaiting_headers)
        if self.cycle.more_body:
            self._set_deadline(self._limiter.awaiting_body, BODY_TIMEOUT_S)
        else:
            self.clear_deadline(self._limiter.awaiting_body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.is_answering:
            self.clear_deadline(self._limiter.awaiting_body)
            self._set_deadline(self._limiter.awaiting_headers, HEADERS_TIMEOUT_S)

    def send_400_response(self, msg: str) -> None:
        """For what is not HTTP: an answer that is there already, or about to be, stays the only one."""
        is_answered = self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)
        if self.is_answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if is_answered:
            self.transport.close()
        else:
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_deadline(self._limiter.awaiting_reader, WRITE_TIMEOUT_S)

    def resume_writing(self) -> None:
        self.clear_deadline(self._limiter.awaiting_reader)
        super().resume_writing()

    def abort(self) -> None:
        """Hang up, at once."""
        self.connections.discard(self)
        self._limiter.remove(self)
        if not self.transport.is_closing():
            self.transport.abort()

    def clear_deadline(self, deadlines: Deadlines) -> None:
        """What one of them is for has happened."""
        deadline = deadlines.pop(self, None)
        if deadline is not None:
            deadline.cancel()

    def _set_deadline(self, deadlines: Deadlines, within_s: float) -> None:
        if self not in deadlines and not self.transport.is_closing():
            deadlines[self] = self.loop.call_later(within_s, self.abort)


Deadlines = OrderedDict[LimitedConnection, asyncio.TimerHandle]
"""In the order of their begin, which is that of their end: all last equally long."""


class _RequestParser(h11.Connection):
    """Reads requests, and refuses a body in very small chunks: a few connections full of them, with no key, would hold
    up everybody's answers."""

    def __init__(self, our_role: type[h11.SERVER]) -> None:
        super().__init__(our_role)
        self._num_chunks = self._num_bytes = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_chunks = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_chunks += event.chunk_end
            self._num_bytes += len(event.data)
            if self._num_chunks > _MAX_SMALL_CHUNKS and self._num_bytes < self._num_chunks * _MIN_CHUNK_BYTES:
                raise h11.RemoteProtocolError("the body's chunks are too small")
        return event
