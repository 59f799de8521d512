"""What this host's devices are, under the names they will have in the pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from devices.cache import probe_devices
from devices.device import Device
from devices.discover import default_devices, device_requests
from potluck.config import Settings
from potluck.paths import probe_cache_file
from transport.errors import ConfigError


def offered_devices(
    settings: Settings, *, say: Callable[[str], object], prefix: str | None = None, host: str | None = None
) -> list[Device]:
    """Probe them, within the owner's caps. A device that can't be probed is left out and named.

    `prefix` is that of the devices' names, `host` this host's name in the pool.
    Raises ConfigError if none is left.
    """
    texts = settings.devices or default_devices()
    requests = device_requests(texts, threads=settings.threads, memory_bytes=settings.memory_bytes)
    found = probe_devices(requests, probe_cache_file())
    for left_out in found.left_out:
        say(f"[yellow]Left out {left_out.name}:[/yellow] {left_out.reason}")
    if not found.devices:
        raise ConfigError(
            "no device of this host can be used", hint="see the reasons above, or choose one with --device"
        )
    return [_in_pool(device, prefix, host) for device in found.devices]


def _in_pool(device: Device, prefix: str | None, host: str | None) -> Device:
    name = device.name if prefix is None else f"{prefix}/{device.name}"
    if host is None:
        return replace(device, name=name)
    # Memory that devices share is named after the host.
    return replace(device, name=name, host=host, memory_pool=f"{host}/{device.memory_pool.partition('/')[2]}")
