"""Workers that are up and wait for a ring to be loaded: processes of this host, or of others that join."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import zmq

from planner.plan import Plan
from potluck.config import Settings
from potluck.lan import ThisHost
from potluck.node import Node
from potluck.offer import offered_devices
from potluck.planning import device_of, estimated_times, plan_for
from potluck.pool import Pool, PoolWorker
from potluck.profiling import pool_times_for
from potluck.store import StoredModel
from transport.messages import Stats

_STARTS_WITHIN_S = 120.0


@dataclass(frozen=True, slots=True)
class BenchPool:
    """One pool with all its devices; `run_dir` is for sockets and logs."""

    context: zmq.Context[zmq.Socket[bytes]]
    pool: Pool
    here: ThisHost
    run_dir: Path

    def wait_for(self, num_devices: int) -> None:
        """Raises DeadlineExceeded."""
        self.pool.wait_for_devices([], num_devices, _STARTS_WITHIN_S)

    def plan(self, model: StoredModel, settings: Settings, *, in_turn: bool = False) -> Plan:
        """As `potluck up` would with these settings. `in_turn`: measure one device at a time. Raises PotluckError."""
        if settings.estimate:
            devices = [device_of(worker.register) for worker in self.pool.workers()]
            return plan_for(model, estimated_times(model, devices, self.here.name), settings)
        times, _ = pool_times_for(
            model, self.pool, self.here, run_dir=self.run_dir, say=lambda line: None, in_turn=in_turn
        )
        return plan_for(model, times, settings)

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
def pool_of_hosts(here: ThisHost, lan_port: int) -> Iterator[BenchPool]:
    """Of workers of other hosts, which join at `here` by themselves; empty at first."""
    with _pool(here, lan_port) as found:
        yield found


@contextmanager
def pool_of_processes(num_stages: int) -> Iterator[BenchPool]:
    """Of worker processes on this host's CPU, one thread each."""
    here = ThisHost(name="bench")
    settings = Settings(devices=("torch:cpu",) * num_stages, threads=None if num_stages > 1 else 1)
    devices = offered_devices(settings, say=lambda line: None, host=here.name, is_head=True)
    one_thread = [replace(device, threads=1) for device in devices]
    with _pool(here, 0) as found, ExitStack() as stack:
        node = Node(
            control=found.pool.endpoint, logs=found.run_dir, run_dir=found.run_dir, on_exit=found.pool.report_exit
        )
        stack.callback(node.stop)
        node.start(one_thread)
        found.pool.wait_for_devices([device.name for device in one_thread], num_stages, _STARTS_WITHIN_S)
        yield found


@contextmanager
def _pool(here: ThisHost, lan_port: int) -> Iterator[BenchPool]:
    run_dir = Path(tempfile.mkdtemp(prefix="plb-"))
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        pool = Pool(
            context,
            run_dir,
            on_fault=lambda worker, error: None,
            on_joined=lambda worker: None,
            here=here,
            lan_port=lan_port,
        )
        try:
            yield BenchPool(context, pool, here, run_dir)
        finally:
            pool.stop_workers("the bench is over")
            pool.close()
    finally:
        context.destroy(0)
        shutil.rmtree(run_dir, ignore_errors=True)
