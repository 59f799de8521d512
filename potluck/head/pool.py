"""The pool holds the workers that have registered with this head, what they report, and whether they are there."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import zmq

from potluck.head.hosts import HostRoster, PoolHosts, RpcClient
from potluck.host.local_host import ThisHost
from transport.control import REVOKED_REASON, ControlPeer, ControlServer
from transport.errors import (
    BadMessage,
    ConfigError,
    DeadlineExceeded,
    HostRevoked,
    NeighbourGone,
    PotluckError,
    RingDown,
)
from transport.links.endpoints import is_host_endpoint, local_endpoint
from transport.links.secure_endpoints import Where
from transport.messages.control import (
    ControlMessage,
    Listening,
    Load,
    Loaded,
    Loading,
    Register,
    Stats,
    StatsRequest,
    Stop,
    WorkerFault,
)
from transport.messages.measure import MeasureReply, MeasureRequest, ProfileProgress
from transport.messages.pool import NodeHello
from transport.messages.ring import Fence
from transport.security.curve import Guard, Prepare

_MAX_THREADS = 65536
_MAX_BYTES = 2**50
_MAX_TEXT_CHARACTERS = 4096
_ROSTER_UNREADABLE = "the head can't read its list of devices now"
NAME_TAKEN = "is in the pool already"
"""A part of what a worker is told whose device has another one's name."""

_DEVICE_NAME = re.compile(r"[\w.:/-]{1,100}")


@dataclass(slots=True)
class PoolWorker:
    """One device's worker as the head sees it. What it says of another load than that of `fence` is late and ignored.

    `fault` is why the worker can't be used until it loads anew.
    """

    peer: ControlPeer
    fence: Fence | None = None
    listens_at: Where = "local"
    listening: Listening | None = None
    loading: Loading | None = None
    loaded: Loaded | None = None
    fault: PotluckError | None = None
    stats: Stats | None = None
    last_progress_s: float = 0.0
    is_remote: bool = False
    """Whether it is on another host, where the head's files are not."""

    @property
    def register(self) -> Register:
        return self.peer.register


class Pool:
    """Owns the control socket. `on_change` is called when workers have come, gone or failed; it must not block."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        run_dir: Path,
        *,
        on_change: Callable[[], None],
        here: ThisHost,
        roster: HostRoster | None = None,
        control: str | None = None,
        pool: str = "",
        pieces: Callable[[], str] = lambda: "",
    ) -> None:
        """`here` is the head's host. Hosts of the `roster` may come in at `control`, a TCP endpoint; `pool` is the id
        that they are told, `pieces` where this host gives them pieces of models."""
        self._here = here
        self._roster = roster
        self._edges = here.secure_endpoints(context, run_dir)
        self.own_key = self._edges.key
        self.hosts = PoolHosts(
            own_key=self.own_key,
            roster=roster,
            pool=pool,
            pieces=pieces,
            send=lambda peer, message: self._server.send(peer, message),
        )
        self._on_change = on_change
        self._workers: dict[bytes, PoolWorker] = {}
        self._changed = threading.Condition()
        self._stats_token = 0
        local = local_endpoint(run_dir, "control")
        endpoints: list[tuple[str, Guard | None]] = [(local, self._edges.guard(local, ""))]
        if roster is not None and control is not None:
            endpoints.append((control, self._edges.curve.guard(roster.admits)))
        self._exit_error: PotluckError | None = None
        self.rpc: RpcClient[PoolWorker, MeasureRequest, MeasureReply, ProfileProgress] = RpcClient(
            lambda peer, message: self._server.send(peer, message),
            reply_types=get_args(MeasureReply),
            progress_types=(ProfileProgress,),
            lost_error=self._lost_error,
        )
        self._server = ControlServer(
            context,
            endpoints,
            on_message=self._on_message,
            on_lost=self._on_lost,
            # Whom hosts may give pieces to is not to wait for a ring that loads.
            on_tick=self.hosts.send_members,
            eviction_reason=lambda key: REVOKED_REASON if self._roster_problem() is None else _ROSTER_UNREADABLE,
        )

    @property
    def endpoint(self) -> str:
        """Where this host's workers register."""
        return self._server.endpoints[0]

    @property
    def control(self) -> str | None:
        """Where other hosts come in, if they may."""
        return self._server.endpoints[1] if len(self._server.endpoints) > 1 else None

    def client_auth(self, endpoint: str) -> Prepare | None:
        """For a socket of this context that connects to a process of this host."""
        return self._edges.client_auth(endpoint, "")

    def key_of(self, worker: PoolWorker) -> str:
        """Its host's."""
        return worker.peer.key or self.own_key

    def workers(self) -> list[PoolWorker]:
        """In order of registration names, so that plans do not depend on who was first."""
        with self._changed:
            return sorted(self._workers.values(), key=lambda worker: worker.register.device)

    def wait_for(self, ready: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Raises DeadlineExceeded."""
        with self._changed:
            if not self._changed.wait_for(ready, timeout_s):
                raise DeadlineExceeded(f"{what} took more than {timeout_s:.0f} s", hint="see the logs: potluck status")

    def wait_for_devices(self, names: Sequence[str], num_devices: int, timeout_s: float) -> None:
        """Until the workers called `names` have registered and there are `num_devices` in all.

        Raises DeadlineExceeded, or RingDown as soon as a worker of this host has ended instead.
        """

        def ready() -> bool:
            if self._exit_error is not None:
                raise self._exit_error
            registered = {worker.register.device for worker in self._workers.values()}
            return registered >= set(names) and len(registered) >= num_devices

        self.wait_for(ready, timeout_s, f"waiting for {max(len(names), num_devices)} devices")

    def start_loading(self, assignments: Sequence[tuple[PoolWorker, Load]], timeout_s: float = 30.0) -> list[str]:
        """Send every worker its load; they go on loading. Returns where each of them listens.

        Raises the first worker's error, or DeadlineExceeded.
        """
        with self._changed:
            for worker, _ in assignments:
                if (lost := self._lost_error(worker)) is not None:  # Nobody will say so again.
                    raise lost
            for worker, load in assignments:
                worker.fence, worker.listens_at = load.fence, load.listen
                worker.listening = worker.loading = worker.loaded = worker.fault = worker.stats = None
        for worker, load in assignments:
            self._server.send(worker.peer, load)
        found: list[str] = []
        with self._changed:
            self._changed.wait_for(
                lambda: all(worker.listening or worker.fault for worker, _ in assignments), timeout_s
            )
            for worker, _ in assignments:
                if worker.fault is not None:
                    raise worker.fault
                if worker.listening is None:
                    raise DeadlineExceeded(
                        f"{worker.register.device} did not listen within {timeout_s:.0f} s",
                        hint="its log says more: potluck status",
                    )
                found.append(worker.listening.endpoint)
        return found

    def wait_until_loaded(
        self,
        workers: Sequence[PoolWorker],
        *,
        on_loading: Callable[[Sequence[PoolWorker]], None],
        silence_s: float = 60.0,
    ) -> None:
        """Until all have loaded and are connected; `tick` is called some times a second meanwhile.

        Raises the first worker's error, or DeadlineExceeded if one reports no progress for `silence_s`.
        """
        with self._changed:
            now_s = time.monotonic()
            for worker in workers:
                worker.last_progress_s = now_s
            while not all(worker.loaded for worker in workers):
                for worker in workers:
                    if worker.fault is not None:
                        raise worker.fault
                    if worker.loaded is None and time.monotonic() - worker.last_progress_s > silence_s:
                        raise DeadlineExceeded(
                            f"{worker.register.device} made no progress in loading for {silence_s:.0f} s",
                            hint="its log says more: potluck status",
                        )
                on_loading(workers)
                self._changed.wait(0.1)
        on_loading(workers)

    def request_stats(self, workers: Sequence[PoolWorker], timeout_s: float = 2.0) -> None:
        """Ask for fresh `stats`; a worker that does not answer in time keeps its old ones."""
        with self._changed:
            self._stats_token += 1
            token = self._stats_token
        for worker in workers:
            self._server.send(worker.peer, StatsRequest(token))
        with self._changed:
            self._changed.wait_for(
                lambda: all(worker.stats is not None and worker.stats.token >= token for worker in workers), timeout_s
            )

    def send(self, worker: PoolWorker, message: ControlMessage) -> None:
        """Does not wait."""
        self._server.send(worker.peer, message)

    def on_worker_exit(self, pid: int, error: PotluckError) -> None:
        """A worker process of this host has ended: known sooner than by its silence."""
        with self._changed:
            self._exit_error = error
            self._changed.notify_all()
            gone = [worker for worker in self._workers.values() if worker.register.pid == pid]
        for worker in gone:
            self._set_fault(worker, error)
            with self._changed:
                self._workers.pop(worker.peer.identity, None)

    def remove_workers(self, pids: Collection[int]) -> None:
        """Forget workers of this host that are being replaced."""
        with self._changed:
            self._exit_error = None
            for worker in list(self._workers.values()):
                if not worker.is_remote and worker.register.pid in pids:
                    del self._workers[worker.peer.identity]
            self._changed.notify_all()

    def stop_workers(self, reason: str) -> None:
        """Tell every worker to leave; does not wait."""
        for worker in self.workers():
            self._server.send(worker.peer, Stop(reason))

    def close(self) -> None:
        self._server.close()
        self._edges.close()

    def _on_message(self, peer: ControlPeer, message: ControlMessage) -> None:
        with self._changed:
            worker = self._workers.get(peer.identity)
        match message:
            case _ if isinstance(peer.introduction, NodeHello):
                self.hosts.on_message(peer, message)
            case Register():
                self._add(PoolWorker(peer=peer, is_remote=peer.key not in ("", self.own_key)))
            case WorkerFault(fence=fence, error=error) if worker and fence == worker.fence:
                self._set_fault(worker, error.error(of=worker.register.device))
            case Listening(fence=fence, endpoint=endpoint) if worker and fence == worker.fence:
                if worker.is_remote and worker.listens_at == "network" and not is_host_endpoint(endpoint):
                    self._set_fault(worker, BadMessage(f"{worker.register.device} listens at {endpoint[:80]!r}"))
                    return
                with self._changed:
                    worker.listening = message
                    self._changed.notify_all()
            case Loading(fence=fence) if worker and fence == worker.fence:
                with self._changed:
                    worker.loading, worker.last_progress_s = message, time.monotonic()
                    self._changed.notify_all()
            case Loaded(fence=fence) if worker and fence == worker.fence:
                with self._changed:
                    worker.loaded, worker.last_progress_s = message, time.monotonic()
                    self._changed.notify_all()
            case Stats() if worker is not None:
                with self._changed:
                    worker.stats = message
                    self._changed.notify_all()
            case _ if worker is not None:
                self.rpc.on_message(peer, message)

    def _add(self, worker: PoolWorker) -> None:
        reason = self._refusal_reason(worker)
        if reason is not None:
            self._server.send(worker.peer, Stop(reason))
            return
        with self._changed:
            self._workers[worker.peer.identity] = worker
            self._changed.notify_all()
        self._on_change()

    def _refusal_reason(self, worker: PoolWorker) -> str | None:
        """Names tell devices and hosts apart: a second one of the same name can't come in, and a host has the name that
        the roster gave it."""
        register = worker.register
        if not _DEVICE_NAME.fullmatch(register.device):
            return "a device's name has other characters than letters, digits and .:/-: choose another --name"
        if not _is_plausible(register):
            return "what this device says of itself makes no sense: update Potluck on its host"
        if register.device in {other.register.device for other in self._workers.values()}:
            return f"a device called {register.device} {NAME_TAKEN}: choose another --name"
        name = self._here.name
        if worker.is_remote and self._roster is not None:
            name = self._roster.name_of(worker.peer.key) or ""
        if register.host != name:
            return f"this host is called {name} in the pool, not {register.host}: join again"
        return None

    def _lost_error(self, worker: PoolWorker) -> PotluckError | None:
        if worker.peer.identity in self._workers:
            return None
        return worker.fault or RingDown("its worker is gone")

    def _roster_problem(self) -> ConfigError | None:
        return self._roster.problem() if self._roster is not None else None

    def _on_lost(self, peer: ControlPeer) -> None:
        with self._changed:
            worker = self._workers.pop(peer.identity, None)
            self._changed.notify_all()
        self.hosts.on_lost(peer)
        if worker is None:
            return
        if worker.is_remote and self._roster is not None and self._roster.name_of(peer.key) is None:
            problem = self._roster_problem()
            if problem is not None:
                what = f"{worker.register.device} is kept out: {problem.message}"
                self._set_fault(worker, RingDown(what, hint=problem.hint))
                return
            what = f"{worker.register.device} was revoked"
            self._set_fault(worker, HostRevoked(what, hint="its host can pair again with a new code"))
            return
        what = f"{worker.register.device} left or went silent"
        self._set_fault(worker, RingDown(what, hint="wake it up, let it join again, or start this head without it"))

    def _set_fault(self, worker: PoolWorker, error: PotluckError) -> None:
        """The first one counts, but that a cause replaces a symptom."""
        with self._changed:
            if worker.fault is None or (
                isinstance(worker.fault, NeighbourGone) and not isinstance(error, NeighbourGone)
            ):
                worker.fault = error
            self._changed.notify_all()
        self._on_change()


def _is_plausible(register: Register) -> bool:
    """Whether a plan can be made with it: a number that is none would end the head."""
    return (
        0 < register.threads <= _MAX_THREADS
        and 0 <= register.free_bytes <= _MAX_BYTES
        and 0 <= register.total_bytes <= _MAX_BYTES
        and 0.0 < register.bandwidth_bytes_per_s <= _MAX_BYTES
        and max(map(len, (register.kind, register.memory_pool, register.machine))) <= _MAX_TEXT_CHARACTERS
    )
