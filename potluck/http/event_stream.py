"""A response that never ends by itself: server-sent events, for as long as the client reads them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from transport.requests import EngineEvent

_KEEPALIVE = b": keepalive\n\n"
_KEEPALIVE_S = 10.0
# A client that takes nothing for this long is gone, whatever its socket says.
_SEND_TIMEOUT_S = 60.0


class EventStream(Response):
    """Sends `pieces`, which are whole events in bytes, as they come, and comments while none comes.

    Ends when they do, when the client leaves, and when it has taken nothing for a minute. `events`, where the pieces
    come from, are closed however it ends, also if the client left before it began.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncIterator[bytes], events: AsyncGenerator[EngineEvent]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=self.media_type)
        del self.headers["content-length"]
        self._pieces = pieces
        self._events = events
        self._sending_since_s: float | None = None
        self._last_sent_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            tasks = [
                asyncio.create_task(self._send_all(send)),
                asyncio.create_task(self._watch(send)),
                asyncio.create_task(wait_for_disconnect(receive)),
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if tasks[0].done():
                    tasks[0].result()
            finally:
                for task in tasks:
                    task.cancel()
                for task in tasks:
                    with contextlib.suppress(asyncio.CancelledError, Exception):
                        await task

    async def _send_all(self, send: Send) -> None:
        async for piece in self._pieces:
            self._sending_since_s = time.monotonic()
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            self._last_sent_s, self._sending_since_s = self._sending_since_s, None
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, send: Send) -> None:
        """Keeps the connection alive; returns when the client takes nothing."""
        while True:
            await asyncio.sleep(max(_KEEPALIVE_S / 10, self._last_sent_s + _KEEPALIVE_S - time.monotonic()))
            now_s = time.monotonic()
            if self._sending_since_s is not None:
                if now_s - self._sending_since_s > _SEND_TIMEOUT_S:
                    return
            elif now_s - self._last_sent_s >= _KEEPALIVE_S:
                try:
                    async with asyncio.timeout(_SEND_TIMEOUT_S):
                        await send({"type": "http.response.body", "body": _KEEPALIVE, "more_body": True})
                        self._last_sent_s = now_s
                except TimeoutError:
                    return


async def wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
