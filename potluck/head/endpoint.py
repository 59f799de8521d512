"""The HTTP endpoint runs in a thread of the head's process, over whichever engine the ring has now."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator

import uvicorn

from potluck.api.access import AccessPolicy
from potluck.api.limits import MAX_CONNECTIONS
from potluck.api.server import create_app, make_server
from potluck.engine.client import EngineClient
from potluck.head.api_access import local_url
from potluck.head.routes import HeadControl, head_routes
from transport.errors import ConfigError, PortInUse, PotluckError, RingDown
from transport.messages.requests import EngineEvent, EngineState, Pong, Submit, request_failed
from transport.process.child import lower_priority

_START_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 3.0
_PONG_TIMEOUT_S = 1.0
_MAX_FILES = 4 * MAX_CONNECTIONS
_STARTING = RingDown("the ring is starting", hint="try again in a moment")


def bind_endpoint(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything is loaded. Raises PortInUse, ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol by name: asyncio turns Nagle's delay off, 40 ms an answer, only where it is known to be TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    # On Windows the usual option would let another program take the same port.
    exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR if exclusive is None else exclusive, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRINUSE, getattr(errno, "WSAEACCES", errno.EADDRINUSE)):
            raise PortInUse(
                f"port {port} of {host} is in use", hint="choose another one with --port, or 0 for any free one"
            ) from error
        is_port = error.errno in (errno.EACCES, errno.EPERM)
        hint = "choose another --port" if is_port else "--host is an address of this host, or 0.0.0.0 for all of them"
        raise ConfigError(f"can't listen on {host}:{port}: {error.strerror}", hint=hint) from error
    return listener


class EngineSwitch:
    """Passes requests to the engine while it has a ring, and says why it has none."""

    def __init__(self) -> None:
        self._client: EngineClient | None = None
        self._is_down = False
        self._error: PotluckError = _STARTING

    @property
    def state(self) -> EngineState:
        if self._client is None:
            return "down" if self._is_down else "starting"
        return self._client.state

    @property
    def reason(self) -> str:
        return self._error.message if self._client is None else self._client.reason

    def submit(self, submit: Submit) -> AsyncGenerator[EngineEvent]:
        """The request's events up to its terminal one; closing it cancels what has not ended."""
        return _refuse(submit, self._error) if self._client is None else self._client.submit(submit)

    def set_client(self, client: EngineClient | None) -> None:
        self._client = client
        self._is_down, self._error = False, _STARTING

    def mark_down(self, error: PotluckError) -> None:
        """End requests with `error`, and refuse those to come, until there is another ring."""
        client, self._client = self._client, None
        self._is_down, self._error = True, error
        if client is not None:
            client.end_ring(error)

    async def ping(self) -> Pong:
        if self._client is None:
            raise self._error
        return await self._client.ping()


async def _refuse(submit: Submit, error: PotluckError) -> AsyncGenerator[EngineEvent]:
    yield request_failed(submit.request, error)


class HttpEndpoint:
    """Serves the API, the chat page and the head's status on a listening socket."""

    def __init__(
        self,
        listener: socket.socket,
        *,
        model: str,
        access: AccessPolicy | None = None,
    ) -> None:
        """`access` None: for this host alone, without a key."""
        # What the head's own commands show, to be told from everybody else who may ask.
        self.secret = secrets.token_urlsafe(32)
        self._listener = listener
        self._access = access or AccessPolicy(port=listener.getsockname()[1])
        self._model = model
        self._engine = EngineSwitch()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        """For programs of this host."""
        return local_url(*self._listener.getsockname()[:2])

    def start(self, head: HeadControl) -> None:
        """Serve from now on; requests are refused with a reason until an engine is connected."""
        _raise_file_limit()
        app = create_app(self._engine, model=self._model)
        app.router.routes.extend(head_routes(head, self.secret))
        self._server = make_server(app, self._access)
        self._thread = threading.Thread(target=self._serve, args=(self._server,), name="http", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise ConfigError(f"the endpoint at {self.url} did not start", hint="see the messages above")
            time.sleep(0.01)

    def connect(self, client: EngineClient) -> None:
        """Send requests to that engine, which has a ring."""
        self._engine.set_client(client)

    def disconnect(self) -> None:
        """The ring is being loaded."""
        self._engine.set_client(None)

    def mark_down(self, error: PotluckError) -> None:
        self._engine.mark_down(error)

    def is_idle(self) -> bool:
        """Nobody waits for an answer, or nobody will get one."""
        if self._loop is None or self._engine.state != "ready":
            return True
        pong = self.pong(_STOP_TIMEOUT_S)
        return pong is not None and pong.active_requests == 0 and pong.queued_requests == 0

    def pong(self, timeout_s: float = _PONG_TIMEOUT_S) -> Pong | None:
        """The engine's counters; None if it is not ready, or does not answer in time. Not for the server's thread."""
        if self._loop is None or self._engine.state != "ready":
            return None
        asked = asyncio.run_coroutine_threadsafe(self._engine.ping(), self._loop)
        try:
            return asked.result(timeout_s)
        except (PotluckError, TimeoutError):
            asked.cancel()
            return None

    def stop(self) -> None:
        """End open requests and close; takes at most a few seconds."""
        self._engine.mark_down(RingDown("the head is stopping"))
        if self._server is not None:
            self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(_STOP_TIMEOUT_S)

    def _serve(self, server: uvicorn.Server) -> None:
        lower_priority()

        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            await server.serve(sockets=[self._listener])

        asyncio.run(main())


def _raise_file_limit() -> None:
    """Each connection is a file to the system, and its default may be 256 of them."""
    if sys.platform == "win32":
        return
    import resource  # Not there on Windows.

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(_MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # A system may forbid it for reasons of its own: then there are fewer.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
