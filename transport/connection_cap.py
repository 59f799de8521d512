"""How many connections a socket that listens on a network may have, strangers included.

libzmq accepts whoever comes and has no such limit. It tells a monitor the descriptor of each connection, and one that
is shut down there ends like one that its peer has closed.
"""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any

import zmq

MONITORED = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED


class ConnectionCap:
    """Fed with a socket's monitor events by the thread that owns it."""

    def __init__(self, *, most: int, most_per_address: int) -> None:
        self._most = most
        self._most_per_address = most_per_address
        self._addresses: dict[int, str] = {}
        self.num_refused = 0

    def __len__(self) -> int:
        return len(self._addresses)

    def note(self, event: Mapping[str, Any]) -> None:
        """An event as pyzmq parses it: a connection beyond the cap is shut down."""
        descriptor = int(event["value"])
        if event["event"] != zmq.EVENT_ACCEPTED:
            self._addresses.pop(descriptor, None)
            return
        connection = _connection(descriptor)
        if connection is None:
            return
        try:
            address = str(connection.getpeername()[0])
            self._addresses[descriptor] = address
            if len(self._addresses) > self._most or Counter(self._addresses.values())[address] > self._most_per_address:
                self.num_refused += 1
                connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            self._addresses.pop(descriptor, None)  # It is gone already.
        finally:
            connection.detach()  # libzmq's, to close.


def _connection(descriptor: int) -> socket.socket | None:
    with contextlib.suppress(OSError):
        return socket.socket(fileno=descriptor)
    return None
