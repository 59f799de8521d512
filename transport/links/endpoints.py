"""Endpoints as ZeroMQ writes them, and binding to one.

Between processes of one host a socket is a file (ipc) in a folder that only its user can enter. Where there is no ipc
(Windows, or `POTLUCK_NO_IPC=1`) it is a port of the loopback address, and kept like one on a network: by CURVE.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import zmq

from transport.errors import ConfigError

LOOPBACK = "127.0.0.1"
_PORT_DIGITS = 5


def tcp_endpoint(address: str, port: int | None = None) -> str:
    """Without a port (or with 0), any free one: whoever binds it learns which."""
    return f"tcp://{address}:{port or '*'}"


def is_tcp(endpoint: str) -> bool:
    return endpoint.startswith("tcp://")


def is_host_endpoint(endpoint: str) -> bool:
    """Whether it is an IPv4 address and a port, bound: what another host may say that it listens at."""
    address, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    try:
        is_address = not ipaddress.IPv4Address(address).is_unspecified
    except ValueError:
        return False
    return is_tcp(endpoint) and is_address and is_port(port)


def is_port(text: str) -> bool:
    """Of a service, as anyone may write it."""
    # Numbers of thousands of digits are no numbers to Python.
    return text.isascii() and text.isdecimal() and len(text) <= _PORT_DIGITS and 0 < int(text) < 65536


def has_ipc() -> bool:
    return os.name != "nt" and bool(zmq.has("ipc")) and os.environ.get("POTLUCK_NO_IPC") != "1"


def local_endpoint(run_dir: Path, name: str) -> str:
    """Where to bind a socket for processes of this host; `bind` says where it then is."""
    return f"ipc://{run_dir}/{name}" if has_ipc() else tcp_endpoint(LOOPBACK)


def fixed_local_endpoint(run_dir: Path, name: str) -> str:
    """The same for a socket whose place must be known before it is bound."""
    return f"ipc://{run_dir}/{name}" if has_ipc() else tcp_endpoint(LOOPBACK, free_port(LOOPBACK))


def free_port(address: str) -> int:
    """A port of this host that nobody listens at now. Raises ConfigError."""
    try:
        with socket.create_server((address, 0)) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"can't listen at {address}: {error.strerror}", hint="is it an address of this host?"
        ) from error


def port_or_zero(address: str, port: int) -> int:
    """`port` if it is free at `address` ("*": at all of them), else 0: any."""
    try:
        socket.create_server(("" if address == "*" else address, port)).close()
    except OSError:
        return 0
    return port


def port_of(endpoint: str) -> int:
    """Of a TCP endpoint that is bound."""
    return int(endpoint.rpartition(":")[2])


def bind(sock: zmq.Socket[bytes], endpoint: str) -> str:
    """Bind, and return the endpoint that others connect to. Raises ConfigError."""
    try:
        sock.bind(endpoint)
    except zmq.ZMQError as error:
        sock.close(0)
        raise ConfigError(
            f"can't listen at {endpoint}: {zmq.strerror(error.errno or 0)}",
            hint="is it an address of this host, and its port free?" if is_tcp(endpoint) else "see POTLUCK_RUNTIME",
        ) from error
    return sock.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
