"""The head: this host's node, the pool, the ring and its engine, the endpoint. One at a time on a host."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from devices.hardware.device import Device
from potluck.head.api_access import EndpointAccess, endpoint_access
from potluck.head.controller import RingController
from potluck.head.endpoint import HttpEndpoint, bind_endpoint
from potluck.head.engine_process import EngineProcess
from potluck.head.loader import RingLoader
from potluck.head.models.search import FileHolders, ModelRequest, RemoteModelList, find_file_holders, list_remote_models
from potluck.head.models.source import ModelSource, find_model
from potluck.head.plan_watch import BetterPlan
from potluck.head.pool import Pool
from potluck.head.progress import HeadProgress
from potluck.head.status import StatusReport, report_of
from potluck.host.local_devices import find_local_devices
from potluck.host.local_head import HeadFile, LocalHead
from potluck.host.local_host import NO_NETWORK_TEXT, ThisHost, this_host
from potluck.host.node import Node
from potluck.host.piece_server import HostPieceServer
from potluck.store.manifest import StoredModel
from potluck.system.paths import logs_dir, runtime_dir
from potluck.system.settings import Settings
from transport.errors import NotRunning
from transport.links.endpoints import port_of

if TYPE_CHECKING:
    from potluck.head.network import Network

_REGISTER_TIMEOUT_S = 60.0
_JOIN_TIMEOUT_S = 3600.0


class Head:
    """`start_head` makes one; `wait` serves. Reports and what the routes ask for is thread-safe."""

    def __init__(
        self,
        *,
        model_name: str,
        access: EndpointAccess,
        network: Network | None,
        pool: Pool,
        endpoint: HttpEndpoint,
        controller: RingController,
    ) -> None:
        self.model_name = model_name
        self.opened = access
        self._network = network
        self._pool = pool
        self._endpoint = endpoint
        self._controller = controller

    @property
    def url(self) -> str:
        return self._endpoint.url

    def wait(self) -> None:
        """Until interrupted: takes in devices that join, and has the ring loaded anew when it may come back."""
        self._controller.run()

    def report(self) -> StatusReport:
        """Facts for `potluck status`, the stages' counters fresh."""
        self._controller.request_stats()
        network = self._network
        return report_of(
            self._controller.view,
            self._endpoint.pong(),
            model=self.model_name,
            url=self.url,
            lan=network.pairing_address if network is not None else None,
            workers=self._pool.workers(),
            # Without those that only visit (`potluck doctor`).
            hosts=self._pool.hosts.with_pieces(),
            candidates=network.approvals.pending if network is not None else (),
        )

    def request_replan(self) -> BetterPlan | None:
        """Load the better plan, if there is one, once nobody waits for an answer."""
        return self._controller.request_replan()

    def invite(self) -> tuple[str, str]:
        """A fresh invite and a fresh code for another host. Raises NotRunning without a network."""
        made, code = self._open_network().invite()
        return str(made), str(code)

    def decide_candidate(self, name: str, allow: bool) -> str:
        """Let in, or refuse, the host that waits under that name. Raises BadRequest, NotRunning."""
        return self._open_network().approvals.decide(name, allow).name

    def find_file(self, sha256: str) -> FileHolders:
        """Which other hosts have a file with that checksum; takes seconds at most."""
        return find_file_holders(self._pool.hosts, sha256)

    def list_models(self) -> RemoteModelList:
        """What the other hosts have; takes seconds at most."""
        return list_remote_models(self._pool.hosts)

    def _open_network(self) -> Network:
        if self._network is None or self._network.pairing_address is None:
            raise NotRunning(
                "this head keeps other hosts out", hint="start it without --no-lan, on a host with a network"
            )
        return self._network


@contextmanager
def start_head(settings: Settings, model: StoredModel | ModelRequest, progress: HeadProgress) -> Iterator[Head]:
    """A head that is up; leaving it leaves nothing behind. A model that this host's store lacks is looked for on the
    other hosts of the pool.

    Raises PotluckError: AlreadyRunning, PortInUse, DoesNotFit, StageFailed and so on.
    """
    with ExitStack() as stack:
        head_file = stack.enter_context(HeadFile())
        listener = bind_endpoint(settings.host, settings.port)
        stack.callback(listener.close)
        opened = endpoint_access(settings, listener.getsockname()[1])
        here, network = _open_network(settings, progress)
        # Before there is a folder of sockets: its workers remove it should this process crash, and none is there yet.
        devices = find_local_devices(settings, say=progress.say, host=here.name, is_head=True)
        run_dir = _make_run_dir(stack)
        # Not its context manager: that would wait for ever for a socket somebody forgot.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.destroy, 0)
        changed = threading.Event()
        piece_server: HostPieceServer | None = None
        pool = Pool(
            context,
            run_dir,
            on_change=changed.set,
            here=here,
            roster=network.roster if network is not None else None,
            control=network.control_endpoint if network is not None else None,
            pool=network.pool_id if network is not None else "",
            pieces=lambda: piece_server.endpoint if piece_server is not None else "",
        )
        stack.callback(pool.close)
        if network is not None:
            piece_server = HostPieceServer(here, network.piece_endpoint, network.roster.admits)
            stack.callback(piece_server.close)
        local = _LocalWorkers(pool, run_dir, here, devices)
        stack.callback(local.stop)
        endpoint = HttpEndpoint(listener, model=model.name, access=opened.access)
        controller = RingController(
            pool=pool,
            endpoint=endpoint,
            progress=progress,
            start_engine=lambda model: EngineProcess(
                context,
                run_dir,
                model,
                here=here,
                logs=logs_dir(),
                client_auth=pool.client_auth,
                prefix_cache=settings.prefix_cache,
                on_change=changed.set,
            ),
            changed=changed,
        )
        # Workers first hear that it is over: they would take an engine that stops before them for a fault.
        stack.callback(controller.stop)
        stack.callback(pool.stop_workers, "the head has stopped")
        stack.callback(endpoint.stop)
        head = Head(
            model_name=model.name,
            access=opened,
            network=network,
            pool=pool,
            endpoint=endpoint,
            controller=controller,
        )
        endpoint.start(head)
        if network is not None and pool.control is not None:
            # Other hosts may come in from now on.
            stack.callback(network.close)
            network.open(port_of(pool.control))
            progress.show_invitation(*network.invite())
        head_file.publish(
            LocalHead(
                pid=os.getpid(),
                url=head.url,
                model=model.name,
                control=pool.endpoint,
                host=here.name,
                address=here.address,
                lan=network.pairing_address if network is not None else None,
                pieces=piece_server.endpoint if piece_server is not None else None,
                secret=endpoint.secret,
            )
        )
        source = find_model(model, here=here, piece_server=piece_server, pool=pool, run_dir=run_dir, progress=progress)
        local.start()
        _wait_for_others(settings, pool, len(devices), progress)
        loader = RingLoader(
            settings,
            progress,
            pool=pool,
            here=here,
            run_dir=run_dir,
            model=source,
            first_devices=[device.name for device in devices],
        )
        controller.start(loader, _mover(settings, network, source, local))
        yield head


class _LocalWorkers:
    """Workers of this host's devices, replaced by new ones when its address changes."""

    def __init__(self, pool: Pool, run_dir: Path, here: ThisHost, devices: list[Device]) -> None:
        self._pool = pool
        self._run_dir = run_dir
        self._devices = devices
        self._node = self._node_of(here)

    def start(self) -> None:
        """Returns once they have registered. Raises PotluckError."""
        self._node.start(self._devices)
        self._pool.wait_for_devices([device.name for device in self._devices], 0, _REGISTER_TIMEOUT_S)

    def restart(self, here: ThisHost) -> None:
        """Raises PotluckError."""
        self._node.stop()
        self._pool.remove_workers([worker.child.pid for worker in self._node.workers])
        self._node = self._node_of(here)
        self.start()

    def stop(self) -> None:
        self._node.stop()

    def _node_of(self, here: ThisHost) -> Node:
        return Node(
            control=self._pool.endpoint,
            logs=logs_dir(),
            run_dir=self._run_dir,
            on_exit=self._pool.on_worker_exit,
            address=here.address,
            keys_file=here.keys_file,
        )


def _open_network(settings: Settings, progress: HeadProgress) -> tuple[ThisHost, Network | None]:
    """This host, and its network if there is one."""
    here = this_host(settings)
    if here.address is None:
        if settings.lan:
            progress.say(f"No other host can join: {NO_NETWORK_TEXT}")
        return here, None
    from potluck.head.network import Network  # Here, since it takes a while to import.

    network = Network(here, settings, say=progress.say)
    return network.here, network


def _make_run_dir(stack: ExitStack) -> Path:
    """A folder for sockets, without those that a crash has left."""
    for left_by_a_crash in runtime_dir().glob("run-*"):
        shutil.rmtree(left_by_a_crash, ignore_errors=True)
    run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=runtime_dir()))
    stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
    return run_dir


def _wait_for_others(settings: Settings, pool: Pool, num_here: int, progress: HeadProgress) -> None:
    """Until as many devices as were asked for have registered."""
    missing = settings.wait_for - num_here
    if missing > 0:
        progress.say(f"Waiting for {missing} more devices: run potluck join in another terminal")
        pool.wait_for_devices([], settings.wait_for, _JOIN_TIMEOUT_S)


def _mover(
    settings: Settings, network: Network | None, source: ModelSource, local: _LocalWorkers
) -> Callable[[ThisHost], None] | None:
    """What goes on at another address of this host; None where it has none, or it is fixed."""
    if network is None or settings.lan_host is not None:
        return None

    def move(here: ThisHost) -> None:
        network.update_host(here)
        source.update_host(here)
        local.restart(here)

    return move
