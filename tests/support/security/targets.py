"""Every kind of socket that listens on a network, with what reaches the application behind it.

A message that an attacker sends says `HOSTILE`; those of the honest member do not.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import zmq

from transport.codec import EdgeLimits, encode
from transport.control import ControlClient, ControlPeer, ControlServer
from transport.links.zmq_link import ZmqReceiver, ZmqSender
from transport.messages.control import ControlMessage, Register
from transport.messages.measure import ProfileProgress
from transport.messages.pieces import PieceRequest
from transport.messages.pieces import encode as encode_request
from transport.messages.ring import PROTOCOL_VERSION, Fence, Hello, Tokens
from transport.pieces.piece_source import Located
from transport.pieces.server import PieceServer
from transport.security.curve import Curve, KeyPair, new_key_pair

WITHIN_S = 60.0
HOSTILE = 666
FENCE = Fence("ring", 1, "plan")
LIMITS = EdgeLimits(fence=FENCE, hidden_size=8, dtype="float32", vocab_size=9, context_tokens=64, max_step_tokens=64)
Heard = Callable[[], bool]
"""Whether it has reached the application."""
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


class Target(Protocol):
    """`members` may connect, `says` is what an attacker would want to get in, as frames of one message each."""

    endpoint: str
    keys: KeyPair
    members: set[str]
    says: list[list[bytes]]
    max_frame_bytes: int

    def is_reached(self) -> bool:
        """Whether anything hostile has come in."""

    def num_heard(self) -> int:
        """Messages that have come in, of anybody."""

    def say(self) -> Heard:
        """The honest member, which is connected all the time, says one thing more."""

    def close(self) -> None: ...


def is_served(target: Target) -> bool:
    """Whether the honest member is. Fails if that takes long."""
    wait_until(target.say())
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Who the two sides are, who is admitted in place of `members`, what comes before the honest member at an edge, and
    where that one connects to reach an endpoint."""

    keys: KeyPair = field(default_factory=new_key_pair)
    honest: KeyPair = field(default_factory=new_key_pair)
    admits: Callable[[str], bool] | None = None
    first: Callable[[Target], object] = id
    way: Callable[[str], str] = str


class Socket:
    """A context for each side."""

    def __init__(self, setting: Setting) -> None:
        self.keys, self.honest_keys = setting.keys, setting.honest
        self.members = {self.honest_keys.public}
        self.context: Any = zmq.Context()
        self.honest_context: Any = zmq.Context()
        self.curve = Curve(self.context, self.keys)
        self.guard = self.curve.guard(setting.admits or self.members.__contains__)
        self.prepare = Curve(self.honest_context, self.honest_keys).client_auth(self.keys.public)

    def end(self) -> None:
        self.curve.close()
        self.context.destroy(0)
        self.honest_context.destroy(0)


class DataEdge(Socket):
    """A stage's end of an edge. It takes its upstream neighbour alone, so that even a member is a stranger here once
    that one is connected."""

    max_frame_bytes = 2**16 + 256

    def __init__(self, setting: Setting | None = None) -> None:
        setting = setting or Setting()
        super().__init__(setting)
        self.says = [[encode(Hello(PROTOCOL_VERSION, FENCE, "hostile"))], [encode(_step(HOSTILE))]]
        self.steps: list[int] = []
        self._next = 1000
        self._receiver = ZmqReceiver(self.context, "tcp://127.0.0.1:*", LIMITS, guard=self.guard)
        self.endpoint = self._receiver.endpoint
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()
        setting.first(self)
        self._sender = ZmqSender(
            self.honest_context, setting.way(self.endpoint), LIMITS, name="honest", prepare=self.prepare
        )
        assert is_served(self)

    def is_reached(self) -> bool:
        return HOSTILE in self.steps

    def num_heard(self) -> int:
        return len(self.steps)

    def say(self) -> Heard:
        step = self._next
        self._next += 1
        self._sender.send(_step(step))
        return lambda: step in self.steps

    def is_sender_asked(self) -> bool:
        """Whether anything has come back to the honest member."""
        return bool(self._sender._socket.poll(0))

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._sender.close()
        self._receiver.close()
        self.end()

    def _receive(self) -> None:
        while not self._closing.is_set():
            received = self._receiver.receive(0.1)
            if received is not None:
                self.steps.append(received.message.step)  # type: ignore[union-attr]


class Control(Socket):
    """The head's end of control."""

    max_frame_bytes = 2**18

    def __init__(self, setting: Setting | None = None) -> None:
        setting = setting or Setting()
        super().__init__(setting)
        self.says = [[encode(REGISTER)], [encode(ProfileProgress(HOSTILE, "hostile"))]]
        self.heard: list[tuple[str, ControlMessage]] = []
        self.peers: dict[str, ControlPeer] = {}
        self._next = 1000
        self.server = ControlServer(
            self.context, [("tcp://127.0.0.1:*", self.guard)], on_message=self._hear, on_lost=lambda peer: None
        )
        self.endpoint = self.server.endpoints[0]
        self._client = ControlClient(
            self.honest_context,
            setting.way(self.endpoint),
            REGISTER,
            on_message=lambda message: None,
            on_lost=lambda: None,
            prepare=self.prepare,
        )
        assert is_served(self)

    def is_reached(self) -> bool:
        return any(key != self.honest_keys.public for key, _ in self.heard)

    def num_heard(self) -> int:
        return len(self.heard)

    def say(self) -> Heard:
        told = (self.honest_keys.public, ProfileProgress(self._next, "honest"))
        self._next += 1
        self._client.send(told[1])
        return lambda: told in self.heard

    def close(self) -> None:
        self._client.close()
        self.server.close()
        self.end()

    def _hear(self, peer: ControlPeer, message: ControlMessage) -> None:
        self.heard.append((peer.key, message))
        self.peers[peer.key] = peer


class Pieces(Socket):
    """A host's piece server. What reaches the application are questions to its source."""

    max_frame_bytes = 2048

    def __init__(self, setting: Setting | None = None) -> None:
        setting = setting or Setting()
        super().__init__(setting)
        self.says = [[encode_request(PieceRequest(HOSTILE, "6" * 64, 0, 1))]] * 2
        self.asked: list[str] = []
        self.server = PieceServer(self.context, "tcp://127.0.0.1:*", self.guard, [self])
        self.endpoint = self.server.endpoint
        self._client = self.honest_context.socket(zmq.DEALER)
        self._client.setsockopt(zmq.LINGER, 0)
        self.prepare(self._client)
        self._client.connect(setting.way(self.endpoint))
        assert is_served(self)

    def locate(self, digest: str) -> Located | None:
        self.asked.append(digest)
        return Located(Path(__file__), 0, 10) if digest == "0" * 64 else None

    def have_bitmap(self, model: str) -> bytes:
        self.asked.append(model)
        return b""

    def is_reached(self) -> bool:
        return "6" * 64 in self.asked

    def num_heard(self) -> int:
        return len(self.asked)

    def say(self) -> Heard:
        before = len(self.asked)
        with contextlib.suppress(zmq.Again):
            self._client.send(encode_request(PieceRequest(1, "0" * 64, 0, 10)), zmq.DONTWAIT)
        while self._client.poll(0):
            assert self._client.recv_multipart()[1] == Path(__file__).read_bytes()[:10]
        return lambda: "0" * 64 in self.asked[before:]

    def close(self) -> None:
        self.server.close()
        self.end()


KINDS: list[type[DataEdge | Control | Pieces]] = [DataEdge, Control, Pieces]


def _step(number: int) -> Tokens:
    return Tokens(FENCE, number, (), ())


def wait_until(true: Callable[[], bool], within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.005)


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
