"""No more answers under way than this computer can hold: those beyond are asked to come again."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from potluck.http.errors import ApiError
from transport.errors import Busy

MAX_OPEN_ANSWERS = 512
"""More than the engine lets wait and run, so that it is the engine that says who waits."""


class Bounded:
    """ASGI middleware: 429 for a POST while `limit` others are being answered. One whose body is still coming is not:
    who sends many of them slowly takes nobody's place."""

    def __init__(self, app: ASGIApp, limit: int = MAX_OPEN_ANSWERS) -> None:
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
                    raise ApiError.of(Busy(f"{self._num_open} requests are open already", hint="try again soon"))
                self._num_open += 1
                is_here = True
            return message

        try:
            await self._app(scope, receive_counted, send)
        finally:
            self._num_open -= is_here
