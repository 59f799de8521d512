"""Attackers send what libzmq lets them with libzmq, and the rest byte by byte."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq

from transport.security.curve import Curve, KeyPair

CHOSEN = b"a name of its own"
_MORE, _LONG, _COMMAND = 1, 2, 4


def address_of(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)


@contextmanager
def dealer(endpoint: str, keys: KeyPair | None, server_key: str = "", **options: Any) -> Iterator[Any]:
    """A DEALER with these keys; without any it speaks no CURVE."""
    context: Any = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDTIMEO, 200)
    for option, value in options.items():
        sock.set(getattr(zmq, option), value)
    if keys is not None:
        Curve(context, keys).client_auth(server_key)(sock)
    sock.connect(endpoint)
    try:
        yield sock
    finally:
        context.destroy(0)


def insist(sock: Any, says: list[list[bytes]], *, for_s: float) -> None:
    """Say it over and over."""
    until = time.monotonic() + for_s
    while time.monotonic() < until:
        for frames in says:
            with contextlib.suppress(zmq.Again):
                sock.send_multipart(frames)
        time.sleep(0.01)


@contextmanager
def raw(endpoint: str) -> Iterator[socket.socket]:
    with socket.create_connection(address_of(endpoint), 60.0) as sock:
        yield sock


def push(sock: socket.socket, data: bytes) -> None:
    """As much of it as it takes."""
    with contextlib.suppress(OSError):
        sock.sendall(data)


def greeting(mechanism: bytes = b"NULL", *, major: int = 3, minor: int = 1) -> bytes:
    """ZMTP's first 64 bytes: https://rfc.zeromq.org/spec/37/"""
    return b"\xff" + bytes(8) + b"\x7f" + bytes((major, minor)) + mechanism.ljust(20, b"\0") + bytes(32)


def frame(body: bytes, flags: int = 0, announced: int | None = None) -> bytes:
    size = len(body) if announced is None else announced
    if size > 255:
        return bytes([flags | _LONG]) + struct.pack(">Q", size) + body
    return bytes((flags, size)) + body


def ready() -> bytes:
    """NULL's READY of a DEALER."""
    return frame(b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER", _COMMAND)


def hello() -> bytes:
    """CURVE's HELLO, with noise for the box."""
    return frame(b"\x05HELLO\x01\x00" + bytes(72) + b"\x11" * 32 + bytes(8) + b"\x22" * 80, _COMMAND)


def messages(says: list[list[bytes]]) -> bytes:
    """Unencrypted."""
    return b"".join(
        frame(part, _MORE if index < len(frames) - 1 else 0) for frames in says for index, part in enumerate(frames)
    )


class RecordingRelay:
    """Passes one connection after another on to `endpoint`, and keeps what each client sent."""

    def __init__(self, endpoint: str) -> None:
        self._to = address_of(endpoint)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent: list[bytearray] = []
        self.came: list[bytearray] = []
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for sock in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._to)
                self._open += [near, far]
                self.sent.append(bytearray())
                self.came.append(bytearray())
                for source, sink, record in ((near, far, self.sent[-1]), (far, near, self.came[-1])):
                    threading.Thread(target=_pass_on, args=(source, sink, record), daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            record += data
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
