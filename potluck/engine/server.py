"""The engine server takes requests on one ROUTER socket and sends each client its events."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import msgspec
import zmq

from potluck.engine.settings import Attach, Detach, EngineCommand, RingSpec, WarmUp
from transport.errors import Busy, PotluckError, error_from_code
from transport.links.zmq_link import set_options
from transport.messages.requests import (
    MAX_CLIENT_MESSAGE_BYTES,
    Aborted,
    Cancel,
    ClientMessage,
    Delta,
    EngineDown,
    EngineEvent,
    EngineReady,
    Finished,
    Ping,
    Pong,
    RequestFailed,
    Submit,
    request_failed,
)
from transport.messages.ring import Fence
from transport.process.child import lower_priority
from transport.process.polling import Waker
from transport.security.curve import Guard

_MAX_PREPARING = 256
_MAX_PREPARING_BYTES = 64 * 2**20
_SHORT_BYTES = 64 * 2**10
_MAX_BACKLOG = 20_000
_MAX_EVENTS_IN_MESSAGE = 256
# A step's events come one by one: a moment later they are all here, and the engine's thread is in nobody's way.
_GATHER_S = 0.0003
_RETRY_MS = 20
_TICK_MS = 1000
_NUM_PROBES = 3

log = logging.getLogger("potluck.engine.api")


class ServableEngine(Protocol):
    """What the door needs of `potluck.engine.loop.Engine`."""

    def submit(self, submit: Submit) -> None: ...

    def cancel(self, request: str) -> None: ...

    def state_event(self) -> EngineReady | EngineDown | None: ...

    def pong(self) -> Pong: ...

    def attach(self, ring: RingSpec) -> None: ...

    def warm_up(self, fence: Fence) -> None: ...

    def detach(self, fence: Fence, error: PotluckError) -> None: ...


@dataclass(slots=True)
class _Client:
    """A connection. `backlog` is what it is still to be sent."""

    identity: bytes
    backlog: deque[EngineEvent] = field(default_factory=deque)
    requests: set[str] = field(default_factory=set)


class EngineServer:
    """`emit` is the engine's; `serve` starts answering. A client that goes away takes its requests with it; one that
    reads too slowly loses them. Neither ever holds up the engine. Each message to a client is a list of events."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, *, guard: Guard | None = None) -> None:
        """`guard` where there is no ipc."""
        self._socket = context.socket(zmq.ROUTER)
        set_options(self._socket, max_message_bytes=MAX_CLIENT_MESSAGE_BYTES)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        if guard is not None:
            guard.prepare(self._socket)
        self._socket.bind(endpoint)
        self._wake = Waker()
        self._outbox: deque[EngineEvent] = deque()
        self._is_woken = False
        self._clients: dict[bytes, _Client] = {}
        self._clients_with_backlog: dict[bytes, _Client] = {}
        self._routes: dict[str, _Client] = {}
        # Tokenizing must hold up neither the engine's loop nor this door, and a queue of it is fair. Long requests have
        # one of their own: what the model's template, or its tokenizer, is slow with takes seconds only there.
        self._short_pool, self._long_pool = (
            ThreadPoolExecutor(count, thread_name_prefix="prepare", initializer=lower_priority) for count in (2, 1)
        )
        self._preparing: dict[str, tuple[Future[None], int]] = {}
        self._num_probes = 0
        self._is_closing = False
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ClientMessage | EngineCommand)
        self._thread: threading.Thread | None = None
        self.num_refused = 0

    def emit(self, event: EngineEvent) -> None:
        """Queue an event for whom it concerns. Thread-safe; never blocks. Only the first of a burst costs a system
        call."""
        self._outbox.append(event)
        if not self._is_woken:
            self._is_woken = True
            self._wake.set()

    def serve(self, engine: ServableEngine) -> None:
        """Start the door's thread."""
        self._thread = threading.Thread(target=self._run, args=(engine,), name="engine api", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what can be sent at once, and close."""
        self._is_closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(2.0)
        for preparer in (self._short_pool, self._long_pool):
            preparer.shutdown(wait=False, cancel_futures=True)

    def _run(self, engine: ServableEngine) -> None:
        lower_priority()
        poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake.fileno()):
            poller.register(source, zmq.POLLIN)
        while not self._is_closing:
            is_behind = bool(self._clients_with_backlog)
            ready = dict(poller.poll(_RETRY_MS if is_behind else _TICK_MS))
            if self._wake.fileno() in ready:
                self._wake.clear()
                time.sleep(_GATHER_S)
                # Before the outbox is emptied: what comes after wakes again.
                self._is_woken = False
            if self._socket in ready:
                self._receive(engine)
            if self._monitor in ready:
                self._monitor.recv_multipart()
                self._num_probes = _NUM_PROBES
            if self._num_probes and not is_behind:
                self._probe(engine)
            self._deliver(engine)
        # LINGER is 0 on every socket: give what was just written a moment to leave.
        self._socket.close(linger=500)
        self._monitor.close(0)

    def _receive(self, engine: ServableEngine) -> None:
        identity, *frames = self._socket.recv_multipart()
        try:
            message = self._decoder.decode(frames[0]) if len(frames) == 1 else None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            log.warning("a client's message can't be read: %s", error)
            message = None
        if message is None:
            self.num_refused += 1
            return
        client = self._clients.get(identity)
        if client is None:
            client = self._clients[identity] = _Client(identity)
            if (state := engine.state_event()) is not None:
                self._enqueue(client, state)
        if isinstance(message, Attach | WarmUp | Detach):
            _command(engine, message)
            return
        match message:
            case Submit():
                self._submit(engine, client, message, len(frames[0]))
            case Cancel(request=request):
                if request in client.requests:
                    self._cancel(engine, request)
            case Ping():
                self._enqueue(client, engine.pong())

    def _submit(self, engine: ServableEngine, client: _Client, submit: Submit, num_bytes: int) -> None:
        if submit.request in self._routes:
            self.num_refused += 1
            log.warning("request id %s is in use; the second one is ignored", submit.request)
            return
        self._routes[submit.request] = client
        client.requests.add(submit.request)
        self._preparing = {name: item for name, item in self._preparing.items() if not item[0].done()}
        is_short = num_bytes <= _SHORT_BYTES
        sizes = [size for _, size in self._preparing.values() if (size <= _SHORT_BYTES) == is_short]
        waiting, waiting_bytes = len(sizes), sum(sizes)
        if waiting >= _MAX_PREPARING or (waiting and waiting_bytes + num_bytes > _MAX_PREPARING_BYTES):
            busy = Busy(
                f"{waiting} requests of {waiting_bytes / 2**20:.0f} MiB wait to be tokenized", hint="try again soon"
            )
            self._outbox.append(request_failed(submit.request, busy))
            return
        preparer = self._short_pool if is_short else self._long_pool
        self._preparing[submit.request] = preparer.submit(engine.submit, submit), num_bytes

    def _cancel(self, engine: ServableEngine, request: str) -> None:
        preparing = self._preparing.get(request)
        if preparing is None:
            engine.cancel(request)
        else:
            # The engine can only cancel what it has been given; called at once if that has happened.
            preparing[0].add_done_callback(lambda _: engine.cancel(request))

    def _deliver(self, engine: ServableEngine) -> None:
        while self._outbox:
            event = self._outbox.popleft()
            request = getattr(event, "request", None)
            if request is None:
                for client in self._clients.values():
                    self._enqueue(client, event)
                continue
            owner = self._routes.get(request)
            if isinstance(event, Finished | Aborted | RequestFailed):
                self._routes.pop(request, None)
                if owner is not None:
                    owner.requests.discard(request)
            if owner is not None and owner.identity in self._clients:
                self._enqueue(owner, event)
        for client in list(self._clients_with_backlog.values()):
            self._send_backlog(engine, client)

    def _enqueue(self, client: _Client, event: EngineEvent) -> None:
        client.backlog.append(event)
        self._clients_with_backlog[client.identity] = client

    def _send_backlog(self, engine: ServableEngine, client: _Client) -> None:
        while client.backlog:
            events = list(islice(client.backlog, _MAX_EVENTS_IN_MESSAGE))
            try:
                self._socket.send_multipart([client.identity, self._encoder.encode(events)], flags=zmq.DONTWAIT)
            except zmq.Again:
                break
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self._remove_client(engine, client)
                return
            for _ in events:
                client.backlog.popleft()
        if not client.backlog:
            del self._clients_with_backlog[client.identity]
        elif len(client.backlog) > _MAX_BACKLOG:
            log.warning("a client is %d events behind: its requests are cancelled", len(client.backlog))
            self._drop_text(engine, client)

    def _drop_text(self, engine: ServableEngine, client: _Client) -> None:
        """Free what a client does not take. An answer that lost text must not look as if it were whole."""
        cut = {event.request for event in client.backlog if isinstance(event, Delta)}
        slow = Busy("the answer was not read in time", hint="read faster, or ask for less")
        kept: deque[EngineEvent] = deque()
        for event in client.backlog:
            if isinstance(event, Finished) and event.request in cut:
                kept.append(request_failed(event.request, slow))
            elif not isinstance(event, Delta):
                kept.append(event)
        client.backlog = kept
        for request in client.requests:
            self._cancel(engine, request)

    def _probe(self, engine: ServableEngine) -> None:
        """Somebody went, and ROUTER does not say who. Asked some times: its list may change a moment later."""
        self._num_probes -= 1
        pong = engine.pong()
        for client in self._clients.values():
            self._enqueue(client, pong)

    def _remove_client(self, engine: ServableEngine, client: _Client) -> None:
        del self._clients[client.identity], self._clients_with_backlog[client.identity]
        for request in client.requests:
            self._cancel(engine, request)


def _command(engine: ServableEngine, command: EngineCommand) -> None:
    match command:
        case Attach(ring=ring):
            engine.attach(ring)
        case WarmUp(fence=fence):
            engine.warm_up(fence)
        case Detach(fence=fence, code=code, message=message, hint=hint):
            engine.detach(fence, error_from_code(code, message, hint))
