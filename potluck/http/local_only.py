"""Only pages and programs of this host may ask.

The endpoint listens on loopback alone, but a browser here runs other people's pages: one whose name suddenly resolves
to 127.0.0.1 (DNS rebinding) could talk to it as its own origin. Its requests still carry the page's name as Host.
"""

from __future__ import annotations

import re

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from potluck.http.errors import ApiError

_LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])?(:\d*)?", re.IGNORECASE)


class LocalOnly:
    """ASGI middleware: 403 for a request whose Host is not this host's loopback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = HTTPConnection(scope).headers.get("host", "") if scope["type"] == "http" else ""
        if _LOCAL.fullmatch(host):
            await self._app(scope, receive, send)
            return
        error = ApiError(403, f"the host {host!r} is not served here; use localhost", code="host_not_allowed")
        await error.response()(scope, receive, send)
