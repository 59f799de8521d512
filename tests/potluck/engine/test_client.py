"""Engine and client over real sockets, and the engine as a process that can be killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from potluck.engine.client import EngineClient
from potluck.engine.loop import RingEnds
from potluck.engine.server import EngineServer
from potluck.engine.settings import EngineLimits, RingSpec
from tests.support.engine.engine_process import slowly_forever
from tests.support.engine.fakes import FENCE, VOCAB, ByteTokenizer, FakeRing, attached_engine, script
from transport.errors import BadRequest, Busy, RingDown
from transport.messages.requests import (
    Aborted,
    Delta,
    EngineDown,
    EngineEvent,
    EngineReady,
    Finished,
    RequestFailed,
    Submit,
)
from transport.messages.ring import Fence, Sampling

# Nothing is kept, so that KV is left only by mistake.
_LIMITS = EngineLimits(
    context_tokens=10**6, kv_capacity_tokens=10**7, vocab_size=VOCAB, num_stages=2, prefix_cache=False
)


def _answer(prompt: tuple[int, ...], position: int) -> int:
    return (slowly_forever if bytes(prompt) == b"forever" else script("hello"))(prompt, position)


def _answer_fast(prompt: tuple[int, ...], position: int) -> int:
    return ord("x") if bytes(prompt) == b"forever" else script("hello")(prompt, position)


class Door:
    """An engine with its door in this process, and clients of it."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/engine"
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.ring = FakeRing(_answer)
        self.api = EngineServer(self.context, self.endpoint)
        self.engine = attached_engine(
            model="scripted",
            sender=self.ring.sender,
            receiver=self.ring.receiver,
            tokenizer=ByteTokenizer(),
            limits=_LIMITS,
            fence=FENCE,
            emit=self.api.emit,
            clock=time.monotonic,
        )
        self.thread = threading.Thread(target=self.engine.run, daemon=True)
        self.thread.start()
        self.api.serve(self.engine)
        self.clients: list[EngineClient] = []

    def client(self) -> EngineClient:
        self.clients.append(EngineClient(self.context, self.endpoint))
        self.clients[-1].wait_ready(60.0)
        return self.clients[-1]

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.engine.stop()
        self.api.close()
        self.ring.close()
        self.thread.join(60.0)
        self.context.destroy(0)

    def is_empty(self) -> bool:
        return self.engine.pong().sequences == 0 and self.ring.stages.lengths == {}


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    opened = Door(tmp_path)
    yield opened
    opened.close()


def _submit(name: str, prompt: str = "hi", **fields: Any) -> Submit:
    return Submit(request=name, prompt=prompt, sampling=Sampling(temperature=0.0), **fields)


async def _all(events: AsyncIterator[EngineEvent]) -> list[EngineEvent]:
    return [event async for event in events]


def _eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def test_several_requests_at_once(door: Door) -> None:
    client = door.client()

    async def ask() -> list[list[EngineEvent]]:
        return await asyncio.gather(*(_all(client.submit(_submit(f"r{number}"))) for number in range(8)))

    for events in asyncio.run(ask()):
        assert "".join(event.text for event in events if isinstance(event, Delta)) == "hello"
        assert isinstance(events[-1], Finished)
    _eventually(door.is_empty)


@pytest.mark.parametrize("fields", [{"max_tokens": 10**30}, {"stop": ("\ud800",)}, {"prompt": "x" * (33 * 2**20)}])
def test_a_request_that_cannot_be_sent_fails_alone(door: Door, fields: dict[str, Any]) -> None:
    client = door.client()

    async def ask() -> tuple[list[EngineEvent], list[EngineEvent]]:
        return await _all(client.submit(_submit("bad", **fields))), await _all(client.submit(_submit("good")))

    (failed,), answered = asyncio.run(asyncio.wait_for(ask(), 60.0))
    assert isinstance(failed, RequestFailed) and failed.code == BadRequest.code
    assert isinstance(answered[-1], Finished)


def test_cancel_ends_the_iterator_with_aborted(door: Door) -> None:
    client = door.client()

    async def ask() -> EngineEvent:
        async for event in client.submit(_submit("r", "forever")):
            if isinstance(event, Delta):
                client.cancel("r")
            last = event
        return last

    assert asyncio.run(ask()) == Aborted("r")
    _eventually(door.is_empty)


def test_an_iterator_that_is_left_cancels(door: Door) -> None:
    client = door.client()

    async def ask() -> None:
        events = client.submit(_submit("r", "forever"))
        async for event in events:
            if isinstance(event, Delta):
                break
        await events.aclose()  # type: ignore[attr-defined]

    asyncio.run(ask())
    _eventually(door.is_empty)


def test_a_cancel_is_not_lost_while_the_prompt_is_tokenized(door: Door) -> None:
    client, entered, go = door.client(), threading.Event(), threading.Event()
    submit = door.engine.submit

    def slow_submit(request: Submit) -> None:
        entered.set()
        go.wait()
        submit(request)

    door.engine.submit = slow_submit  # type: ignore[method-assign]

    async def ask() -> list[EngineEvent]:
        task = asyncio.create_task(_all(client.submit(_submit("r", "forever"))))
        await asyncio.to_thread(entered.wait)
        client.cancel("r")
        await client.ping()  # the cancel has arrived
        go.set()
        return await asyncio.wait_for(task, 60.0)

    assert isinstance(asyncio.run(ask())[-1], Aborted)
    _eventually(door.is_empty)


@pytest.mark.parametrize(("bound", "most"), [("_MAX_PREPARING", 1), ("_MAX_PREPARING_BYTES", 1000)])
def test_more_prompts_than_can_wait_for_the_tokenizer_are_refused(
    door: Door, monkeypatch: pytest.MonkeyPatch, bound: str, most: int
) -> None:
    monkeypatch.setattr(f"potluck.engine.server.{bound}", most)
    client, entered, go = door.client(), threading.Event(), threading.Event()
    submit = door.engine.submit

    def slow_submit(request: Submit) -> None:
        entered.set()
        go.wait()
        submit(request)

    door.engine.submit = slow_submit  # type: ignore[method-assign]

    async def ask() -> tuple[list[EngineEvent], list[EngineEvent]]:
        first = asyncio.create_task(_all(client.submit(_submit("first"))))
        await asyncio.to_thread(entered.wait)
        refused = await asyncio.wait_for(_all(client.submit(_submit("second", "hi" * 1000))), 60.0)
        go.set()
        return await asyncio.wait_for(first, 60.0), refused

    answered, (refused,) = asyncio.run(ask())
    assert isinstance(answered[-1], Finished)
    assert isinstance(refused, RequestFailed) and refused.code == Busy.code


def test_long_requests_hold_up_no_short_ones(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the model's template needs seconds for what is long, and somebody sends much of it."""
    monkeypatch.setattr("potluck.engine.server._MAX_PREPARING_BYTES", 500_000)
    client, entered, go = door.client(), threading.Event(), threading.Event()
    submit = door.engine.submit

    def slow_submit(request: Submit) -> None:
        if request.prompt is not None and len(request.prompt) > 100_000:
            entered.set()
            go.wait()
            request = msgspec.structs.replace(request, prompt="hi")
        submit(request)

    door.engine.submit = slow_submit  # type: ignore[method-assign]

    async def ask() -> None:
        long = [asyncio.create_task(_all(client.submit(_submit(f"long-{i}", "hi" * 60_000)))) for i in range(6)]
        await asyncio.to_thread(entered.wait)
        short = [asyncio.wait_for(_all(client.submit(_submit(f"short-{i}"))), 60.0) for i in range(6)]
        assert all(isinstance(events[-1], Finished) for events in await asyncio.gather(*short))
        go.set()
        ends = [(await asyncio.wait_for(task, 60.0))[-1] for task in long]
        # They wait for each other alone, and not without bound.
        assert [type(end) for end in ends] == [Finished] * 4 + [RequestFailed] * 2

    asyncio.run(ask())


def test_a_client_that_vanishes_takes_its_requests_along(door: Door) -> None:
    client, other = door.client(), door.client()

    async def ask() -> None:
        async for event in client.submit(_submit("r", "forever")):
            if isinstance(event, Delta):
                client._is_closing = True  # gone without a word
                client._wake.set()
                return

    asyncio.run(ask())
    _eventually(door.is_empty)
    assert isinstance(asyncio.run(_all(other.submit(_submit("s"))))[-1], Finished)


def test_a_client_that_does_not_read_holds_up_nobody(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("potluck.engine.server._MAX_BACKLOG", 50)
    door.ring.stages._sampler = _answer_fast
    lazy = door.context.socket(zmq.DEALER)
    lazy.setsockopt(zmq.RCVHWM, 1)
    lazy.setsockopt(zmq.RCVBUF, 4096)
    lazy.connect(door.endpoint)
    lazy.send(msgspec.msgpack.encode(_submit("lazy", "forever")))
    client = door.client()
    _eventually(lambda: door.engine.pong().active_requests == 1)
    for number in range(5):
        assert isinstance(asyncio.run(_all(client.submit(_submit(f"r{number}"))))[-1], Finished)
    _eventually(door.is_empty)
    lazy.close(0)


@pytest.mark.parametrize(
    "frames", [[b"\xff\x00"], [b""], [b"\x81", b"\x81"], [b"\x82\xa4type\xa6submit\xa7request\x01"]]
)
def test_garbage_is_refused_and_the_door_stays_open(door: Door, frames: list[bytes]) -> None:
    stranger = door.context.socket(zmq.DEALER)
    stranger.connect(door.endpoint)
    stranger.send_multipart(frames)
    _eventually(lambda: door.api.num_refused == 1)
    assert isinstance(asyncio.run(_all(door.client().submit(_submit("r"))))[-1], Finished)
    stranger.close(0)


def test_end_ring_ends_requests_and_refuses_later_ones(door: Door) -> None:
    client = door.client()

    async def ask() -> list[EngineEvent]:
        ends = []
        async for event in client.submit(_submit("r", "forever")):
            if isinstance(event, Delta):
                client.end_ring(RingDown("cuda:0 died"))
        ends.append(event)
        ends += await _all(client.submit(_submit("s")))
        return ends

    ends = asyncio.run(ask())
    assert [event.message for event in ends if isinstance(event, RequestFailed)] == ["cuda:0 died"] * 2
    assert (client.state, client.reason) == ("down", "cuda:0 died")
    _eventually(door.is_empty)


def test_what_is_said_of_another_ring_changes_nothing(door: Door) -> None:
    client = door.client()
    ring = RingSpec(
        fence=FENCE,
        first_stage="ipc://none",
        num_stages=1,
        wire_dtype="float32",
        context_tokens=1,
        kv_capacity_tokens=1,
        max_step_tokens=1,
    )
    opened: list[RingSpec] = []

    def open_ring(spec: RingSpec) -> RingEnds:
        opened.append(spec)
        another = FakeRing(_answer)
        return RingEnds(
            limits=_LIMITS, receiver=another.receiver, connect=lambda is_cancelled: another.sender, endpoint="here"
        )

    door.engine._open_ring = open_ring
    door.engine.detach(FENCE, RingDown("another ring comes"))
    _eventually(lambda: client.state == "down")
    assert client.attach(ring, lambda: None, 60.0) == "here"
    assert opened == [ring]
    client.warm_up(FENCE)
    client.wait_ready(60.0)
    other = Fence("ring", 0, "an older plan")
    door.api.emit(EngineDown("ring_down", "old news", fence=other))
    door.api.emit(EngineReady(model="scripted", context_tokens=1, fence=other))
    asyncio.run(asyncio.wait_for(_all(client.submit(_submit("r"))), 60.0))
    assert (client.state, client.ring_error) == ("ready", None)
    assert client.detach(RingDown("it is replaced"), 60.0)
    assert (client.state, client.reason) == ("down", "it is replaced")
    # What was ready cannot become so again by late news.
    door.api.emit(EngineReady(model="scripted", context_tokens=1, fence=FENCE))
    with pytest.raises(RingDown, match="replaced"):
        client.wait_ready(1.0)
    client.attach(ring, lambda: None, 60.0)
    client.warm_up(FENCE)
    client.wait_ready(60.0)
    events = asyncio.run(asyncio.wait_for(_all(client.submit(_submit("s"))), 60.0))
    assert isinstance(events[-1], Finished)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_process_that_dies_or_hangs_ends_requests_with_an_error(tmp_path: Path, fault: int) -> None:
    endpoint = f"ipc://{tmp_path}/engine"
    process = subprocess.Popen([sys.executable, "-m", "tests.support.engine.engine_process", endpoint])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = EngineClient(context, endpoint)

    async def ask() -> EngineEvent:
        is_struck = False
        async for event in client.submit(_submit("r", "hi")):
            if isinstance(event, Delta) and not is_struck:
                os.kill(process.pid, fault)
                is_struck = True
        return event

    try:
        client.wait_ready(60.0)
        event = asyncio.run(asyncio.wait_for(ask(), 60.0))
        assert isinstance(event, RequestFailed) and event.code == "ring_down"
        # The end of a process is noticed by itself, without waiting for its silence.
        assert ("process is gone" if fault == signal.SIGKILL else "silent for 4 s") in event.message
        with pytest.raises(RingDown):
            client.wait_ready(1.0)
    finally:
        process.kill()
        process.wait()
        client.close()
        context.destroy(0)


def test_before_the_engine_listens_a_request_is_refused_at_once(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = EngineClient(context, f"ipc://{tmp_path}/nobody")
    events = asyncio.run(_all(client.submit(_submit("r"))))
    assert [type(event) for event in events] == [RequestFailed] and client.state == "starting"
    client.close()
    context.destroy(0)
