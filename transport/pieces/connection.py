"""One TCP connection of a ROUTER, so that it alone can be ended: libzmq knows no way to drop a single peer."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

import zmq

# struct linger, of shorts on Windows: what the kernel has not sent yet is thrown away.
_RESET = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Connection:
    """`descriptor` is libzmq's; it is this connection's as long as its far end is `far_end`."""

    descriptor: int
    far_end: tuple[Any, ...]

    def end(self) -> None:
        """Nothing that waits in the kernel still goes out. To libzmq it looks as if the peer had gone."""
        with contextlib.suppress(OSError):  # It has ended already.
            sock = socket.socket(fileno=self.descriptor)
            try:
                if sock.getpeername() == self.far_end:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    sock.shutdown(socket.SHUT_RDWR)
            finally:
                sock.detach()  # libzmq's, to close

    def is_there(self) -> bool:
        return _far_end(self.descriptor) == self.far_end


def connection_of(frame: zmq.Frame) -> Connection | None:
    """The one that the frame came by; None if it has ended, or is none of TCP."""
    try:
        descriptor = int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return None
    far_end = _far_end(descriptor)
    return Connection(descriptor, far_end) if far_end is not None else None


def _far_end(descriptor: int) -> tuple[Any, ...] | None:
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        return None
    try:
        return tuple(sock.getpeername())
    except OSError:
        return None
    finally:
        sock.detach()
