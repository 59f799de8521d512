"""Connections that cost nothing for long: deadlines for those that do not get on, a cap, and the idle ones go first.

uvicorn has a deadline only between two requests of a connection. Without one for a request's head, whoever opens many
connections and sends a byte now and then keeps everybody else out.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

MAX_CONNECTIONS = 1024
"""Twice as many as answers that can be open; each is a file to the system."""
HEAD_WITHIN_S = 10.0
BODY_WITHIN_S = 60.0
TAKEN_WITHIN_S = 60.0
# Each chunk of a body costs about as much time as a packet, however little is in it.
_MAX_CRUMBS = 256
_MIN_CHUNK_BYTES = 64

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 2\r\nConnection: close\r\n"
    b'\r\n{"error": {"message": "too many connections are open; try again soon", "type": "server_error", '
    b'"param": null, "code": "busy"}}'
)


class Room:
    """One server's connections that may have to make room, each with its deadline, the first one first."""

    def __init__(self) -> None:
        self.without_head: Deadlines = OrderedDict()
        self.without_body: Deadlines = OrderedDict()
        self.unread: Deadlines = OrderedDict()

    def first(self) -> Connection | None:
        """Found at once: strangers may open thousands a second."""
        return next(iter(self.without_head or self.without_body or self.unread), None)

    def forget(self, connection: Connection) -> None:
        for deadlines in (self.without_head, self.without_body, self.unread):
            connection.end(deadlines)


class Connection(H11Protocol):
    """A connection that is closed when a request's head takes longer than HEAD_WITHIN_S, also if bytes trickle in, or
    when it takes nothing of what it is sent for TAKEN_WITHIN_S.

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
        room: Room,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _Requests(h11.SERVER)
        self._room = room

    @property
    def is_under_way(self) -> bool:
        """A request's head is here, and its answer is not yet complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.max_connections:
            leaving = self._room.first()
            if leaving is None:
                transport.write(_FULL)
                transport.close()
                # Whatever it sends is nobody's.
                self.transport = transport
                return
            leaving.leave()
        super().connection_made(transport)
        self._begin(self._room.without_head, HEAD_WITHIN_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._room.forget(self)
        if self.flow is not None:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.flow is None:
            return
        super().data_received(data)
        if not self.is_under_way:
            self._begin(self._room.without_head, HEAD_WITHIN_S)
            return
        self.end(self._room.without_head)
        if self.cycle.more_body:
            self._begin(self._room.without_body, BODY_WITHIN_S)
        else:
            self.end(self._room.without_body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.is_under_way:
            self.end(self._room.without_body)
            self._begin(self._room.without_head, HEAD_WITHIN_S)

    def send_400_response(self, msg: str) -> None:
        """For what is not HTTP: an answer that is there already, or about to be, stays the only one."""
        is_answered = self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE)
        if self.is_under_way:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if is_answered:
            self.transport.close()
        else:
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._begin(self._room.unread, TAKEN_WITHIN_S)

    def resume_writing(self) -> None:
        self.end(self._room.unread)
        super().resume_writing()

    def leave(self) -> None:
        """Hang up, at once."""
        self.connections.discard(self)
        self._room.forget(self)
        if not self.transport.is_closing():
            self.transport.abort()

    def end(self, deadlines: Deadlines) -> None:
        """What one of them is for has happened."""
        deadline = deadlines.pop(self, None)
        if deadline is not None:
            deadline.cancel()

    def _begin(self, deadlines: Deadlines, within_s: float) -> None:
        if self not in deadlines and not self.transport.is_closing():
            deadlines[self] = self.loop.call_later(within_s, self.leave)


Deadlines = OrderedDict[Connection, asyncio.TimerHandle]
"""In the order of their begin, which is that of their end: all last equally long."""


class _Requests(h11.Connection):
    """Reads requests, and takes a body that comes in crumbs for none: a few connections full of them, with no key,
    would hold up everybody's answers."""

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
            if self._num_chunks > _MAX_CRUMBS and self._num_bytes < self._num_chunks * _MIN_CHUNK_BYTES:
                raise h11.RemoteProtocolError("a body in crumbs")
        return event
