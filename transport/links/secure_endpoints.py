"""A process listens for its neighbours by ipc on its own host and by CURVE everywhere else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import zmq

from transport.errors import ConfigError
from transport.links.endpoints import fixed_local_endpoint, is_tcp, local_endpoint, tcp_endpoint
from transport.security.curve import Curve, Guard, KeyPair, Prepare, allow_only

Where = Literal["local", "network"]
"""From where a neighbour connects: from this host or from another one."""


class SecureEndpoints:
    """One process's. `keys` are its host's; without them it can only talk within the host. `address` is where other
    hosts reach it. Close it before the context, if it has keys."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        run_dir: Path,
        *,
        keys: KeyPair | None,
        address: str | None,
    ) -> None:
        self._run_dir = run_dir
        self._address = address
        self._curve = Curve(context, keys) if keys is not None else None

    @property
    def key(self) -> str:
        """This host's public key; empty without keys."""
        return self._curve.keys.public if self._curve is not None else ""

    @property
    def curve(self) -> Curve:
        """Raises ConfigError without keys."""
        if self._curve is None:
            raise ConfigError("this process has no keys for the network", hint="start potluck anew")
        return self._curve

    def listen_at(self, where: Where, name: str, *, known: bool = False) -> str:
        """An endpoint to bind; `known`: one that does not change when it is bound. Raises ConfigError."""
        if where == "local":
            own = f"{os.getpid()}-{name}"
            return fixed_local_endpoint(self._run_dir, own) if known else local_endpoint(self._run_dir, own)
        if self._address is None:
            raise ConfigError("this host has no address for others", hint="start it without --no-lan")
        return tcp_endpoint(self._address)

    def guard(self, endpoint: str, upstream: str) -> Guard | None:
        """For the socket at `endpoint`: only the key `upstream` may come in, or this host's own where that is empty.
        Raises ConfigError, BadMessage."""
        return self.curve.guard(allow_only(upstream or self.key)) if is_tcp(endpoint) else None

    def client_auth(self, endpoint: str, key: str) -> Prepare | None:
        """For a socket that connects to `endpoint`, to whoever has `key`, or this host's own where that is empty.
        Raises ConfigError, BadMessage."""
        return self.curve.client_auth(key or self.key) if is_tcp(endpoint) else None

    def close(self) -> None:
        if self._curve is not None:
            self._curve.close()
