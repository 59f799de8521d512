"""Probes measure all devices of a host at once, each in its own process, and a file keeps what they found."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec

from devices.hardware.device import HOST_MEMORY, Device, DeviceRequest, ProbedDevices, UnavailableDevice
from devices.hardware.measure import BandwidthMeasurement, NoisyMeasurement, is_noisy
from devices.hardware.memory import host_free_bytes, list_gpus
from devices.hardware.probe import READY
from transport.messages.ring import DTYPE_BYTES
from transport.process.child_process import LineChild
from transport.process.cpu_use import share_of_cores
from transport.process.files import write_atomic
from transport.timeouts import PROBE_READY_S, PROBE_RESULT_S


def run_probes(requests: Sequence[DeviceRequest], ready_s: float = PROBE_READY_S) -> list[BandwidthMeasurement | str]:
    """For each request what was measured, or in words why it could not be. No process outlives this call."""
    ready_by = time.monotonic() + ready_s
    probes = [_Probe(request) for request in requests]
    try:
        # All measure together: none starts before the last is ready, or has failed.
        ready = [probe.wait_until_ready(ready_by) for probe in probes]
        for probe, is_ready in zip(probes, ready, strict=True):
            if is_ready:
                probe.start()
        result_by = time.monotonic() + PROBE_RESULT_S
        return [
            probe.result(result_by) if is_ready else probe.why_not(ready_s)
            for probe, is_ready in zip(probes, ready, strict=True)
        ]
    finally:
        for probe in probes:
            probe.close()


class _Probe:
    def __init__(self, request: DeviceRequest) -> None:
        arguments = ["--json", "--wait", "--backend", request.backend, "--device", request.kind]
        self._child = LineChild("devices.hardware.probe", [*arguments, "--threads", str(request.threads)])

    def wait_until_ready(self, ends_at: float) -> bool:
        return self._child.next_line(ends_at) == READY

    def start(self) -> None:
        self._child.send("go")

    def result(self, ends_at: float) -> BandwidthMeasurement | str:
        line = self._child.next_line(ends_at)
        if not line:
            return self.why_not(PROBE_RESULT_S)
        try:
            return BandwidthMeasurement(**json.loads(line))
        except (ValueError, TypeError):
            return f"its probe said {line!r}"

    def why_not(self, waited_s: float) -> str:
        """Why there is no answer: the probe's own words, how it ended, or that it did not."""
        ended = self._child.ended()
        if ended is None:
            return f"its probe gave no answer within {waited_s:.0f} s"
        code, last_error = ended
        if code < 0:
            return f"its probe was ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        return last_error or f"its probe ended with exit code {code}"

    def close(self) -> None:
        self._child.close()


_VERSION = 2

Prober = Callable[[Sequence[DeviceRequest]], list[BandwidthMeasurement | str]]


def probe_devices(
    requests: Sequence[DeviceRequest],
    cache_path: Path,
    *,
    fresh: bool = False,
    prober: Prober = run_probes,
    now: Callable[[], float] = time.time,
    on_measuring: Callable[[], object] = lambda: None,
) -> ProbedDevices:
    """The devices asked for, in that order; `left_out` names those that could not be measured, and why. `on_measuring`
    is called if any has to be measured: that takes some seconds.

    Probes run together, and a result counts only for the same set of devices: they compete for the memory bus.
    A cache that is missing, corrupt or of other library versions means measuring again (`fresh`: in any case), and so
    does, some time later, a measurement that other programs disturbed; of several such ones the best counts.
    """
    free_bytes = host_free_bytes()  # Before the probes take some.
    key = _key(requests)
    measured = None if fresh else _load(cache_path, key, len(requests))
    noisy = _load_noisy(cache_path, key) if measured is not None else None
    earlier: list[BandwidthMeasurement] | None = None
    if noisy is not None and noisy.is_due(now()):
        earlier, measured = measured, None
    if measured is None:
        on_measuring()
        found = prober(requests)
        left_out = [
            UnavailableDevice(name=request.name, reason=result)
            for request, result in zip(requests, found, strict=True)
            if isinstance(result, str)
        ]
        pairs = [
            (q, result) for q, result in zip(requests, found, strict=True) if isinstance(result, BandwidthMeasurement)
        ]
        if not left_out:
            results, noisy = _combine([result for _, result in pairs], earlier, noisy, now())
            pairs = list(zip(requests, results, strict=True))
            _store(cache_path, key, results, noisy)
    else:
        left_out, pairs = [], list(zip(requests, measured, strict=True))
    free_by_gpu = {gpu.uuid: gpu.free_bytes for gpu in list_gpus()} if any(result.gpu for _, result in pairs) else {}
    devices = [_device(request, result, free_bytes, free_by_gpu) for request, result in pairs]
    return ProbedDevices(devices=tuple(_with_shared_memory(devices)), left_out=tuple(left_out))


def _combine(
    results: list[BandwidthMeasurement],
    earlier: list[BandwidthMeasurement] | None,
    noisy: NoisyMeasurement | None,
    now_s: float,
) -> tuple[list[BandwidthMeasurement], NoisyMeasurement | None]:
    """What counts now, and whether it is noisy. Whatever disturbs makes slower, never faster."""
    others = min(result.busy_cores for result in results) - sum(result.own_cores for result in results)
    if not is_noisy(share_of_cores(others)):
        return results, None
    if earlier is not None:
        results = [max(pair, key=lambda one: one.bandwidth_bytes_per_s) for pair in zip(results, earlier, strict=True)]
    return results, NoisyMeasurement(kept_s=now_s, num_tries=1 if noisy is None else noisy.num_tries + 1)


def _device(
    request: DeviceRequest, measured: BandwidthMeasurement, host_free: int, free_by_gpu: dict[str, int]
) -> Device:
    host = socket.gethostname()
    pool = HOST_MEMORY if measured.uses_host_memory else f"/{measured.gpu or request.kind}"
    if measured.uses_host_memory:
        free_bytes = host_free if measured.limit_bytes is None else min(host_free, measured.limit_bytes)
    else:
        free_bytes = free_by_gpu.get(measured.gpu, measured.limit_bytes or 0)
    return Device(
        name=request.name,
        backend=request.backend,
        kind=request.kind,
        host=host,
        threads=request.threads,
        free_bytes=free_bytes if request.memory_bytes is None else min(free_bytes, request.memory_bytes),
        total_bytes=host_free if measured.uses_host_memory else free_bytes,
        bandwidth_bytes_per_s=measured.bandwidth_bytes_per_s,
        compute_dtype=measured.compute_dtype,
        memory_pool=f"{host}{pool}",
    )


def _with_shared_memory(devices: Sequence[Device]) -> list[Device]:
    """Devices of one memory pool agree on what it holds for all of them."""
    totals: dict[str, list[int]] = defaultdict(list)
    for device in devices:
        totals[device.memory_pool].append(device.total_bytes)
    return [replace(device, total_bytes=min(totals[device.memory_pool])) for device in devices]


def _key(requests: Sequence[DeviceRequest]) -> str:
    """What a measurement depends on, as text."""
    return json.dumps(
        {
            "devices": [[request.backend, request.kind, request.threads] for request in requests],
            "versions": {name: _version(name) for name in sorted({request.backend for request in requests})},
            "machine": [platform.node(), platform.machine(), platform.processor(), os.cpu_count()],
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        },
        sort_keys=True,
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _load(path: Path, key: str, count: int) -> list[BandwidthMeasurement] | None:
    records = _read(path).get(key)
    try:
        measured = [BandwidthMeasurement(**record) for record in records]  # type: ignore[union-attr]
    except TypeError:
        return None
    return measured if len(measured) == count and all(map(_is_plausible, measured)) else None


def _is_plausible(measured: BandwidthMeasurement) -> bool:
    """Whether a record from the file has the right types and values that can be planned with."""
    return (
        isinstance(measured.bandwidth_bytes_per_s, float)
        and 0 < measured.bandwidth_bytes_per_s < float("inf")
        and measured.compute_dtype in DTYPE_BYTES
        and isinstance(measured.uses_host_memory, bool)
        and (measured.limit_bytes is None or isinstance(measured.limit_bytes, int))
        and isinstance(measured.gpu, str)
    )


def _load_noisy(path: Path, key: str) -> NoisyMeasurement | None:
    try:
        noisy = msgspec.convert(_read(path, "noisy").get(key), NoisyMeasurement)
    except msgspec.ValidationError:
        return None
    return noisy if noisy.kept_s >= 0 and noisy.num_tries >= 1 else None


def _read(path: Path, part: str = "entries") -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = data.get(part) if isinstance(data, dict) and data.get("version") == _VERSION else None
    return entries if isinstance(entries, dict) else {}


def _store(path: Path, key: str, measured: Sequence[BandwidthMeasurement], noisy: NoisyMeasurement | None) -> None:
    """Add an entry by replacing the file at once: a reader sees the old or the new one. Failing only costs a probe."""
    entries = _read(path) | {key: [asdict(result) for result in measured]}
    noisy_entries = {other: found for other, found in _read(path, "noisy").items() if other != key}
    if noisy is not None:
        noisy_entries[key] = msgspec.to_builtins(noisy)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = {"version": _VERSION, "entries": entries, "noisy": noisy_entries}
        write_atomic(path, json.dumps(file, indent=1).encode())
