"""Profiling measures or recalls what planning needs: every device with this model, every link."""

from __future__ import annotations

import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

import zmq
from rich.markup import escape

from devices.hardware.device import Device, UnavailableDevice
from devices.hardware.measure import is_noisy
from planner.measurements import DeviceTimes, LinkTimes, PoolTimes
from potluck.head.plan_watch import factor_at, is_deviating, learn, scale_times
from potluck.head.planning import device_of
from potluck.head.pool import Pool, PoolWorker
from potluck.head.profiling.cache import DeviceKey, ProfileCache, model_identity
from potluck.head.profiling.probes import (
    ChildProfiler,
    DeviceProfiler,
    HostPair,
    LocalProbeEnd,
    OnMeasuring,
    ProbeEnd,
    WorkerProbeEnd,
    WorkerProfiler,
    host_pairs,
    measure_links,
)
from potluck.host.local_host import ThisHost, isolated_host
from potluck.store.manifest import StoredModel
from potluck.system.paths import profiles_dir
from transport.errors import ConfigError, PotluckError
from transport.links.link_probe import LinkMeasurement
from transport.messages.measure import ProfileReport
from transport.messages.pool import SharedModel
from transport.messages.ring import WeightsForm

Say = Callable[[str], object]
MeasuredPool = tuple[PoolTimes, tuple[UnavailableDevice, ...]]
_UNDER_LOAD_S = 1.0


def device_key(model: StoredModel, device: Device, machine: str, weights: WeightsForm) -> DeviceKey:
    """Under what a device's times are kept. `machine` is what its worker registered with."""
    return DeviceKey(
        host=device.host,
        backend=device.backend,
        kind=device.kind,
        threads=device.threads,
        dtype=device.compute_dtype,
        machine=machine,
        model=model_identity(model),
        weights=weights,
    )


def device_times(device: Device, report: ProfileReport, slowdown: float = 1.0) -> DeviceTimes:
    """A report as the planner's structs."""
    return DeviceTimes(
        device=device,
        kinds=report.kinds,
        layers=report.layers,
        embed=report.embed,
        head=report.lm_head,
        step_s=report.step_s,
        busy=slowdown,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureOptions:
    """How a pool is measured: with matrices in the form `weights`; `fresh`: whatever is remembered; `in_turn`: one
    device at a time, for hosts that share a machine."""

    weights: WeightsForm = "stored"
    fresh: bool = False
    in_turn: bool = False


@dataclass(slots=True)
class PoolMeasurement:
    """One round of measuring, with what was remembered."""

    model: StoredModel
    cache: ProfileCache
    probes: DeviceProfiler
    say: Say
    measuring: OnMeasuring
    options: MeasureOptions = MeasureOptions()
    _keys: dict[str, DeviceKey] = field(default_factory=dict)
    _known: dict[str, ProfileReport] = field(default_factory=dict)
    _to_remeasure: dict[str, ProfileReport] = field(default_factory=dict)
    _noisy: dict[str, float] = field(default_factory=dict)
    _slowdowns: dict[str, float] = field(default_factory=dict)
    _errors: dict[str, str] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)

    def run(self, devices: Sequence[Device], own: ProbeEnd, ends: Sequence[ProbeEnd]) -> MeasuredPool:
        """The times of all that could be measured, and why the others could not. See `pool_times_for`."""
        links, unreachable = self._links(own, ends)
        for device in devices:
            if device.host in unreachable:
                self._errors[device.name] = f"its host can't be reached: {unreachable[device.host]}"
        times = self._measure_devices([device for device in devices if device.host not in unreachable])
        left_out = tuple(UnavailableDevice(name=name, reason=reason) for name, reason in self._errors.items())
        if not times:
            raise ConfigError(
                f"no device could be measured with {self.model.name}",
                hint="; ".join(f"{one.name}: {one.reason}" for one in left_out) or "is a device in the pool?",
            )
        return PoolTimes(head=own.host, devices=tuple(times), links=tuple(links)), left_out

    def _measure_devices(self, devices: Sequence[Device]) -> list[DeviceTimes]:
        self._keys = {
            one.name: device_key(self.model, one, self.probes.machine(one), self.options.weights) for one in devices
        }
        now_s = time.time()
        for name, key in self._keys.items():
            report = None if self.options.fresh else self.cache.report(key)
            if report is not None:
                (self._to_remeasure if self.cache.should_remeasure(key, now_s) else self._known)[name] = report
        unknown = [group for group in _groups(devices) if not self._is_known(group)]
        for batch in _batches(unknown, in_turn=self.options.in_turn):
            self._measure(batch)
        if self._noisy:
            most, names = max(self._noisy.values()), ", ".join(sorted(self._noisy))
            what = f"Other programs had up to {100 * most:.0f} % of the processors meanwhile"
            self.say(escape(f"{what}; measured again at a later start, or with potluck up --fresh: {names}"))
        now_s = time.time()
        return [self._times(device, now_s) for device in devices if device.name in self._known]

    def _times(self, device: Device, now_s: float) -> DeviceTimes:
        times = device_times(device, self._known[device.name], self._slowdowns.get(device.name, 1.0))
        learned = None if self.options.fresh else self.cache.learned(self._keys[device.name])
        factor = factor_at(learned, now_s)
        if is_deviating(factor):
            words = f"{device.name} took {factor:.2f}× what was measured of it when it was in use, and is planned so"
            self.say(escape(f"{words}; --fresh measures it again"))
        return scale_times(times, factor)

    def _is_known(self, group: Sequence[Device]) -> bool:
        """Whether all of the group, and what its devices do to each other, is remembered."""
        if not all(device.name in self._known for device in group):
            return False
        factors = (
            (1.0,) if len(group) == 1 else None if self.options.fresh else self.cache.slowdowns(self._keys_of(group))
        )
        if factors is not None:
            self._slowdowns.update({device.name: factor for device, factor in zip(group, factors, strict=True)})
        return factors is not None

    def _measure(self, groups: Sequence[Sequence[Device]]) -> None:
        """Groups of different hosts, at the same time; a group's devices one after another, and then all together."""
        everyone = [device for group in groups for device in group]
        self.say(escape(f"Measuring {self.model.name} on {', '.join(device.name for device in everyone)}"))
        try:
            self._profile([[device for device in group if device.name not in self._known] for group in groups])
            groups = [[device for device in group if device.name in self._known] for group in groups]
            groups = [group for group in groups if group and not self._is_known(group)]
            # What was remembered of some must be loaded to be measured beside the others.
            self._profile([[device for device in group if device.name not in self._done] for group in groups])
            for group in groups:
                self._measure_slowdowns([device for device in group if device.name in self._known])
        finally:
            self.probes.end(everyone)

    def _profile(self, groups: Sequence[Sequence[Device]]) -> None:
        for column in zip_longest(*groups):
            batch = [device for device in column if device is not None]
            results = self.probes.profile(batch, self.model.path, self.options.weights, self.measuring)
            for device, result in zip(batch, results, strict=True):
                if isinstance(result, PotluckError):
                    self._errors[device.name] = result.message
                    self.say(f"[yellow]{escape(device.name)} is left out:[/yellow] {escape(result.message)}")
                    self._known.pop(device.name, None)
                else:
                    self._save(device, result)

    def _save(self, device: Device, report: ProfileReport) -> None:
        """Devices that are alike get equal times, the least noisy ones, so that the planner need not tell them apart.
        Of two noisy measurements the better one counts."""
        self._done.add(device.name)
        earlier = self._to_remeasure.get(device.name)
        if is_noisy(report.others_share):
            self._noisy[device.name] = report.others_share
            if earlier is not None:
                report = min(earlier, report, key=lambda one: one.under_load_s)
        self._known[device.name] = report
        alike = [name for name in self._done if self._keys[name] == self._keys[device.name]]
        best = min((self._known[name] for name in alike), key=lambda one: one.under_load_s)
        self._known.update(dict.fromkeys(alike, best))
        self.cache.save_report(self._keys[device.name], best, time.time())

    def _measure_slowdowns(self, group: Sequence[Device]) -> None:
        if len(group) < 2:
            return
        for device in group:
            self.measuring(device.name, "while the others work")
        # Alone once more, at about the same time: other programs come and go.
        alone = [self.probes.measure_under_load([device], _UNDER_LOAD_S / 2)[0] for device in group]
        together = self.probes.measure_under_load(group, _UNDER_LOAD_S)
        factors: dict[DeviceKey, list[float]] = defaultdict(list)
        for device, alone_s, together_s in zip(group, alone, together, strict=True):
            factors[self._keys[device.name]].append(_slowdown(alone_s, together_s))
        means = {device.name: statistics.fmean(factors[self._keys[device.name]]) for device in group}
        self._slowdowns.update(means)
        self.cache.save_slowdowns(self._keys_of(group), tuple(means.values()))

    def _keys_of(self, group: Sequence[Device]) -> tuple[DeviceKey, ...]:
        return tuple(self._keys[device.name] for device in group)

    def _links(self, own: ProbeEnd, ends: Sequence[ProbeEnd]) -> tuple[list[LinkTimes], dict[str, str]]:
        """What is known of links, and the hosts that the head can't reach, with the reason."""
        found: list[LinkTimes] = []
        unreachable: dict[str, str] = {}
        for pair in host_pairs(own, ends):
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

    def _link(self, pair: HostPair) -> tuple[LinkMeasurement, LinkMeasurement]:
        source, target = pair.leader.host, pair.follower.host
        how = f"{pair.where} {self.model.spec.hidden_size}"
        now_s = time.time()
        there, back = self.cache.link(source, target, how, now_s), self.cache.link(target, source, how, now_s)
        if there is not None and back is not None and not self.options.fresh:
            return there, back
        self.measuring(source, f"the link to {target}" if source != target else "the link between its devices")
        there, back = measure_links(pair, self.model.spec.hidden_size)
        self.cache.save_link(source, target, how, there, now_s)
        if source == target:
            return there, there
        self.cache.save_link(target, source, how, back, now_s)
        return there, back


def _slowdown(alone_s: float | PotluckError, together_s: float | PotluckError) -> float:
    """1 where one of the two failed: the device did not fail before, and its own times hold."""
    if isinstance(alone_s, PotluckError) or isinstance(together_s, PotluckError):
        return 1.0
    return max(1.0, together_s / alone_s)


def _groups(devices: Sequence[Device]) -> list[list[Device]]:
    """Devices that share memory, and with it its bus or their cores."""
    by_pool: dict[str, list[Device]] = defaultdict(list)
    for device in devices:
        by_pool[device.memory_pool].append(device)
    # Each may take what it would get if all held their layers at once.
    return [
        [replace(one, free_bytes=min(one.free_bytes, one.total_bytes // len(group))) for one in group]
        for group in by_pool.values()
    ]


def _batches(groups: Sequence[list[Device]], *, in_turn: bool) -> Iterator[list[list[Device]]]:
    """Groups to measure at the same time: one of each host, or one at all."""
    if in_turn:
        yield from ([group] for group in groups)
        return
    by_host: dict[str, list[list[Device]]] = defaultdict(list)
    for group in groups:
        by_host[group[0].host].append(group)
    for column in zip_longest(*by_host.values()):
        yield [group for group in column if group is not None]


def pool_times_for(
    model: StoredModel,
    pool: Pool,
    here: ThisHost,
    *,
    run_dir: Path,
    say: Say,
    measuring: OnMeasuring = lambda device, what: None,
    options: MeasureOptions = MeasureOptions(),
    shared: Callable[[PoolWorker], SharedModel | None] = lambda worker: None,
) -> MeasuredPool:
    """All devices and hosts of a running pool. `here` is the head's host; `run_dir` is for its sockets; `shared` says
    where a worker gets the model from, if it does not lie on its host.

    What can't be measured is left out and named. Hosts are measured at the same time, a host's devices one after
    another. Raises ConfigError if no device is left.
    """
    devices = [device_of(worker.register) for worker in pool.workers()]
    probes = WorkerProfiler(pool, shared)
    measurement = PoolMeasurement(model, ProfileCache(profiles_dir()), probes, say, measuring, options)
    with zmq.Context() as context, closing(here.secure_endpoints(context, run_dir)) as edges:
        own = LocalProbeEnd(context, here.name, edges)
        return measurement.run(devices, own, [WorkerProbeEnd(pool, worker) for worker in pool.workers()])


def local_times_for(
    model: StoredModel,
    devices: Sequence[Device],
    *,
    say: Say,
    measuring: OnMeasuring = lambda device, what: None,
    options: MeasureOptions = MeasureOptions(),
) -> MeasuredPool:
    """Devices of this host, without a pool: children of this process measure them. See `pool_times_for`."""
    measurement = PoolMeasurement(model, ProfileCache(profiles_dir()), ChildProfiler(), say, measuring, options)
    here = isolated_host(devices[0].host if devices else socket.gethostname())
    with (
        zmq.Context() as context,
        tempfile.TemporaryDirectory(prefix="pl-") as folder,
        closing(here.secure_endpoints(context, Path(folder))) as edges,
    ):
        own, other = (LocalProbeEnd(context, here.name, edges) for _ in range(2))
        return measurement.run(devices, own, [other])


def _link_times(source: str, target: str, figures: LinkMeasurement) -> LinkTimes:
    return LinkTimes(
        source=source,
        target=target,
        hop_s=figures.hop_s,
        hop_p95_s=figures.hop_p95_s,
        bytes_per_s=figures.bytes_per_s,
    )


def save_deviation(model: StoredModel, pool: Pool, device: str, ratio: float, weights: WeightsForm) -> None:
    """A device took `ratio` times what was predicted of it in use: learn that for the next plans. If it was faster than
    measured, the measurement was noisy, and is taken again."""
    found = [worker for worker in pool.workers() if worker.register.device == device]
    cache = ProfileCache(profiles_dir())
    for worker in found:
        key = device_key(model, device_of(worker.register), worker.register.machine, weights)
        now_s = time.time()
        if ratio < 1 and cache.learned(key) is None:
            cache.mark_noisy(key)
        else:
            cache.save_learned(key, learn(cache.learned(key), ratio, now_s))
