"""An engine ring is one as `potluck up` loads it: its workers, its engine process, and a client."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import zmq

from planner.plan import Plan
from potluck.head.engine_process import EngineProcess
from potluck.head.models.source import LocalModel
from potluck.head.planning import device_of, estimate_times, plan_for
from potluck.head.pool import Pool, PoolWorker
from potluck.head.profiling.measure import MeasureOptions, pool_times_for
from potluck.head.ring import Ring
from potluck.host.local_devices import find_local_devices
from potluck.host.local_host import ThisHost, isolated_host
from potluck.host.piece_server import HostPieceServer
from potluck.measure.ring import worker_pool
from potluck.store.manifest import StoredModel
from potluck.system.settings import Settings
from transport.links.endpoints import port_of
from transport.links.zmq_link import set_options
from transport.messages.control import Stats
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
    RequestFailed,
    Submit,
)
from transport.messages.ring import Sampling
from transport.security.curve import Prepare

_STARTS_WITHIN_S = 120.0


@dataclass(frozen=True, slots=True)
class BenchPool:
    """One pool with all its devices. `run_dir` is for sockets and logs; other hosts get models from `piece_server`."""

    context: zmq.Context[zmq.Socket[bytes]]
    pool: Pool
    here: ThisHost
    run_dir: Path
    piece_server: HostPieceServer | None = None

    def wait_for(self, num_devices: int) -> None:
        """Raises DeadlineExceeded."""
        self.pool.wait_for_devices([], num_devices, _STARTS_WITHIN_S)

    def plan(self, model: StoredModel, settings: Settings, *, in_turn: bool = False) -> Plan:
        """As `potluck up` would with these settings. `in_turn`: measure one device at a time. Raises PotluckError."""
        if settings.estimate:
            devices = [device_of(worker.register) for worker in self.pool.workers()]
            return plan_for(model, estimate_times(model, devices, self.here.name), settings)
        times, _ = pool_times_for(
            model,
            self.pool,
            self.here,
            run_dir=self.run_dir,
            say=lambda line: None,
            options=MeasureOptions(in_turn=in_turn),
            shared=self.share(model).share_for_worker,
        )
        return plan_for(model, times, settings)

    def share(self, model: StoredModel) -> LocalModel:
        """Share the model with the other hosts. Raises PotluckError."""
        share = LocalModel(model, self.here, self.pool, self.piece_server)
        share.prepare(lambda line: None, for_others=True)
        return share

    def workers_of(self, plan: Plan) -> list[PoolWorker]:
        """Those of the plan's stages, in ring order."""
        by_name = {worker.register.device: worker for worker in self.pool.workers()}
        return [by_name[stage.device] for stage in plan.stages]

    def stats(self, workers: list[PoolWorker]) -> tuple[Stats, ...]:
        """Fresh counters. Raises RuntimeError if a worker has none."""
        self.pool.request_stats(workers)
        found = tuple(worker.stats for worker in workers if worker.stats is not None)
        if len(found) < len(workers):
            raise RuntimeError("a worker did not answer a request for its counters: see the logs in the run folder")
        return found


@contextmanager
def pool_of_hosts(here: ThisHost, pairing_port: int) -> Iterator[BenchPool]:
    """Of workers of other hosts, paired with this one, which join at `pairing_port` by themselves; empty at first."""
    from potluck.head.network import Network  # Here, since zeroconf takes a while to import.

    settings = Settings(lan_host=here.address, lan_port=pairing_port, discovery=False)
    network = Network(here, settings, say=lambda line: None)
    run_dir = Path(tempfile.mkdtemp(prefix="plb-"))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        stack.callback(context.destroy, 0)
        piece_server = HostPieceServer(here, network.piece_endpoint, network.roster.admits)
        stack.callback(piece_server.close)
        pool = Pool(
            context,
            run_dir,
            on_change=lambda: None,
            here=here,
            roster=network.roster,
            control=network.control_endpoint,
            pool=network.pool_id,
            pieces=lambda: piece_server.endpoint,
        )
        stack.callback(pool.close)
        stack.callback(pool.stop_workers, "the bench is over")
        assert pool.control is not None
        stack.callback(network.close)
        network.open(port_of(pool.control))
        yield BenchPool(context, pool, here, run_dir, piece_server)


@contextmanager
def pool_of_processes(num_stages: int) -> Iterator[BenchPool]:
    """Of worker processes on this host's CPU, one thread each."""
    here = isolated_host("bench")
    settings = Settings(device=("torch:cpu",) * num_stages, threads=None if num_stages > 1 else 1)
    devices = find_local_devices(settings, say=lambda line: None, host=here.name, is_head=True)
    one_thread = [replace(device, threads=1) for device in devices]
    with worker_pool(one_thread, here) as (context, pool, run_dir):
        yield BenchPool(context, pool, here, run_dir)


_READY_WITHIN_S = 300.0
_ANSWERED_WITHIN_S = 600.0


class PendingRequest:
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


class BenchClient:
    """One client of an engine. Not thread-safe."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, prepare: Prepare | None = None) -> None:
        self._socket = context.socket(zmq.DEALER)
        set_options(self._socket, max_message_bytes=MAX_CLIENT_MESSAGE_BYTES)
        if prepare is not None:
            prepare(self._socket)
        self._socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[list[EngineEvent]] = msgspec.msgpack.Decoder(list[EngineEvent])
        self._pending: dict[str, PendingRequest] = {}
        self._is_ready = False

    def wait_ready(self) -> None:
        """Raises RuntimeError if the engine can't serve, or takes too long."""
        self._send(Ping())
        self.wait(lambda: self._is_ready, _READY_WITHIN_S)

    def start(self, submit: Submit) -> PendingRequest:
        pending = self._pending[submit.request] = PendingRequest(submit.request)
        self._send(submit)
        return pending

    def cancel(self, pending: PendingRequest) -> None:
        self._send(Cancel(pending.request))

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
                pending = self._pending[request]
                pending.chunks_s.append(now_s)
                pending.text += text
            case Finished(request=request):
                pending = self._pending.pop(request)
                pending.finished, pending.ended_s = event, now_s
            case Aborted(request=request):
                self._pending.pop(request).ended_s = now_s
            case EngineReady():
                self._is_ready = True
            case RequestFailed() | EngineDown():
                self._pending.clear()
                raise RuntimeError(f"{event.message} ({event.code})")


class EngineRing:
    """A ring that is ready."""

    def __init__(self, name: str, pool: BenchPool, plan: Plan, client: BenchClient, eos_ids: frozenset[int]) -> None:
        self.name = name
        self.plan = plan
        self.client = client
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
        """A greedy one, of exactly one of a user's text, messages and token ids. Its answer is as long as pending for,
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

    def run_requests(self, requests: Sequence[Submit]) -> list[PendingRequest]:
        """All at once, until the last one is answered. Raises RuntimeError if one fails."""
        pending = [self.client.start(request) for request in requests]
        self.client.wait(lambda: all(one.is_over for one in pending))
        return pending


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
        epoch=1,
        shared=pool.share(model).share_for_stages,
    )
    engine = EngineProcess(
        pool.context,
        pool.run_dir,
        model,
        here=pool.here,
        logs=pool.run_dir,
        client_auth=pool.pool.client_auth,
    )
    try:
        ring.start(engine, lambda workers: None)
        engine.warm_up(ring.fence)
        client = BenchClient(pool.context, engine.api_endpoint, pool.pool.client_auth(engine.api_endpoint))
        try:
            client.wait_ready()
            yield EngineRing(name, pool, plan, client, eos_ids)
        finally:
            client.close()
    finally:
        # Workers take an engine that leaves before them for a fault; nobody listens any more.
        ring.unload()
        engine.stop()
