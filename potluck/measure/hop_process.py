"""A hop process is one end of the links that the hop bench measures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import zmq

from potluck.measure.child_process import Handlers, reply_pipe, serve_commands
from transport.codec import EdgeLimits, decode_data, encode
from transport.links.endpoints import bind, is_tcp, tcp_endpoint
from transport.links.zmq_link import ZmqReceiver, ZmqSender, set_options
from transport.messages.ring import DTYPE_BYTES, DType, Entry, Fence, Hidden, SequenceId
from transport.security.curve import Curve, Guard, Prepare, allow_only, new_key_pair

Carrier = Literal["ipc", "tcp", "curve"]
LinkKind = Literal["potluck", "raw"]
CARRIERS: tuple[Carrier, ...] = ("ipc", "tcp", "curve")
LINK_KINDS: dict[Carrier, tuple[LinkKind, ...]] = {
    "ipc": ("raw", "potluck"),
    "tcp": ("raw",),
    "curve": ("raw", "potluck"),
}

_FENCE = Fence("bench-hops", 1, "0123456789abcdef")
_DTYPE: DType = "bfloat16"
_ANSWER_S = 20.0
_CONTEXT_TOKENS = 4096
_CHUNK_BYTES = 2**20
_WEIGHTS_BYTES = 2**25


@dataclass(frozen=True, slots=True, kw_only=True)
class HopKeys:
    """This end's CURVE keys, and the other one's public key: each end lets the other one in, and nobody else."""

    curve: Curve
    other: str

    def guard(self) -> Guard:
        """For the socket where the other end connects."""
        return self.curve.guard(allow_only(self.other))

    def client_auth(self) -> Prepare:
        """For the socket that connects to the other end."""
        return self.curve.client_auth(self.other)


class HopStep:
    """A step between two stages: `entries` of `tokens` each, hidden states as wide as SmolLM2's."""

    def __init__(self, *, entries: int, tokens: int, hidden_size: int) -> None:
        self._entries = tuple(Entry(SequenceId(number), 1000, (77,) * tokens, 1) for number in range(entries))
        self._shape = (entries * tokens, hidden_size)
        hidden = np.ones(self._shape, np.uint16)
        self.buffer = hidden.data.cast("B")
        self.limits = EdgeLimits(
            fence=_FENCE,
            hidden_size=hidden_size,
            dtype=_DTYPE,
            vocab_size=2**16,
            context_tokens=_CONTEXT_TOKENS,
            max_step_tokens=max(1024, entries * tokens),
        )
        assert self.buffer.nbytes == entries * tokens * hidden_size * DTYPE_BYTES[_DTYPE]

    def message(self, number: int) -> Hidden:
        return Hidden(_FENCE, number, (), self._entries, _DTYPE, *self._shape, (0.0025,))


class HopEnd(Protocol):
    """One end of both directions between two processes. `endpoint` is what the other one connects to."""

    endpoint: str

    def connect(self, endpoint: str) -> None: ...

    def send(self, number: int) -> None: ...

    def receive(self) -> None:
        """Wait for the other end's message. Raises TimeoutError."""

    def close(self) -> None: ...


class PotluckEnd:
    """Implements End by the links that a ring's stages use, from a stage's result to a checked message."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, step: HopStep, keys: HopKeys | None
    ) -> None:
        self._context = context
        self._step = step
        self._keys = keys
        guard = keys.guard() if keys else None
        self._receiver = ZmqReceiver(context, endpoint, step.limits, guard=guard)
        self._sender: ZmqSender | None = None
        self.endpoint = self._receiver.endpoint

    def connect(self, endpoint: str) -> None:
        prepare = self._keys.client_auth() if self._keys else None
        self._sender = ZmqSender(self._context, endpoint, self._step.limits, name="a bench", prepare=prepare)

    def send(self, number: int) -> None:
        assert self._sender is not None
        self._sender.send(self._step.message(number), (self._step.buffer,))

    def receive(self) -> None:
        if self._receiver.receive(_ANSWER_S) is None:
            raise TimeoutError(f"nothing came within {_ANSWER_S:.0f} s")

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._receiver.close()


class RawEnd:
    """Implements End by two sockets and the same frames, encoded once and looked at by nobody."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, step: HopStep, keys: HopKeys | None
    ) -> None:
        self._keys = keys
        self._frames = [encode(step.message(2**20)), bytes(step.buffer)]
        self._in = context.socket(zmq.DEALER)
        self._out = context.socket(zmq.DEALER)
        for sock in (self._in, self._out):
            set_options(sock, max_message_bytes=step.limits.max_message_bytes, on_network=is_tcp(endpoint))
        self._in.setsockopt(zmq.RCVTIMEO, int(_ANSWER_S * 1000))
        if keys is not None:
            keys.guard().prepare(self._in)
            keys.client_auth()(self._out)
        self.endpoint = bind(self._in, endpoint)

    def connect(self, endpoint: str) -> None:
        self._out.connect(endpoint)

    def send(self, number: int) -> None:
        self._out.send_multipart(self._frames)

    def receive(self) -> None:
        try:
            self._in.recv_multipart()
        except zmq.Again as error:
            raise TimeoutError(f"nothing came within {_ANSWER_S:.0f} s") from error

    def close(self) -> None:
        self._in.close(0)
        self._out.close(0)


HOP_ENDS: dict[LinkKind, type[PotluckEnd] | type[RawEnd]] = {"potluck": PotluckEnd, "raw": RawEnd}


class CacheReader:
    """What a stage does to caches while it computes: it reads more bytes than they hold."""

    def __init__(self) -> None:
        chunks = _WEIGHTS_BYTES // _CHUNK_BYTES
        self._chunks: Sequence[np.ndarray] = list(np.ones((chunks, _CHUNK_BYTES // 4), np.float32))
        self._next = 0

    def read(self, seconds: float) -> None:
        """Keep a core busy for so long."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            self._chunks[self._next].sum()
            self._next = (self._next + 1) % len(self._chunks)


_NUM_WARM_UPS = 10


class HopChild:
    """Links by name; times are `time.perf_counter()`, which is one clock for all processes of a machine."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._curve = Curve(self._context, new_key_pair())
        self._weights = CacheReader()
        self._steps: dict[str, HopStep] = {}
        self._ends: dict[str, HopEnd] = {}

    def ready(self) -> dict[str, Any]:
        return {"public": self._curve.keys.public}

    def step(self, name: str, entries: int, tokens: int, hidden_size: int) -> dict[str, Any]:
        self._steps[name] = HopStep(entries=entries, tokens=tokens, hidden_size=hidden_size)
        return {}

    def listen(self, link: str, way: LinkKind, carrier: Carrier, step: str, other: str) -> dict[str, Any]:
        endpoint = f"ipc://{self._run_dir}/{len(self._ends)}" if carrier == "ipc" else tcp_endpoint("127.0.0.1")
        keys = HopKeys(curve=self._curve, other=other) if carrier == "curve" else None
        self._ends[link] = end = HOP_ENDS[way](self._context, endpoint, self._steps[step], keys)
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
    child = HopChild(Path(sys.argv[1]))
    handlers: Handlers = {
        "step": child.step,
        "listen": child.listen,
        "connect": child.connect,
        "exchange": child.exchange,
        "codec": child.codec,
        "close": child.close,
    }
    serve_commands(handlers, child.ready(), replies)


if __name__ == "__main__":
    main()
