"""Probes measure devices and links, by workers of the pool or by this process and its children."""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import zmq

from devices.hardware.device import Device
from planner.memory import runtime_reserve_bytes
from potluck.head.pool import Pool, PoolWorker
from shard.worker.machine import machine_fingerprint
from shard.worker.profile.process import SILENCE_S, ProfileProcess
from shard.worker.profile.report import BUDGET_S, ProfileSettings
from transport.errors import BadMessage, PotluckError, StageFailed
from transport.links.endpoints import is_host_endpoint
from transport.links.link_probe import LinkMeasurement, LinkProbeEnd, link_measurements
from transport.links.secure_endpoints import SecureEndpoints, Where
from transport.messages.measure import (
    EndProfile,
    LinkListen,
    LinkListening,
    LinkProbe,
    LinkProbed,
    LinkShape,
    MeasureReply,
    MeasureRequest,
    MeasureUnderLoad,
    Profile,
    Profiled,
    ProfileReport,
    UnderLoadTime,
    check_report,
)
from transport.messages.pool import SharedModel
from transport.messages.ring import Fence, WeightsForm
from transport.timeouts import LINK_PROBE_SILENT_S

Result = TypeVar("Result")
OnMeasuring = Callable[[str, str], None]
"""Called with a device's name and what is being measured of it."""


class DeviceProfiler(Protocol):
    """Profiles devices; an error in place of what could not be measured. `end` frees what `profile` has loaded."""

    def machine(self, device: Device) -> str: ...

    def profile(
        self, devices: Sequence[Device], model: Path, weights: WeightsForm, measuring: OnMeasuring
    ) -> list[ProfileReport | PotluckError]:
        """All at once: they must not share memory or cores."""

    def measure_under_load(self, devices: Sequence[Device], seconds: float) -> list[float | PotluckError]:
        """All at once, so that they slow each other down. After `profile`."""

    def end(self, devices: Sequence[Device]) -> None: ...


@dataclass(slots=True)
class WorkerProfiler:
    """By the devices' workers, wherever they are."""

    pool: Pool
    shared: Callable[[PoolWorker], SharedModel | None] = lambda worker: None
    budget_s: float = BUDGET_S
    silence_s: float = SILENCE_S

    def machine(self, device: Device) -> str:
        return self._worker(device).register.machine

    def profile(
        self, devices: Sequence[Device], model: Path, weights: WeightsForm, measuring: OnMeasuring
    ) -> list[ProfileReport | PotluckError]:
        requests: list[tuple[PoolWorker, MeasureRequest]] = [
            (
                (worker := self._worker(device)),
                Profile(
                    model_path=str(model),
                    dtype=device.compute_dtype,
                    budget_s=self.budget_s,
                    memory_bytes=max_weights_bytes(device),
                    weights=weights,
                    shared=self.shared(worker),
                ),
            )
            for device in devices
        ]
        replies = self.pool.rpc.call_all(
            # The worker gives up first, and knows more.
            requests,
            silence_s=1.2 * self.silence_s,
            on_progress=lambda worker, progress: measuring(worker.register.device, progress.what),
        )
        return [_report(answer) for answer in replies]

    def measure_under_load(self, devices: Sequence[Device], seconds: float) -> list[float | PotluckError]:
        requests: list[tuple[PoolWorker, MeasureRequest]] = [
            (self._worker(device), MeasureUnderLoad(seconds=seconds)) for device in devices
        ]
        replies = self.pool.rpc.call_all(requests, silence_s=seconds + self.silence_s)
        return [_step_s(answer) for answer in replies]

    def end(self, devices: Sequence[Device]) -> None:
        for device in devices:
            self.pool.send(self._worker(device), EndProfile())

    def _worker(self, device: Device) -> PoolWorker:
        for worker in self.pool.workers():
            if worker.register.device == device.name:
                return worker
        raise StageFailed(f"{device.name} has left the pool")


@dataclass(slots=True)
class ChildProfiler:
    """By children of this process, for devices of this host."""

    budget_s: float = BUDGET_S
    silence_s: float = SILENCE_S
    _children: dict[str, ProfileProcess] = field(default_factory=dict)

    def machine(self, device: Device) -> str:
        return machine_fingerprint(device.backend)

    def profile(
        self, devices: Sequence[Device], model: Path, weights: WeightsForm, measuring: OnMeasuring
    ) -> list[ProfileReport | PotluckError]:
        def one(device: Device) -> ProfileReport | PotluckError:
            settings = ProfileSettings(
                backend=device.backend,
                device=device.kind,
                dtype=device.compute_dtype,
                budget_s=self.budget_s,
                memory_bytes=max_weights_bytes(device),
                weights=weights,
            )
            child = ProfileProcess(model, settings, threads=device.threads, silence_s=self.silence_s)
            self._children[device.name] = child
            result = _or_error(lambda: child.report(lambda what: measuring(device.name, what)))
            if isinstance(result, PotluckError):
                self.end([device])
            return result

        with ThreadPoolExecutor(max_workers=len(devices)) as threads:
            return list(threads.map(one, devices))

    def measure_under_load(self, devices: Sequence[Device], seconds: float) -> list[float | PotluckError]:
        def one(device: Device) -> float | PotluckError:
            return _or_error(lambda: self._children[device.name].measure_under_load(seconds))

        with ThreadPoolExecutor(max_workers=len(devices)) as threads:
            return list(threads.map(one, devices))

    def end(self, devices: Sequence[Device]) -> None:
        for device in devices:
            child = self._children.pop(device.name, None)
            if child is not None:
                child.close()


def max_weights_bytes(device: Device) -> int:
    """What a profile's weights may take."""
    return max(0, device.free_bytes - runtime_reserve_bytes(device))


def _report(reply: MeasureReply | PotluckError) -> ProfileReport | PotluckError:
    match reply:
        case PotluckError():
            return reply
        case Profiled(report=report):
            return _or_error(lambda: check_report(report))
    return StageFailed(f"expected a profile from its worker, got {type(reply).__name__}")


def _step_s(reply: MeasureReply | PotluckError) -> float | PotluckError:
    match reply:
        case PotluckError():
            return reply
        case UnderLoadTime(step_s=step_s) if 0.0 < step_s < math.inf:
            return step_s
    got = reply.step_s if isinstance(reply, UnderLoadTime) else type(reply).__name__
    return StageFailed(f"expected a positive step time from its worker, got {got}")


def _or_error(call: Callable[[], Result]) -> Result | PotluckError:
    try:
        return call()
    except PotluckError as error:
        return error


_NUM_LARGE_LOCAL = 17
_NUM_LARGE_NETWORK = 5
_probe_numbers = itertools.count(1)


class ProbeEnd(Protocol):
    """A process that can be one end of a link. `key` is its host's."""

    host: str
    key: str

    def listen(self, where: Where, shape: LinkShape, upstream: str) -> str: ...

    def probe(self, next_endpoint: str, key: str, *, leads: bool) -> LinkProbed: ...

    def close(self) -> None: ...


class LocalProbeEnd:
    """This process."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], host: str, edges: SecureEndpoints) -> None:
        self.host = host
        self.key = edges.key
        self._context = context
        self._edges = edges
        self._end: LinkProbeEnd | None = None

    def listen(self, where: Where, shape: LinkShape, upstream: str) -> str:
        self.close()
        endpoint = self._edges.listen_at(where, f"probe-{next(_probe_numbers)}")
        self._end = LinkProbeEnd(self._context, endpoint, shape, guard=self._edges.guard(endpoint, upstream))
        return self._end.endpoint

    def probe(self, next_endpoint: str, key: str, *, leads: bool) -> LinkProbed:
        assert self._end is not None, "an end listens first"
        try:
            return self._end.run(next_endpoint, leads=leads, prepare=self._edges.client_auth(next_endpoint, key))
        finally:
            self.close()

    def close(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end.close()


class WorkerProbeEnd:
    """A worker of the pool, which closes its socket itself: after the probe, or before the next one."""

    def __init__(self, pool: Pool, worker: PoolWorker) -> None:
        self.host = worker.register.host
        self.key = pool.key_of(worker)
        self._pool = pool
        self._worker = worker

    def listen(self, where: Where, shape: LinkShape, upstream: str) -> str:
        endpoint = self._call(LinkListen(listen=where, shape=shape, upstream=upstream), LinkListening).endpoint
        if where == "network" and not is_host_endpoint(endpoint):
            device = self._worker.register.device
            raise BadMessage(f"expected an endpoint for other hosts from {device}, got {endpoint[:80]!r}")
        return endpoint

    def probe(self, next_endpoint: str, key: str, *, leads: bool) -> LinkProbed:
        return self._call(LinkProbe(next=next_endpoint, leads=leads, key=key), LinkProbed)

    def close(self) -> None:
        pass

    def _call(self, request: MeasureRequest, expected: type[Result]) -> Result:
        (reply,) = self._pool.rpc.call_all([(self._worker, request)], silence_s=LINK_PROBE_SILENT_S)
        if isinstance(reply, PotluckError):
            raise reply
        if not isinstance(reply, expected):
            device = self._worker.register.device
            raise StageFailed(f"expected {expected.__name__} from {device}, got {type(reply).__name__}")
        return reply


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPair:
    """Two ends to measure between; of two processes on one host that is the host's link to itself."""

    leader: ProbeEnd
    follower: ProbeEnd

    @property
    def where(self) -> Where:
        return "local" if self.leader.host == self.follower.host else "network"


def host_pairs(own: ProbeEnd, others: Sequence[ProbeEnd]) -> Iterator[HostPair]:
    """Every pair of hosts once, the head's first; and every host with itself where it has two processes."""
    by_host: dict[str, list[ProbeEnd]] = {own.host: [own]}
    for end in others:
        by_host.setdefault(end.host, []).append(end)
    for ends in by_host.values():
        if len(ends) > 1:
            yield HostPair(leader=ends[0], follower=ends[1])
    for one, other in itertools.combinations(by_host.values(), 2):
        yield HostPair(leader=one[0], follower=other[0])


def measure_links(pair: HostPair, hidden_size: int) -> tuple[LinkMeasurement, LinkMeasurement]:
    """The links from the leader to the follower and back. Raises PotluckError where they can't reach each other."""
    shape = LinkShape(
        fence=Fence(secrets.token_hex(8), 0, "probe"),
        hidden_size=hidden_size,
        dtype="bfloat16",
        num_large=_NUM_LARGE_LOCAL if pair.where == "local" else _NUM_LARGE_NETWORK,
    )
    ends = (pair.leader, pair.follower)
    try:
        at_leader, at_follower = (
            end.listen(pair.where, shape, other.key) for end, other in zip(ends, reversed(ends), strict=True)
        )
        with ThreadPoolExecutor(max_workers=2) as threads:
            leading = threads.submit(pair.leader.probe, at_follower, pair.follower.key, leads=True)
            following = threads.submit(pair.follower.probe, at_leader, pair.leader.key, leads=False)
            return link_measurements(leading.result(), following.result())
    finally:
        for end in ends:
            end.close()
