"""uvicorn as the endpoint uses it: the gate before the application, bounded connections, no log of requests."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from potluck.http.access import Access
from potluck.http.connections import Connection, Room
from potluck.http.gate import Gate


def server_for(app: ASGIApp, access: Access) -> uvicorn.Server:
    config = uvicorn.Config(
        Gate(app, access),
        # Called with keywords, as a class is.
        http=cast(Any, partial(Connection, room=Room())),
        ws="none",
        # Whoever asks could say anything of whom they ask for.
        proxy_headers=False,
        log_config=None,
        # Each odd request would be a line, and there is no end of them.
        log_level="error",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    return uvicorn.Server(config)
