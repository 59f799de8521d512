"""The application runs on a loopback socket, over a scripted engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
from starlette.types import ASGIApp

from potluck.api.access import AccessPolicy
from potluck.api.server import create_app, make_server
from potluck.head.endpoint import bind_endpoint
from tests.support.api.scripted_engine import ScriptedEngine

MODEL = "tiny"


class Server:
    """uvicorn in a thread, over a scripted engine."""

    def __init__(self, app: ASGIApp | None = None, **access: Any) -> None:
        """`access` are more fields of `AccessPolicy`."""
        self.engine = ScriptedEngine()
        self.socket = bind_endpoint("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self._server = make_server(
            create_app(self.engine, model=MODEL) if app is None else app, AccessPolicy(port=self.port, **access)
        )
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve(sockets=[self.socket])), daemon=True
        )
        self._thread.start()
        eventually(lambda: self._server.started)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key=key, max_retries=0, timeout=60.0)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(5.0)


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)
