"""An event stream sends server-sent events until they end or the client leaves."""

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
# A client that takes nothing for this long is gone, whatever its socket says.
_SEND_TIMEOUT_S = 60.0

log = logging.getLogger("potluck.http")


class EventStream(EventSourceResponse):  # type: ignore[misc]  # sse_starlette is followed as untyped
    """Sends `pieces`, which are whole events in bytes, as they come, and comments while none comes.

    Ends when they do, when the client leaves, and when it has taken nothing for a minute. `events`, where the pieces
    come from, are closed however it ends, also if the client left before it began.
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
