"""How many connections a socket that listens on a network may have, strangers included, and what they may pile up.

libzmq accepts whoever comes and has no such limit. It tells a monitor the descriptor of each connection, and one that
is shut down there ends like one that its peer has closed.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import zmq

MONITORED = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
LOOK_EVERY_S = 0.1
# Heartbeats come for ever and never as messages.
_HEARTBEATS_BYTES_PER_S = 1024.0
# tcpi_bytes_received in Linux's struct tcp_info.
_RECEIVED_AT = 128


@dataclass(slots=True)
class _Connection:
    endpoint: bytes
    address: str
    counted_bytes: float = 0.0
    is_heard: bool = False
    is_known: bool = False
    """Something was heard of it that counts: it is no stranger's."""
    is_shut: bool = False


class ConnectionCap:
    """Fed with a socket's monitor events, by one thread at a time.

    Where all places are taken, a newcomer gets that of a stranger whose address has more of them than the newcomer's:
    who holds many from few addresses keeps nobody out.

    A message comes out of libzmq when its last frame is there: one that never ends would pile up. On Linux a connection
    that has sent more than `most_unread_bytes` since its last whole message is shut down; elsewhere the kernel does not
    tell how much has come.
    """

    def __init__(self, *, most: int, most_per_address: int, most_unread_bytes: int | None = None) -> None:
        self._most = most
        self._most_per_address = most_per_address
        self._most_unread_bytes = most_unread_bytes if sys.platform == "linux" else None
        self._connections: dict[int, _Connection] = {}
        self._looked_s: float | None = None
        self.num_refused = 0

    def __len__(self) -> int:
        return len(self._connections)

    def note(self, event: Mapping[str, Any]) -> None:
        """An event as pyzmq parses it: a connection beyond the cap is shut down."""
        descriptor = int(event["value"])
        if event["event"] != zmq.EVENT_ACCEPTED:
            self._connections.pop(descriptor, None)
            return
        with _borrowed(descriptor) as connection:
            # The descriptor may be another's by now: of this process's own, or of a client of its HTTP endpoint.
            if connection is None or not _is_at(connection, event["endpoint"]):
                self._connections.pop(descriptor, None)
                return
            self._connections.pop(descriptor, None)
            address = str(connection.getpeername()[0])
            self._connections[descriptor] = _Connection(event["endpoint"], address)
        if descriptor in self._connections and (refused := self._one_too_many(descriptor)) is not None:
            self._shut(refused)

    def _one_too_many(self, newest: int) -> int | None:
        """Of the descriptors, after `newest` has come."""
        address = self._connections[newest].address
        there = {descriptor: each for descriptor, each in self._connections.items() if not each.is_shut}
        if sum(each.address == address for each in there.values()) > self._most_per_address:
            return newest
        if len(there) <= self._most:
            return None
        strangers = {descriptor: each.address for descriptor, each in there.items() if not each.is_known}
        num_by_address = Counter(strangers.values())
        [(most_from, num)] = num_by_address.most_common(1)
        if num <= num_by_address[address]:
            return newest
        return next(descriptor for descriptor, each in strangers.items() if each == most_from)

    def _shut(self, descriptor: int) -> None:
        connection = self._connections[descriptor]
        connection.is_shut = True
        self.num_refused += 1
        with _borrowed(descriptor) as sock:
            if sock is not None and _is_at(sock, connection.endpoint):
                sock.shutdown(socket.SHUT_RDWR)

    def heard(self, descriptor: int) -> None:
        """A whole message has come by this connection, from someone who may send some."""
        connection = self._connections.get(descriptor)
        if connection is not None:
            connection.is_heard = connection.is_known = True

    def look(self, now_s: float) -> None:
        """To be called when no message waits, every `LOOK_EVERY_S` or more often: shut down what piles up."""
        if self._most_unread_bytes is None or (
            self._looked_s is not None and now_s < self._looked_s + LOOK_EVERY_S / 2
        ):
            return
        passed_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        self._looked_s = now_s
        for descriptor, connection in self._connections.items():
            with _borrowed(descriptor) as sock:
                if sock is None or not _is_at(sock, connection.endpoint):
                    continue
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED_AT + 8)
                received = struct.unpack_from("=Q", info, _RECEIVED_AT)[0]
                forgiven = connection.counted_bytes + passed_s * _HEARTBEATS_BYTES_PER_S
                connection.counted_bytes = received if connection.is_heard else min(received, forgiven)
                connection.is_heard = False
                if received - connection.counted_bytes > self._most_unread_bytes:
                    self._shut(descriptor)


@contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket | None]:
    """libzmq's socket, for it to close; None if it has ended. Within, OSError means that it ends now."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        yield None
        return
    try:
        yield sock
    except OSError:
        pass
    finally:
        sock.detach()


def _is_at(sock: socket.socket, endpoint: bytes) -> bool:
    """Whether it is a connection to the port of `endpoint`, "tcp://127.0.0.1:5000"."""
    port = sock.getsockname()[1] if sock.family in (socket.AF_INET, socket.AF_INET6) else None
    return str(port) == endpoint.decode("ascii", "replace").rpartition(":")[2].rstrip("\0")
