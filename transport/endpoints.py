"""Endpoints as ZeroMQ writes them, and binding to one."""

from __future__ import annotations

import zmq

from transport.errors import ConfigError


def tcp_endpoint(address: str, port: int | None = None) -> str:
    """Without a port (or with 0), any free one: whoever binds it learns which."""
    return f"tcp://{address}:{port or '*'}"


def is_tcp(endpoint: str) -> bool:
    return endpoint.startswith("tcp://")


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
