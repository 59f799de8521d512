"""The head: this host's node, the pool, the ring and its engine, the endpoint. One at a time on a host."""

from __future__ import annotations

import os
import queue
import shutil
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Literal

import zmq

from devices.device import Device
from planner.plan import Plan
from potluck.config import Settings
from potluck.endpoint import Endpoint, bind_endpoint
from potluck.head_file import HeadFacts, HeadFile
from potluck.node import Node
from potluck.offer import offered_devices
from potluck.paths import logs_dir, runtime_dir
from potluck.planning import device_of, plan_for
from potluck.pool import Pool, PoolWorker
from potluck.progress import HeadProgress
from potluck.ring import Ring
from potluck.status import StatusReport, report_of
from potluck.store import StoredModel
from transport.errors import NeighbourGone, PotluckError, RingDown

_REGISTER_TIMEOUT_S = 60.0
_JOIN_TIMEOUT_S = 3600.0
_READY_TIMEOUT_S = 300.0
_CAUSE_WITHIN_S = 0.5
State = Literal["starting", "ready", "down"]


class Head:
    """`with Head(settings, model, progress) as head: head.wait()`. Leaving it leaves nothing behind."""

    def __init__(self, settings: Settings, model: StoredModel, progress: HeadProgress) -> None:
        self._settings = settings
        self._progress = progress
        self._stack = ExitStack()
        self._epoch = 0
        self._local_names: list[str] = []
        self._joined: list[PoolWorker] = []
        self._events: queue.SimpleQueue[PotluckError | PoolWorker] = queue.SimpleQueue()
        self._reporting = threading.Lock()
        self.model = model
        self.state: State = "starting"
        self.ring: Ring | None = None
        self.endpoint: Endpoint
        self.plan: Plan
        self._pool: Pool
        self._node: Node
        self._run_dir: Path

    def __enter__(self) -> Head:
        """Raises PotluckError: AlreadyRunning, PortInUse, DoesNotFit, StageFailed and so on."""
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        return self.endpoint.url

    def report(self) -> StatusReport:
        """Facts for `potluck status`, the stages' counters fresh. Thread-safe."""
        with self._reporting:
            ring = self.ring
            if ring is not None:
                self._pool.request_stats([stage.worker for stage in ring.stages])
            return report_of(self, ring, self._pool.workers())

    def wait(self) -> None:
        """Until interrupted: takes in devices that join and reports a ring that goes down."""
        while True:
            match self._next_event():
                case PotluckError() as error:
                    self.state = "down"
                    self.endpoint.mark_down(error)
                    self._progress.say(f"[bold red]The ring is down:[/bold red] {error}")
                case PoolWorker() as worker:
                    self._joined.append(worker)
            if self._joined and self.endpoint.is_idle():
                self._take_in()

    def _start(self) -> None:
        head_file = self._stack.enter_context(HeadFile())
        listener = bind_endpoint(self._settings.host, self._settings.port)
        self._stack.callback(listener.close)
        # Before there is a folder of sockets: its workers remove it should this process crash, and none is there yet.
        self._progress.say("Measuring this host's devices")
        devices = offered_devices(self._settings, say=self._progress.say)
        for left_by_a_crash in runtime_dir().glob("run-*"):
            shutil.rmtree(left_by_a_crash, ignore_errors=True)
        self._run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=runtime_dir()))
        self._stack.callback(shutil.rmtree, self._run_dir, ignore_errors=True)
        # Not its context manager: that would wait for ever for a socket somebody forgot.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._stack.callback(context.destroy, 0)
        self._pool = Pool(context, self._run_dir, on_fault=self._on_fault, on_joined=self._on_joined)
        self._stack.callback(self._pool.close)
        self._node = Node(control=self._pool.endpoint, logs=logs_dir(), on_exit=self._pool.report_exit)
        self._stack.callback(self._node.stop)
        # Workers first hear that it is over: they would take an engine that stops before them for a fault.
        self._stack.callback(self._take_down_ring)
        self._stack.callback(self._pool.stop_workers, "the head has stopped")
        self.endpoint = Endpoint(context, listener, model=self.model.name)
        self._stack.callback(self.endpoint.stop)
        self.endpoint.start(self.report)
        head_file.publish(self._facts())
        self._gather(devices)
        self._bring_up()

    def _facts(self) -> HeadFacts:
        return HeadFacts(pid=os.getpid(), url=self.url, model=self.model.name, control=self._pool.endpoint)

    def _gather(self, devices: list[Device]) -> None:
        """Start this host's workers and wait until they, and as many others as were asked for, have registered."""
        self._node.start(devices, remove=self._run_dir)
        names = self._local_names = [device.name for device in devices]
        self._pool.wait_for_devices(names, 0, _REGISTER_TIMEOUT_S)
        missing = self._settings.wait_for_devices - len(names)
        if missing > 0:
            self._progress.say(f"Waiting for {missing} more devices: run potluck join in another terminal")
            self._pool.wait_for_devices(names, self._settings.wait_for_devices, _JOIN_TIMEOUT_S)

    def _bring_up(self) -> None:
        self.state = "starting"
        self._epoch += 1
        devices = [device_of(worker.register) for worker in self._workers_in_order()]
        self.plan = plan_for(self.model, devices, self._settings)
        self.ring = Ring(self._pool, self.model, self.plan, run_dir=self._run_dir, logs=logs_dir(), epoch=self._epoch)
        num_stages = len(self.plan.stages)
        self._progress.say(f"Loading {self.model.name} over {num_stages} stage{'s' if num_stages > 1 else ''}")
        self.ring.bring_up(self._progress.tick)
        self._progress.say("Warming up")
        client = self.endpoint.connect(self.ring.api_endpoint)
        try:
            client.wait_ready(_READY_TIMEOUT_S)
        except PotluckError as error:
            # A worker or the engine that died says more than the engine's client can.
            raise self.ring.error or self.ring.engine_exit() or error from error
        self.state = "ready"

    def _take_down_ring(self) -> None:
        if self.ring is not None:
            self.ring.take_down()

    def _workers_in_order(self) -> list[PoolWorker]:
        """This host's devices in the order they were asked for, then those that joined."""
        order = {name: index for index, name in enumerate(self._local_names)}
        return sorted(self._pool.workers(), key=lambda worker: order.get(worker.register.device, len(order)))

    def _next_event(self) -> PotluckError | PoolWorker | None:
        try:
            return self._events.get(timeout=0.5)
        except queue.Empty:
            ring = self.ring
            error = ring.engine_exit() if ring is not None else None
            return error if error is not None and ring is not None and ring.mark_down(error) else None

    def _take_in(self) -> None:
        """Load the ring anew over all devices; nobody waits for an answer now."""
        names = ", ".join(worker.register.device for worker in self._joined)
        self._joined.clear()
        self._progress.say(f"{names} joined: loading the ring anew")
        self.endpoint.disconnect()
        if self.ring is not None:
            self.ring.mark_down(RingDown("the ring is being loaded anew", hint="try again in a moment"))
        self._take_down_ring()
        try:
            self._bring_up()
        except PotluckError as error:
            if self.ring is not None:
                self.ring.mark_down(error)
            self._events.put(error)
            return
        self._progress.say(f"Ready at {self.url}")

    def _on_fault(self, worker: PoolWorker, error: PotluckError) -> None:
        ring = self.ring
        if ring is None or worker.fence != ring.fence:
            return
        if isinstance(error, NeighbourGone):
            # A symptom, and often known before its cause, which is what the user needs.
            threading.Timer(_CAUSE_WITHIN_S, self._ring_lost, (ring, error)).start()
        else:
            self._ring_lost(ring, error)

    def _ring_lost(self, ring: Ring, error: PotluckError) -> None:
        if ring.mark_down(error):
            self._events.put(error)

    def _on_joined(self, worker: PoolWorker) -> None:
        if self.state != "starting":
            self._events.put(worker)
