"""Requests are sent byte by byte, as no library would send them."""

from __future__ import annotations

import socket
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Raw:
    """`headers` in lower case; the last of each name."""

    status: int
    headers: dict[str, str]
    body: bytes


def send(port: int, request: bytes, timeout_s: float = 60.0) -> Raw:
    """The first answer to these bytes; status 0 if the connection ended without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        connection.sendall(request)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return parse(received)


def parse(received: bytes) -> Raw:
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Raw(int(words[1]) if len(words) > 1 else 0, headers, body)
