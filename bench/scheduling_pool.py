"""Workers that are up and wait for a ring to be loaded: processes of this host, or of others that join."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from planner.plan import Plan
from potluck.config import Settings
from potluck.lan import ThisHost, alone
from potluck.model_share import ModelShare, OwnModel, PieceGiver
from potluck.node import Node
from potluck.offer import offered_devices
from potluck.planning import device_of, estimated_times, plan_for
from potluck.pool import Pool, PoolWorker
from potluck.profiling import pool_times_for
from potluck.store import StoredModel
from transport.control_messages import Stats
from transport.endpoints import port_of

if TYPE_CHECKING:
    from potluck.network import Network

_STARTS_WITHIN_S = 120.0


@dataclass(frozen=True, slots=True)
class BenchPool:
    """One pool with all its devices; `run_dir` is for sockets and logs. Other hosts get the model from the `giver`."""

    context: zmq.Context[zmq.Socket[bytes]]
    pool: Pool
    here: ThisHost
    run_dir: Path
    giver: PieceGiver | None = None

    def wait_for(self, num_devices: int) -> None:
        """Raises DeadlineExceeded."""
        self.pool.wait_for_devices([], num_devices, _STARTS_WITHIN_S)

    def plan(self, model: StoredModel, settings: Settings, *, in_turn: bool = False) -> Plan:
        """As `potluck up` would with these settings. `in_turn`: measure one device at a time. Raises PotluckError."""
        if settings.estimate:
            devices = [device_of(worker.register) for worker in self.pool.workers()]
            return plan_for(model, estimated_times(model, devices, self.here.name), settings)
        times, _ = pool_times_for(
            model,
            self.pool,
            self.here,
            run_dir=self.run_dir,
            say=lambda line: None,
            in_turn=in_turn,
            shared=self.share(model).for_worker,
        )
        return plan_for(model, times, settings)

    def share(self, model: StoredModel) -> OwnModel | ModelShare:
        """Of the model with the other hosts. Raises PotluckError."""
        if self.giver is None:
            return OwnModel(model)
        share = ModelShare(model, self.here, self.giver, self.pool)
        share.ready(lambda line: None, for_others=True)
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
            raise RuntimeError("a worker does not answer: see the logs")
        return found


@contextmanager
def pool_of_hosts(here: ThisHost, door_port: int) -> Iterator[BenchPool]:
    """Of workers of other hosts, paired with this one, which join at `door_port` by themselves; empty at first."""
    from potluck.network import Network  # Here, since zeroconf takes a while to import.

    settings = Settings(lan_host=here.address, lan_port=door_port, discovery=False)
    network = Network(here, settings, say=lambda line: None)
    with _pool(here, network) as found, ExitStack() as stack:
        control = found.pool.control
        assert control is not None
        stack.callback(network.close)
        network.open(port_of(control))
        yield found


@contextmanager
def pool_of_processes(num_stages: int) -> Iterator[BenchPool]:
    """Of worker processes on this host's CPU, one thread each."""
    here = alone("bench")
    settings = Settings(devices=("torch:cpu",) * num_stages, threads=None if num_stages > 1 else 1)
    devices = offered_devices(settings, say=lambda line: None, host=here.name, is_head=True)
    one_thread = [replace(device, threads=1) for device in devices]
    with _pool(here, None) as found, ExitStack() as stack:
        node = Node(
            control=found.pool.endpoint,
            logs=found.run_dir,
            run_dir=found.run_dir,
            on_exit=found.pool.report_exit,
            keys_file=here.keys_file,
        )
        stack.callback(node.stop)
        node.start(one_thread)
        found.pool.wait_for_devices([device.name for device in one_thread], num_stages, _STARTS_WITHIN_S)
        yield found


@contextmanager
def _pool(here: ThisHost, network: Network | None) -> Iterator[BenchPool]:
    run_dir = Path(tempfile.mkdtemp(prefix="plb-"))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        giver = None if network is None else PieceGiver(here, network.pieces, network.roster.admits)
        try:
            pool = Pool(
                context,
                run_dir,
                on_fault=lambda worker, error: None,
                on_joined=lambda worker: None,
                here=here,
                roster=network.roster if network is not None else None,
                control=network.control if network is not None else None,
                pool=network.pool if network is not None else "",
                pieces=(lambda: "") if giver is None else (lambda: giver.endpoint),
            )
            try:
                yield BenchPool(context, pool, here, run_dir, giver)
            finally:
                pool.stop_workers("the bench is over")
                pool.close()
        finally:
            if giver is not None:
                giver.close()
    finally:
        context.destroy(0)
        shutil.rmtree(run_dir, ignore_errors=True)
