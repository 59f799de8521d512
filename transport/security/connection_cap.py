"""A cap bounds the connections of a socket on a network, and a thread enforces it while the owner computes.

libzmq accepts whoever comes and has no such limit. It tells a monitor the descriptor of each connection, and one that
is shut down there ends like one that its peer has closed.

The socket's owner may compute, or load, for minutes. Meanwhile nobody would hold strangers to the cap; and libzmq
waits, with all traffic of its context, for whoever gets connections' events from a monitor and does not read them.
"""

from __future__ import annotations

import itertools
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from transport.process.polling import Waker
from transport.timeouts import THREAD_JOIN_S

MONITORED_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
ENFORCE_INTERVAL_S = 0.1
# Heartbeats come for ever and never as messages.
_HEARTBEATS_BYTES_PER_S = 1024.0
# tcpi_bytes_received in Linux's struct tcp_info.
_RECEIVED_AT = 128


@dataclass(slots=True)
class _CappedConnection:
    endpoint: bytes
    address: str
    counted_bytes: float = 0.0
    is_active: bool = False
    is_known: bool = False
    """Something was heard of it that counts: it is no stranger's."""
    is_shut: bool = False


class ConnectionCap:
    """Fed with a socket's monitor events, by one thread at a time.

    Where all places are taken, a newcomer gets that of a stranger whose address has more of them than the newcomer's:
    who holds many from few addresses keeps nobody out.

    A message comes out of libzmq when its last frame is there: one that never ends would pile up. On Linux a connection
    that has sent more than `max_unread_bytes` since its last whole message is shut down; elsewhere the kernel does not
    tell how much has come.
    """

    def __init__(self, *, max_connections: int, max_per_address: int, max_unread_bytes: int | None = None) -> None:
        self._max_connections = max_connections
        self._max_per_address = max_per_address
        self._max_unread_bytes = max_unread_bytes if sys.platform == "linux" else None
        self._connections: dict[int, _CappedConnection] = {}
        self._enforced_s: float | None = None
        self.num_refused = 0

    def __len__(self) -> int:
        return len(self._connections)

    def on_event(self, event: Mapping[str, Any]) -> None:
        """An event as pyzmq parses it: a connection beyond the cap is shut down."""
        descriptor = int(event["value"])
        if event["event"] != zmq.EVENT_ACCEPTED:
            self._connections.pop(descriptor, None)
            return
        with _borrow_socket(descriptor) as connection:
            # The descriptor may be another's by now: of this process's own, or of a client of its HTTP endpoint.
            if connection is None or not _is_at(connection, event["endpoint"]):
                self._connections.pop(descriptor, None)
                return
            self._connections.pop(descriptor, None)
            address = str(connection.getpeername()[0])
            self._connections[descriptor] = _CappedConnection(event["endpoint"], address)
        if descriptor in self._connections and (refused := self._excess_connection(descriptor)) is not None:
            self._shut(refused)

    def _excess_connection(self, newest: int) -> int | None:
        """Of the descriptors, after `newest` has come."""
        address = self._connections[newest].address
        there = {descriptor: each for descriptor, each in self._connections.items() if not each.is_shut}
        if sum(each.address == address for each in there.values()) > self._max_per_address:
            return newest
        if len(there) <= self._max_connections:
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
        with _borrow_socket(descriptor) as sock:
            if sock is not None and _is_at(sock, connection.endpoint):
                sock.shutdown(socket.SHUT_RDWR)

    def mark_active(self, descriptor: int) -> None:
        """A whole message has come by this connection, from someone who may send some."""
        connection = self._connections.get(descriptor)
        if connection is not None:
            connection.is_active = connection.is_known = True

    def enforce(self, now_s: float) -> None:
        """To be called when no message waits, every `ENFORCE_INTERVAL_S` or more often: shut down what piles up."""
        if self._max_unread_bytes is None or (
            self._enforced_s is not None and now_s < self._enforced_s + ENFORCE_INTERVAL_S / 2
        ):
            return
        passed_s = 0.0 if self._enforced_s is None else now_s - self._enforced_s
        self._enforced_s = now_s
        for descriptor, connection in self._connections.items():
            with _borrow_socket(descriptor) as sock:
                if sock is None or not _is_at(sock, connection.endpoint):
                    continue
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED_AT + 8)
                received = struct.unpack_from("=Q", info, _RECEIVED_AT)[0]
                forgiven = connection.counted_bytes + passed_s * _HEARTBEATS_BYTES_PER_S
                connection.counted_bytes = received if connection.is_active else min(received, forgiven)
                connection.is_active = False
                if received - connection.counted_bytes > self._max_unread_bytes:
                    self._shut(descriptor)


@contextmanager
def _borrow_socket(descriptor: int) -> Iterator[socket.socket | None]:
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


_watch_numbers = itertools.count(1)


class ConnectionWatch:
    """Of one socket, from before it binds until it is closed. `fileno()` is readable once the connection that is
    followed has ended, until `clear`. For the socket's owner."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], sock: zmq.Socket[bytes], cap: ConnectionCap) -> None:
        self._cap = cap
        self._lock = threading.Lock()
        self._followed = -1
        # Descriptors of connections that have ended, until they are another one's.
        self._over: set[int] = set()
        self._ended = Waker()
        place = f"inproc://watch-{next(_watch_numbers)}"
        sock.monitor(place, MONITORED_EVENTS | zmq.EVENT_MONITOR_STOPPED)
        self._socket = sock
        self._monitor = context.socket(zmq.PAIR)
        # What can't be told at once waits here, without end: else libzmq's one thread would.
        self._monitor.setsockopt(zmq.RCVHWM, 0)
        self._monitor.connect(place)
        self._thread = threading.Thread(target=self._run, name="connections", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._ended.fileno()

    def clear(self) -> None:
        self._ended.clear()

    def follow(self, descriptor: int) -> None:
        """Tell when that connection ends, also if it has by now."""
        with self._lock:
            self._followed = descriptor
            self._cap.mark_active(descriptor)
            if descriptor in self._over:
                self._ended.set()

    def mark_active(self, descriptor: int) -> None:
        """A whole message has come by that connection."""
        with self._lock:
            self._cap.mark_active(descriptor)

    def enforce(self, now_s: float) -> None:
        """As `ConnectionCap.enforce`."""
        with self._lock:
            self._cap.enforce(now_s)

    def close(self) -> None:
        """Before the socket."""
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._thread.join(THREAD_JOIN_S)
        self._ended.close()

    def _run(self) -> None:
        try:
            while True:
                event = parse_monitor_message(self._monitor.recv_multipart())
                if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                    return
                self._on_event(event)
        except zmq.ZMQError:  # The context ends.
            return
        finally:
            self._monitor.close(0)

    def _on_event(self, event: Mapping[str, Any]) -> None:
        with self._lock:
            self._cap.on_event(event)
            descriptor = int(event["value"])
            if event["event"] != zmq.EVENT_DISCONNECTED:
                self._over.discard(descriptor)
                return
            self._over.add(descriptor)
            if descriptor == self._followed:
                self._ended.set()
