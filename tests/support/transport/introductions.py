"""How workers and nodes introduce themselves to a head, and waiting for what is to come of it."""

from __future__ import annotations

import time
from collections.abc import Callable

from transport.messages.control import Register
from transport.messages.pool import NodeHello
from transport.messages.ring import PROTOCOL_VERSION

WITHIN_S = 60.0
REGISTER = Register(
    version=PROTOCOL_VERSION,
    device="cpu",
    backend="torch",
    kind="cpu",
    host="a host",
    pid=1,
    threads=1,
    free_bytes=1,
    total_bytes=1,
    memory_pool="ram",
    bandwidth_bytes_per_s=1.0,
    compute_dtype="float32",
)
ARRIVE = NodeHello(version=PROTOCOL_VERSION, potluck="1", platform="linux", address="127.0.0.1", pieces="")


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < deadline, f"not within {WITHIN_S} s"
        time.sleep(0.005)
