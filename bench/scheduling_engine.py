"""A ring as `potluck up` loads it, with its engine in a process of its own, and requests timed as they come back.

The client here is the engine's door and nothing more, in one thread: it shares its cores with what it measures.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import zmq

from bench.load import CellTimes, Stream
from bench.scheduling_pool import BenchPool
from planner.plan import Plan
from potluck.engine.api_server import MAX_CLIENT_MESSAGE_BYTES
from potluck.ring import Ring
from potluck.store import StoredModel
from transport.control_messages import Stats
from transport.curve import Prepare
from transport.messages import Sampling
from transport.requests import (
    Aborted,
    Cancel,
    ClientMessage,
    Delta,
    EngineDown,
    EngineEvent,
    EngineReady,
    Finished,
    Ping,
    RequestFailed,
    Submit,
)
from transport.zmq_link import set_options

_READY_WITHIN_S = 300.0
_ANSWERED_WITHIN_S = 600.0


class Asked:
    """A request on its way; times are seconds of `time.perf_counter`. `chunks_s` grows as text arrives."""

    def __init__(self, request: str) -> None:
        self.request = request
        self.started_s = time.perf_counter()
        self.ended_s = 0.0
        self.chunks_s: list[float] = []
        self.text = ""
        self.finished: Finished | None = None

    @property
    def is_over(self) -> bool:
        return self.ended_s > 0

    @property
    def done(self) -> Finished:
        """What the engine said of it. Raises RuntimeError if it was cancelled."""
        if self.finished is None:
            raise RuntimeError("a request was cancelled")
        return self.finished

    @property
    def decode_tokens_per_s(self) -> float:
        """By the engine's clock."""
        return (self.done.completion_tokens - 1) / self.done.decode_s

    @property
    def stream(self) -> Stream:
        return Stream(
            started_s=self.started_s,
            ended_s=self.ended_s,
            chunks_s=tuple(self.chunks_s),
            prompt_tokens=self.done.prompt_tokens,
            tokens=self.done.completion_tokens,
        )


class Door:
    """One client of an engine. Not thread-safe."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, prepare: Prepare | None = None) -> None:
        self._socket = context.socket(zmq.DEALER)
        set_options(self._socket, max_message_bytes=MAX_CLIENT_MESSAGE_BYTES)
        if prepare is not None:
            prepare(self._socket)
        self._socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[list[EngineEvent]] = msgspec.msgpack.Decoder(list[EngineEvent])
        self._asked: dict[str, Asked] = {}
        self._is_ready = False

    def wait_ready(self) -> None:
        """Raises RuntimeError if the engine can't serve, or takes too long."""
        self._send(Ping())
        self.wait(lambda: self._is_ready, _READY_WITHIN_S)

    def start(self, submit: Submit) -> Asked:
        asked = self._asked[submit.request] = Asked(submit.request)
        self._send(submit)
        return asked

    def cancel(self, asked: Asked) -> None:
        self._send(Cancel(asked.request))

    def wait(self, until: Callable[[], bool], timeout_s: float = _ANSWERED_WITHIN_S) -> None:
        """Take events in until it is so. Raises RuntimeError if a request fails, or after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while not until():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the engine took more than {timeout_s:.0f} s")
            if self._socket.poll(100):
                frame, now_s = self._socket.recv(), time.perf_counter()
                for event in self._decoder.decode(frame):
                    self._take(event, now_s)

    def wait_for_s(self, seconds: float) -> None:
        """Take events in for so long."""
        end_s = time.perf_counter() + seconds
        self.wait(lambda: time.perf_counter() >= end_s)

    def close(self) -> None:
        self._socket.close(0)

    def _send(self, message: ClientMessage) -> None:
        self._socket.send(self._encoder.encode(message))

    def _take(self, event: EngineEvent, now_s: float) -> None:
        match event:
            case Delta(request=request, text=text):
                asked = self._asked[request]
                asked.chunks_s.append(now_s)
                asked.text += text
            case Finished(request=request):
                asked = self._asked.pop(request)
                asked.finished, asked.ended_s = event, now_s
            case Aborted(request=request):
                self._asked.pop(request).ended_s = now_s
            case EngineReady():
                self._is_ready = True
            case RequestFailed() | EngineDown():
                self._asked.clear()
                raise RuntimeError(f"{event.message} ({event.code})")


class EngineRing:
    """A ring that is ready."""

    def __init__(self, name: str, pool: BenchPool, plan: Plan, door: Door, eos_ids: frozenset[int]) -> None:
        self.name = name
        self.plan = plan
        self.door = door
        self._pool = pool
        self._bias = dict.fromkeys(eos_ids, -100.0)

    def stats(self) -> tuple[Stats, ...]:
        """Counters of the stages, in ring order."""
        return self._pool.stats(self._pool.workers_of(self.plan))

    def request(
        self,
        max_tokens: int,
        *,
        text: str | None = None,
        messages: Sequence[dict[str, str]] = (),
        ids: Sequence[int] = (),
        may_end: bool = False,
    ) -> Submit:
        """A greedy one, of exactly one of a user's text, messages and token ids. Its answer is as long as asked for,
        unless it `may_end`."""
        if text is not None:
            messages = ({"role": "user", "content": text},)
        return Submit(
            request=secrets.token_hex(6),
            messages=tuple(messages) or None,
            prompt_ids=tuple(ids) or None,
            sampling=Sampling(temperature=0.0, logit_bias={} if may_end else self._bias),
            max_tokens=max_tokens,
        )

    def ask(self, requests: Sequence[Submit]) -> list[Asked]:
        """All at once, until the last one is answered. Raises RuntimeError if one fails."""
        asked = [self.door.start(request) for request in requests]
        self.door.wait(lambda: all(one.is_over for one in asked))
        return asked


def times_of(answers: Sequence[Asked]) -> CellTimes:
    return CellTimes(streams=tuple(answer.stream for answer in answers))


@contextmanager
def engine_ring(
    name: str, pool: BenchPool, model: StoredModel, plan: Plan, eos_ids: frozenset[int]
) -> Iterator[EngineRing]:
    """Load it, start its engine, wait until it has warmed up. Raises PotluckError."""
    ring = Ring(
        pool.pool,
        model,
        plan,
        here=pool.here,
        run_dir=pool.run_dir,
        logs=pool.run_dir,
        epoch=1,
        shared=pool.share(model).for_stages,
    )
    try:
        ring.bring_up(lambda workers: None)
        door = Door(pool.context, ring.api_endpoint, pool.pool.towards(ring.api_endpoint))
        try:
            door.wait_ready()
            yield EngineRing(name, pool, plan, door, eos_ids)
        finally:
            door.close()
    finally:
        # Workers take an engine that leaves before them for a fault; nobody listens any more.
        ring.take_down()
