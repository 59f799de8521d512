"""What planning needs to know of a pool, measured or remembered: every device with this model, every link."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import zmq
from rich.markup import escape

from devices.device import Device, LeftOut
from planner.measured import LinkTimes, PoolTimes
from potluck.calibration import learn
from potluck.device_probes import ChildProbes, DeviceProbes, Doing, WorkerProbes
from potluck.lan import ThisHost, alone
from potluck.link_probes import End, OwnEnd, Pair, WorkerEnd, measure, pairs
from potluck.paths import profiles_dir
from potluck.planning import device_of
from potluck.pool import Pool, PoolWorker
from potluck.profile_cache import ProfileCache
from potluck.profile_devices import DeviceMeasuring, device_key
from potluck.store import StoredModel
from transport.errors import ConfigError, PotluckError
from transport.link_probe import LinkFigures
from transport.messages import WeightsForm
from transport.pool_messages import SharedModel

Say = Callable[[str], object]
Found = tuple[PoolTimes, tuple[LeftOut, ...]]


def pool_times_for(
    model: StoredModel,
    pool: Pool,
    here: ThisHost,
    *,
    run_dir: Path,
    say: Say,
    doing: Doing = lambda device, what: None,
    weights: WeightsForm = "stored",
    fresh: bool = False,
    in_turn: bool = False,
    probes: DeviceProbes | None = None,
    shared: Callable[[PoolWorker], SharedModel | None] = lambda worker: None,
) -> Found:
    """All devices and hosts of a running pool, with matrices in the form `weights`. `here` is the head's host;
    `run_dir` is for its sockets; `shared` says where a worker gets the model from, if it does not lie on its host.

    What can't be measured is left out and named. Hosts are measured at the same time, a host's devices one after
    another; `in_turn`: one device at a time, for hosts that are none (several on one machine).
    Raises ConfigError if no device is left.
    """
    devices = [device_of(worker.register) for worker in pool.workers()]
    measuring = _Measuring(
        model, ProfileCache(profiles_dir()), probes or WorkerProbes(pool, shared), say, doing, fresh, weights
    )
    with zmq.Context() as context, closing(here.edges(context, run_dir)) as edges:
        own = OwnEnd(context, here.name, edges)
        ends = [WorkerEnd(pool, worker) for worker in pool.workers()]
        return measuring.run(devices, own, ends, in_turn=in_turn)


def local_times_for(
    model: StoredModel,
    devices: Sequence[Device],
    *,
    say: Say,
    doing: Doing = lambda device, what: None,
    weights: WeightsForm = "stored",
    fresh: bool = False,
    probes: DeviceProbes | None = None,
) -> Found:
    """Devices of this host, without a pool: children of this process measure them. See `pool_times_for`."""
    measuring = _Measuring(model, ProfileCache(profiles_dir()), probes or ChildProbes(), say, doing, fresh, weights)
    here = alone(devices[0].host if devices else socket.gethostname())
    with (
        zmq.Context() as context,
        tempfile.TemporaryDirectory(prefix="pl-") as folder,
        closing(here.edges(context, Path(folder))) as edges,
    ):
        own, other = (OwnEnd(context, here.name, edges) for _ in range(2))
        return measuring.run(devices, own, [other], in_turn=False)


@dataclass(slots=True)
class _Measuring:
    """One round of measuring, with what was remembered."""

    model: StoredModel
    cache: ProfileCache
    probes: DeviceProbes
    say: Say
    doing: Doing
    fresh: bool
    weights: WeightsForm = "stored"

    def run(self, devices: Sequence[Device], own: End, ends: Sequence[End], *, in_turn: bool) -> Found:
        links, unreachable = self._links(own, ends)
        left_out = [
            LeftOut(name=device.name, reason=f"its host can't be reached: {unreachable[device.host]}")
            for device in devices
            if device.host in unreachable
        ]
        measuring = DeviceMeasuring(
            model=self.model,
            weights=self.weights,
            cache=self.cache,
            probes=self.probes,
            say=self.say,
            doing=self.doing,
            fresh=self.fresh,
        )
        times, failed = measuring.run([device for device in devices if device.host not in unreachable], in_turn=in_turn)
        left_out += failed
        if not times:
            raise ConfigError(
                f"no device could be measured with {self.model.name}",
                hint="; ".join(f"{one.name}: {one.reason}" for one in left_out) or "is a device in the pool?",
            )
        return PoolTimes(head=own.host, devices=tuple(times), links=tuple(links)), tuple(left_out)

    def _links(self, own: End, ends: Sequence[End]) -> tuple[list[LinkTimes], dict[str, str]]:
        """What is known of links, and the hosts that the head can't reach, with the reason."""
        found: list[LinkTimes] = []
        unreachable: dict[str, str] = {}
        for pair in pairs(own, ends):
            hosts = (pair.leader.host, pair.follower.host)
            if unreachable.keys() & set(hosts):
                continue
            try:
                there, back = self._link(pair)
            except PotluckError as error:
                self.say(f"[yellow]No link between {hosts[0]} and {hosts[1]}:[/yellow] {escape(error.message)}")
                if own.host in hosts and hosts[0] != hosts[1]:
                    unreachable[hosts[1]] = error.message
                continue
            found.append(_link_times(*hosts, there))
            if hosts[0] != hosts[1]:
                found.append(_link_times(hosts[1], hosts[0], back))
        return found, unreachable

    def _link(self, pair: Pair) -> tuple[LinkFigures, LinkFigures]:
        source, target = pair.leader.host, pair.follower.host
        how = f"{pair.where} {self.model.spec.hidden_size}"
        now_s = time.time()
        there, back = self.cache.link(source, target, how, now_s), self.cache.link(target, source, how, now_s)
        if there is not None and back is not None and not self.fresh:
            return there, back
        self.doing(source, f"the link to {target}" if source != target else "the link between its devices")
        there, back = measure(pair, self.model.spec.hidden_size)
        self.cache.keep_link(source, target, how, there, now_s)
        if source == target:
            return there, there
        self.cache.keep_link(target, source, how, back, now_s)
        return there, back


def _link_times(source: str, target: str, figures: LinkFigures) -> LinkTimes:
    return LinkTimes(
        source=source,
        target=target,
        hop_s=figures.hop_s,
        hop_p95_s=figures.hop_p95_s,
        bytes_per_s=figures.bytes_per_s,
    )


def remember_deviation(model: StoredModel, pool: Pool, device: str, ratio: float, weights: WeightsForm) -> None:
    """A device took `ratio` times what was predicted of it in use: the next plans know. What was faster than measured
    was disturbed when it was measured, and is measured again."""
    found = [worker for worker in pool.workers() if worker.register.device == device]
    cache = ProfileCache(profiles_dir())
    for worker in found:
        key = device_key(model, device_of(worker.register), worker.register.machine, weights)
        now_s = time.time()
        if ratio < 1 and cache.learned(key) is None:
            cache.doubt(key)
        else:
            cache.keep_learned(key, learn(cache.learned(key), ratio, now_s))
