"""A way to interrupt a thread that waits in a ZeroMQ poller, which owns its sockets and may not share them."""

from __future__ import annotations

import contextlib
import socket


class Wake:
    """Register `fileno()` with a poller for reading; `set` from any thread makes it readable until `clear`."""

    def __init__(self) -> None:
        self._in, self._out = socket.socketpair()
        self._in.setblocking(False)
        self._out.setblocking(False)

    def fileno(self) -> int:
        return self._out.fileno()

    def set(self) -> None:
        # A full buffer means that wakes are waiting already; a closed one that nobody waits any more.
        with contextlib.suppress(BlockingIOError, OSError):
            self._in.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._out.recv(4096):
                pass

    def close(self) -> None:
        self._in.close()
        self._out.close()
