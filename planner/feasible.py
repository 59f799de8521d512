"""Feasibility says which devices of a pool can serve a model at all, and why the others can't."""

from __future__ import annotations

import itertools
from dataclasses import replace

from devices.hardware.device import Device, UnavailableDevice
from planner.measurements import PoolTimes
from planner.memory import MemoryModel
from transport.errors import ConfigError, DoesNotFit

GIB = 2**30


def feasible_devices(pool: PoolTimes, memory_model: MemoryModel) -> tuple[PoolTimes, list[UnavailableDevice]]:
    """The pool without devices that no way leads to and back from, or that can't hold one layer."""
    kept, left_out = [], []
    forward, backward = _reachable_hosts(pool), _reachable_hosts(pool, backwards=True)
    for times in pool.devices:
        device = times.device
        if device.host not in forward or device.host not in backward:
            way = f"from {pool.head}" if device.host not in forward else f"back to {pool.head}"
            reason = f"no link {way} to its host {device.host} was measured"
            if device.host in forward:
                reason = f"no link from its host {device.host} {way} was measured"
            left_out.append(UnavailableDevice(name=device.name, reason=reason))
            continue
        least = least_bytes(memory_model, times.device)
        if least > device.free_bytes:
            reason = f"its {device.free_bytes / GIB:.2f} GiB can't hold one layer with its KV and runtime, "
            left_out.append(UnavailableDevice(name=device.name, reason=f"{reason}{least / GIB:.2f} GiB"))
            continue
        kept.append(times)
    return replace(pool, devices=tuple(kept)), left_out


def least_bytes(memory_model: MemoryModel, device: Device) -> int:
    profile = memory_model.profile
    ends = [0, *profile.legal_cuts, profile.num_layers]
    return min(memory_model.memory_bytes(device, *span) for span in itertools.pairwise(ends))


def check_request(pool: PoolTimes, memory_model: MemoryModel) -> None:
    """Raises DoesNotFit without devices, ConfigError for what can't be meant."""
    profile = memory_model.profile
    if not pool.devices:
        raise DoesNotFit(f"no device can run {profile.name}", hint="see `potluck status` for why devices were left out")
    if not 1 <= memory_model.context_tokens <= profile.context_tokens:
        raise ConfigError(
            f"{profile.name} has a context of {profile.context_tokens:,} tokens; {memory_model.context_tokens:,} "
            "were asked "
            "for",
            hint=f"use --context with 1 to {profile.context_tokens}",
        )
    if memory_model.concurrency < 1:
        raise ConfigError(f"{memory_model.concurrency} conversations at once were asked for", hint="ask for at least 1")
    if len({times.device.name for times in pool.devices}) != len(pool.devices):
        raise ConfigError("two devices have the same name", hint="give each device a name of its own")
    for times in pool.devices:
        if len(times.kinds) != profile.num_layers:
            raise ConfigError(
                f"{times.device.name} was measured with {len(times.kinds)} layers; {profile.name} has "
                f"{profile.num_layers}",
                hint="measure it with this model",
            )


def _reachable_hosts(pool: PoolTimes, *, backwards: bool = False) -> set[str]:
    pairs = [(link.target, link.source) if backwards else (link.source, link.target) for link in pool.links]
    hosts = {times.device.host for times in pool.devices}
    found: set[str] = set()
    edge = [pool.head]
    while edge:
        here = edge.pop()
        for source, target in pairs:
            if source == here and target in hosts and target not in found:
                found.add(target)
                edge.append(target)
    return found
