"""Devices of this host, measured once and remembered: bandwidth is kept in a file, free memory is always fresh."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from devices.device import HOST_MEMORY, Device, DeviceRequest, LeftOut, Probed
from devices.doubt import is_disturbed, is_due
from devices.measure import Measured
from devices.memory import host_free_bytes
from devices.nvidia import gpus
from devices.probes import run_probes
from transport.cpu_use import share_of_cores
from transport.messages import DTYPE_BYTES

_VERSION = 1

Prober = Callable[[Sequence[DeviceRequest]], list[Measured | str]]


def probe_devices(
    requests: Sequence[DeviceRequest],
    cache_path: Path,
    *,
    fresh: bool = False,
    prober: Prober = run_probes,
    now: Callable[[], float] = time.time,
    on_measuring: Callable[[], object] = lambda: None,
) -> Probed:
    """The devices asked for, in that order; `left_out` names those that could not be measured, and why. `on_measuring`
    is called if any has to be measured: that takes some seconds.

    Probes run together, and a result counts only for the same set of devices: they compete for the memory bus.
    A cache that is missing, corrupt or of other library versions means measuring again (`fresh`: in any case), and so
    does, some time later, a measurement that other programs disturbed; of several such ones the best counts.
    """
    free_bytes = host_free_bytes()  # Before the probes take some.
    key = _key(requests)
    measured = None if fresh else _load(cache_path, key, len(requests))
    doubt = _doubt(cache_path, key) if measured is not None else None
    earlier: list[Measured] | None = None
    if doubt is not None and is_due(doubt.kept_s, doubt.num_tries, now()):
        earlier, measured = measured, None
    if measured is None:
        on_measuring()
        found = prober(requests)
        left_out = [
            LeftOut(name=request.name, reason=result)
            for request, result in zip(requests, found, strict=True)
            if isinstance(result, str)
        ]
        pairs = [(q, result) for q, result in zip(requests, found, strict=True) if isinstance(result, Measured)]
        if not left_out:
            results, doubt = _judged([result for _, result in pairs], earlier, doubt, now())
            pairs = list(zip(requests, results, strict=True))
            _store(cache_path, key, results, doubt)
    else:
        left_out, pairs = [], list(zip(requests, measured, strict=True))
    free_by_gpu = {gpu.uuid: gpu.free_bytes for gpu in gpus()} if any(result.gpu for _, result in pairs) else {}
    devices = [_device(request, result, free_bytes, free_by_gpu) for request, result in pairs]
    return Probed(devices=tuple(_pooled(devices)), left_out=tuple(left_out))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Doubt:
    """A measurement was disturbed, at `kept_s`, for the `num_tries`th time."""

    kept_s: float
    num_tries: int


def _judged(
    results: list[Measured], earlier: list[Measured] | None, doubt: _Doubt | None, now_s: float
) -> tuple[list[Measured], _Doubt | None]:
    """What counts now, and whether it is doubtful. Whatever disturbs makes slower, never faster."""
    others = min(result.busy_cores for result in results) - sum(result.own_cores for result in results)
    if not is_disturbed(share_of_cores(others)):
        return results, None
    if earlier is not None:
        results = [max(pair, key=lambda one: one.bandwidth_bytes_per_s) for pair in zip(results, earlier, strict=True)]
    return results, _Doubt(kept_s=now_s, num_tries=1 if doubt is None else doubt.num_tries + 1)


def _device(request: DeviceRequest, measured: Measured, host_free: int, free_by_gpu: dict[str, int]) -> Device:
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


def _pooled(devices: Sequence[Device]) -> list[Device]:
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


def _load(path: Path, key: str, count: int) -> list[Measured] | None:
    records = _read(path).get(key)
    try:
        measured = [Measured(**record) for record in records]  # type: ignore[union-attr]
    except TypeError:
        return None
    return measured if len(measured) == count and all(map(_is_sound, measured)) else None


def _is_sound(measured: Measured) -> bool:
    """Whether a record from the file has the right types and values that can be planned with."""
    return (
        isinstance(measured.bandwidth_bytes_per_s, float)
        and 0 < measured.bandwidth_bytes_per_s < float("inf")
        and measured.compute_dtype in DTYPE_BYTES
        and isinstance(measured.uses_host_memory, bool)
        and (measured.limit_bytes is None or isinstance(measured.limit_bytes, int))
        and isinstance(measured.gpu, str)
    )


def _doubt(path: Path, key: str) -> _Doubt | None:
    found = _read(path, "doubts").get(key)
    if not isinstance(found, dict):
        return None
    try:
        doubt = _Doubt(**found)
        return doubt if doubt.kept_s >= 0 and doubt.num_tries >= 1 else None
    except TypeError:
        return None


def _read(path: Path, part: str = "entries") -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = data.get(part) if isinstance(data, dict) and data.get("version") == _VERSION else None
    return entries if isinstance(entries, dict) else {}


def _store(path: Path, key: str, measured: Sequence[Measured], doubt: _Doubt | None) -> None:
    """Add an entry by replacing the file at once: a reader sees the old or the new one. Failing only costs a probe."""
    entries = _read(path) | {key: [asdict(result) for result in measured]}
    doubts = {other: found for other, found in _read(path, "doubts").items() if other != key}
    if doubt is not None:
        doubts[key] = asdict(doubt)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"version": _VERSION, "entries": entries, "doubts": doubts}, file, indent=1)
            Path(temporary).replace(path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
