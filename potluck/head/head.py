"""The head: this host's node, the pool, the ring and its engine, the endpoint. One at a time on a host."""

from __future__ import annotations

import os
import queue
import shutil
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import zmq
from rich.markup import escape

from devices.hardware.device import Device
from devices.hardware.interfaces import lan_address
from potluck.head.api_access import EndpointAccess, endpoint_access
from potluck.head.endpoint import HttpEndpoint, bind_endpoint
from potluck.head.hosts import PoolHost
from potluck.head.loader import RingLoader
from potluck.head.models.search import FileHolders, ModelRequest, RemoteModelList, find_file_holders, list_remote_models
from potluck.head.models.source import ModelSource, find_model
from potluck.head.plan_watch import BetterPlan, PlanWatch
from potluck.head.pool import Pool, PoolWorker
from potluck.head.progress import HeadProgress
from potluck.head.ring import Ring
from potluck.head.status import StatusReport, report_of
from potluck.host.local_devices import find_local_devices
from potluck.host.local_head import HeadFile, LocalHead
from potluck.host.local_host import NO_NETWORK_TEXT, this_host
from potluck.host.node import Node
from potluck.host.piece_server import HostPieceServer
from potluck.store.manifest import StoredModel
from potluck.system.paths import logs_dir, runtime_dir
from potluck.system.settings import Settings
from transport.errors import (
    DeadlineExceeded,
    HostRevoked,
    NeighbourGone,
    NotRunning,
    PotluckError,
    RingDown,
)
from transport.links.endpoints import port_of

if TYPE_CHECKING:
    from devices.pairing.pake import Candidate
    from potluck.head.network import Network

_REGISTER_TIMEOUT_S = 60.0
_JOIN_TIMEOUT_S = 3600.0
_READY_TIMEOUT_S = 300.0
_CAUSE_GRACE_S = 0.5
_WATCH_INTERVAL_S = 5.0
_ADDRESS_INTERVAL_S = 2.0
State = Literal["starting", "ready", "down"]


class Head:
    """`with Head(settings, model, progress) as head: head.wait()`. Leaving it leaves nothing behind."""

    def __init__(self, settings: Settings, model: StoredModel | ModelRequest, progress: HeadProgress) -> None:
        """A model that this host's store lacks is looked for on the other hosts of the pool."""
        self._settings = settings
        self._progress = progress
        self._stack = ExitStack()
        self._devices: list[Device] = []
        self._next_address_s = 0.0
        self._joined: list[PoolWorker] = []
        self._events: queue.SimpleQueue[PotluckError | PoolWorker] = queue.SimpleQueue()
        self._here = this_host(settings)
        self.network: Network | None = None
        self._model = model
        self.model_name = model.name
        self.state: State = "starting"
        self._piece_server: HostPieceServer | None = None
        self._source: ModelSource | None = None
        self._wants_replan = False
        self._wants_reload = False
        self._tried_again = False
        self._next_look_s = 0.0
        self.endpoint: HttpEndpoint
        self.opened: EndpointAccess
        self._pool: Pool
        self._loader: RingLoader | None = None
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

    @property
    def ring(self) -> Ring | None:
        """The newest; None before the first plan."""
        return self._loader.ring if self._loader is not None else None

    @property
    def watch(self) -> PlanWatch | None:
        return self._loader.watch if self._loader is not None else None

    @property
    def pairing_address(self) -> str | None:
        """ "ADDRESS:PORT" where other hosts knock, if they may."""
        return self.network.pairing_address if self.network is not None else None

    def report(self) -> StatusReport:
        """Facts for `potluck status`, the stages' counters fresh. Thread-safe."""
        loader = self._loader
        if loader is not None:
            loader.request_stats()
        return report_of(self, self.ring, self._pool.workers(), self.endpoint.pong())

    def wait(self) -> None:
        """Until interrupted: takes in devices that join and reports a ring that goes down."""
        while True:
            match self._next_event():
                case PotluckError() as error:
                    self.state = "down"
                    self.endpoint.mark_down(error)
                    self._progress.say(f"[bold red]The ring is down:[/bold red] {escape(str(error))}")
                    self._wants_reload = self._wants_reload or isinstance(error, HostRevoked)
                case PoolWorker() as worker if self._loader is None or not self._loader.is_planned(worker):
                    self._joined.append(worker)
            if self._address_changed():
                self._change_address()
            if (self._joined or self._wants_replan or self._wants_reload) and self.endpoint.is_idle():
                self._reload()
            elif time.monotonic() >= self._next_look_s:
                self._next_look_s = time.monotonic() + _WATCH_INTERVAL_S
                if self._loader is not None and self.state == "ready":
                    self._loader.check_plan()

    def request_replan(self) -> BetterPlan | None:
        """Load the better plan, if there is one, once nobody waits for an answer. Thread-safe."""
        better = self.watch.better if self.watch is not None else None
        self._wants_replan = better is not None
        return better

    def invite(self) -> tuple[str, str]:
        """A fresh invite and a fresh code for another host. Thread-safe. Raises NotRunning without a network."""
        made, code = self._open_network().invite()
        return str(made), str(code)

    def decide_candidate(self, name: str, allow: bool) -> str:
        """Let in, or refuse, the host that waits under that name. Thread-safe. Raises BadRequest, NotRunning."""
        return self._open_network().approvals.decide(name, allow).name

    def find_file(self, sha256: str) -> FileHolders:
        """Which other hosts have a file with that checksum. Thread-safe; takes seconds at most."""
        return find_file_holders(self._pool.hosts, sha256)

    def list_models(self) -> RemoteModelList:
        """What the other hosts have. Thread-safe; takes seconds at most."""
        return list_remote_models(self._pool.hosts)

    def hosts(self) -> list[PoolHost]:
        """The other hosts that are connected, but for those that only visit (`potluck doctor`). Thread-safe."""
        return self._pool.hosts.with_pieces()

    def pending_candidates(self) -> tuple[Candidate, ...]:
        """The hosts that wait to be let in. Thread-safe."""
        return self.network.approvals.pending if self.network is not None else ()

    def _piece_endpoint(self) -> str:
        return self._piece_server.endpoint if self._piece_server is not None else ""

    def _open_network(self) -> Network:
        if self.network is None or self.network.pairing_address is None:
            raise NotRunning(
                "this head keeps other hosts out", hint="start it without --no-lan, on a host with a network"
            )
        return self.network

    def _start(self) -> None:
        head_file = self._stack.enter_context(HeadFile())
        listener = bind_endpoint(self._settings.host, self._settings.port)
        self._stack.callback(listener.close)
        self.opened = endpoint_access(self._settings, listener.getsockname()[1])
        if self._here.address is not None:
            from potluck.head.network import Network  # Here, since it takes a while to import.

            self.network = Network(self._here, self._settings, say=self._progress.say)
            self._here = self.network.here
        elif self._settings.lan:
            self._progress.say(f"No other host can join: {NO_NETWORK_TEXT}")
        # Before there is a folder of sockets: its workers remove it should this process crash, and none is there yet.
        devices = find_local_devices(self._settings, say=self._progress.say, host=self._here.name, is_head=True)
        for left_by_a_crash in runtime_dir().glob("run-*"):
            shutil.rmtree(left_by_a_crash, ignore_errors=True)
        self._run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=runtime_dir()))
        self._stack.callback(shutil.rmtree, self._run_dir, ignore_errors=True)
        # Not its context manager: that would wait for ever for a socket somebody forgot.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._stack.callback(context.destroy, 0)
        self._pool = Pool(
            context,
            self._run_dir,
            on_fault=self._on_fault,
            on_joined=self._on_joined,
            here=self._here,
            roster=self.network.roster if self.network is not None else None,
            control=self.network.control_endpoint if self.network is not None else None,
            pool=self.network.pool_id if self.network is not None else "",
            pieces=self._piece_endpoint,
        )
        self._stack.callback(self._pool.close)
        if self.network is not None:
            piece_server = self._piece_server = HostPieceServer(
                self._here, self.network.piece_endpoint, self.network.roster.admits
            )
            self._stack.callback(piece_server.close)
        self._node = self._new_node()
        self._stack.callback(lambda: self._node.stop())
        # Workers first hear that it is over: they would take an engine that stops before them for a fault.
        self._stack.callback(self._take_down_ring)
        self._stack.callback(self._pool.stop_workers, "the head has stopped")
        self.endpoint = HttpEndpoint(context, listener, model=self.model_name, access=self.opened.access)
        self._stack.callback(self.endpoint.stop)
        self.endpoint.start(self)
        self._open_pairing()
        head_file.publish(self._facts())
        self._source = find_model(
            self._model,
            here=self._here,
            piece_server=self._piece_server,
            pool=self._pool,
            run_dir=self._run_dir,
            progress=self._progress,
        )
        self._start_workers(devices)
        self._loader = RingLoader(
            self._settings,
            self._progress,
            pool=self._pool,
            endpoint=self.endpoint,
            here=self._here,
            run_dir=self._run_dir,
            model=self._source,
            first_devices=[device.name for device in devices],
        )
        self._stack.callback(self._loader.save_deviations)
        self._loader.load_first()
        self.state = "ready"

    def _new_node(self) -> Node:
        return Node(
            control=self._pool.endpoint,
            logs=logs_dir(),
            run_dir=self._run_dir,
            on_exit=self._pool.on_worker_exit,
            address=self._here.address,
            keys_file=self._here.keys_file,
        )

    def _facts(self) -> LocalHead:
        return LocalHead(
            pid=os.getpid(),
            url=self.url,
            model=self.model_name,
            control=self._pool.endpoint,
            host=self._here.name,
            address=self._here.address,
            lan=self.pairing_address,
            pieces=self._piece_endpoint() or None,
            secret=self.endpoint.secret,
        )

    def _open_pairing(self) -> None:
        """Other hosts may come in from now on."""
        network, control = self.network, self._pool.control
        if network is None or control is None:
            return
        self._stack.callback(network.close)
        network.open(port_of(control))
        self._progress.show_invitation(*network.invite())

    def _start_workers(self, devices: list[Device]) -> None:
        """Start this host's workers and wait until they, and as many others as were asked for, have registered."""
        self._devices = devices
        self._node.start(devices)
        names = [device.name for device in devices]
        self._pool.wait_for_devices(names, 0, _REGISTER_TIMEOUT_S)
        missing = self._settings.wait_for - len(names)
        if missing > 0:
            self._progress.say(f"Waiting for {missing} more devices: run potluck join in another terminal")
            self._pool.wait_for_devices(names, self._settings.wait_for, _JOIN_TIMEOUT_S)

    def _take_down_ring(self) -> None:
        if self._loader is not None:
            self._loader.stop_engine()

    def _next_event(self) -> PotluckError | PoolWorker | None:
        try:
            return self._events.get(timeout=0.5)
        except queue.Empty:
            return self._loader.engine_error() if self._loader is not None else None

    def _address_changed(self) -> bool:
        """Whether other hosts reach this one somewhere else than before: another Wi-Fi, a new lease."""
        network = self.network
        if network is None or self._settings.lan_host is not None or time.monotonic() < self._next_address_s:
            return False
        self._next_address_s = time.monotonic() + _ADDRESS_INTERVAL_S
        address = lan_address()
        if address is None or address == self._here.address:
            return False
        self._here = replace(self._here, address=address)
        return True

    def _change_address(self) -> None:
        """Go on at this host's new address: its workers listen there, and others are told."""
        network, source = self.network, self._source
        assert network is not None and source is not None, "it is up"
        self._progress.say(f"This host's address is {self._here.address} now")
        if self.ring is not None:
            self._ring_lost(self.ring, RingDown("this host's address has changed", hint="try again in a moment"))
        if self._loader is not None:
            self._loader.here = self._here
        network.update_host(self._here)
        source.update_host(self._here)
        self._take_down_ring()
        self._node.stop()
        self._pool.remove_workers([worker.child.pid for worker in self._node.workers])
        self._node = self._new_node()
        self._node.start(self._devices)
        try:
            self._pool.wait_for_devices([device.name for device in self._devices], 0, _REGISTER_TIMEOUT_S)
        except PotluckError as error:
            self._events.put(error)
        self._wants_reload = True

    def _reload(self) -> None:
        """Load the ring over all devices by a new plan; nobody waits for an answer now."""
        loader = self._loader
        assert loader is not None, "it is up"
        better = loader.watch.better if self._wants_replan and loader.watch is not None and not self._joined else None
        loader.save_deviations()
        names = ", ".join(worker.register.device for worker in self._joined)
        self._joined.clear()
        why = "Loading the ring anew" if self._wants_reload else "Loading the ring by the better plan"
        self._wants_replan = self._wants_reload = False
        self._progress.say(f"{escape(names)} joined: loading the ring anew" if names else why)
        self.endpoint.disconnect()
        loader.mark_down(RingDown("the ring is being loaded anew", hint="try again in a moment"))
        loader.stop_engine()
        self.state = "starting"
        try:
            loader.load(better.times if better is not None else None)
        except PotluckError as error:
            loader.mark_down(error)
            self._events.put(error)
            # Once more: a host that joined may have been busy, or another one may have left meanwhile.
            self._wants_reload = isinstance(error, RingDown | DeadlineExceeded) and not self._tried_again
            self._tried_again = self._wants_reload
            return
        self._tried_again = False
        self.state = "ready"
        self._progress.say(f"Ready at {self.url}")

    def _on_fault(self, worker: PoolWorker, error: PotluckError) -> None:
        ring = self.ring
        if ring is None or worker.fence != ring.fence:
            return
        if isinstance(error, NeighbourGone):
            # A symptom, and often known before its cause, which is what the user needs.
            threading.Timer(_CAUSE_GRACE_S, self._ring_lost, (ring, error)).start()
        else:
            self._ring_lost(ring, error)

    def _ring_lost(self, ring: Ring, error: PotluckError) -> None:
        if ring.mark_down(error):
            # Nobody sends to a stage of it any more, or hears from one, whatever went wrong.
            ring.unload()
            if isinstance(error, HostRevoked):
                # What a revoked host still sends to the engine is not to be read. It takes a moment to end.
                threading.Thread(target=ring.stop_engine, name="revoked", daemon=True).start()
            self._events.put(error)

    def _on_joined(self, worker: PoolWorker) -> None:
        self._events.put(worker)
