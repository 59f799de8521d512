"""What measuring this host's devices would say if it were quiet: tests neither wait for it nor depend on its result.
That devices are measured is for tests/devices, and for those tests of whole programs that begin with nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from devices.hardware.device import DeviceRequest
from devices.hardware.measure import BandwidthMeasurement
from devices.hardware.probes import probe_devices
from devices.hardware.selection import device_requests
from shard.worker.machine import cores_allowed

_TORCH = BandwidthMeasurement(
    bandwidth_bytes_per_s=2e10, compute_dtype="bfloat16", uses_host_memory=True, limit_bytes=None, gpu=""
)
_MLX = BandwidthMeasurement(
    bandwidth_bytes_per_s=1e10, compute_dtype="float32", uses_host_memory=True, limit_bytes=None, gpu=""
)
_SETS = (
    ("torch:cpu",),
    ("torch:cpu", "torch:cpu"),
    ("mlx", "mlx"),
    ("torch:cpu", "mlx"),
    ("torch:cpu", "mlx", "torch:cpu"),
)


def know_devices(cache: Path) -> None:
    """With one thread each, in the sets that tests ask for."""

    def measured(requests: Sequence[DeviceRequest]) -> list[BandwidthMeasurement | str]:
        return [_MLX if request.backend == "mlx" else _TORCH for request in requests]

    for names in _SETS:
        requests = device_requests(names, threads=1, cores_allowed=cores_allowed(), memory_bytes=None)
        probe_devices(requests, cache, fresh=True, prober=measured)
