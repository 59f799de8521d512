"""A real pairing server with its roster, and what its user heard, was asked and says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from devices.pairing.client import pair
from devices.pairing.known_pools import KnownPool
from devices.pairing.roster import RosterFile
from devices.pairing.server import Candidate, PairingServer, PoolInfo
from transport.messages.ring import PROTOCOL_VERSION
from transport.security.curve import KeyPair, new_key_pair

HEAD, JOINER = new_key_pair(), new_key_pair()


class House:
    """A door, its roster, and what its user heard, was asked and says."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.now = 1000.0
        self.roster = RosterFile(path, name="den")
        self.facts = PoolInfo(
            pool=self.roster.read().pool,
            name="den",
            key=HEAD.public,
            protocol=PROTOCOL_VERSION,
            potluck="9.9",
            control_port=11502,
        )
        self.heard: list[str] = []
        self.asked: list[Candidate] = []
        self.answer: Callable[[Candidate], bool] = lambda candidate: True
        self.door = PairingServer(
            "127.0.0.1",
            0,
            pool_info=lambda: self.facts,
            roster=self.roster,
            keys=HEAD,
            approve=self._approve,
            notify=self.heard.append,
            monotonic=lambda: self.now,
            **options,
        )

    def _approve(self, candidate: Candidate) -> bool:
        self.asked.append(candidate)
        return self.answer(candidate)

    def pair(self, credential: Any, *, keys: KeyPair = JOINER, name: str = "mac", **options: Any) -> KnownPool:
        port = options.pop("port", self.door.port)
        return pair("127.0.0.1", port, credential, keys=keys, name=name, platform="macOS arm64", **options)


def connection(house: House, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", house.door.port), 60.0, source_address=(source, 0))


def is_hung_up(sock: socket.socket, timeout_s: float = 60.0) -> bool:
    sock.settimeout(timeout_s)
    try:
        while sock.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def other_code(code: str) -> str:
    return code[:-1] + ("0" if code[-1] != "0" else "1")


def guests() -> int:
    return sum(thread.name == "pairing-connection" for thread in threading.enumerate())


def until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60.0
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_so()
