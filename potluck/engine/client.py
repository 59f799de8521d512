"""The engine client sends requests from any event loop and hands each its events; one thread owns the socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable

import msgspec
import zmq

from potluck.engine.settings import Attach, Detach, EngineCommand, RingSpec, WarmUp
from transport.errors import BadRequest, Busy, DeadlineExceeded, PotluckError, RingDown, error_from_code
from transport.links.zmq_link import set_options
from transport.messages.requests import (
    MAX_CLIENT_MESSAGE_BYTES,
    Aborted,
    Accepted,
    Cancel,
    ChoiceFinished,
    Delta,
    EngineDown,
    EngineEvent,
    EngineReady,
    EngineState,
    Finished,
    Ping,
    Pong,
    RequestFailed,
    RingAttached,
    Submit,
    request_failed,
)
from transport.messages.ring import Fence
from transport.process.child import lower_priority
from transport.process.polling import SuspendDetector, Waker
from transport.security.curve import Prepare


class Inbox:
    """Events of one request, on their way to its reader in `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._events: list[EngineEvent] = []
        self._reader: asyncio.Future[None] | None = None

    def put(self, events: list[EngineEvent]) -> None:
        """In the loop's thread."""
        self._events += events
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> list[EngineEvent]:
        """What has come; waits for it."""
        if not self._events:
            self._reader = self.loop.create_future()
            await self._reader
        events, self._events = self._events, []
        return events


def deliver_all(received: dict[Inbox, list[EngineEvent]]) -> None:
    """Into the inboxes, with one call for each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[Inbox, list[EngineEvent]]]] = {}
    for inbox, events in received.items():
        loops.setdefault(inbox.loop, []).append((inbox, events))
    for loop, batch in loops.items():
        call_in_loop(loop, _put, batch)


def _put(batch: list[tuple[Inbox, list[EngineEvent]]]) -> None:
    for inbox, events in batch:
        inbox.put(events)


def call_in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """In the loop's thread. A loop that has been closed has nobody left who waits."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *arguments)


_PING_INTERVAL_S = 1.0
_SILENT_AFTER_S = 4.0
_RETRY_MS = 20
_CHECK_S = 0.1
_MAX_OUTBOX = 10_000

log = logging.getLogger("potluck.engine.client")

_encoder = msgspec.msgpack.Encoder()
_PING = Ping()
_TERMINAL = (Finished, Aborted, RequestFailed)
_ENGINE_EVENTS = (EngineReady, EngineDown, RingAttached, Pong)
_RequestEvent = Accepted | Delta | ChoiceFinished | Finished | Aborted | RequestFailed


class EngineClient:
    """Thread-safe. An engine that dies, falls silent or loses its ring ends every request at once with an error.

    It outlives rings: what the engine says of another ring than the one that was attached last changes nothing.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        prepare: Prepare | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`prepare` where there is no ipc; `on_change` is called when it is not ready any more, and must not block."""
        self._on_change = on_change
        self._socket = context.socket(zmq.DEALER)
        set_options(self._socket, max_message_bytes=MAX_CLIENT_MESSAGE_BYTES)
        if prepare is not None:
            prepare(self._socket)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(endpoint)
        self._wake = Waker()
        # Guards what the socket's thread and the event loops share: all of the following.
        self._changed = threading.Condition()
        # A request is there as its frame, so that it fails alone if it can't be encoded.
        self._outbox: deque[bytes | Cancel | Ping | EngineCommand] = deque()
        self._inboxes: dict[str, Inbox] = {}
        self._pings: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[Pong]]] = []
        self._state: EngineState = "starting"
        self._ready: EngineReady | None = None
        self._error: PotluckError = RingDown("the engine is starting", hint="try again in a moment")
        self.ring_error: PotluckError | None = None
        """What the engine has said that the attached ring is down with."""
        self._fence: Fence | None = None
        self._attached: RingAttached | None = None
        self._is_detached = False
        self._is_ended = False
        self._is_closing = False
        self._decoder: msgspec.msgpack.Decoder[list[EngineEvent]] = msgspec.msgpack.Decoder(list[EngineEvent])
        self._thread = threading.Thread(target=self._run, name="engine client", daemon=True)
        self._thread.start()

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def reason(self) -> str:
        """Why the engine is not ready; empty if it is."""
        return "" if self._state == "ready" else self._error.message

    def wait_ready(self, timeout_s: float) -> EngineReady:
        """Block until the engine has warmed up. Raises RingDown if it can't, DeadlineExceeded if it takes too long."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._state != "starting", timeout_s):
                raise DeadlineExceeded(f"the engine was not ready within {timeout_s:.0f} s", hint="see its log")
            if self._ready is None or self._state == "down":
                raise self._error
            return self._ready

    async def submit(self, submit: Submit) -> AsyncGenerator[EngineEvent]:
        """The request's events up to its terminal one. Closing the iterator early cancels the request.

        Sent when first iterated. If the engine is not ready, or this can't be sent, the only event is a RequestFailed.
        """
        inbox = Inbox(asyncio.get_running_loop())
        try:
            # Here, and not in the socket's thread, so that only this request fails if it can't be encoded.
            frame = _encode_submit(submit)
        except BadRequest as error:
            yield request_failed(submit.request, error)
            return
        with self._changed:
            refusal = self._refusal()
            if refusal is None:
                self._inboxes[submit.request] = inbox
                self._outbox.append(frame)
        if refusal is not None:
            yield request_failed(submit.request, refusal)
            return
        self._wake.set()
        try:
            while True:
                for event in await inbox.take():
                    yield event
                    if isinstance(event, _TERMINAL):
                        return
        finally:
            with self._changed:
                is_open = self._inboxes.pop(submit.request, None) is not None
            if is_open:
                self.cancel(submit.request)

    def cancel(self, request: str) -> None:
        """End a request; its iterator, if somebody still reads it, ends with `Aborted`."""
        self._send(Cancel(request))

    async def ping(self, timeout_s: float = 5.0) -> Pong:
        """The engine's state and counters. Raises RingDown or DeadlineExceeded."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Pong] = loop.create_future()
        with self._changed:
            self._pings.append((loop, future))
        self._send(Ping())
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the engine did not answer within {timeout_s:.0f} s", hint="see its log") from error

    def attach(self, ring: RingSpec, check: Callable[[], None], timeout_s: float) -> str:
        """Returns where the engine listens for the ring's last stage. `check` raises what ends the wait."""
        with self._changed:
            self._fence, self._attached, self._ready, self.ring_error = ring.fence, None, None, None
            self._is_ended = self._is_detached = False
            self._state, self._error = "starting", RingDown("the ring is starting", hint="try again in a moment")
        self._send(Attach(ring))
        deadline = time.monotonic() + timeout_s
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._attached is not None or self.ring_error is not None, _CHECK_S)
                if self._attached is not None:
                    return self._attached.endpoint
                if self.ring_error is not None:
                    raise self.ring_error
            check()
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"the engine did not start within {timeout_s:.0f} s", hint="see its log")

    def warm_up(self, fence: Fence) -> None:
        """All stages have loaded; see `wait_ready`."""
        self._send(WarmUp(fence))

    def end_ring(self, error: PotluckError) -> None:
        """Its requests end with `error`, and later ones are refused with it, until another ring is attached."""
        with self._changed:
            self._is_ended = True
        self._go_down(error)

    def detach(self, error: PotluckError, timeout_s: float) -> bool:
        """`end_ring`, and have the engine leave the ring; False if it does not say within `timeout_s` that it has."""
        fence = self._fence
        self.end_ring(error)
        if fence is None:
            return True
        self._send(Detach(fence, error.code, error.message, error.hint))
        with self._changed:
            return self._changed.wait_for(lambda: self._is_detached, timeout_s)

    def close(self) -> None:
        """End every request and leave."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(2.0)
        self.end_ring(RingDown("the head is stopping"))

    def _refusal(self) -> PotluckError | None:
        if self._state != "ready":
            return self._error
        if len(self._outbox) >= _MAX_OUTBOX:
            return Busy("the engine takes no more requests", hint="try again soon")
        return None

    def _send(self, message: Cancel | Ping | EngineCommand) -> None:
        with self._changed:
            self._outbox.append(message)
        self._wake.set()

    def _run(self) -> None:
        lower_priority()
        try:
            self._serve()
        except Exception as error:
            # Our own fault, but whoever waits has to be told.
            log.exception("the engine's client failed")
            self.end_ring(PotluckError(f"the engine's client failed: {type(error).__name__}: {error}"))
        finally:
            self._socket.close()
            self._monitor.close(0)

    def _serve(self) -> None:
        poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake.fileno()):
            poller.register(source, zmq.POLLIN)
        next_ping_s = last_received_s = time.monotonic()
        is_connected = False
        suspend_detector = SuspendDetector()
        while not self._is_closing:
            # Up to the next thing to do: to ask, or to find that nobody has answered for too long.
            next_s = min(next_ping_s, last_received_s + _SILENT_AFTER_S) if is_connected else next_ping_s
            wait_ms = max(1, int((next_s - time.monotonic()) * 1000) + 1)
            ready = dict(poller.poll(min(wait_ms, _RETRY_MS) if self._outbox else wait_ms))
            self._wake.clear()
            last_received_s += suspend_detector.suspended_s(_PING_INTERVAL_S)
            if self._socket in ready:
                is_connected, last_received_s = True, time.monotonic()
                self._receive_all()
            elif self._monitor in ready:
                self._monitor.recv_multipart()
                is_connected = False
                self._go_down(RingDown("the engine's process is gone", hint="see its log, then start again"))
            elif is_connected and time.monotonic() - last_received_s > _SILENT_AFTER_S:
                is_connected = False
                self._go_down(RingDown(f"the engine has been silent for {_SILENT_AFTER_S:.0f} s", hint="see its log"))
            if time.monotonic() >= next_ping_s:
                next_ping_s = time.monotonic() + _PING_INTERVAL_S
                if _PING not in list(self._outbox)[:8]:
                    self._outbox.append(_PING)
            self._flush()

    def _flush(self) -> None:
        while True:
            with self._changed:  # Another thread may put another outbox there.
                if not self._outbox:
                    return
                message = self._outbox[0]
                frame = message if isinstance(message, bytes) else _encoder.encode(message)
                try:
                    self._socket.send(frame, flags=zmq.DONTWAIT)
                except zmq.Again:
                    return
                self._outbox.popleft()

    def _receive_all(self) -> None:
        """Everything that has arrived, handed to each event loop in one go."""
        received: dict[Inbox, list[EngineEvent]] = {}
        while True:
            try:
                frame = self._socket.recv(flags=zmq.DONTWAIT)
            except zmq.Again:
                break
            try:
                events = self._decoder.decode(frame)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                log.error("the engine's message can't be read: %s", error)
                continue
            for event in events:
                if isinstance(event, _ENGINE_EVENTS):
                    # A ring that goes down ends requests: not ahead of what they have got.
                    deliver_all(received)
                    received = {}
                    self._handle_engine_event(event)
                elif (inbox := self._inbox_of(event)) is not None:
                    received.setdefault(inbox, []).append(event)
        deliver_all(received)

    def _inbox_of(self, event: _RequestEvent) -> Inbox | None:
        if not isinstance(event, _TERMINAL):
            return self._inboxes.get(event.request)
        with self._changed:
            return self._inboxes.pop(event.request, None)

    def _is_of_ring(self, fence: Fence | None) -> bool:
        return self._fence is None or fence is None or fence == self._fence

    def _on_ring_down(self, error: PotluckError) -> None:
        with self._changed:
            self._is_detached = True
            self.ring_error = error
            self._changed.notify_all()
        if not self._is_ended:
            self._go_down(error)

    def _handle_engine_event(self, event: EngineReady | EngineDown | RingAttached | Pong) -> None:
        match event:
            case EngineReady(fence=fence) if self._is_of_ring(fence):
                self._set_ready(event)
            case EngineDown(code=code, message=message, hint=hint, fence=fence) if self._is_of_ring(fence):
                self._on_ring_down(error_from_code(code, message, hint))
            case RingAttached(fence=fence) if self._is_of_ring(fence):
                with self._changed:
                    self._attached = event
                    self._changed.notify_all()
            case Pong():
                with self._changed:
                    pings, self._pings = self._pings, []
                for loop, future in pings:
                    call_in_loop(loop, _resolve, future, event)
                # Back after a silence: the engine was ready all the time.
                is_back = event.state == "ready" and self._state == "down" and self.ring_error is None
                if is_back and self._ready is not None:
                    self._set_ready(self._ready)

    def _set_ready(self, ready: EngineReady) -> None:
        with self._changed:
            if not self._is_ended:
                self._ready, self._state = ready, "ready"
                self._changed.notify_all()

    def _go_down(self, error: PotluckError) -> None:
        with self._changed:
            self._state, self._error = "down", error
            inboxes, self._inboxes = self._inboxes, {}
            pings, self._pings = self._pings, []
            # Their clients have been told: an engine that comes back must not go on with them.
            kept = [message for message in self._outbox if not isinstance(message, bytes)]
            self._outbox = deque([*kept, *(Cancel(request) for request in inboxes)])
            self._changed.notify_all()
        deliver_all({inbox: [request_failed(request, error)] for request, inbox in inboxes.items()})
        for loop, future in pings:
            call_in_loop(loop, _reject, future, error)
        self._on_change()


def _encode_submit(submit: Submit) -> bytes:
    """Raises BadRequest."""
    try:
        frame = _encoder.encode(submit)
    except (OverflowError, UnicodeEncodeError) as error:
        raise BadRequest(f"the request can't be sent to the engine: {error}") from error
    if len(frame) > MAX_CLIENT_MESSAGE_BYTES:
        raise BadRequest(
            f"the request has {len(frame):,} bytes; at most {MAX_CLIENT_MESSAGE_BYTES:,} are possible",
            hint="send fewer or shorter messages",
        )
    return frame


def _resolve(future: asyncio.Future[Pong], pong: Pong) -> None:
    if not future.done():
        future.set_result(pong)


def _reject(future: asyncio.Future[Pong], error: PotluckError) -> None:
    if not future.done():
        future.set_exception(error)
