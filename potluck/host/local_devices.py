"""Local devices are probed within the owner's limits and get the names they have in the pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rich.markup import escape

from devices.hardware.device import HOST_MEMORY, Device
from devices.hardware.probes import probe_devices
from devices.hardware.selection import default_devices, device_requests
from planner.memory import HEAD_RESERVE_BYTES
from potluck.system.paths import probe_cache_file
from potluck.system.settings import Settings
from shard.worker.machine import cores_allowed
from transport.errors import ConfigError


def find_local_devices(
    settings: Settings,
    *,
    say: Callable[[str], object],
    prefix: str | None = None,
    host: str | None = None,
    is_head: bool = False,
) -> list[Device]:
    """Probe them, within the owner's caps. A device that can't be probed is left out and named.

    `prefix` is that of the devices' names, `host` this host's name in the pool; `is_head`: the engine will run here and
    takes memory too.
    Raises ConfigError if none is left.
    """
    texts = settings.device or default_devices()
    requests = device_requests(
        texts, threads=settings.threads, cores_allowed=cores_allowed(), memory_bytes=settings.memory
    )
    found = probe_devices(
        requests,
        probe_cache_file(),
        fresh=settings.fresh,
        on_measuring=lambda: say("Measuring this host's devices"),
    )
    for left_out in found.left_out:
        say(f"[yellow]Left out {escape(left_out.name)}:[/yellow] {escape(left_out.reason)}")
    if not found.devices:
        raise ConfigError(
            "no device of this host can be used", hint="see the reasons above, or choose one with --device"
        )
    devices = [_reserve_for_head(device) for device in found.devices] if is_head else found.devices
    return [_with_pool_names(device, prefix, host) for device in devices]


def _reserve_for_head(device: Device) -> Device:
    """What is left of host memory."""
    if not device.memory_pool.endswith(HOST_MEMORY):
        return device
    total_bytes = max(0, device.total_bytes - HEAD_RESERVE_BYTES)
    return replace(device, total_bytes=total_bytes, free_bytes=min(device.free_bytes, total_bytes))


def _with_pool_names(device: Device, prefix: str | None, host: str | None) -> Device:
    name = device.name if prefix is None else f"{prefix}/{device.name}"
    if host is None:
        return replace(device, name=name)
    # Memory that devices share is named after the host.
    return replace(device, name=name, host=host, memory_pool=f"{host}/{device.memory_pool.partition('/')[2]}")
