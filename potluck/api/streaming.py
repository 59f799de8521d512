"""An event stream sends server-sent events until they end or the client disconnects."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from transport.messages.requests import EngineEvent

_KEEPALIVE_S = 10.0
# A client that reads nothing for this long is gone, whatever its socket says.
_SEND_TIMEOUT_S = 60.0

DONE = b"data: [DONE]\n\n"

log = logging.getLogger("potluck.api")


def sse_event(data: bytes, event: bytes = b"") -> bytes:
    """One server-sent event; `data` is one line."""
    return (b"event: %s\n" % event if event else b"") + b"data: %s\n\n" % data


class EventStream(EventSourceResponse):  # type: ignore[misc]  # sse_starlette is followed as untyped
    """Sends `chunks`, which are complete events in bytes, as they come, and comments while none comes.

    Ends when they do, when the client disconnects, and when it has read nothing for a minute. `events`, where the
    chunks come from, are closed however it ends, also if the client disconnected before it began.
    """

    def __init__(self, chunks: AsyncIterator[bytes], events: AsyncGenerator[EngineEvent]) -> None:
        super().__init__(
            chunks,
            ping=_KEEPALIVE_S,
            ping_message_factory=lambda: ServerSentEvent(comment="keepalive", sep="\n"),
            send_timeout=_SEND_TIMEOUT_S,
        )
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            try:
                await super().__call__(scope, receive, send)
            except SendTimeoutError:
                log.info("a client has read nothing for %.0f s: its request is cancelled", self.send_timeout)


async def wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
