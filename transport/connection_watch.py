"""Keeps watch over who connects to a socket on a network, in a thread of its own.

The socket's owner may compute, or load, for minutes. Meanwhile nobody would hold strangers to the cap; and libzmq
waits, with all traffic of its context, for whoever is told of connections by a monitor and does not listen.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from transport.connection_cap import MONITORED, ConnectionCap
from transport.wake import Wake

_END_TIMEOUT_S = 2.0
_numbers = itertools.count(1)


class ConnectionWatch:
    """Of one socket, from before it binds until it is closed. `fileno()` is readable once the connection that is
    followed has ended, until `clear`. For the socket's owner."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], sock: zmq.Socket[bytes], cap: ConnectionCap) -> None:
        self._cap = cap
        self._lock = threading.Lock()
        self._followed = -1
        # Descriptors of connections that have ended, until they are another one's.
        self._over: set[int] = set()
        self._ended = Wake()
        place = f"inproc://watch-{next(_numbers)}"
        sock.monitor(place, MONITORED | zmq.EVENT_MONITOR_STOPPED)
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
            self._cap.heard(descriptor)
            if descriptor in self._over:
                self._ended.set()

    def heard(self, descriptor: int) -> None:
        """A whole message has come by that connection."""
        with self._lock:
            self._cap.heard(descriptor)

    def look(self, now_s: float) -> None:
        """As `ConnectionCap.look`."""
        with self._lock:
            self._cap.look(now_s)

    def close(self) -> None:
        """Before the socket."""
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._thread.join(_END_TIMEOUT_S)
        self._ended.close()

    def _run(self) -> None:
        try:
            while True:
                event = parse_monitor_message(self._monitor.recv_multipart())
                if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                    return
                self._note(event)
        except zmq.ZMQError:  # The context ends.
            return
        finally:
            self._monitor.close(0)

    def _note(self, event: Mapping[str, Any]) -> None:
        with self._lock:
            self._cap.note(event)
            descriptor = int(event["value"])
            if event["event"] != zmq.EVENT_DISCONNECTED:
                self._over.discard(descriptor)
                return
            self._over.add(descriptor)
            if descriptor == self._followed:
                self._ended.set()
