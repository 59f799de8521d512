"""Ends of a link to measure: Potluck's own links, and ZeroMQ alone with the same bytes, over the same transports.

Over TCP Potluck's links have CURVE, always. ZeroMQ alone also goes without: the difference is what encryption costs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import zmq

from transport.codec import EdgeLimits, encode
from transport.curve import Curve, Guard, Prepare, only
from transport.endpoints import bind, is_tcp
from transport.messages import DTYPE_BYTES, DType, Entry, Fence, Hidden, SequenceId
from transport.zmq_link import ZmqReceiver, ZmqSender, set_options

Carrier = Literal["ipc", "tcp", "curve"]
Way = Literal["potluck", "raw"]
CARRIERS: tuple[Carrier, ...] = ("ipc", "tcp", "curve")
WAYS: dict[Carrier, tuple[Way, ...]] = {"ipc": ("raw", "potluck"), "tcp": ("raw",), "curve": ("raw", "potluck")}

_FENCE = Fence("bench-hops", 1, "0123456789abcdef")
_DTYPE: DType = "bfloat16"
_ANSWER_S = 20.0
_CONTEXT_TOKENS = 4096
_CHUNK_BYTES = 2**20
_WEIGHTS_BYTES = 2**25


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """This end's CURVE keys, and the other one's public key: each end lets the other one in, and nobody else."""

    curve: Curve
    other: str

    def guard(self) -> Guard:
        """For the socket where the other end connects."""
        return self.curve.guard(only(self.other))

    def towards(self) -> Prepare:
        """For the socket that connects to the other end."""
        return self.curve.towards(self.other)


class Step:
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


class End(Protocol):
    """One end of both directions between two processes. `endpoint` is what the other one connects to."""

    endpoint: str

    def connect(self, endpoint: str) -> None: ...

    def send(self, number: int) -> None: ...

    def receive(self) -> None:
        """Wait for the other end's message. Raises TimeoutError."""

    def close(self) -> None: ...


class PotluckEnd:
    """Implements End by the links that a ring's stages use, from a stage's result to a checked message."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, step: Step, keys: Keys | None) -> None:
        self._context = context
        self._step = step
        self._keys = keys
        guard = keys.guard() if keys else None
        self._receiver = ZmqReceiver(context, endpoint, step.limits, guard=guard)
        self._sender: ZmqSender | None = None
        self.endpoint = self._receiver.endpoint

    def connect(self, endpoint: str) -> None:
        prepare = self._keys.towards() if self._keys else None
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

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, step: Step, keys: Keys | None) -> None:
        self._keys = keys
        self._frames = [encode(step.message(2**20)), bytes(step.buffer)]
        self._in = context.socket(zmq.DEALER)
        self._out = context.socket(zmq.DEALER)
        for sock in (self._in, self._out):
            set_options(sock, max_message_bytes=step.limits.max_message_bytes, on_network=is_tcp(endpoint))
        self._in.setsockopt(zmq.RCVTIMEO, int(_ANSWER_S * 1000))
        if keys is not None:
            keys.guard().prepare(self._in)
            keys.towards()(self._out)
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


ENDS: dict[Way, type[PotluckEnd] | type[RawEnd]] = {"potluck": PotluckEnd, "raw": RawEnd}


class Weights:
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
