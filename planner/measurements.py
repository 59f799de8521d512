"""Measurements are seconds of layers and links for one model, measured or estimated from bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from devices.hardware.device import Device
from planner.memory import WINDOW_SLACK_TOKENS, ModelProfile
from transport.messages.measure import Grid, LayerTimes
from transport.messages.ring import DTYPE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTimes:
    """One model on one device. `kinds[i]` is the kind of layer i, an index into `layers`.

    `embed` and `head` are seconds by number of rows (contexts is (0,)); the head is norm, projection and sampling.
    `step_s` is what any step costs a stage besides its layers: entering and leaving the backend, ops, checks.
    `busy` tells how much slower this device gets while all the others of its shared resource work as well
    (1.0: not at all).
    """

    device: Device
    kinds: tuple[int, ...]
    layers: tuple[LayerTimes, ...]
    embed: Grid
    head: Grid
    step_s: float
    busy: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTimes:
    """An ordered pair of hosts (or a host and itself), one way on a warm connection of the real transport.

    `hop_s` is the median time from one stage's result to the next one's start for a decode-sized message, software
    included; `hop_p95_s` its 95th percentile; `bytes_per_s` the rate of large messages.
    """

    source: str
    target: str
    hop_s: float
    hop_p95_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolTimes:
    """Everything that a plan is made from. `head` is the host of the engine.

    A missing pair of hosts in `links` can't be used. `shared_links` are groups of ordered pairs that share a medium
    (Wi-Fi air, a NIC's one direction): their transfer times add up.
    """

    head: str
    devices: tuple[DeviceTimes, ...]
    links: tuple[LinkTimes, ...]
    shared_links: tuple[tuple[tuple[str, str], ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Seconds of one stage. `decode`: (sequences in the step, seconds), by number of sequences. `prefill`: (tokens of
    the chunk, positions before it, seconds), for every pair of some numbers of tokens and some of positions."""

    decode: tuple[tuple[int, float], ...]
    prefill: tuple[tuple[int, int, float], ...]


STEP_S = 2e-4
"""Entering and leaving a backend."""

SAME_HOST = (1e-4, 2e9)
OTHER_HOST = (5e-4, 1.1e8)
"""Seconds of a hop and bytes a second: PERFORMANCE.md for one host; a home's gigabit network between two."""

_OPERATIONS_PER_BYTE = {"cpu": 8.0, "cuda": 100.0, "mps": 60.0, "mlx": 60.0}
"""What devices of a kind compute while they read a byte. CPU: PERFORMANCE.md (69 GFLOP/s at 10 GB/s)."""


def times_from_bandwidth(profile: ModelProfile, device: Device, *, flops: float | None = None) -> DeviceTimes:
    """An estimate; `flops` is the device's rate of operations if it is known."""
    rate = flops or device.bandwidth_bytes_per_s * _OPERATIONS_PER_BYTE.get(device.kind.split(":")[0], 8.0)
    sizes = profile.part_bytes(device.backend, device.compute_dtype)
    facts = list(zip(sizes.layers, profile.layer_params, profile.kv_elements_per_token, profile.windows, strict=True))
    distinct = list(dict.fromkeys(facts))
    return DeviceTimes(
        device=device,
        kinds=tuple(distinct.index(fact) for fact in facts),
        layers=tuple(_layer_times(profile, device, rate, *fact) for fact in distinct),
        embed=Grid(rows=(1,), contexts=(0,), seconds=((0.0,),)),
        head=_head_grid(device, rate, sizes.norm + sizes.head, profile.head_params),
        step_s=STEP_S,
    )


def estimated_link(source: str, target: str) -> LinkTimes:
    hop_s, bytes_per_s = SAME_HOST if source == target else OTHER_HOST
    return LinkTimes(source=source, target=target, hop_s=hop_s, hop_p95_s=2 * hop_s, bytes_per_s=bytes_per_s)


def estimated_pool(profile: ModelProfile, devices: Sequence[Device], head: str) -> PoolTimes:
    """A pool of which only bandwidths are known, in a network where every host reaches every other."""
    hosts = list(dict.fromkeys([head, *(device.host for device in devices)]))
    return PoolTimes(
        head=head,
        devices=tuple(times_from_bandwidth(profile, device) for device in devices),
        links=tuple(estimated_link(source, target) for source in hosts for target in hosts),
    )


def _layer_times(
    profile: ModelProfile,
    device: Device,
    rate: float,
    weights_bytes: int,
    params: int,
    kv_elements: int,
    window: int | None,
) -> LayerTimes:
    width, bandwidth = DTYPE_BYTES[device.compute_dtype], device.bandwidth_bytes_per_s
    furthest = profile.context_tokens
    held = sorted({0, furthest} if window is None else {0, min(furthest, window + WINDOW_SLACK_TOKENS), furthest})

    def decode_s(rows: int, context: int) -> float:
        tokens = context if window is None else min(context, window)
        read_bytes = weights_bytes + width * rows * tokens * kv_elements
        return read_bytes / bandwidth + 2 * params * (rows - 1) / rate

    def chunk_s(rows: int, context: int) -> float:
        tokens = context if window is None else min(context, window)
        return (weights_bytes + width * tokens * kv_elements) / bandwidth + 2 * params * (rows - 1) / rate

    return LayerTimes(
        decode=Grid(
            rows=(1, 2), contexts=tuple(held), seconds=tuple(tuple(decode_s(r, c) for c in held) for r in (1, 2))
        ),
        prefill=Grid(
            rows=(1, 2), contexts=tuple(held), seconds=tuple(tuple(chunk_s(r, c) for c in held) for r in (1, 2))
        ),
    )


def _head_grid(device: Device, rate: float, weights_bytes: int, params: int) -> Grid:
    read_s = weights_bytes / device.bandwidth_bytes_per_s
    return Grid(rows=(1, 2), contexts=(0,), seconds=((read_s,), (read_s + 2 * params / rate,)))
