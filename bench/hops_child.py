"""A process at one end of the links that `bench.hops` measures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from bench.child_loop import Handlers, reply_pipe, serve
from bench.hop_ends import ENDS, Carrier, End, Keys, Step, Way, Weights
from transport.codec import decode_data, encode
from transport.curve import Curve, new_key_pair
from transport.endpoints import tcp_endpoint

_NUM_WARM_UPS = 10


class Child:
    """Links by name; times are `time.perf_counter()`, which is one clock for all processes of a machine."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._curve = Curve(self._context, new_key_pair())
        self._weights = Weights()
        self._steps: dict[str, Step] = {}
        self._ends: dict[str, End] = {}

    def ready(self) -> dict[str, Any]:
        return {"public": self._curve.keys.public}

    def step(self, name: str, entries: int, tokens: int, hidden_size: int) -> dict[str, Any]:
        self._steps[name] = Step(entries=entries, tokens=tokens, hidden_size=hidden_size)
        return {}

    def listen(self, link: str, way: Way, carrier: Carrier, step: str, other: str) -> dict[str, Any]:
        endpoint = f"ipc://{self._run_dir}/{len(self._ends)}" if carrier == "ipc" else tcp_endpoint("127.0.0.1")
        keys = Keys(curve=self._curve, other=other) if carrier == "curve" else None
        self._ends[link] = end = ENDS[way](self._context, endpoint, self._steps[step], keys)
        return {"endpoint": end.endpoint}

    def connect(self, link: str, endpoint: str) -> dict[str, Any]:
        self._ends[link].connect(endpoint)
        return {}

    def exchange(self, link: str, leads: bool, trips: int, pause_s: float) -> dict[str, Any]:
        """Send and receive in turn; when each message began to be made, and when each had come."""
        end = self._ends[link]
        sent: list[float] = []
        came: list[float] = []
        for number in range(trips + _NUM_WARM_UPS):
            if not leads:
                end.receive()
                came.append(time.perf_counter())
            self._weights.read(pause_s)
            sent.append(time.perf_counter())
            end.send(number)
            if leads:
                end.receive()
                came.append(time.perf_counter())
        return {"sent": sent[_NUM_WARM_UPS:], "came": came[_NUM_WARM_UPS:]}

    def codec(self, step: str, times: int, pause_s: float) -> dict[str, Any]:
        """Seconds to encode one message, and to decode and check it, each after a pause like that before a message."""
        measured = self._steps[step]
        frames: list[bytes | memoryview] = [encode(measured.message(2**20)), measured.buffer]
        return {
            "encode": self._seconds(lambda number: encode(measured.message(number)), times, pause_s),
            "decode": self._seconds(lambda _: decode_data(frames, measured.limits), times, pause_s),
        }

    def close(self) -> dict[str, Any]:
        for end in self._ends.values():
            end.close()
        self._curve.close()
        self._context.destroy(0)
        return {}

    def _seconds(self, work: Callable[[int], object], times: int, pause_s: float) -> list[float]:
        found = []
        for number in range(times):
            self._weights.read(pause_s)
            started = time.perf_counter()
            work(number)
            found.append(time.perf_counter() - started)
        return found


def main() -> None:
    replies = reply_pipe()
    child = Child(Path(sys.argv[1]))
    handlers: Handlers = {
        "step": child.step,
        "listen": child.listen,
        "connect": child.connect,
        "exchange": child.exchange,
        "codec": child.codec,
        "close": child.close,
    }
    serve(handlers, child.ready(), replies)


if __name__ == "__main__":
    main()
