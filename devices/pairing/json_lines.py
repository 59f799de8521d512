"""JSON messages, one a line, over a plain TCP connection with someone who may mean no good."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TypeVar

import msgspec

from transport.errors import BadMessage, DeadlineExceeded

MAX_LINE_BYTES = 4096

Message = TypeVar("Message")


class ConnectionClosed(Exception):
    """The other side closed the connection, or it broke."""


def decode_line(line: bytes, kind: type[Message]) -> Message:
    """Raises BadMessage for anything else than one message of that kind."""
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadMessage(f"not a message that belongs here: {error}") from error


class JsonLineSocket:
    """One connection. For one thread, but for `interrupt`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._pending = b""

    def send(self, message: msgspec.Struct, timeout_s: float) -> bytes:
        """The line that was sent, without its end. Raises HungUp, also if it can't be sent in time."""
        line = msgspec.json.encode(message)
        try:
            self._sock.settimeout(timeout_s)
            self._sock.sendall(line + b"\n")
        except OSError as error:
            raise ConnectionClosed(str(error)) from error
        return line

    def receive(self, kind: type[Message], timeout_s: float) -> Message:
        """The next line, which has to be complete in that time, however slowly it drips in.

        Raises HungUp, BadMessage, DeadlineExceeded.
        """
        return decode_line(self.receive_line(timeout_s), kind)

    def receive_line(self, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            if len(self._pending) >= MAX_LINE_BYTES:
                raise BadMessage(f"a line of more than {MAX_LINE_BYTES} bytes")
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded(f"no complete line within {timeout_s:.0f} s")
            try:
                self._sock.settimeout(left_s)
                data = self._sock.recv(MAX_LINE_BYTES - len(self._pending))
            except TimeoutError:
                continue
            except OSError as error:
                raise ConnectionClosed(str(error)) from error
            if not data:
                raise ConnectionClosed("the connection was closed")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def is_waiting(self) -> bool:
        """Whether the other side is there and says nothing, as one that waits for an answer does."""
        if self._pending:
            return False
        try:
            self._sock.settimeout(0.0)
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def interrupt(self) -> None:
        """From any thread: the one whose connection it is gets HungUp."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()
