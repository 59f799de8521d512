"""Connections that mean no good, held for some seconds, and opened anew whenever they end.

python -m bench.ring.hostile_clients --seconds S --connections N --server-key KEY ADDRESS:PORT ...

They go to loopback addresses alone. Kinds, in turns over all ports: idle, half a greeting, a whole handshake without
encryption, CURVE with random keys, a byte now and then, frames that are announced and pushed, or never finished. Prints
how many connections it opened, and the bytes that it could push.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import itertools
import json
import os
import selectors
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import zmq

from transport.security.curve import Curve, new_key_pair

SocketAddress = tuple[str, int]
Kind = Literal[
    "idle",
    "half a greeting",
    "no encryption",
    "random key",
    "slow",
    "large frames",
    "unfinished frames",
    "unfinished large frames",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
_RENEW_AFTER_S = 0.05
_TICK_S = 0.02
_MOST_OPENED = 50_000
_CHUNK = os.urandom(2**16)
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01"
_NULL = _GREETING + b"NULL".ljust(20, b"\0") + bytes(32)
_CURVE = _GREETING + b"CURVE".ljust(20, b"\0") + bytes(32)
_READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
_OPENINGS: dict[Kind, bytes] = {
    "idle": b"",
    "half a greeting": _NULL[:20],
    "no encryption": _NULL + _READY + b"\x00\x05hello",
    "slow": b"",
    # A command and a message of 2³¹ bytes, and as much of each as it takes.
    "large frames": _CURVE + b"\x06" + (2**31).to_bytes(8, "big"),
    # As large as edges and control allow, and never whole.
    "unfinished frames": _CURVE + b"\x06" + (60_000).to_bytes(8, "big") + bytes(59_000),
    "unfinished large frames": _CURVE + b"\x06" + (260_000).to_bytes(8, "big") + bytes(259_000),
}


@dataclass(slots=True)
class _HostileConnection:
    kind: Kind
    place: SocketAddress
    sock: socket.socket | None = None
    reopen_at_s: float = 0.0
    sent: int = 0


class HostileClients:
    """All of them, run by one thread."""

    def __init__(self, places: list[SocketAddress], num_connections: int, server_key: str) -> None:
        # All ports for one kind, then all for the next one.
        turns = itertools.cycle([(kind, place) for kind in KINDS for place in places])
        chosen = list(itertools.islice(turns, num_connections))
        self._slots = [_HostileConnection(kind, place) for kind, place in chosen if kind != "random key"]
        self._with_keys = [place for kind, place in chosen if kind == "random key"]
        self._server_key = server_key
        self._selector = selectors.DefaultSelector()
        self.num_opened = 0
        self.pushed_bytes = 0

    def run(self, seconds: float) -> None:
        context: Any = zmq.Context()
        context.set(zmq.MAX_SOCKETS, 2048)
        for address, port in self._with_keys:
            self._connect_with_key(context, f"tcp://{address}:{port}")
        until = time.monotonic() + seconds
        try:
            while (now := time.monotonic()) < until:
                for slot in self._slots:
                    if slot.sock is None and now >= slot.reopen_at_s and self.num_opened < _MOST_OPENED:
                        self._open(slot, now)
                    elif slot.sock is not None and slot.kind == "large frames":
                        self._flood(slot, now)
                    elif slot.sock is not None and slot.kind == "slow":
                        self._send_slowly(slot, now)
                for key, _ in self._selector.select(_TICK_S):
                    self._read(key.data, now)
        finally:
            context.destroy(0)
            for slot in self._slots:
                if slot.sock is not None:
                    slot.sock.close()

    def _connect_with_key(self, context: Any, endpoint: str) -> None:
        sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RECONNECT_IVL, int(_RENEW_AFTER_S * 1000))
        Curve(context, new_key_pair()).client_auth(self._server_key)(sock)
        sock.connect(endpoint)
        with contextlib.suppress(zmq.Again):
            sock.send(b"hello", zmq.DONTWAIT)

    def _open(self, slot: _HostileConnection, now: float) -> None:
        slot.sock = socket.socket()
        slot.sock.setblocking(False)
        slot.sent = 0
        self.num_opened += 1
        with contextlib.suppress(BlockingIOError):
            slot.sock.connect(slot.place)
        self._selector.register(slot.sock, selectors.EVENT_READ, slot)
        if _OPENINGS[slot.kind]:
            self._send(slot, _OPENINGS[slot.kind], now)

    def _flood(self, slot: _HostileConnection, now: float) -> None:
        while slot.sock is not None:
            if not self._send(slot, _CHUNK, now):
                return

    def _send_slowly(self, slot: _HostileConnection, now: float) -> None:
        self._send(slot, _CURVE[slot.sent % len(_CURVE) :][:1], now)
        slot.sent += 1

    def _send(self, slot: _HostileConnection, data: bytes, now: float) -> bool:
        """Whether it took something."""
        assert slot.sock is not None
        try:
            self.pushed_bytes += slot.sock.send(data)
        except BlockingIOError:
            return False
        except OSError:
            self._close(slot, now)
            return False
        return True

    def _read(self, slot: _HostileConnection, now: float) -> None:
        if slot.sock is None:
            return
        try:
            if slot.sock.recv(2**16):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._close(slot, now)

    def _close(self, slot: _HostileConnection, now: float) -> None:
        assert slot.sock is not None
        self._selector.unregister(slot.sock)
        slot.sock.close()
        slot.sock, slot.reopen_at_s = None, now + _RENEW_AFTER_S


def _place(text: str) -> SocketAddress:
    address, _, port = text.rpartition(":")
    if not ipaddress.ip_address(address).is_loopback:
        raise ValueError(f"{address} is another host")
    return address, int(port)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--server-key", required=True)
    parser.add_argument("places", type=_place, nargs="+", metavar="ADDRESS:PORT")
    arguments = parser.parse_args()
    hostile = HostileClients(arguments.places, arguments.connections, arguments.server_key)
    hostile.run(arguments.seconds)
    json.dump({"opened": hostile.num_opened, "pushed_bytes": hostile.pushed_bytes}, sys.stdout)


if __name__ == "__main__":
    main()
